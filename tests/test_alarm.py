import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.diagnostics.alarm import Alarm, Level, advance, after_rollback

DATA = Path(__file__).parent / "data" / "alarm"
TRUNCATION = "rollout/truncation_rate"


def real(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def truncations(rates, start=1):
    return [{"step": start + k, TRUNCATION: float(r)} for k, r in enumerate(rates)]


def play(lines, alarm=None):
    """The states after each line."""
    states = [alarm or Alarm()]
    for line in lines:
        states.append(advance(states[-1], line))
    return states[1:]


def first(states, level):
    return next((a.step for a in states if a.level == level), None)


def noisy(rates, num_rollouts=64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.binomial(num_rollouts, np.clip(rates, 0, 1)) / num_rollouts


def test_a_jump_warns_and_then_is_a_collapse():
    states = play(truncations([0.02] * 20 + [0.9] * 10))
    assert [a.level for a in states[:20]] == [Level.OK] * 20
    assert {a.reason for a in states[:20]} == {""}
    # One step of .9 makes .196 over the last 5 lines, and 4 make .724: 1 - .724 < .4 * .98.
    assert first(states, Level.WARN) == 21
    assert first(states, Level.COLLAPSE) == 24
    assert states[23].reason == "truncation rate 0.72 over the last 5 steps, 0.02 in steps 1-10"
    assert states[23].last_ok == 15
    assert states[-1].level == Level.COLLAPSE


def test_the_level_of_a_collapse_is_that_of_the_stops_left():
    """From .5, truncation of .75 leaves half of the stops, .8 four tenths."""
    for high, called in ((0.78, False), (0.82, True)):
        states = play(truncations([0.5] * 20 + [high] * 15))
        assert (first(states, Level.COLLAPSE) is not None) == called
        assert first(states, Level.WARN) is not None
    # Accuracy that falls with it lowers the bar.
    lines = truncations([0.5] * 20 + [0.78] * 15)
    lines = [line | {"rollout/accuracy": 0.4 if line["step"] <= 20 else 0.1} for line in lines]
    assert first(play(lines), Level.COLLAPSE) is not None


@pytest.mark.parametrize("level", [0.0, 0.02, 0.2, 0.5, 0.75])
def test_noise_about_a_level_is_healthy(level):
    """The paper's stable phase truncates half of the rollouts."""
    for seed in range(5):
        states = play(truncations(noisy(np.full(150, level), seed=seed)))
        assert {a.level for a in states} == {Level.OK}
        assert states[-1].last_ok is not None
        assert states[-1].last_ok >= 130


@pytest.mark.parametrize("num_rollouts", [4, 16])
def test_few_rollouts_are_no_collapse(num_rollouts):
    for seed in range(10):
        states = play(truncations(noisy(np.full(150, 0.4), num_rollouts, seed)))
        assert first(states, Level.COLLAPSE) is None


def test_the_transition_of_the_paper_is_caught_on_its_way():
    """From .5 at step 100 to .95 at step 130."""
    rates = np.interp(np.arange(1, 161), [100, 130], [0.5, 0.95])
    for seed in range(5):
        states = play(truncations(noisy(rates, seed=seed)))
        warn, collapse = first(states, Level.WARN), first(states, Level.COLLAPSE)
        assert warn is not None
        assert collapse is not None
        assert 105 <= warn < collapse <= 130


def test_a_run_that_inflates_and_recovers_is_no_collapse():
    rates = np.interp(np.arange(1, 226), [1, 30, 60, 225], [0.23, 0.41, 0.11, 0.06])
    states = play(truncations(noisy(rates)))
    assert first(states, Level.COLLAPSE) is None
    assert states[-1].level == Level.OK
    for peak in (0.44, 0.51):
        rates = np.interp(np.arange(1, 101), [20, 40, 50, 70], [0.02, peak, peak, 0.07])
        states = play(truncations(noisy(rates)))
        assert first(states, Level.WARN) is not None
        assert first(states, Level.COLLAPSE) is None


def test_a_slow_lock_is_a_collapse():
    knots = [0, 30, 60, 120, 180, 270]
    rates = np.interp(np.arange(1, 271), knots, [0.15, 0.76, 0.80, 0.85, 0.91, 0.96])
    states = play(truncations(noisy(rates)))
    assert first(states, Level.COLLAPSE) is not None
    assert states[-1].level == Level.COLLAPSE
    # The same with a line every 30 steps.
    sparse = zip(knots, (0.15, 0.76, 0.80, 0.85, 0.91, 0.96), strict=True)
    states = play([{"step": s, TRUNCATION: r} for s, r in sparse])
    assert states[-1].level == Level.COLLAPSE


def test_a_drift_to_the_lock_is_a_collapse():
    """So slow that no 10 steps differ from the 10 before."""
    states = play(truncations(noisy(np.linspace(0.1, 0.97, 1000))))
    assert first(states, Level.COLLAPSE) is not None


def test_truncation_from_the_first_step_on():
    states = play(truncations(noisy(np.full(100, 0.95))))
    assert first(states, Level.WARN) == 3
    assert first(states, Level.COLLAPSE) is None
    assert "the budget is too short, or the student cannot stop" in states[-1].reason
    assert states[-1].last_ok is None


def test_a_student_that_learns_to_stop_is_healthy_and_judged_by_its_best():
    rates = np.interp(np.arange(1, 101), [1, 15, 60, 80], [0.6, 0.05, 0.05, 0.6])
    states = play(truncations(noisy(rates)))
    assert {a.level for a in states[:60]} == {Level.OK}
    assert first(states, Level.COLLAPSE) is not None


def test_a_stop_token_mismatch_warns_at_once_and_runs_away():
    rates = [0.05, 0.1, 0.3, 0.6, 0.9, 1.0, 1.0, 1.0]
    lines = [
        line | {"stop/student_logp": -0.4, "stop/teacher_logp": -25.4}
        for line in truncations(rates)
    ]
    states = play(lines)
    assert first(states, Level.WARN) == 1
    assert "25.0 nats less likely to the teacher" in states[0].reason
    assert "stop-token mismatch" in states[0].reason
    collapse = first(states, Level.COLLAPSE)
    assert collapse is not None
    assert collapse <= 6
    assert states[-1].last_ok is None


def test_repetition_and_stops_warn_before_anything_is_truncated():
    base = {TRUNCATION: 0.0, "rollout/repetitive_share": 0.0}
    quiet = [base | {"step": s, "stop/student_logp": -0.2, "stop/teacher_logp": -0.6}
             for s in range(1, 31)]  # fmt: skip
    for change, word in (
        ({"rollout/repetitive_share": 0.06}, "share of repetitive tokens 0.06"),
        ({"rollout/repetitive_share": 0.02, "advantage/repetitive_mean": 0.1}, "advantage"),
        ({"stop/student_logp": -0.8, "stop/teacher_logp": -3.0}, "stop gap 2.2 nats"),
        ({"rollout/mean_length": 60.0}, "mean length 60"),
    ):
        before = [line | {"rollout/mean_length": 30.0} for line in quiet]
        states = play([*before, *(before[0] | change | {"step": s} for s in range(31, 36))])
        assert states[29].level == Level.OK
        assert states[-1].level == Level.WARN
        assert word in states[-1].reason
        assert states[-1].last_ok is not None
        assert 20 <= states[-1].last_ok <= 30
    # The teacher's dislike of repetitive tokens is no sign.
    change = {"rollout/repetitive_share": 0.009, "advantage/repetitive_mean": -0.3}
    states = play([*quiet, *(quiet[0] | change | {"step": s} for s in range(31, 36))])
    assert states[-1].level == Level.OK


def test_accuracy_that_halves_with_repetition_is_a_collapse_before_truncation():
    def line(step, accuracy, share):
        return {
            "step": step,
            TRUNCATION: 0.0,
            "rollout/accuracy": accuracy,
            "rollout/repetitive_share": share,
        }

    good = [line(s, 0.6, 0.0) for s in range(1, 31)]
    states = play(good + [line(s, 0.1, 0.2) for s in range(31, 51)])
    assert first(states, Level.COLLAPSE) is not None
    assert "accuracy has halved" in states[-1].reason
    assert "rollout accuracy 0" in states[-1].reason
    for accuracy, share in ((0.1, 0.0), (0.6, 0.2)):  # either alone warns
        states = play(good + [line(s, accuracy, share) for s in range(31, 51)])
        assert states[-1].level == Level.WARN


def test_an_evaluation_that_falls_warns_and_takes_last_ok_back():
    lines = truncations([0.0] * 40)
    lines[19] |= {"eval/accuracy": 0.8, "eval/accuracy_se": 0.03}
    lines[39] |= {"eval/accuracy": 0.5, "eval/accuracy_se": 0.03}
    states = play(lines)
    assert (states[38].level, states[38].last_ok) == (Level.OK, 34)
    assert (states[39].level, states[39].last_ok) == (Level.WARN, 20)
    assert states[39].reason == "held-out accuracy 0.50 at step 40, 0.80 at step 20"
    lines[39] |= {"eval/accuracy_se": 0.12}  # the same fall within the error
    assert play(lines)[39].level == Level.OK


def test_a_warning_ends_and_a_collapse_ends_later():
    up, down = [0.02] * 20 + [0.3] * 5, [0.02] * 30
    states = play(truncations(up + down))
    assert first(states, Level.WARN) is not None
    assert states[-1].level == Level.OK
    assert states[-1].last_ok is not None
    assert states[-1].last_ok >= 45
    states = play(truncations([0.02] * 20 + [0.95] * 10 + [0.02] * 30))
    back = [a.step for a in states if a.level == Level.COLLAPSE]
    # The last 5 lines are near the baseline from step 35 on, 10 of them by step 44.
    assert back == list(range(back[0], 44))
    assert states[-1].level == Level.OK


def test_after_a_rollback_the_baseline_is_the_healthy_one():
    states = play(truncations([0.02] * 20 + [0.95] * 10))
    collapsed = states[-1]
    fresh = after_rollback(collapsed, 12)
    assert (fresh.level, fresh.reason, fresh.step, fresh.last_ok) == (Level.OK, "", 12, 12)
    assert after_rollback(collapsed, 18).last_ok == collapsed.last_ok == 15
    cured = play(truncations([0.02] * 20, 13), fresh)
    assert {a.level for a in cured} == {Level.OK}
    assert cured[-1].last_ok == 27
    again = play(truncations([0.9] * 5, 13), fresh)
    assert first(again, Level.COLLAPSE) == 15  # three lines, not a new baseline
    assert "0.02 in steps 1-10" in again[2].reason


def test_a_rollback_before_there_is_a_start_begins_anew():
    states = play(truncations([0.1, 0.1, 0.9]))
    fresh = after_rollback(states[-1], 0)
    assert (fresh.last_ok, fresh.history.start) == (None, ())
    assert {a.level for a in play(truncations([0.5] * 30), fresh)} == {Level.OK}


def test_steps_that_go_back_are_a_rollback():
    lines = truncations([0.02] * 20 + [0.95] * 10)
    back = truncations([0.02] * 20, 13)
    told = play(back, after_rollback(play(lines)[-1], 12))
    assert play(lines + back)[30:] == told


def test_the_fold_can_be_replayed_and_stored():
    lines = real("opd-s3")
    states = play(lines)
    assert play([json.loads(json.dumps(line)) for line in lines]) == states
    assert play(lines[40:], states[39])[-1] == states[-1]
    stored = json.dumps(dataclasses.asdict(states[-1]), allow_nan=False)
    assert json.loads(stored)["level"] == "collapse"
    assert len(stored) < 10_000


def test_lines_without_rollouts_change_nothing_but_the_step():
    states = play(truncations([0.02] * 20))
    for line in ({"step": 21}, {"step": 21, TRUNCATION: None}, {TRUNCATION: math.nan}, {}):
        after = advance(states[-1], line)
        assert dataclasses.replace(after, step=20) == dataclasses.replace(
            states[-1], num_back=after.num_back
        )
        assert after.step == 21


def accuracy_until(lines, step):
    found = {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}
    return found[max(s for s in found if s <= step)], max(found.values())


@pytest.mark.parametrize("name", ["opd-s3", "slow-s20", "budget40-s20"])
def test_real_collapses(name):
    lines = real(name)
    states = play(lines)
    warn, collapse = first(states, Level.WARN), first(states, Level.COLLAPSE)
    assert warn is not None
    assert collapse is not None
    truncated = next(line["step"] for line in lines if line.get(TRUNCATION, 0.0) >= 0.2)
    assert warn < truncated
    last_ok = states[-1].last_ok
    assert last_ok is not None
    assert last_ok < warn
    then, best = accuracy_until(lines, last_ok)
    assert then >= 0.8 * best
    # With truncation alone it comes later, but it comes.
    alone = play([{k: line[k] for k in ("step", TRUNCATION) if k in line} for line in lines])
    later = first(alone, Level.COLLAPSE)
    assert later is not None
    assert later > collapse


@pytest.mark.parametrize(("name", "least"), [("stable-s3", 95), ("tanh-s20", 90)])
def test_real_healthy_runs(name, least):
    states = play(real(name))
    assert {a.level for a in states} == {Level.OK}
    assert states[-1].last_ok is not None
    assert states[-1].last_ok >= least


def test_a_real_run_whose_budget_is_too_short():
    states = play(real("short-s0"))
    assert first(states, Level.COLLAPSE) is None
    assert states[-1].level == Level.WARN
    assert "the budget is too short" in states[-1].reason


NAMES = [TRUNCATION, "rollout/mean_length", "rollout/repetitive_share", "rollout/accuracy"]
NAMES += ["advantage/repetitive_mean", "stop/student_logp", "stop/teacher_logp", "eval/accuracy"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), st.none() | st.floats(0, 1)), max_size=30))
def test_any_lines_get_an_answer(lines):
    alarm = Alarm()
    for k, line in enumerate(lines, 1):
        before = alarm
        alarm = advance(alarm, line)
        assert alarm == advance(before, line)
        assert alarm.step == k
        assert (alarm.level == Level.OK) == (alarm.reason == "")
        assert alarm.last_ok is None or 0 < alarm.last_ok <= k
