"""Lengths that stream by: a histogram in constant memory, and whether they pile up at a budget."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stableopd.diagnostics.summary import Histogram

__all__ = ["Lengths", "is_pile_up"]

# Lengths below this are counted one by one, longer ones in classes of 2, 4, 8, ...
_NUM_CLASSES = 2**17

# Design: about as many bins as can be told apart on a page.
_NUM_BINS = 40
_MOST_BINS = 128  # a budget below 128 may have as many bins as tokens

# Design: a pile of 3 rollouts and of 1%, more than 10 times as many as the lengths just below
# would give by themselves. Answers that are all alike may well be 20 tokens long, but then the
# others are hardly shorter, or there are no others; budgets are longer.
_PILE_COUNT, _PILE_SHARE, _PILE_DENSITY = 3, 0.01, 10
_NEAR, _PILE_LENGTH, _ONLY_LENGTH = 0.8, 16, 64

# Design: texts cut off at the same token differ in characters, so that a pile there is chance
# (measured: 6 of 480 by chance) unless it is large, as where tokens are characters.
_PILE_SHARE_OF_CHARACTERS = 0.1


class Lengths:
    """Counts of rollouts by length.

    Attributes:
        maximum: The longest so far; 0 before the first.
        num_rollouts: How many there are.
    """

    def __init__(self) -> None:
        self.maximum = 0
        self.num_rollouts = 0
        self._width = 1
        self._counts = np.zeros(1024, dtype=np.int64)
        self._cut = np.zeros(1024, dtype=np.int64)

    def add(self, length: int, truncated: bool) -> None:
        """Count a rollout."""
        while length // self._width >= _NUM_CLASSES:
            self._width *= 2
            self._counts, self._cut = _halve(self._counts), _halve(self._cut)
        place = length // self._width
        if place >= len(self._counts):
            more = np.zeros(max(place + 1, 2 * len(self._counts)) - len(self._counts), np.int64)
            self._counts = np.concatenate((self._counts, more))
            self._cut = np.concatenate((self._cut, more))
        self._counts[place] += 1
        self._cut[place] += truncated
        self.maximum = max(self.maximum, length)
        self.num_rollouts += 1

    def num_between(self, start: int, stop: int) -> int:
        """Number of rollouts with start <= length < stop."""
        first, last = -(-start // self._width), -(-stop // self._width)
        return int(self._counts[first:last].sum())

    def histogram(self, budget: int | None, pile: int = 0, by_length: bool = False) -> Histogram:
        """Count rollouts in about 40 bins.

        Args:
            budget: Where the last bin begins, so that cut-off rollouts stand apart; None where
                rollouts are not cut off at a known length.
            pile: How many of the longest rollouts count as cut off beside those added as such.
            by_length: Whether these alone count as cut off.

        Returns:
            Bins from 0 to past the longest length; exact below 131,072.
        """
        if not self.num_rollouts:
            none = np.zeros(0, dtype=np.int64)
            return Histogram(np.zeros(0), none, none)
        edges = _edges(self.maximum, budget)
        places = np.minimum(-(-edges // self._width), len(self._counts))
        places[-1] = len(self._counts)
        counts, truncated = (
            np.diff(np.concatenate(([0], np.cumsum(values)))[places])
            for values in (self._counts, self._cut)
        )
        if by_length:
            truncated[:] = 0
        truncated[np.searchsorted(edges, self.maximum, side="right") - 1] += pile
        return Histogram(edges.astype(np.float64), counts, truncated)


def is_pile_up(lengths: Lengths, num_longest: int, unit: str = "tokens") -> bool:
    """Whether rollouts pile up at the longest length, as they do where a budget cuts them off.

    True where, with m >= 16 the longest length and c rollouts exactly that long among N,
    c >= 3, c >= 0.01 N, c > 10 d with d the number of rollouts per length in [0.8 m, m), and at
    least half of the N - c shorter ones are shorter than 0.8 m. Of lengths in characters c must
    be at least 0.1 N.

    Args:
        lengths: All lengths.
        num_longest: c.
        unit: What lengths are counted in, "tokens" or "characters".

    Returns:
        The answer; where no rollout is shorter, whether m >= 64. (The rule is the project's.)
    """
    longest, total = lengths.maximum, lengths.num_rollouts
    share = _PILE_SHARE_OF_CHARACTERS if unit == "characters" else _PILE_SHARE
    if longest < _PILE_LENGTH or num_longest < max(_PILE_COUNT, share * total):
        return False
    if num_longest == total:
        return longest >= _ONLY_LENGTH
    near = math.ceil(_NEAR * longest)
    density = lengths.num_between(near, longest) / (longest - near)
    is_usual = lengths.num_between(0, near) * 2 < total - num_longest
    return num_longest > _PILE_DENSITY * density and not is_usual


def _halve(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.pad(counts, (0, len(counts) % 2)).reshape(-1, 2).sum(1)


def _edges(longest: int, budget: int | None) -> NDArray[np.int64]:
    if budget is None or budget > longest:
        width = _nice_width(longest + 1)
        return np.arange(0, longest + width + 1, width, dtype=np.int64)
    width = _divisor(budget) or _nice_width(budget)
    below = np.arange(0, budget, width, dtype=np.int64)
    return np.concatenate((below, [budget, max(longest + 1, budget + width)]))


def _divisor(budget: int) -> int | None:
    """The width nearest to a fortieth of the budget that divides it, if there is one near."""
    # By the number of bins, of which there are few, and not by the widths, which grow with it.
    widths = [budget // bins for bins in range(20, _MOST_BINS) if budget % bins == 0]
    fitting = [width for width in widths if width >= max(1, budget // 64)]
    return min(fitting, key=lambda w: abs(math.log(w * _NUM_BINS / budget)), default=None)


def _nice_width(span: int) -> int:
    """1, 2 or 5 times a power of ten, so that at most 40 bins cover the span."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power * _NUM_BINS >= span:
                return digit * power
        power *= 10
