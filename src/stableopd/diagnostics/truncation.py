"""How long rollouts are, and how many were cut off by the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stableopd.types import StopReason

__all__ = ["LengthStatistics", "length_statistics", "truncation_rate"]


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Lengths of a set of rollouts, in the unit of the lengths given; all nan for an empty set.

    Attributes:
        mean: Arithmetic mean.
        median: Middle value, the mean of the two middle ones for an even count.
        p90: 90th percentile, linear between the two nearest values.
        maximum: Largest value.
    """

    mean: float
    median: float
    p90: float
    maximum: float


def truncation_rate(reasons: Sequence[StopReason]) -> float:
    """TruncRate: the share of rollouts that ended because the length budget ran out.

    Args:
        reasons: Why each rollout ended, one per rollout.

    Returns:
        A share from 0 to 1; nan where there is no rollout. (arXiv 2604.08527; here a fact that
        the sampler recorded, not a guess from the length.)
    """
    if not reasons:
        return math.nan
    return sum(reason == StopReason.LENGTH for reason in reasons) / len(reasons)


def length_statistics(lengths: Sequence[int]) -> LengthStatistics:
    """Summarise lengths.

    Args:
        lengths: One number per rollout, in tokens (or any other unit).

    Returns:
        Mean, median, 90th percentile and maximum in the same unit.
    """
    if not lengths:
        return LengthStatistics(math.nan, math.nan, math.nan, math.nan)
    values = np.asarray(lengths, dtype=np.float64)
    return LengthStatistics(
        mean=float(values.mean()),
        median=float(np.median(values)),
        p90=float(np.percentile(values, 90)),
        maximum=float(values.max()),
    )
