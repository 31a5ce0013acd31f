"""When a rate changed phase: at which step, how fast, between which levels, how surely.

Four descriptions are fitted by weighted least squares with w_i = counts_i / mean(counts). In
them g(x; a, b) = clip((x - a) / (b - a), 0, 1) is a ramp from step a to b, both observed:

    constant    y = c
    drift       y = c + d x
    one ramp    y = c + d g(x; a, b)
    two ramps   y = c + d g(x; a, b) + e g(x; a', b'),  b <= a'      (from 12 steps on)

over all ramps of a coarse grid and then of finer ones around the best, down to single steps.
They are compared by BIC = m ln(RSS / n + 0.02^2) + p ln m with p = 1, 2, 5, 9 and
m = n (1 - r) / (1 + r) independent steps, r being the autocorrelation at lag 1 of what the
closest of them leaves over. 0.02 is the smallest noise believed in, so that a rate of exactly
0 does not make every flicker a phase. A single step far outside its four neighbours is moved to
the nearest of them, except for a low first one: a run may run away after one step.

A change is material if it is of 0.2 or more; of 0.4 or more if it takes more than half of the
run, else it is called drift and "none". A level after a change must have 3 steps and, where
counts are given, 32 rollouts. Two rises in sequence are one. A rise of which at most a third is
left at the end has healed. A fall that a rise follows is passed over. A run that ends while it
rises has risen.

The confidence is the sum of the weights exp(-BIC / 2) of those descriptions that hold a
material change, over that of all; from 0.5 on the best of them is reported. The interval is
{a : m ln(RSS(a) / RSS) <= 6.63}, minimised over b: the 99% point of chi squared, which on
made series covers the true step in 89% or more, where the usual 95% point has 72% or more.

Least squares over break points after Bai (1997), the criterion after Yao (1988); thresholds are
design, or measured on made series where the code says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopd.diagnostics.ramps import (
    MIN_ROLLOUTS,
    MIN_STEPS,
    Fit,
    Series,
    fit_phases,
    onset_interval,
)

__all__ = ["Onset", "find_onset"]

MIN_CHANGE = 0.2  # design: a smaller difference of levels is no change of phase
MIN_DRIFT = 0.4  # design: a change that takes more than half of the run must be this large
HEALED = 1 / 3  # design: a rise has healed when at most this part of it is left
MIN_POINTS = 8  # design: with fewer steps nothing is said
END_STEPS = 10  # design: `end` is the mean of the last 10 steps, of a quarter in short runs

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Onset:
    """What became of a rate over the steps of a run.

    Attributes:
        kind: "none" (no change of phase), "rise" (it went to a higher level and stayed), "healed"
            (it rose and came back), "fall", or "too short" (too few steps to say).
        step: The first step that is off the level before the change; None without one.
        interval: 95% interval of `step`; None without one.
        width: Steps from `step` to the first at the level `after`; 0 for a jump within a step.
        before: Level before the change, or of all steps where there is none.
        after: Level after it (for "healed" the level at the height).
        end: Mean of the last steps.
        confidence: Probability that there is a change of phase, from 0 to 1.
        text: The same as a sentence.
    """

    kind: Literal["none", "rise", "healed", "fall", "too short"]
    step: int | None
    interval: tuple[int, int] | None
    width: float
    before: float
    after: float
    end: float
    confidence: float
    text: str


@dataclass(frozen=True, slots=True)
class _Change:
    """A material change that a fit holds: which ramp it begins with, and what it leads to."""

    kind: Literal["rise", "healed", "fall"]
    ramp: int
    start: int
    stop: int
    before: float
    after: float


def find_onset(steps: Sequence[int], rates: ArrayLike, counts: ArrayLike | None = None) -> Onset:
    """Find the change of phase of a rate.

    The module's own text states the method: phases by weighted least squares, compared by BIC.

    Args:
        steps: (n,) steps in any order, with gaps if need be; of equal ones the mean is taken.
        rates: (n,) a share from 0 to 1 for each; nan is left out.
        counts: (n,) rollouts of each step; all alike if None.

    Returns:
        What happened; kind "too short" for fewer than 8 steps with a rate.

    Raises:
        ValueError: The lengths differ, or a rate lies outside [0, 1].
    """
    series = _clean(steps, rates, counts)
    n = len(series.rates)
    end = _end(series.rates)
    if n < MIN_POINTS:
        what = f"only {n} step{'s have' if n != 1 else ' has'} a rate" if n else "no rates"
        return _unsure("too short", series, end, 0.0, what)
    smooth = replace(series, rates=_without_outliers(series.rates))
    fits = fit_phases(smooth)
    changes = [_change(fit, smooth) for fit in fits]
    lowest = min(fit.bic for fit in fits)
    weights = [math.exp((lowest - fit.bic) / 2) for fit in fits]
    total = math.fsum(weights)
    confidence = sum(w for w, change in zip(weights, changes, strict=True) if change) / total
    known = [k for k, change in enumerate(changes) if (change is not None) == (confidence >= 0.5)]
    best = min(known, key=lambda k: fits[k].bic)
    change = changes[best]
    if change is None:
        first, last = fits[best].levels[0], fits[best].levels[-1]
        moved = abs(last - first) >= MIN_CHANGE
        what = f"a slow drift from {first:.2f} to {last:.2f}" if moved else "no change of phase"
        return _unsure("none", series, end, confidence, what)
    interval = onset_interval(smooth, fits[best], change.ramp)
    return _found(change, smooth.steps, interval, end, confidence)


def _found(
    change: _Change, x: Array, interval: tuple[int, int], end: float, confidence: float
) -> Onset:
    step = int(x[change.start + 1])
    low, high = int(x[interval[0]]) + 1, int(x[interval[1] + 1])
    width = float(x[change.stop] - x[change.start + 1])
    steps = "at once" if width == 0 else f"within {width:.0f} step{'s' * (width != 1)}"
    text = (
        f"{'Falls' if change.kind == 'fall' else 'Rises'} from {change.before:.2f} to "
        f"{change.after:.2f} {steps} from step {step} (95%: {low} to {high})"
    )
    if change.kind == "healed":
        text += f" and comes back, to {end:.2f} at the end"
    elif change.kind == "rise" and change.stop == len(x) - 1:
        text += " and is still rising at the end"
    return Onset(
        kind=change.kind,
        step=step,
        interval=(low, high),
        width=width,
        before=change.before,
        after=change.after,
        end=end,
        confidence=confidence,
        text=f"{text}; confidence {confidence:.2f}.",
    )


def _clean(steps: Sequence[int], rates: ArrayLike, counts: ArrayLike | None) -> Series:
    x = np.asarray(steps, dtype=np.float64).reshape(-1)
    y = np.asarray(rates, dtype=np.float64).reshape(-1)
    w = np.ones_like(y) if counts is None else np.asarray(counts, dtype=np.float64).reshape(-1)
    if not len(x) == len(y) == len(w):
        raise ValueError(f"{len(x)} steps, {len(y)} rates and {len(w)} counts do not match.")
    kept = ~np.isnan(y) & (w > 0)
    x, y, w = x[kept], y[kept], w[kept]
    if len(y) and (y.min() < 0 or y.max() > 1):
        raise ValueError(f"Rates must lie in [0, 1], not in [{y.min():g}, {y.max():g}].")
    unique, place = np.unique(x, return_inverse=True)
    weight, mean = np.zeros_like(unique), np.zeros_like(unique)
    np.add.at(weight, place, w)
    np.add.at(mean, place, w * y)
    mean /= np.maximum(weight, 1e-300)
    min_steps = MIN_STEPS
    if counts is not None and len(weight):
        needed = math.ceil(MIN_ROLLOUTS / weight.mean())
        min_steps = max(MIN_STEPS, min(needed, len(weight) // 4))
    if len(weight):
        # A step with very many rollouts is no truer than the process that it was drawn from.
        weight = np.clip(weight / weight.mean(), 0.25, 4.0)
    return Series(unique, np.clip(mean, 0.0, 1.0), weight, min_steps)


def _end(rates: Array) -> float:
    if not len(rates):
        return math.nan
    return float(rates[-max(1, min(END_STEPS, len(rates) // 4)) :].mean())


def _without_outliers(rates: Array) -> Array:
    """Move single steps that lie far outside the range of their four neighbours to its edge.

    The first is moved down alone: what is low there may be all that there is before a rise.
    """
    n = len(rates)
    padded = np.pad(rates, 2, constant_values=np.nan)
    around = np.stack([padded[k : k + n] for k in (0, 1, 3, 4)])
    low, high = np.nanmin(around, axis=0), np.nanmax(around, axis=0)
    noise = 1.4826 * float(np.median(np.abs(np.diff(rates)))) / math.sqrt(2)
    margin = max(0.1, 3 * noise)
    moved = np.where((rates > high + margin) | (rates < low - margin), rates.clip(low, high), rates)
    moved[0] = min(moved[0], rates[0])
    return moved


def _change(fit: Fit, series: Series) -> _Change | None:
    """The material change that a fit holds, if it does."""
    n = len(series.rates)
    levels, ramps = fit.levels, fit.ramps
    if not ramps:
        return _drift(fit, n)
    found = _first_material(levels, ramps)
    if found is None:
        return None
    width = series.steps[found.stop] - series.steps[found.start + 1]
    slow = width > (series.steps[-1] - series.steps[0]) / 2
    return None if slow and abs(found.after - found.before) < MIN_DRIFT else found


def _first_material(
    levels: tuple[float, ...], ramps: tuple[tuple[int, int], ...]
) -> _Change | None:
    jumps = [after - before for before, after in pairwise(levels)]
    whole = levels[-1] - levels[0]
    for k, jump in enumerate(jumps):
        start, stop = ramps[k]
        later = sum(jumps[k + 1 :])
        # Two halves of one change, each too small alone, count together.
        together = jump * later > 0 and abs(jump) < MIN_CHANGE <= abs(whole)
        together &= k == 0 and abs(later) < MIN_CHANGE
        if abs(jump) < MIN_CHANGE and not together:
            continue
        if jump < 0 and later >= MIN_CHANGE:
            continue  # it improved first; what matters is the rise that follows
        kind = "rise" if jump > 0 else "fall"
        if jump * later > 0:
            # What creeps on after the change belongs to the level, but not to the width.
            stop = ramps[-1][1] if together or abs(later) >= MIN_CHANGE else stop
            return _Change(kind, k, start, stop, levels[k], levels[-1])
        if jump > 0 and jump + later <= HEALED * jump:
            kind = "healed"
        return _Change(kind, k, start, stop, levels[k], levels[k + 1])
    return None


def _drift(fit: Fit, n: int) -> _Change | None:
    if len(fit.levels) < 2 or abs(fit.levels[1] - fit.levels[0]) < MIN_DRIFT:
        return None
    before, after = fit.levels
    return _Change("rise" if after > before else "fall", 0, 0, n - 1, before, after)


def _unsure(
    kind: Literal["none", "too short"], series: Series, end: float, confidence: float, what: str
) -> Onset:
    level = float("nan")
    if len(series.rates):
        level = float(np.average(series.rates, weights=series.weights))
    mean = "" if math.isnan(level) else f"; the mean is {level:.2f}"
    text = f"{what[0].upper()}{what[1:]}{mean}."
    return Onset(kind, None, None, 0.0, level, level, end, confidence, text)
