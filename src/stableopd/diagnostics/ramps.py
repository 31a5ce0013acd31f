"""Least-squares fits of a level that changes in ramps; `onset.py` says what for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fit", "Series", "fit_phases", "onset_interval"]

MIN_STEPS = 3  # design: steps that a level after a change must have
MIN_ROLLOUTS = 32  # measured: with fewer in a level, 4 rollouts a step make phases out of noise
MIN_TWO_RAMPS = 12  # design: with fewer steps two ramps could describe anything
NOISE = 0.02  # design: the smallest standard deviation believed in
MAX_CORRELATION = 0.8  # design: at least a ninth of the steps count as independent
NUM_PARAMETERS = (1, 2, 5, 9)  # a bend counts as one and a half: measured on short noise
LIMIT = 6.63  # chi squared, 99%: measured to cover 89% or more, 3.84 only 72%

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Series:
    """A rate over steps.

    Attributes:
        steps: (n,) distinct steps in order.
        rates: (n,) the rate at each.
        weights: (n,) how much each counts; their mean is about 1.
        min_steps: Steps that a level after a change must have.
    """

    steps: Array
    rates: Array
    weights: Array
    min_steps: int = MIN_STEPS


@dataclass(frozen=True, slots=True)
class Fit:
    """A description of a series.

    Attributes:
        levels: Its levels in order; for a drift the values at both ends, for a constant one.
        ramps: Indices (last step at the old level, first step at the new one) of each ramp.
        rss: Weighted sum of squared residuals.
        bic: What it costs, the less the better.
        independent: Number of independent steps that the criterion reckons with.
    """

    levels: tuple[float, ...]
    ramps: tuple[tuple[int, int], ...]
    rss: float
    bic: float = math.nan
    independent: float = math.nan


@dataclass(frozen=True, slots=True)
class _Ramps:
    """Ramps g from index a to index b, and sums over the series: of w g, w g^2, w g y."""

    a: Indices
    b: Indices
    middle: Indices
    g: Array
    gg: Array
    gy: Array


def fit_phases(series: Series) -> list[Fit]:
    """Fit a constant, a drift, one ramp and, where the series is long enough, two ramps.

    Args:
        series: n steps, at least 3.

    Returns:
        The fits in that order, with their criterion of `find_onset`.
    """
    fits = [_constant(series), _drift(series), _one_ramp(series)]
    if len(series.rates) >= MIN_TWO_RAMPS:
        fits.append(_two_ramps(series, fits[-1]))
    closest = min(fits, key=lambda fit: fit.rss)
    n = len(series.rates)
    independent = max(n * _shrink(series.rates - _values(closest, series)), 2.0)
    return [
        Fit(
            fit.levels,
            fit.ramps,
            fit.rss,
            independent * math.log(fit.rss / n + NOISE**2) + p * math.log(independent),
            independent,
        )
        for fit, p in zip(fits, NUM_PARAMETERS, strict=False)
    ]


def onset_interval(series: Series, fit: Fit, ramp: int) -> tuple[int, int]:
    """Profile-likelihood interval of the start of a ramp; the other ramp stays where it is.

    Args:
        series: What was fitted.
        fit: A fit of `fit_phases`.
        ramp: Which of its ramps.

    Returns:
        The first and the last index that the ramp may start from; all of them for a drift.
    """
    n = len(series.rates)
    if not fit.ramps:
        return 0, n - 2
    best = fit.ramps[ramp]
    lowest = fit.ramps[ramp - 1][1] if ramp else 0
    highest = fit.ramps[ramp + 1][0] if ramp + 1 < len(fit.ramps) else n - 1
    ends = np.unique(np.concatenate([_knots(n, 128), _around(best[1], 1.0, n)]))
    ends = ends[(ends > lowest) & (ends <= highest)]
    starts = np.arange(lowest, highest)
    a, b = (grid.reshape(-1) for grid in np.meshgrid(starts, ends, indexing="ij"))
    a, b = a[a < b], b[a < b]
    own = _ramps(series, a, b)
    others = [_ramps(series, *_single(r)) for k, r in enumerate(fit.ramps) if k != ramp]
    if not others:
        gain = _gain_one(series, own)
    elif ramp == 0:
        gain = _gain_two(series, own, others[0])
    else:
        gain = _gain_two(series, others[0], own)
    rss = np.maximum(_total(series) - gain, 0.0) / n + NOISE**2
    limit = (fit.rss / n + NOISE**2) * math.exp(LIMIT / fit.independent)
    within = a[rss <= limit * (1 + 1e-9)]
    return min(int(within.min(initial=best[0])), best[0]), max(
        int(within.max(initial=best[0])), best[0]
    )


def _constant(series: Series) -> Fit:
    mean = float(np.average(series.rates, weights=series.weights))
    return Fit((mean,), (), _total(series))


def _drift(series: Series) -> Fit:
    """A drift is a ramp from the first step to the last."""
    n = len(series.rates)
    whole = _ramps(series, *_single((0, n - 1)))
    levels = _levels_one(series, whole)
    return Fit(levels, (), _total(series) - float(_gain_one(series, whole)[0]))


def _one_ramp(series: Series) -> Fit:
    n = len(series.rates)
    spacing, knots = (n - 1) / 63, _knots(n, 64)
    best = (0, n - 1)
    for _ in range(20):
        a, b = _pairs(knots)
        ramps = _ramps(series, a, b)
        gain = np.where(n - ramps.middle >= series.min_steps, _gain_one(series, ramps), -1.0)
        k = int(np.argmax(gain))
        found = (int(a[k]), int(b[k]))
        if found == best and spacing <= 1:
            break
        best, spacing = found, max(spacing / 4, 1.0)
        knots = np.unique(np.concatenate([_around(i, spacing, n) for i in best]))
    single = _ramps(series, *_single(best))
    rss = _total(series) - float(_gain_one(series, single)[0])
    return Fit(_levels_one(series, single), (best,), max(rss, 0.0))


def _two_ramps(series: Series, one: Fit) -> Fit:
    n = len(series.rates)
    spacing, knots = (n - 1) / 27, np.union1d(_knots(n, 28), np.asarray(one.ramps[0]))
    best: tuple[int, int, int, int] | None = None
    for _ in range(20):
        ramps = _ramps(series, *_pairs(knots))
        first, second = _reshape(ramps, (-1, 1)), _reshape(ramps, (1, -1))
        possible = (first.b <= second.a) & (second.middle - first.middle >= series.min_steps)
        possible &= n - second.middle >= series.min_steps
        gain = np.where(possible, _gain_two(series, first, second), -1.0)
        r, s = np.unravel_index(int(np.argmax(gain)), gain.shape)
        found = (int(ramps.a[r]), int(ramps.b[r]), int(ramps.a[s]), int(ramps.b[s]))
        if found == best and spacing <= 1:
            break
        best, spacing = found, max(spacing / 4, 1.0)
        knots = np.unique(np.concatenate([_around(i, spacing, n) for i in best]))
    assert best is not None
    first, second = _ramps(series, *_single(best[:2])), _ramps(series, *_single(best[2:]))
    rss = _total(series) - float(_gain_two(series, first, second)[0])
    levels = _levels_two(series, first, second)
    return Fit(levels, (best[:2], best[2:]), max(rss, 0.0))


def _knots(n: int, number: int) -> Indices:
    return np.unique(np.round(np.linspace(0, n - 1, min(n, number))).astype(np.int64))


def _around(index: int, spacing: float, n: int) -> Indices:
    places = np.round(index + spacing * np.arange(-4, 5)).astype(np.int64)
    return np.unique(places.clip(0, n - 1))


def _pairs(knots: Indices) -> tuple[Indices, Indices]:
    i, j = np.triu_indices(len(knots), 1)
    return knots[i], knots[j]


def _single(ramp: tuple[int, int]) -> tuple[Indices, Indices]:
    return np.asarray([ramp[0]], dtype=np.int64), np.asarray([ramp[1]], dtype=np.int64)


def _reshape(ramps: _Ramps, shape: tuple[int, int]) -> _Ramps:
    """The same ramps as a column or as a row, so that all pairs can be formed."""
    a, b, middle = ramps.a.reshape(shape), ramps.b.reshape(shape), ramps.middle.reshape(shape)
    g, gg, gy = ramps.g.reshape(shape), ramps.gg.reshape(shape), ramps.gy.reshape(shape)
    return _Ramps(a, b, middle, g, gg, gy)


def _ramps(series: Series, a: Indices, b: Indices) -> _Ramps:
    """Sums over the series for each ramp, from running sums."""
    x = series.steps - series.steps[0]
    w, y = series.weights, series.rates - _mean(series)
    w0, w1, w2, y0, y1 = (
        np.concatenate([[0.0], np.cumsum(values)])
        for values in (w, w * x, w * x * x, w * y, w * x * y)
    )
    start, length = x[a], x[b] - x[a]
    n, inner = len(x), a + 1

    def within(sums: Array) -> Array:
        return sums[b] - sums[inner]

    g = (within(w1) - start * within(w0)) / length + w0[n] - w0[b]
    gg = (within(w2) - 2 * start * within(w1) + start**2 * within(w0)) / length**2
    gy = (within(y1) - start * within(y0)) / length + y0[n] - y0[b]
    middle = np.asarray(np.searchsorted(x, start + length / 2), dtype=np.int64)
    return _Ramps(a, b, middle, g, gg + w0[n] - w0[b], gy)


def _mean(series: Series) -> float:
    return float(np.average(series.rates, weights=series.weights))


def _total(series: Series) -> float:
    return float((series.weights * (series.rates - _mean(series)) ** 2).sum())


def _gain_one(series: Series, ramps: _Ramps) -> Array:
    """How much of the sum of squares a ramp explains (rates are centred: sum of w y is 0)."""
    variance = ramps.gg - ramps.g**2 / series.weights.sum()
    return np.where(variance > 1e-12, ramps.gy**2 / np.maximum(variance, 1e-12), 0.0)


def _moments(series: Series, first: _Ramps, second: _Ramps) -> tuple[Array, Array, Array, Array]:
    """Second moments about the mean of two ramps; the second starts where the first has ended."""
    total = float(series.weights.sum())
    c11 = first.gg - first.g**2 / total
    c22 = second.gg - second.g**2 / total
    # Where the second is above 0 the first is 1, so that the sum of their product is that of g2.
    c12 = second.g - first.g * second.g / total
    return c11, c12, c22, c11 * c22 - c12**2


def _gain_two(series: Series, first: _Ramps, second: _Ramps) -> Array:
    c11, c12, c22, det = _moments(series, first, second)
    b1, b2 = first.gy, second.gy
    gain = (b1**2 * c22 - 2 * b1 * b2 * c12 + b2**2 * c11) / np.where(det > 1e-12, det, 1.0)
    return np.where(det > 1e-12, gain, 0.0)


def _levels_one(series: Series, ramp: _Ramps) -> tuple[float, float]:
    total = float(series.weights.sum())
    variance = float(ramp.gg[0] - ramp.g[0] ** 2 / total)
    height = float(ramp.gy[0]) / variance if variance > 1e-12 else 0.0
    low = _mean(series) - height * float(ramp.g[0]) / total
    return _clip(low), _clip(low + height)


def _levels_two(series: Series, first: _Ramps, second: _Ramps) -> tuple[float, float, float]:
    c11, c12, c22, det = (float(v[0]) for v in _moments(series, first, second))
    b1, b2, total = float(first.gy[0]), float(second.gy[0]), float(series.weights.sum())
    d = (b1 * c22 - b2 * c12) / det if det > 1e-12 else 0.0
    e = (b2 * c11 - b1 * c12) / det if det > 1e-12 else 0.0
    low = _mean(series) - (d * float(first.g[0]) + e * float(second.g[0])) / total
    return _clip(low), _clip(low + d), _clip(low + d + e)


def _clip(level: float) -> float:
    return min(max(level, 0.0), 1.0)


def _values(fit: Fit, series: Series) -> Array:
    """The fitted rate at each step."""
    x = series.steps
    if not fit.ramps:
        return np.interp(x, [x[0], x[-1]], [fit.levels[0], fit.levels[-1]])
    places = [x[i] for ramp in fit.ramps for i in ramp]
    levels = [level for level in fit.levels for _ in range(2)][1:-1]
    return np.interp(x, places, levels)


def _shrink(residuals: Array) -> float:
    """The share of steps that are independent, (1 - r) / (1 + r), r the autocorrelation."""
    power = float((residuals**2).sum())
    r = float((residuals[1:] * residuals[:-1]).sum()) / power if power > 1e-12 else 0.0
    r = min(max(r, 0.0), MAX_CORRELATION)
    return (1 - r) / (1 + r)
