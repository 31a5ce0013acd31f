"""The evidence of a verdict: the numbers that speak for either cause, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableopd.diagnostics.memory import number
from stableopd.diagnostics.onset import Onset
from stableopd.diagnostics.summary import Summary

__all__ = ["Clues", "Facts", "ends_repetitive", "find_clues", "say"]

# Design: as in the audit before training; e^5 is 150 times less likely than under the student.
STOP_GAP_NATS = 5.0

# Design: the student has unlearnt to stop when its stops are half as likely as at first.
STOPS_HALVED_NATS = math.log(2)

# Design: lines of metrics that count as the beginning of a run, where cause A shows.
FIRST_LINES = 5

# Design: shares of the cut-off rollouts (RepRate, ending in a loop) or of their tokens from which
# on repetition is there. The paper has RepRate .3 to .6 after collapse, and about 0 before.
REPETITION_RATE, LOOP_SHARE, REPETITIVE_SHARE = 0.25, 0.5, 0.5

# Design: share of cut-off rollouts in which the student wrote an end marker and went on.
MARKER_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run's own files say about stops and checkpoints; None where they do not.

    Attributes:
        stop_mode: `objective.stop` of the run: "event" or "token".
        student_stop_ids: Ids that the student stops with.
        teacher_stop_ids: Ids that the teacher stops with.
        checkpoints: Steps whose checkpoints are there, in order.
    """

    stop_mode: str | None = None
    student_stop_ids: tuple[int, ...] | None = None
    teacher_stop_ids: tuple[int, ...] | None = None
    checkpoints: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Clues:
    """The numbers that the rules of the verdict look at; nan or None where unknown.

    Attributes:
        truncation: TruncRate of all rollouts.
        first_gap: student_stop - teacher_stop, in nats.
        student_stop: Mean log-prob under the student at its first stops.
        teacher_stop: The same under the teacher.
        ids_differ: Whether the models have different stop ids.
        repetitive_advantage: Mean advantage of repetitive tokens from the onset on, in nats.
        regular_advantage: The same of all other tokens.
        repeats: Whether the cut-off rollouts are repetitive.
        repeats_first: Whether repetition rose before truncation did.
        stop_at_repetition: Mean log-prob under the student of its stops when repetition rose.
        marker_share: `Summary.marker_share`.
    """

    truncation: float
    first_gap: float
    student_stop: float
    teacher_stop: float
    ids_differ: bool | None
    repetitive_advantage: float
    regular_advantage: float
    repeats: bool
    repeats_first: bool | None
    stop_at_repetition: float
    marker_share: float

    @property
    def forbids_stops(self) -> bool:
        """Whether the teacher gives the student's first stops far less than the student does."""
        return self.first_gap > STOP_GAP_NATS

    @property
    def unlearnt_first(self) -> bool:
        """Whether the student had unlearnt to stop by the time that repetition rose."""
        return self.student_stop - self.stop_at_repetition > STOPS_HALVED_NATS

    @property
    def credits_repeats(self) -> bool:
        """Whether repetitive tokens have the greater mean advantage."""
        return self.repetitive_advantage > self.regular_advantage


def find_clues(
    summary: Summary,
    lines: Sequence[Mapping[str, Any]],
    onset: Onset,
    repetition_onset: Onset,
    facts: Facts,
) -> Clues:
    """Gather the numbers that the rules look at; arguments as in `verdict.judge`."""
    both = ("stop/student_logp", "stop/teacher_logp")
    stops = [line for line in lines if None not in [number(line, name) for name in both]]
    student, teacher = (_mean(stops[:FIRST_LINES], name) for name in both)
    if not stops:
        student, teacher = summary.overall.student_stop_logp, summary.overall.teacher_stop_logp
    after = [line for line in lines if onset.step is None or line["step"] >= onset.step]
    cut = summary.overall if math.isnan(summary.truncated.repetitive_share) else summary.truncated
    ids_differ = None
    if facts.student_stop_ids is not None and facts.teacher_stop_ids is not None:
        ids_differ = set(facts.student_stop_ids) != set(facts.teacher_stop_ids)
    return Clues(
        truncation=summary.overall.truncation_rate,
        first_gap=student - teacher,
        student_stop=student,
        teacher_stop=teacher,
        ids_differ=ids_differ,
        repetitive_advantage=_mean(after, "advantage/repetitive_mean"),
        regular_advantage=_mean(after, "advantage/regular_mean"),
        repeats=cut.repetition_rate >= REPETITION_RATE
        or cut.loop_share >= LOOP_SHARE
        or cut.repetitive_share >= REPETITIVE_SHARE
        or ends_repetitive(repetition_onset),
        repeats_first=_is_first(repetition_onset, onset),
        stop_at_repetition=_stop_at(stops, repetition_onset.step),
        marker_share=summary.marker_share,
    )


def ends_repetitive(repetition: Onset) -> bool:
    """Whether the share of repetitive units rose, and is high at the end."""
    return repetition.kind == "rise" and repetition.end >= REPETITIVE_SHARE


def _stop_at(stops: Sequence[Mapping[str, Any]], step: int | None) -> float:
    """Mean of the student's stop log-prob over the last lines up to a step."""
    if step is None:
        return math.nan
    until = [line for line in stops if line["step"] <= step]
    return _mean(until[-FIRST_LINES:], "stop/student_logp")


def _is_first(repetition: Onset, truncation: Onset) -> bool | None:
    """Whether repetition rose before truncation did; None where the intervals do not tell."""
    if repetition.kind != "rise" or truncation.kind != "rise":
        return None
    if repetition.interval is None or truncation.interval is None:
        return None
    if repetition.interval[1] < truncation.interval[0]:
        return True
    return False if truncation.interval[1] < repetition.interval[0] else None


def say(
    summary: Summary,
    clues: Clues,
    onset: Onset,
    repetition_onset: Onset,
    facts: Facts,
    collapsed: bool,
) -> tuple[str, ...]:
    """Put the evidence into words, one sentence each; arguments as in `verdict.judge`."""
    said = (
        _about_truncation(summary, clues, onset),
        *_about_stops(clues, facts, collapsed),
        *_about_repetition(summary, clues, repetition_onset, collapsed),
    )
    return tuple(sentence for sentence in said if sentence)


def _about_truncation(summary: Summary, clues: Clues, onset: Onset) -> str:
    if math.isnan(clues.truncation):
        return "Truncation: the files do not say which rollouts were cut off."
    if not summary.by_step:
        return (
            f"Truncation: {clues.truncation:.2f} of all rollouts; the files name no steps, so a "
            "change cannot be seen."
        )
    return f"Truncation: {_lower(onset.text)}"


def _about_stops(clues: Clues, facts: Facts, collapsed: bool) -> list[str]:
    said: list[str] = []
    if clues.ids_differ is not None:
        if clues.ids_differ:
            scored = "one event" if facts.stop_mode == "event" else "single tokens"
            said.append(
                f"The models stop with different ids (student {_ids(facts.student_stop_ids)}, "
                f"teacher {_ids(facts.teacher_stop_ids)}); stops were scored as {scored}."
            )
        else:
            said.append(f"Both models stop with the same ids ({_ids(facts.student_stop_ids)}).")
    if not math.isnan(clues.first_gap):
        meaning = (
            "the teacher forbids the student's stops (cause A)"
            if clues.forbids_stops
            else "no mismatch of stops (against cause A)"
        )
        said.append(
            f"At the student's first stops its own log-prob is {clues.student_stop:.2f} nats, the "
            f"teacher's {clues.teacher_stop:.2f}: {meaning}."
        )
    elif collapsed:
        said.append(
            "The files have no log-probs of student and teacher at stops, so cause A can neither "
            "be shown nor ruled out by them."
        )
    if clues.marker_share >= MARKER_SHARE:
        said.append(
            f"{clues.marker_share:.0%} of the cut-off rollouts hold an end or chat marker after "
            "which the student went on: it stopped, and was not stopped (a hint at cause A)."
        )
    return said


def _about_repetition(
    summary: Summary, clues: Clues, repetition_onset: Onset, collapsed: bool
) -> list[str]:
    said: list[str] = []
    cut, unit = summary.truncated, summary.parameters.unit
    if cut.num_rollouts and not math.isnan(cut.repetitive_share):
        said.append(
            f"Of the {cut.num_rollouts:,} cut-off rollouts {_share(cut.loop_share)} end in a loop, "
            f"RepRate is {_share(cut.repetition_rate)}, and {_share(cut.repetitive_share)} of "
            f"their {unit} are repetitive."
        )
    if repetition_onset.kind in ("rise", "healed"):
        order = {True: " It rose before truncation.", False: " It rose after truncation."}
        told = order.get(clues.repeats_first, "") if clues.repeats_first is not None else ""
        said.append(f"Repetition, share of {unit}: {_lower(repetition_onset.text)}{told}")
    if not collapsed:
        return said
    # 0 is what texts give whose way of stating an answer is not known.
    if summary.answered_before_loop > 0:
        said.append(
            f"In {summary.answered_before_loop:.0%} of those that end in a loop a final answer "
            "stands before the loop begins."
        )
    if clues.forbids_stops and clues.unlearnt_first:
        said.append(
            f"By then the student's log-prob of its stops was {clues.stop_at_repetition:.2f} nats: "
            "it had unlearnt to stop before it repeated itself (cause A, with its symptom)."
        )
    if clues.repeats and not math.isnan(clues.repetitive_advantage + clues.regular_advantage):
        meaning = (
            "the update favours repetition (cause B)"
            if clues.credits_repeats
            else "the update does not favour repetition"
        )
        said.append(
            f"From the onset on repetitive tokens have a mean advantage of "
            f"{clues.repetitive_advantage:+.3f} nats, regular ones "
            f"{clues.regular_advantage:+.3f}: {meaning}."
        )
    return said


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [value for line in lines if (value := number(line, name)) is not None]
    return math.fsum(values) / len(values) if values else math.nan


def _share(value: float) -> str:
    return "an unknown share" if math.isnan(value) else f"{value:.0%}"


def _ids(ids: tuple[int, ...] | None) -> str:
    return ", ".join(map(str, ids or ()))
