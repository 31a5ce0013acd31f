"""Means with 95% confidence intervals, over seeds, problems or rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Estimate", "binomial_estimate", "half_widths", "normal_estimate", "seeds_estimate"]

# Quantiles .975 of Student's t for 1 to 30 degrees of freedom. Beyond, the last one is used, which
# makes intervals at most 4% too wide.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and how well it is known.

    Attributes:
        value: The estimate; nan where there is none.
        interval: Its 95% confidence interval; None where it cannot be told.
        method: What the interval is over, as "4 seeds", "problems" or "rollouts"; "" without one.
    """

    value: float = math.nan
    interval: tuple[float, float] | None = None
    method: str = ""


def half_widths(deviations: ArrayLike, counts: ArrayLike) -> NDArray[np.float64]:
    """Half the width of the t interval of a mean: t(.975, n - 1) s / sqrt(n).

    Args:
        deviations: (S,) standard deviations s of the samples, with n - 1 below.
        counts: (S,) sizes n of the samples.

    Returns:
        (S,) half widths in the unit of `deviations`; nan where n < 2.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    spread = np.asarray(deviations, dtype=np.float64)
    quantiles = np.asarray(T_QUANTILES)[np.clip(sizes - 2, 0, len(T_QUANTILES) - 1)]
    return np.where(sizes < 2, math.nan, quantiles * spread / np.sqrt(np.maximum(sizes, 1)))


def seeds_estimate(values: Sequence[float], is_share: bool, what: str = "seeds") -> Estimate:
    """The mean over seeds (or problems) with its t interval.

    Args:
        values: One number per seed. Equal ones tell nothing of their spread: no interval.
        is_share: Whether the interval has to stay within [0, 1].
        what: What the values are of.

    Returns:
        The estimate, over "n seeds".
    """
    value = math.fsum(values) / len(values)
    if len(set(values)) < 2:
        return Estimate(value)
    half = float(half_widths(np.std(values, ddof=1), len(values)))
    interval = (value - half, value + half)
    return Estimate(value, _clip(interval) if is_share else interval, f"{len(values)} {what}")


def normal_estimate(value: float, standard_error: float) -> Estimate:
    """A share with the normal interval of its standard error over problems, cut to [0, 1].

    Args:
        value: The share.
        standard_error: Of it; 0 (all problems alike) tells nothing, and gives no interval.

    Returns:
        The estimate, over "problems".
    """
    if not standard_error > 0:
        return Estimate(value)
    half = NORMAL_QUANTILE * standard_error
    return Estimate(value, _clip((value - half, value + half)), "problems")


def binomial_estimate(value: float, num_rollouts: int) -> Estimate:
    """A share of rollouts with Wilson's interval, as if they were independent of each other.

    Args:
        value: The share.
        num_rollouts: Of how many; 0 gives no interval.

    Returns:
        The estimate, over "rollouts". (Wilson 1927.)
    """
    if math.isnan(value) or num_rollouts < 1:
        return Estimate(value)
    z2 = NORMAL_QUANTILE**2 / num_rollouts
    middle = (value + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (value * (1 - value) + z2 / 4)) / (1 + z2)
    return Estimate(value, _clip((middle - half, middle + half)), "rollouts")


def _clip(interval: tuple[float, float]) -> tuple[float, float]:
    return max(0.0, interval[0]), min(1.0, interval[1])
