"""One quantity over the steps of a run, or of several runs that differ only in their seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stableopd.report.estimates import half_widths

__all__ = ["Arms", "Lines", "Series", "band_name", "read_series", "thin"]

Lines = Sequence[Mapping[str, Any]]
Arms = Mapping[str, Sequence[Lines]]

# Design: with fewer seeds the band is their range, and hides nothing.
MIN_SEEDS_FOR_INTERVAL = 5

MAX_POINTS = 1000  # design: more points than pixels say nothing more

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A quantity over steps: the mean over seeds, and the band around it.

    Attributes:
        steps: (S,) steps, in order.
        mean: (S,) mean over the seeds that have a number at the step; nan where none has.
        low: (S,) lower edge of the band; the mean itself where there is one seed.
        high: (S,) upper edge.
        num_seeds: Seeds with any number.
    """

    steps: Array
    mean: Array
    low: Array
    high: Array
    num_seeds: int


def band_name(num_seeds: int) -> str:
    """What the band around an arm of so many seeds is; "" for one seed, which has none."""
    if num_seeds < 2:
        return ""
    few = num_seeds < MIN_SEEDS_FOR_INTERVAL
    return "smallest to largest seed" if few else "95% interval of the mean"


def read_series(seeds: Sequence[Lines], key: str) -> Series | None:
    """Take one quantity out of the lines of metrics of an arm.

    Args:
        seeds: The lines of each seed; lines without the key are left out.
        key: A name of docs/metrics.md.

    Returns:
        The series, of at most 1,000 points with the extremes kept; None where no seed has a
        number.
    """
    given = [
        {
            float(line["step"]): _number(line[key])
            for line in lines
            if key in line and "step" in line
        }
        for lines in seeds
    ]
    given = [points for points in given if any(map(math.isfinite, points.values()))]
    if not given:
        return None
    steps = np.array(sorted({step for points in given for step in points}))
    values = np.array([[points.get(step, math.nan) for step in steps] for points in given])
    mean, low, high = _mean_and_band(values)
    kept = thin((mean, low, high))
    return Series(steps[kept], mean[kept], low[kept], high[kept], len(given))


def thin(columns: Sequence[Array], limit: int = MAX_POINTS) -> NDArray[np.int64]:
    """Choose points of a long line so that it looks the same: every extreme stays.

    Args:
        columns: Arrays (S,) that are drawn together; nan is a gap.
        limit: About so many points are kept.

    Returns:
        Indices into the arrays, rising: all of them, or the ends and the places of the smallest
        and the largest value of each column in each of equal stretches.
    """
    size = len(columns[0])
    if size <= limit:
        return np.arange(size)
    chosen = {0, size - 1}
    for stretch in np.array_split(np.arange(size), limit // (2 * len(columns))):
        for column in columns:
            values = column[stretch]
            if np.isfinite(values).any():
                chosen |= {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
            else:
                chosen.add(int(stretch[0]))
    return np.array(sorted(chosen))


def _mean_and_band(values: NDArray[np.float64]) -> tuple[Array, Array, Array]:
    """From (seeds, S), with nan where a seed has no number."""
    known = np.isfinite(values)
    counts = known.sum(axis=0)
    filled = np.where(known, values, 0.0)
    mean = np.where(counts > 0, filled.sum(axis=0) / np.maximum(counts, 1), math.nan)
    if len(values) < MIN_SEEDS_FOR_INTERVAL:
        low = np.where(known, values, math.inf).min(axis=0)
        high = np.where(known, values, -math.inf).max(axis=0)
    else:
        squares = np.where(known, (values - mean) ** 2, 0.0).sum(axis=0)
        half = half_widths(np.sqrt(squares / np.maximum(counts - 1, 1)), counts)
        half = np.where(np.isnan(half), 0.0, half)
        low, high = mean - half, mean + half
    return mean, np.where(counts > 0, low, math.nan), np.where(counts > 0, high, math.nan)


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else math.nan
