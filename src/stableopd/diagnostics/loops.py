"""Loops in a rollout: stretches that repeat themselves back to back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableopd.diagnostics.ngrams import (
    as_hashes,
    equal_neighbours,
    join_hashes,
    join_ranks,
    same_windows,
    window_hashes,
    window_ranks,
)
from stableopd.types import ConfigError

__all__ = ["Loop", "find_loops"]


@dataclass(frozen=True, slots=True)
class Loop:
    """A stretch x[start:stop] with x[i] == x[i - period] for every i >= start + period.

    Attributes:
        start: Its first unit.
        stop: One past its last unit.
        period: Length of one copy, in units; the smallest that explains the stretch.
        copies: (stop - start) / period; the last copy may be a part of one.
    """

    start: int
    stop: int
    period: int
    copies: float


def find_loops(
    ids: Sequence[int] | NDArray[np.integer], ngram: int = 8, min_copies: float = 3.0
) -> tuple[Loop, ...]:
    """Find every maximal stretch of a sequence that repeats itself back to back.

    A stretch counts when it holds `min_copies` copies of its period and is at least 2n units long
    (or "!!!" would be a loop). Text that comes back later, once or after something else, is none.

    For widths w = n, 2n, 4n, ... every window of w units is paired with its nearest earlier
    occurrence. A loop of period p <= w that is at least p + w long is then exactly a run of
    windows whose earlier occurrence is p back: a window as long as the period cannot recur sooner.
    Only windows that recur at one width are looked at in the next, so that text without long
    repeats ends after one sort; the worst case is T log(T)^2.

    Args:
        ids: (T,) ids of the units, tokens or words.
        ngram: n, in units.
        min_copies: Fewest copies, more than 2.

    Returns:
        The loops by start, none inside another; two may overlap.

    Raises:
        ConfigError: `ngram` is less than 1, or `min_copies` not more than 2.
    """
    if ngram < 1:
        raise ConfigError(f"ngram must be at least 1, not {ngram}; the default is 8.")
    if not min_copies > 2:
        raise ConfigError(f"min_copies must be more than 2, not {min_copies}; the default is 3.")
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1).view(np.uint64)
    if len(tokens) < 2 * ngram:
        return ()
    found = _runs(tokens, ngram, min_copies, exact=False)
    if found is None:  # two different windows have the same hash
        found = _runs(tokens, ngram, min_copies, exact=True)
    assert found is not None
    return _outermost(found)


def _runs(
    tokens: NDArray[np.uint64], ngram: int, min_copies: float, exact: bool
) -> list[Loop] | None:
    """All loops, by widening windows; None where a hash was ambiguous."""
    ranks = window_ranks(tokens, ngram) if exact else None
    hashes = window_hashes(tokens, ngram) if ranks is None else as_hashes(ranks)
    later, earlier = equal_neighbours(hashes)
    if not exact and not same_windows(tokens, ngram, later, earlier):
        return None
    loops: list[Loop] = []
    last, width, level = 0, ngram, 0
    while len(later):
        loops += _runs_of_distance(later, earlier, last, width, min_copies, 2 * ngram)
        last = width
        # A loop of a period between two widths must still hold a window and its copy.
        step = max(1, min(width, int(width * (min_copies - 2))))
        width += step
        if (last + 1) * min_copies > len(tokens) or width > len(tokens):
            break
        recurs = np.zeros(len(hashes), dtype=np.bool_)
        recurs[later] = recurs[earlier] = True
        for loop in loops:
            recurs[loop.start : max(0, loop.stop - last + 1)] = True
        wider = recurs[:-step] & recurs[step:]
        # Inside a loop that is known, windows after its first copy are those of the first again;
        # and one copy before its end they are in no loop of a longer period q, or both periods
        # would hold over p + q units, which is one period then (Fine and Wilf).
        for loop in loops:
            wider[loop.start + loop.period : max(0, loop.stop - loop.period - width + 1)] = False
        places = np.flatnonzero(wider)
        parts, level = hashes, level + 1
        if ranks is not None:
            ranks = join_ranks(ranks, step)
            hashes = as_hashes(ranks)
        else:
            hashes = join_hashes(hashes, step, level)
        later, earlier = equal_neighbours(hashes, places)
        if not exact and not _same_halves(parts, step, later, earlier):
            return None
    return loops


def _same_halves(
    parts: NDArray[np.uint64], step: int, later: NDArray[np.int64], earlier: NDArray[np.int64]
) -> bool:
    """Whether joined windows are equal, given that equal hashes of their parts are proof."""
    return np.array_equal(parts.take(later), parts.take(earlier)) and np.array_equal(
        parts.take(later + step), parts.take(earlier + step)
    )


def _runs_of_distance(
    later: NDArray[np.int64],
    earlier: NDArray[np.int64],
    above: int,
    width: int,
    min_copies: float,
    min_units: int,
) -> list[Loop]:
    """Loops of a period p, `above` < p <= `width`: runs of windows that recur p places back."""
    distance = later - earlier
    near = (distance > above) & (distance <= width)
    if not near.any():
        return []
    order = np.argsort(later[near])
    place, period = later[near][order], distance[near][order]
    breaks = np.flatnonzero((np.diff(place) != 1) | (np.diff(period) != 0)) + 1
    first = np.concatenate(([0], breaks))
    last = np.concatenate((breaks, [len(place)])) - 1
    starts, stops, periods = place[first] - period[first], place[last] + width, period[first]
    size = stops - starts
    long = (size >= min_units) & (size / periods >= min_copies)
    found = zip(starts[long].tolist(), stops[long].tolist(), periods[long].tolist(), strict=True)
    return [Loop(start, stop, period, (stop - start) / period) for start, stop, period in found]


def _outermost(loops: list[Loop]) -> tuple[Loop, ...]:
    """Drop loops that lie inside another, by start."""
    kept: list[Loop] = []
    for loop in sorted(loops, key=lambda loop: (loop.start, -loop.stop, loop.period)):
        if not kept or loop.stop > kept[-1].stop:
            kept.append(loop)
    return tuple(kept)
