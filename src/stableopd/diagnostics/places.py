"""Repetition and advantage by position in the completion, in at most 64 bins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stableopd.diagnostics.summary import Positions

__all__ = ["PositionSums"]

_NUM_BINS = 64


class PositionSums:
    """Sums by step and position. Bins are 1, 2, 4, ... units wide, as the longest rollout asks."""

    def __init__(self) -> None:
        self._width = 1
        self._longest = 0
        # By step: units, repetitive units, units with an advantage, sum of advantages. Counts are
        # exact as floats up to 2^53.
        self._sums: dict[int, NDArray[np.float64]] = {}

    def add(
        self,
        step: int | None,
        labels: NDArray[np.bool_],
        advantages: NDArray[np.float64] | None,
    ) -> None:
        """Add a rollout.

        Args:
            step: Its step; None where unknown.
            labels: (U,) which units are repetitive.
            advantages: (U,) in nats, values that are not finite count for none; None for none.
        """
        while len(labels) > self._width * _NUM_BINS:
            self._width *= 2
            for key, sums in self._sums.items():
                self._sums[key] = np.hstack((sums[:, ::2] + sums[:, 1::2], np.zeros_like(sums)))[
                    :, :_NUM_BINS
                ]
        key = -1 if step is None else step
        if key not in self._sums:
            self._sums[key] = np.zeros((4, _NUM_BINS))
        if not len(labels):
            return
        self._longest = max(self._longest, len(labels))
        starts = np.arange(0, len(labels), self._width)
        sums = self._sums[key][:, : len(starts)]
        sums[0] += np.diff(starts, append=len(labels))
        sums[1] += np.add.reduceat(labels, starts, dtype=np.int64)
        if advantages is not None:
            finite = np.isfinite(advantages)
            sums[2] += np.add.reduceat(finite, starts, dtype=np.int64)
            sums[3] += np.add.reduceat(np.where(finite, advantages, 0.0), starts)

    def positions(self) -> Positions:
        """The sums so far."""
        num_bins = -(-self._longest // self._width)
        steps = sorted(self._sums)
        sums = np.zeros((4, len(steps), num_bins))
        for row, step in enumerate(steps):
            sums[:, row] = self._sums[step][:, :num_bins]
        counts = sums[:3].astype(np.int64)
        return Positions(
            width=self._width,
            steps=np.array(steps, dtype=np.int64),
            num_tokens=counts[0],
            num_repetitive=counts[1],
            num_scored=counts[2],
            advantage=sums[3],
        )
