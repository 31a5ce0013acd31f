"""Which tokens the update listens to: the advantage of repetitive and of regular ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Credit", "credit"]


@dataclass(frozen=True, slots=True)
class Credit:
    """Advantage by class of token, over all tokens of a step; nan where a class is empty.

    Attributes:
        repetitive_mean: Mean advantage of repetitive tokens, in nats.
        regular_mean: Mean advantage of all other tokens, in nats.
        repetitive_share: Share of the tokens that are repetitive, from 0 to 1.
        repetitive_weight: Share of the sum of |advantage| that is on repetitive tokens, from 0
            to 1; nan where that sum is 0 or not finite.
    """

    repetitive_mean: float
    regular_mean: float
    repetitive_share: float
    repetitive_weight: float


def credit(
    advantages: Sequence[float] | NDArray[np.floating],
    repetitive: Sequence[bool] | NDArray[np.bool_],
) -> Credit:
    """Split the advantage of a step's tokens by class.

    With A the advantages and R the set of repetitive tokens: mean(A[R]), mean(A[not R]),
    |R| / N and sum_R |A| / sum |A|.

    Args:
        advantages: (N,) advantage of every completion token of the step, in nats.
        repetitive: (N,) labels of `repetitive_tokens`, in the same order.

    Returns:
        The four numbers. (arXiv 2604.08527: after collapse repetitive tokens carry the less
        negative advantage, and are many.)

    Raises:
        ValueError: The two arrays have different lengths.
    """
    values = np.asarray(advantages, dtype=np.float64).reshape(-1)
    labels = np.asarray(repetitive, dtype=np.bool_).reshape(-1)
    if len(values) != len(labels):
        raise ValueError(f"{len(values)} advantages do not match {len(labels)} labels.")
    total = float(np.abs(values).sum())
    weight = float(np.abs(values[labels]).sum())
    return Credit(
        repetitive_mean=_mean(values[labels]),
        regular_mean=_mean(values[~labels]),
        repetitive_share=_mean(labels.astype(np.float64)),
        repetitive_weight=weight / total if total > 0 and math.isfinite(total) else math.nan,
    )


def _mean(values: NDArray[np.float64]) -> float:
    if not len(values):
        return math.nan
    # One infinite log-prob of each sign gives nan, which is the truth, and not a warning.
    with np.errstate(invalid="ignore"):
        return float(values.mean())
