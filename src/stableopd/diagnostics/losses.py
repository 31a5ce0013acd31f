"""What could not be read of a dump, and whether it could hide a collapse.

A collapse stays to the end of a run. What is lost at the end can therefore hide one, and what is
lost before makes the rest less sure. The rules are the project's, at the constants below and in
docs/dumps.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["LossCounter", "Losses", "hidden_by", "weaken"]

Confidence = Literal["high", "medium", "low"]

# Design: what comes last is the last fifth, in which a collapse of the second half shows.
LATE = 0.2

# Design: half of what comes last may be just the rollouts that were cut off: TruncRate of the rest
# would then be 0 where it is 0.5. A third of all leaves no rate certain to better than that.
MOST_LOST_LATE, MOST_LOST = 0.5, 1 / 3

# Design: the alarm needs two or three steps to call a collapse. A step's worth at the end is what
# a file lacks that is being written; more than it, than 3 and than a twentieth may hold one.
MOST_LOST_AT_END = 0.05
FEW = 3

# Design: shares of lost rollouts from which on a verdict is no longer "high", and then "low".
MEDIUM_FROM, LOW_FROM = 0.01, 0.1

# Design: rollouts without a usable step, above which a change over the steps cannot be seen.
MOST_WITHOUT_STEP = 0.1

_NUM_BLOCKS = 1024


@dataclass(frozen=True, slots=True)
class Losses:
    """How many rollouts were read, and about how many were lost where.

    Attributes:
        num_read: Rollouts that were read.
        num_lost: Rollouts that were not; of files that cannot be read an estimate.
        num_lost_late: The same among the last fifth of both.
        num_lost_at_end: The same after the last that was read.
        num_late: The last fifth of both.
        per_step: Rollouts of a step; 1 where the dump names no steps.
        num_without_step: Rollouts that were read and whose step could not be used.
    """

    num_read: int = 0
    num_lost: int = 0
    num_lost_late: int = 0
    num_lost_at_end: int = 0
    num_late: int = 0
    per_step: float = 1.0
    num_without_step: int = 0

    @property
    def share(self) -> float:
        """Share of the rollouts that were lost."""
        return self.num_lost / max(self.num_read + self.num_lost, 1)


def hidden_by(losses: Losses) -> str:
    """Why a collapse may be in what was lost; "" where it cannot."""
    total = losses.num_read + losses.num_lost
    lost = f"about {losses.num_lost:,} of {total:,} rollouts could not be read"
    at_end, few = losses.num_lost_at_end, max(losses.per_step, FEW)
    if at_end > few and at_end >= MOST_LOST_AT_END * total:
        return f"{lost}, {at_end:,} of them at the end, where a collapse would be"
    is_late = losses.num_late and losses.num_lost_late >= MOST_LOST_LATE * losses.num_late
    if is_late and losses.num_lost > few:
        return f"{lost}, half or more of the last fifth among them"
    if losses.share >= MOST_LOST and losses.num_lost > few:
        return lost
    if losses.num_without_step > MOST_WITHOUT_STEP * losses.num_read:
        return (
            f"the steps of {losses.num_without_step:,} of {losses.num_read:,} rollouts could not "
            "be used, so that a change over the steps cannot be seen"
        )
    return ""


def weaken(confidence: Confidence, losses: Losses) -> Confidence:
    """The confidence of a verdict on the rest: at most medium from 1% lost on, low from 10%."""
    without = losses.num_without_step / max(losses.num_read, 1)
    share = max(losses.share, without)
    if share >= LOW_FROM:
        return "low"
    return "medium" if share >= MEDIUM_FROM and confidence == "high" else confidence


class LossCounter:
    """Counts rollouts that are read and lost, in the order in which they stand in the files."""

    def __init__(self) -> None:
        self.num_read = 0
        self._num_lost = 0
        self._at_end = 0
        self._width = 1
        self._lost = [0] * _NUM_BLOCKS  # by place among both, in blocks that grow

    def read(self) -> None:
        """Count a rollout that was read."""
        self.num_read += 1
        self._at_end = 0

    def lose(self, number: int) -> None:
        """Count rollouts that were lost here."""
        if number <= 0:
            return
        start = self.num_read + self._num_lost
        self._num_lost += number
        self._at_end += number
        while start + number > self._width * _NUM_BLOCKS:
            pairs = zip(self._lost[::2], self._lost[1::2], strict=True)
            self._lost = [a + b for a, b in pairs] + [0] * (_NUM_BLOCKS // 2)
            self._width *= 2
        place, left = start, number
        while left:
            block = place // self._width
            fits = min(left, (block + 1) * self._width - place)
            self._lost[block] += fits
            place, left = place + fits, left - fits

    def losses(self, lost_before: float, per_step: float, num_without_step: int) -> Losses:
        """What was counted.

        Args:
            lost_before: Rollouts that were lost before the first that was read, beside those told.
            per_step: Rollouts of a step; 1 where no steps are known.
            num_without_step: Rollouts whose step could not be used.

        Returns:
            The sums.
        """
        lost = self._num_lost + round(lost_before)
        total = self.num_read + lost
        late = max(round(LATE * total), 1)
        start = self.num_read + self._num_lost - late
        lost_late = sum(self._lost[max(0, start) // self._width :])
        return Losses(
            num_read=self.num_read,
            num_lost=lost,
            num_lost_late=min(lost_late, late),
            num_lost_at_end=self._at_end,
            num_late=late,
            per_step=per_step,
            num_without_step=num_without_step,
        )
