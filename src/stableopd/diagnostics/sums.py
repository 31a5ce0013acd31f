"""Sums over rollouts: what the means of `Measures` are made of, one rollout after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from stableopd.diagnostics.summary import Measures
from stableopd.types import Record, StopReason

__all__ = ["Observation", "Sums", "add", "observe", "ratio", "to_measures"]

# Lengths up to here are counted one by one; above, in classes 1% wide.
_EXACT_LENGTH = 1024
_CLASS_RATIO = math.log(1.01)


@dataclass(slots=True)
class Sums:
    """Numbers that add up over rollouts. Names that begin with `num_` count; the others sum.

    Sums of advantages and log-probs leave values out that are not finite (`num_not_finite`).
    `num_mismatched` counts rollouts whose log-probs are not one per token. `length_counts` and
    `length_sums` are by class of length.
    """

    num_rollouts: int = 0
    num_texts: int = 0
    num_repetitive_texts: int = 0
    num_other_units: int = 0
    num_reasons: int = 0
    num_by_budget: int = 0
    num_known: int = 0
    num_truncated: int = 0
    num_lengths: int = 0
    length: int = 0
    max_length: int = 0
    num_units: int = 0
    num_repetitive: int = 0
    num_loops: int = 0
    num_graded: int = 0
    num_correct: int = 0
    num_scores: int = 0
    score: float = 0.0
    num_advantages: int = 0
    advantage: float = 0.0
    num_repetitive_advantages: int = 0
    repetitive_advantage: float = 0.0
    repetitive_magnitude: float = 0.0
    num_regular_advantages: int = 0
    regular_advantage: float = 0.0
    regular_magnitude: float = 0.0
    num_student_logps: int = 0
    student_logp: float = 0.0
    num_teacher_logps: int = 0
    teacher_logp: float = 0.0
    num_stops: int = 0
    student_stop_logp: float = 0.0
    teacher_stop_logp: float = 0.0
    num_not_finite: int = 0
    num_mismatched: int = 0
    num_loop_ends: int = 0
    num_answered: int = 0
    num_endings: int = 0
    num_marked: int = 0
    length_counts: dict[int, int] = field(default_factory=dict[int, int])
    length_sums: dict[int, int] = field(default_factory=dict[int, int])
    markers: dict[str, int] = field(default_factory=dict[str, int])


_TABLES = ("length_counts", "length_sums", "markers")
_NUMBERS = tuple(entry.name for entry in fields(Sums) if entry.name not in (*_TABLES, "max_length"))


@dataclass(frozen=True, slots=True)
class Observation:
    """A rollout with what was found in it.

    Attributes:
        record: The rollout.
        labels: (U,) which of its units are repetitive.
        by_token: Whether the units are the tokens of its ids.
        ends_in_loop: Whether its end lies in a loop.
        repetitive_text: `is_repetitive` of its text; None without a text.
        length: In the unit of the set; None where unknown.
        truncated: Whether it was cut off; None where unknown.
        other_unit: Whether its units are not those of the set.
        over_budget: Whether its length alone makes it cut off, whatever reason it has.
    """

    record: Record
    labels: NDArray[np.bool_]
    by_token: bool
    ends_in_loop: bool
    repetitive_text: bool | None
    length: int | None
    truncated: bool | None
    other_unit: bool = False
    over_budget: bool = False


def observe(seen: Observation) -> tuple[Sums, NDArray[np.float64] | None]:
    """Measure one rollout.

    Args:
        seen: The rollout and its labels.

    Returns:
        Its sums (without those of its ending) and its advantages, one per token, in nats; None
        where the file has none or where they are not one per unit.
    """
    record = seen.record
    one = Sums(
        num_rollouts=1,
        num_texts=int(seen.repetitive_text is not None),
        num_repetitive_texts=int(seen.repetitive_text or False),
        num_other_units=int(seen.other_unit),
        num_reasons=int(record.stop_reason is not None),
        num_by_budget=int(record.stop_reason is None and seen.truncated is not None),
        num_known=int(seen.truncated is not None),
        num_truncated=int(seen.truncated or False),
        num_units=len(seen.labels),
        num_repetitive=int(np.count_nonzero(seen.labels)),
        num_loops=int(seen.ends_in_loop),
        num_graded=int(record.correct is not None),
        num_correct=int(record.correct or False),
    )
    if seen.length is not None:
        place = _length_class(seen.length)
        one.num_lengths, one.length, one.max_length = 1, seen.length, seen.length
        one.length_counts, one.length_sums = {place: 1}, {place: seen.length}
    if record.score is not None and math.isfinite(record.score):
        one.num_scores, one.score = 1, record.score
    advantages = _measure_logps(one, seen)
    return one, advantages


def add(total: Sums, one: Sums) -> None:
    """Add the sums of other rollouts to a total."""
    for name in _NUMBERS:
        value = getattr(one, name)
        if value:
            setattr(total, name, getattr(total, name) + value)
    total.max_length = max(total.max_length, one.max_length)
    for name in _TABLES:
        table = getattr(total, name)
        for key, value in getattr(one, name).items():
            table[key] = table.get(key, 0) + value


def ratio(numerator: float, denominator: float) -> float:
    """The quotient of two sums; nan where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def to_measures(sums: Sums, truncation_rate: float | None = None) -> Measures:
    """Turn sums into means and shares.

    Args:
        sums: Sums over any number of rollouts.
        truncation_rate: What to report as TruncRate; None for the share of the rollouts whose
            end is known.

    Returns:
        The measurements; nan wherever there is nothing to divide by.
    """
    if truncation_rate is None:
        truncation_rate = ratio(sums.num_truncated, sums.num_known)
    magnitude = sums.repetitive_magnitude + sums.regular_magnitude
    return Measures(
        num_rollouts=sums.num_rollouts,
        num_stops=sums.num_stops,
        mean_length=ratio(sums.length, sums.num_lengths),
        median_length=_quantile(sums, 0.5),
        p90_length=_quantile(sums, 0.9),
        max_length=float(sums.max_length) if sums.num_lengths else math.nan,
        truncation_rate=truncation_rate,
        repetition_rate=ratio(sums.num_repetitive_texts, sums.num_texts),
        repetitive_share=ratio(sums.num_repetitive, sums.num_units),
        loop_share=ratio(sums.num_loops, sums.num_rollouts),
        accuracy=ratio(sums.num_correct, sums.num_graded),
        score=ratio(sums.score, sums.num_scores),
        advantage=ratio(sums.advantage, sums.num_advantages),
        repetitive_advantage=ratio(sums.repetitive_advantage, sums.num_repetitive_advantages),
        regular_advantage=ratio(sums.regular_advantage, sums.num_regular_advantages),
        repetitive_weight=ratio(sums.repetitive_magnitude, magnitude),
        student_logp=ratio(sums.student_logp, sums.num_student_logps),
        teacher_logp=ratio(sums.teacher_logp, sums.num_teacher_logps),
        student_stop_logp=ratio(sums.student_stop_logp, sums.num_stops),
        teacher_stop_logp=ratio(sums.teacher_stop_logp, sums.num_stops),
    )


def _measure_logps(one: Sums, seen: Observation) -> NDArray[np.float64] | None:
    record = seen.record
    student, teacher, advantages = record.student_logps, record.teacher_logps, record.advantages
    if student is not None:
        one.student_logp, one.num_student_logps = _finite_sum(one, student)
    if teacher is not None:
        one.teacher_logp, one.num_teacher_logps = _finite_sum(one, teacher)
    size = len(seen.labels) if seen.by_token else None
    given = [len(values) for values in (student, teacher, advantages) if values is not None]
    if given and any(number != (given[0] if size is None else size) for number in given):
        one.num_mismatched = 1
    if student is not None and teacher is not None and len(student) == len(teacher):
        if advantages is None:
            # Two infinite log-probs differ by nan, which is counted and left out.
            with np.errstate(invalid="ignore"):
                advantages = teacher - student
        if record.stop_reason == StopReason.STOP and len(student) and size in (None, len(student)):
            _measure_stop(one, float(student[-1]), float(teacher[-1]))
    if advantages is None:
        return None
    if record.advantages is None:  # made of log-probs, whose infinities are counted already
        one.advantage, one.num_advantages = _finite_sum(Sums(), advantages)
    else:
        one.advantage, one.num_advantages = _finite_sum(one, advantages)
    if len(advantages) != size:
        return None
    _measure_classes(one, advantages, seen.labels)
    return advantages


def _measure_stop(one: Sums, student: float, teacher: float) -> None:
    if math.isfinite(student) and math.isfinite(teacher):
        one.num_stops, one.student_stop_logp, one.teacher_stop_logp = 1, student, teacher


def _measure_classes(one: Sums, advantages: NDArray[np.float64], labels: NDArray[np.bool_]) -> None:
    finite = np.isfinite(advantages)
    repetitive, regular = advantages[finite & labels], advantages[finite & ~labels]
    one.num_repetitive_advantages, one.num_regular_advantages = len(repetitive), len(regular)
    one.repetitive_advantage = float(repetitive.sum())
    one.regular_advantage = float(regular.sum())
    one.repetitive_magnitude = float(np.abs(repetitive).sum())
    one.regular_magnitude = float(np.abs(regular).sum())


def _finite_sum(one: Sums, values: NDArray[np.float64]) -> tuple[float, int]:
    finite = np.isfinite(values)
    count = int(np.count_nonzero(finite))
    if count < len(values):
        one.num_not_finite += len(values) - count
        values = values[finite]
    return float(values.sum()), count


def _length_class(length: int) -> int:
    if length <= _EXACT_LENGTH:
        return length
    return _EXACT_LENGTH + 1 + int(math.log(length / _EXACT_LENGTH) / _CLASS_RATIO)


def _quantile(sums: Sums, share: float) -> float:
    """Linear between the two nearest lengths; the mean of its class stands for a long one."""
    if not sums.num_lengths:
        return math.nan
    places = sorted(sums.length_counts)
    upto = np.cumsum([sums.length_counts[place] for place in places])
    rank = share * (sums.num_lengths - 1)
    low, high = (
        sums.length_sums[places[index]] / sums.length_counts[places[index]]
        for index in np.searchsorted(upto, [math.floor(rank), math.ceil(rank)], side="right")
    )
    return low + (high - low) * (rank - math.floor(rank))
