"""What the alarm remembers of a run: its start, its last lines, its lowest and best means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

__all__ = [
    "Evaluation",
    "History",
    "Mark",
    "Noise",
    "Row",
    "accuracy",
    "baseline_rows",
    "forget",
    "length",
    "lower",
    "mark",
    "now_rows",
    "number",
    "remember",
    "repetition",
    "scatter",
    "truncation",
]

START = 10  # design: the first 10 lines are the start that later ones are held against
RECENT = 5  # design: the last 5 lines are what counts as now
EARLY = 3  # design: the last 3 while there are fewer than 10
LONG = 10  # design: lowest and best are means of 10 lines
KEPT = 15  # design: lines kept; what counts as now where 5 are too noisy
MEMORY = 50  # design: lines over which the noise of a step is averaged


@dataclass(frozen=True, slots=True)
class Row:
    """What is kept of a line; None where the line does not have it.

    Attributes:
        step: Its step.
        truncation: `rollout/truncation_rate`.
        length: `rollout/mean_length`.
        repetition: `rollout/repetitive_share`.
        credit: `advantage/repetitive_mean`.
        gap: `stop/student_logp` minus `stop/teacher_logp`, in nats.
        accuracy: `rollout/accuracy`.
    """

    step: int
    truncation: float | None = None
    length: float | None = None
    repetition: float | None = None
    credit: float | None = None
    gap: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A mean over `num` lines, those of the steps from `first` to `last`."""

    value: float
    first: int
    last: int
    num: int


@dataclass(frozen=True, slots=True)
class Noise:
    """Variance of a step about its neighbours, which a trend hardly moves; over `num` pairs."""

    variance: float = 0.0
    num: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out accuracy after a step, and its standard error."""

    step: int
    accuracy: float
    error: float


@dataclass(frozen=True, slots=True)
class History:
    """What is remembered of a run.

    Attributes:
        start: The first lines, at most 10; fewer if there were signs before.
        start_complete: Whether `start` takes no more lines.
        recent: The last lines, at most 15.
        low_truncation: The lowest mean TruncRate of 15 lines so far.
        low_repetition: The lowest mean share of repetitive tokens of 15 lines so far.
        noise_truncation: The noise of TruncRate.
        noise_repetition: The noise of the share of repetitive tokens.
        best_accuracy: The best mean rollout accuracy of 10 lines so far.
        best_evaluation: The best evaluation so far.
        last_evaluation: The last one.
    """

    start: tuple[Row, ...] = ()
    start_complete: bool = False
    recent: tuple[Row, ...] = ()
    low_truncation: Mark | None = None
    low_repetition: Mark | None = None
    noise_truncation: Noise = Noise()
    noise_repetition: Noise = Noise()
    best_accuracy: Mark | None = None
    best_evaluation: Evaluation | None = None
    last_evaluation: Evaluation | None = None


def number(line: Mapping[str, Any], name: str) -> float | None:
    """The finite number of that name in a line, or None."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def remember(history: History, step: int, line: Mapping[str, Any]) -> tuple[History, bool]:
    """Take a line in.

    Args:
        history: What was known before.
        step: Step of the line.
        line: Its metrics by the names of docs/metrics.md; missing, null and nan are all unknown.

    Returns:
        What is known after it, and whether the line held anything about rollouts.
    """
    history = _with_evaluation(history, step, line)
    row = _row(step, line)
    if row is None:
        return history, False
    recent = (*history.recent, row)[-KEPT:]
    start = history.start if history.start_complete else (*history.start, row)
    best, now = history.best_accuracy, mark(recent[-LONG:], accuracy, LONG)
    better = now is not None and (best is None or now.value > best.value)
    return replace(
        history,
        start=start,
        start_complete=len(start) >= START or history.start_complete,
        recent=recent,
        low_truncation=lower(history.low_truncation, mark(recent, truncation, KEPT)),
        low_repetition=lower(history.low_repetition, mark(recent, repetition, KEPT)),
        noise_truncation=_noise(history.noise_truncation, recent, truncation),
        noise_repetition=_noise(history.noise_repetition, recent, repetition),
        best_accuracy=now if better else best,
    ), True


def forget(history: History, step: int) -> History:
    """Forget the last lines, and of the start, if it was not complete, those after `step`."""
    start = history.start
    if not history.start_complete:
        start = tuple(row for row in start if row.step <= step)
    return replace(history, start=start, recent=(), last_evaluation=None)


def now_rows(history: History, num: int = RECENT) -> tuple[Row, ...]:
    """The lines that count as now: the last `num`, or the last 3 while there are fewer than 10."""
    recent = history.recent
    return recent[-(num if len(recent) >= max(START, num) else EARLY) :]


def baseline_rows(history: History, now: Sequence[Row]) -> tuple[Row, ...]:
    """The lines of the start that do not count as now."""
    return tuple(row for row in history.start if not now or row.step < now[0].step)


def truncation(row: Row) -> float | None:
    """A field of a line, as are the next three."""
    return row.truncation


def repetition(row: Row) -> float | None:
    """See `Row`."""
    return row.repetition


def length(row: Row) -> float | None:
    """See `Row`."""
    return row.length


def accuracy(row: Row) -> float | None:
    """See `Row`."""
    return row.accuracy


def scatter(rows: Sequence[Row], field: Callable[[Row], float | None]) -> float:
    """Standard deviation of a line, from the differences of neighbours without the largest.

    A trend hardly moves it, one jump not at all; an outlier, which makes two differences, does.
    """
    known = [value for row in rows if (value := field(row)) is not None]
    squares = sorted((b - a) ** 2 / 2 for a, b in pairwise(known))[:-1]
    return math.sqrt(fmean(squares)) if squares else 0.0


def mark(rows: Sequence[Row], field: Callable[[Row], float | None], least: int) -> Mark | None:
    """The mean of a field over the lines that have it; None if fewer than `least` have."""
    known = [(row.step, value) for row in rows if (value := field(row)) is not None]
    if len(known) < least:
        return None
    return Mark(fmean(v for _, v in known), known[0][0], known[-1][0], len(known))


def lower(one: Mark | None, other: Mark | None) -> Mark | None:
    """The mark with the lower value, the first of equals; the other where one is None."""
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda m: m.value)


def _with_evaluation(history: History, step: int, line: Mapping[str, Any]) -> History:
    share, error = number(line, "eval/accuracy"), number(line, "eval/accuracy_se")
    if share is None:
        return history
    # Without a standard error: that of a share of one half over 100 problems.
    found = Evaluation(step, share, 0.05 if error is None else error)
    best = history.best_evaluation
    better = best is None or found.accuracy >= best.accuracy
    return replace(history, last_evaluation=found, best_evaluation=found if better else best)


def _noise(old: Noise, recent: Sequence[Row], field: Callable[[Row], float | None]) -> Noise:
    last = [value for row in recent[-2:] if (value := field(row)) is not None]
    if len(last) < 2:
        return old
    num = old.num + 1
    # A jump is no noise: it may count for three standard deviations, or for 0.1.
    square = min((last[1] - last[0]) ** 2 / 2, max(9 * old.variance, 0.01))
    return Noise(old.variance + (square - old.variance) / min(num, MEMORY), num)


def _row(step: int, line: Mapping[str, Any]) -> Row | None:
    student, teacher = number(line, "stop/student_logp"), number(line, "stop/teacher_logp")
    row = Row(
        step=step,
        truncation=number(line, "rollout/truncation_rate"),
        length=number(line, "rollout/mean_length"),
        repetition=number(line, "rollout/repetitive_share"),
        credit=number(line, "advantage/repetitive_mean"),
        gap=None if student is None or teacher is None else student - teacher,
        accuracy=number(line, "rollout/accuracy"),
    )
    return None if row == Row(step) else row
