"""Verdicts from made summaries: which rule fires, and that the evidence names the numbers."""

import dataclasses
import math

import numpy as np
import pytest

from stableopd.diagnostics.alarm import Alarm, Level
from stableopd.diagnostics.evidence import Facts
from stableopd.diagnostics.onset import Onset
from stableopd.diagnostics.summary import (
    Histogram,
    Measures,
    Parameters,
    Positions,
    StepMeasures,
    Summary,
)
from stableopd.diagnostics.verdict import judge

NONE = Onset("none", None, None, 0.0, 0.1, 0.1, 0.1, 0.05, "Truncation stays at 0.10.")
ROSE = Onset("rise", 50, (48, 53), 12.0, 0.02, 0.95, 0.95, 0.99, "Truncation rose at step 50.")
TOO_SHORT = dataclasses.replace(NONE, kind="too short", text="Too short: no rates.")
REPEATED_FIRST = dataclasses.replace(ROSE, step=40, interval=(38, 42))
REPEATED_LATER = dataclasses.replace(ROSE, step=60, interval=(57, 64))


def summary(overall=None, truncated=None, steps=100, **changes):
    empty = np.zeros((0, 1), dtype=np.int64)
    made = Summary(
        parameters=Parameters(),
        length_unit="tokens",
        truncation_source="file",
        budget=96,
        overall=overall or Measures(6400, truncation_rate=0.4, repetitive_share=0.3),
        by_step=tuple(StepMeasures(s, Measures(64)) for s in range(1, steps + 1)),
        num_prompts=10,
        by_prompt=(),
        histogram=Histogram(np.array([0.0, 1.0]), np.array([1]), np.array([0])),
        positions=Positions(1, np.array([], dtype=np.int64), empty, empty, empty, empty * 0.0),
        worst=(),
        truncated=truncated
        or Measures(2000, repetition_rate=0.6, repetitive_share=0.7, loop_share=0.9),
        answered_before_loop=0.9,
        marker_share=0.0,
        markers=(),
    )
    return dataclasses.replace(made, **changes)


def lines(student=-0.1, teacher=-0.3, repetitive=-0.02, regular=-0.2):
    return [
        {
            "step": step,
            "stop/student_logp": student,
            "stop/teacher_logp": teacher,
            "advantage/repetitive_mean": repetitive,
            "advantage/regular_mean": regular,
        }
        for step in range(1, 101)
    ]


def test_repetition_is_cause_b():
    facts = Facts("event", (1,), (1,))
    verdict = judge(summary(), lines(), ROSE, REPEATED_FIRST, facts)
    assert (verdict.cause, verdict.collapsed, verdict.confidence) == ("B", True, "high")
    assert "from step 50 on" in verdict.headline
    evidence = "\n".join(verdict.evidence)
    assert "Both models stop with the same ids (1)" in evidence
    assert "-0.10 nats, the teacher's -0.30" in evidence
    assert "against cause A" in evidence
    assert "90% end in a loop" in evidence
    assert "Repetition, share of tokens: truncation rose at step 50. It rose before" in evidence
    assert "-0.020 nats, regular ones -0.200: the update favours repetition" in evidence
    assert "stable_opd" in verdict.advice[0]
    assert "a checkpoint of step 37 or earlier" in verdict.advice[-1]


def test_a_gap_at_the_first_stops_is_cause_a_and_repetition_its_symptom():
    facts = Facts("token", (1,), (2,))
    for repetition in (REPEATED_LATER, ROSE):
        verdict = judge(summary(), lines(-0.1, -25.0), ROSE, repetition, facts)
        assert (verdict.cause, verdict.confidence) == ("A", "high")
    assert "student 1, teacher 2" in "\n".join(verdict.evidence)
    assert "objective.stop" in verdict.advice[0]


def test_repetition_that_leads_is_a_cause_of_its_own():
    verdict = judge(summary(), lines(-0.1, -25.0), ROSE, REPEATED_FIRST)
    assert verdict.cause == "both"
    assert len(verdict.advice) == 3


def test_repetition_of_a_student_that_has_unlearnt_to_stop_is_a_symptom():
    given = lines(-0.1, -25.0)
    for line in given[30:]:
        line["stop/student_logp"] = -1.5
    verdict = judge(summary(), given, ROSE, REPEATED_FIRST)
    assert (verdict.cause, verdict.confidence) == ("A", "high")
    assert "log-prob of its stops was -1.50 nats" in "\n".join(verdict.evidence)


def test_the_gap_is_read_at_the_beginning_alone():
    """A gap that grows while the student stops at worse places is no mismatch."""
    grown = lines()
    for line in grown[5:]:
        line["stop/teacher_logp"] = -30.0
    assert judge(summary(), grown, ROSE, ROSE).cause == "B"


def test_without_log_probs_the_text_decides():
    assert judge(summary(), [], ROSE, ROSE).confidence == "medium"
    plain = summary(marker_share=0.8, truncated=Measures(2000, repetitive_share=0.1))
    assert judge(plain, [], ROSE, NONE).cause == "A"
    assert "80% of the cut-off rollouts" in "\n".join(judge(plain, [], ROSE, NONE).evidence)
    neither = summary(truncated=Measures(2000, repetitive_share=0.1, loop_share=0.0))
    verdict = judge(neither, [], ROSE, NONE)
    assert (verdict.cause, verdict.collapsed, verdict.confidence) == ("unclear", True, "low")
    assert "doctor" in verdict.advice[0]


@pytest.mark.parametrize("level", [0.0, 0.23, 0.5, 0.8])
def test_a_constant_level_is_no_collapse(level):
    overall = Measures(6400, truncation_rate=level)
    flat = dataclasses.replace(NONE, before=level, after=level, end=level)
    verdict = judge(summary(overall), lines(), flat, NONE)
    assert (verdict.cause, verdict.collapsed, verdict.confidence) == ("healthy", False, "high")


def test_nearly_everything_cut_off_from_the_start_is_one():
    flat = dataclasses.replace(NONE, before=0.95, after=0.95, end=0.95)
    verdict = judge(summary(Measures(6400, truncation_rate=0.95)), [], flat, NONE)
    assert verdict.collapsed
    assert "in all of these steps" in verdict.headline
    assert not any("checkpoint" in sentence for sentence in verdict.advice)


def test_what_heals_or_stays_low_is_healthy():
    healed = dataclasses.replace(ROSE, kind="healed", after=0.7, end=0.1)
    assert "came back" in judge(summary(), lines(), healed, NONE).headline
    small = dataclasses.replace(ROSE, after=0.4, end=0.4)
    verdict = judge(summary(), lines(), small, NONE)
    assert verdict.cause == "healthy"
    assert "rose to 0.40: watch" in verdict.headline
    assert verdict.advice


def test_a_mismatch_that_has_not_struck_yet_is_told():
    verdict = judge(summary(), lines(-0.1, -25.0), NONE, NONE)
    assert (verdict.cause, verdict.confidence) == ("healthy", "medium")
    assert "forbids" in verdict.headline
    assert "objective.stop" in verdict.advice[0]


@pytest.mark.parametrize(
    ("accuracies", "is_told"),
    [([0.0, 0.0], True), ([0.0, 0.1], False), ([], False), ([math.nan], False), (["x"], False)],
)
def test_accuracy_of_zero_throughout_is_told(accuracies, is_told):
    given = lines()
    for line, accuracy in zip(given, accuracies, strict=False):
        line["rollout/accuracy"] = accuracy
    verdict = judge(summary(), given, NONE, NONE)
    assert (verdict.cause, verdict.collapsed) == ("healthy", False)
    assert ("graded correct" in verdict.headline) is is_told
    assert any("data.grader" in advice for advice in verdict.advice) is is_told


def test_unknown_truncation():
    overall = Measures(6400, repetitive_share=0.1, loop_share=0.05)
    unknown = summary(overall, Measures(0))
    verdict = judge(unknown, [], NONE, NONE)
    assert (verdict.cause, verdict.confidence) == ("healthy", "medium")
    assert "Truncation is not known" in verdict.headline
    assert "--max-new-tokens" in verdict.advice[-1]
    looping = dataclasses.replace(overall, repetitive_share=0.9, loop_share=0.95)
    assert judge(summary(looping, Measures(0)), [], NONE, NONE).cause == "B"


def test_a_late_turn_to_repetition_is_told_with_its_step():
    """Means over the whole run hide it; truncation is unknown, or guessed from lengths."""
    overall = Measures(480, repetitive_share=0.3, loop_share=0.4)
    for source, rate in (("unknown", math.nan), ("pile-up", 0.06)):
        measured = dataclasses.replace(overall, truncation_rate=rate)
        given = summary(measured, Measures(0), truncation_source=source)
        verdict = judge(given, [], NONE, REPEATED_FIRST)
        assert (verdict.cause, verdict.confidence) == ("B", "medium")
        assert verdict.headline == "Collapse into repetition from step 40 on: cause B, repetition."
        assert "step 37 or earlier" in verdict.advice[-1]
        assert any(sentence.startswith("Repetition") for sentence in verdict.evidence)
    known = summary(dataclasses.replace(overall, truncation_rate=0.06), Measures(0))
    assert not judge(known, [], NONE, REPEATED_FIRST).collapsed


def test_what_the_alarm_calls_a_collapse_at_the_end_is_one():
    alarm = Alarm(Level.COLLAPSE, "accuracy has halved", step=100, last_ok=20)
    small = dataclasses.replace(ROSE, after=0.2, end=0.2)
    verdict = judge(summary(), lines(), small, REPEATED_FIRST, alarm=alarm)
    assert (verdict.collapsed, verdict.cause, verdict.confidence) == (True, "B", "medium")
    assert verdict.headline.startswith("Collapse under way from step 50 on")
    assert "accuracy has halved" in verdict.evidence[-1]
    assert "step 20 or earlier" in verdict.advice[-1]
    warned = dataclasses.replace(alarm, level=Level.WARN)
    assert not judge(summary(), lines(), small, REPEATED_FIRST, alarm=warned).collapsed


def test_files_without_steps():
    verdict = judge(summary(Measures(100, truncation_rate=0.48), steps=0), [], TOO_SHORT, TOO_SHORT)
    assert verdict.cause == "healthy"
    assert "0.48 of all rollouts; the files name no steps" in verdict.evidence[0]


def test_empty_texts_are_no_healthy_run():
    verdict = judge(summary(Measures(160, max_length=0.0)), [], NONE, NONE)
    assert verdict.cause == "too little data"
    assert "empty" in verdict.headline


@pytest.mark.parametrize("count", [0, 1, 15])
def test_too_little_data(count):
    verdict = judge(summary(Measures(count, truncation_rate=1.0)), [], NONE, NONE)
    assert (verdict.cause, verdict.collapsed) == ("too little data", False)
    assert str(count or "No") in verdict.headline


def test_nan_in_the_lines_is_passed_over():
    given = [{"step": 1, "stop/student_logp": math.nan, "stop/teacher_logp": -1.0}, *lines()]
    assert judge(summary(), given, ROSE, ROSE).cause == "B"


def test_the_checkpoint_to_go_back_to_is_one_that_was_kept():
    """Step 37 is the last healthy one here."""
    for kept, step in (((10, 20, 40), "20"), ((37, 100), "37")):
        verdict = judge(summary(), lines(), ROSE, REPEATED_FIRST, Facts(checkpoints=kept))
        assert f"the checkpoint of step {step}:" in verdict.advice[-1]
    for kept in ((), (40, 100)):
        verdict = judge(summary(), lines(), ROSE, REPEATED_FIRST, Facts(checkpoints=kept))
        assert "initial student" in verdict.advice[-1]
