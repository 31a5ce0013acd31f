"""The signs of a collapse that the alarm sees in the last lines of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from stableopd.diagnostics.memory import (
    EARLY,
    KEPT,
    LONG,
    RECENT,
    START,
    History,
    Mark,
    Noise,
    Row,
    accuracy,
    baseline_rows,
    length,
    lower,
    mark,
    now_rows,
    repetition,
    scatter,
    truncation,
)

__all__ = ["Sign", "collapse", "find_signs", "is_back"]

# A sign has two thresholds: from the lower on a step is suspicious, from the upper on it warns.
# Those without another origin are measured: recipes/alarm.
TRUNCATION = (0.05, 0.15)  # rise of TruncRate
REPETITION = (0.01, 0.04)  # rise of the share of repetitive tokens
CREDIT = (0.005, 0.01)  # share of repetitive tokens while the teacher likes them better
CREDIT_MEAN = 0.02  # what "likes better" is: their mean advantage, in nats
GAP = (0.5, 1.0)  # growth of the stop gap, in nats
ACCURACY = (0.06, 0.15)  # fall of rollout accuracy from its best
EVALUATION = (0.06, 0.15)  # fall of held-out accuracy from its best
LENGTH = (1.25, 1.5)  # mean length as a multiple of that of the 10 lines before
NOISE = (2.5, 5.0)  # standard errors that a change must have, too
NOISE_EVALUATION = (1.5, 3.0)  # the same for evaluations, whose standard error is given
COARSE = 0.04  # design: standard error of a rise from which 15 lines are taken instead of 5
RELATIVE = (0.5, 1.0)  # growth of repetition and stop gap as a multiple of the start's
MISMATCH = 5.0  # design: stop gap at the start, in nats, that is no difference of taste
HIGH = 0.9  # design: TruncRate at the start from which nothing can be seen to rise
LEFT = (0.4, 0.5)  # share of the stops that is left in a collapse; the second with a second sign
RISE = 0.2  # design: least rise of TruncRate in a collapse
SECOND = 0.1  # rise of the share of repetitive tokens that is a second sign
NEAR = 0.1  # design: truncation is back when it is this near to its baseline

_Field = Callable[[Row], float | None]


@dataclass(frozen=True, slots=True)
class Sign:
    """Something suspicious.

    Attributes:
        name: What was looked at.
        warns: Whether it is enough to warn.
        text: What it is, with the numbers.
    """

    name: str
    warns: bool
    text: str


@dataclass(frozen=True, slots=True)
class _Rise:
    """A baseline, the mean of now, and the standard error of their difference."""

    base: Mark
    now: Mark
    error: float

    @property
    def height(self) -> float:
        return self.now.value - self.base.value


def find_signs(history: History) -> list[Sign]:
    """All signs that the last lines show against the start and the best so far."""
    found = [
        _high(history),
        _mismatch(history),
        _truncation(history),
        _repetition(history),
        _credit(history),
        _gap(history),
        _length(history),
        _accuracy(history),
        _evaluation(history),
    ]
    return [sign for sign in found if sign is not None]


def collapse(history: History, signs: Sequence[Sign]) -> Sign | None:
    """The sign for which the last lines are a collapse; None if they are none."""
    repeated, truncated = _repetition_rise(history), _truncation_rise(history)
    repeats = repeated is not None and repeated.height >= SECOND
    worse = any(sign.warns and sign.name in ("accuracy", "evaluation") for sign in signs)
    if truncated is not None:
        left = (1 - truncated.now.value) / max(1 - truncated.base.value, 1e-9)
        enough = truncated.height >= max(RISE, NOISE[1] * truncated.error)
        if enough and left <= LEFT[repeats or worse] and not _turns_back(history, truncated):
            text = f"truncation rate {_against(truncated.now, truncated.base)}"
            return Sign("truncation", True, text)
    if repeated is not None and repeats and _has_halved(history, signs):
        text = _against(repeated.now, repeated.base)
        text = f"accuracy has halved, and the share of repetitive tokens is {text}"
        return Sign("repetition", True, text)
    return None


def is_back(history: History) -> bool:
    """Whether truncation and repetition are near their baselines again."""
    truncated, repeated = _truncation_rise(history), _repetition_rise(history)
    if truncated is None and repeated is None:
        return False
    near = truncated is None or truncated.height <= NEAR
    return near and (repeated is None or repeated.height <= SECOND / 2)


def _truncation_rise(history: History) -> _Rise | None:
    return _rise(history, truncation, history.low_truncation, history.noise_truncation)


def _repetition_rise(history: History) -> _Rise | None:
    return _rise(history, repetition, history.low_repetition, history.noise_repetition)


def _rise(history: History, field: _Field, low: Mark | None, noise: Noise) -> _Rise | None:
    """The rise over the last 5 lines; over the last 15 where 5 are too noisy to tell."""
    found = _rise_over(history, field, low, noise, RECENT)
    if found is None or len(history.recent) < KEPT:
        return found
    if found.error <= COARSE or found.height >= NOISE[1] * found.error:
        return found
    return _rise_over(history, field, low, noise, KEPT) or found


def _rise_over(
    history: History, field: _Field, low: Mark | None, noise: Noise, num: int
) -> _Rise | None:
    now = now_rows(history, num)
    before = baseline_rows(history, now)
    base, mean = lower(mark(before, field, 1), low), mark(now, field, EARLY)
    if base is None or mean is None:
        return None
    # Few lines say little about their own noise: 32 rollouts a step are reckoned with then.
    p = min(max((base.value + mean.value) / 2, 0.0), 1.0)
    least = p * (1 - p) / (64 if noise.num >= START else 32) if field is truncation else 0.0
    variance = max(noise.variance, scatter(history.recent, field) ** 2, least)
    return _Rise(base, mean, math.sqrt(variance * (1 / mean.num + 1 / base.num)))


def _turns_back(history: History, rise: _Rise) -> bool:
    """Whether truncation falls within the lines of now, as in a run that heals."""
    known = [row.truncation for row in now_rows(history) if row.truncation is not None]
    if len(known) < RECENT:
        return False
    return fmean(known[-2:]) < fmean(known[:2]) - max(0.05, NOISE[0] * rise.error)


def _has_halved(history: History, signs: Sequence[Sign]) -> bool:
    names = {sign.name for sign in signs if sign.warns}
    best, last = history.best_evaluation, history.last_evaluation
    if "evaluation" in names and best is not None and last is not None:
        return last.accuracy <= best.accuracy / 2
    mean, now = history.best_accuracy, mark(history.recent[-LONG:], accuracy, LONG)
    if "accuracy" in names and mean is not None and now is not None:
        return now.value <= mean.value / 2
    return False


def _high(history: History) -> Sign | None:
    first = mark(history.start, truncation, EARLY)
    now = mark(now_rows(history), truncation, EARLY)
    if first is None or now is None:
        return None
    error = scatter(history.start, truncation) / math.sqrt(first.num)
    if min(first.value - error, now.value) < HIGH:
        return None
    text = f"truncation rate {_over(now)}, and {first.value:.2f} at the start: the budget is too "
    return Sign("high", True, text + "short, or the student cannot stop")


def _mismatch(history: History) -> Sign | None:
    first = [row.gap for row in history.start if row.gap is not None]
    lately = [row.gap for row in history.recent[-RECENT:] if row.gap is not None]
    if not first or not lately or min(median(first), median(lately)) <= MISMATCH:
        return None
    text = f"the student's stops are {median(first):.1f} nats less likely to the teacher than to "
    return Sign("mismatch", True, text + "the student from the start: stop-token mismatch")


def _truncation(history: History) -> Sign | None:
    found = _truncation_rise(history)
    if found is None:
        return None
    text = f"truncation rate {_against(found.now, found.base)}"
    return _sign("truncation", found.height, TRUNCATION, text, found.error)


def _repetition(history: History) -> Sign | None:
    found = _repetition_rise(history)
    if found is None:
        return None
    text = f"share of repetitive tokens {_against(found.now, found.base)}"
    least = _scaled(REPETITION, found.base.value)
    return _sign("repetition", found.height, least, text, found.error)


def _credit(history: History) -> Sign | None:
    rows = now_rows(history)
    share = mark(rows, repetition, EARLY)
    if share is None or share.value <= 0:
        return None
    mean = math.fsum((r.repetition or 0.0) * (r.credit or 0.0) for r in rows)
    mean /= share.value * share.num
    if mean < CREDIT_MEAN:
        return None
    text = f"the mean advantage of repetitive tokens is {mean:+.2f} over the last {share.num} steps"
    return _sign("credit", share.value, CREDIT, text)


def _gap(history: History) -> Sign | None:
    before = [row.gap for row in baseline_rows(history, now_rows(history)) if row.gap is not None]
    now = [row.gap for row in now_rows(history) if row.gap is not None]
    if not before or len(now) < EARLY:
        return None
    # Medians: where few rollouts stop, one of them makes the mean of a step.
    base, value = median(before), median(now)
    text = f"stop gap {value:.1f} nats over the last {len(now)} steps, {base:.1f} at the start"
    return _sign("gap", value - base, _scaled(GAP, base), text)


def _length(history: History) -> Sign | None:
    now, before = mark(now_rows(history), length, RECENT), mark(history.recent[:-RECENT], length, 5)
    if now is None or before is None or before.value <= 0:
        return None
    error = scatter(history.recent, length) / before.value * math.sqrt(1 / RECENT + 1 / before.num)
    least = (max(LENGTH[0], 1 + NOISE[0] * error), max(LENGTH[1], 1 + NOISE[1] * error))
    text = f"mean length {now.value:.0f} over the last {now.num} steps, {before.value:.0f} before"
    return _sign("length", now.value / before.value, least, text)


def _accuracy(history: History) -> Sign | None:
    best, now = history.best_accuracy, mark(history.recent[-LONG:], accuracy, LONG)
    if best is None or now is None:
        return None
    error = scatter(history.recent, accuracy) * math.sqrt(2 / LONG)
    text = f"rollout accuracy {_against(now, best)}"
    return _sign("accuracy", best.value - now.value, ACCURACY, text, error)


def _evaluation(history: History) -> Sign | None:
    best, last = history.best_evaluation, history.last_evaluation
    if best is None or last is None:
        return None
    fall, error = best.accuracy - last.accuracy, math.hypot(best.error, last.error)
    text = f"held-out accuracy {last.accuracy:.2f} at step {last.step}, "
    text += f"{best.accuracy:.2f} at step {best.step}"
    return _sign("evaluation", fall, EVALUATION, text, error, NOISE_EVALUATION)


def _scaled(least: tuple[float, float], base: float) -> tuple[float, float]:
    return max(least[0], RELATIVE[0] * base), max(least[1], RELATIVE[1] * base)


def _sign(
    name: str,
    value: float,
    least: tuple[float, float],
    text: str,
    error: float = 0.0,
    errors: tuple[float, float] = NOISE,
) -> Sign | None:
    """The sign that a value gives: it warns above the upper thresholds, is one above the lower."""
    if value >= max(least[1], errors[1] * error):
        return Sign(name, True, text)
    return Sign(name, False, text) if value >= max(least[0], errors[0] * error) else None


def _over(now: Mark) -> str:
    return f"{now.value:.2f} over the last {now.num} steps"


def _against(now: Mark, base: Mark) -> str:
    steps = f"steps {base.first}-{base.last}" if base.first < base.last else f"step {base.first}"
    return f"{_over(now)}, {base.value:.2f} in {steps}"
