"""The terms of the loss per token, and the one place that divides by the number of tokens.

StableOPD is a sum of four means, each taken with `masked_mean` over its own tokens:

    L = lambda_policy     mean over rollout tokens  of policy_gradient
      + lambda_gold       mean over golden tokens   of golden_cross_entropy
      + beta_reference    mean over rollout tokens  of KL(student || reference)
      + lambda_divergence mean over rollout tokens  of a divergence to the teacher (gkd)

Source: arXiv 2604.08527 for the first three; arXiv 2306.13649 for the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["denominator", "golden_cross_entropy", "masked_mean", "policy_gradient"]


def policy_gradient(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, clip: float | None = None
) -> Tensor:
    """The clipped policy-gradient loss of each token: -min(r A, clip(r, 1 - eps, 1 + eps) A).

    r = exp(logp - old_logp). With one update per batch the old policy is the current one: pass
    `logp_N.detach()` and r is 1, with the gradient of the log-prob.

    Args:
        logp_N: Log-prob of each sampled token under the student now, (N,); carries gradient.
        old_logp_N: The same under the student that drew it, (N,); taken as a constant.
        advantage_N: Advantages, (N,); taken as constants.
        clip: eps, or None for no clipping.

    Returns:
        Loss per token in the advantage's unit, (N,); lower where liked tokens grow likelier.

    Source:
        arXiv 2604.08527, L_OPD (eps 0.2 in PPO and GRPO).
    """
    advantage_N = advantage_N.detach()
    ratio_N = (logp_N - old_logp_N.detach()).exp()
    gain_N = ratio_N * advantage_N
    if clip is None:
        return -gain_N
    # Written out, as the gradient of torch.clamp at its bounds differs between versions of torch.
    low, high = ratio_N.new_tensor([1.0 - clip, 1.0 + clip])
    bound_N = torch.where(advantage_N > 0, high, low)
    is_beyond_N = torch.where(advantage_N > 0, ratio_N > bound_N, ratio_N < bound_N)
    return -torch.where(is_beyond_N, bound_N * advantage_N, gain_N)


def golden_cross_entropy(logp_N: Tensor) -> Tensor:
    """The cross entropy of each golden token: -log pi_theta(y_t).

    Whether the stop label counts is a matter of the mask given to `masked_mean`.

    Args:
        logp_N: Log-prob of each golden token under the student, (N,); carries gradient.

    Returns:
        Nats per token, (N,), never negative.

    Source:
        arXiv 2604.08527, rollout mixture distillation.
    """
    return -logp_N


def denominator(num_counted: Sequence[int], aggregation: str, max_length: int) -> float:
    """What the sum over one optimizer step is divided by, over all its micro-batches.

    sequence: sequences that have a counted token.  token: counted tokens.
    constant: sequences that have a counted token, times `max_length`.

    Args:
        num_counted: Counted tokens of each sequence of the step.
        aggregation: "sequence", "token" or "constant".
        max_length: The length that "constant" divides by.

    Returns:
        The denominator; 0 if nothing is counted.

    Raises:
        ValueError: The aggregation is unknown.
    """
    num_sequences = sum(n > 0 for n in num_counted)
    if aggregation == "sequence":
        return float(num_sequences)
    if aggregation == "token":
        return float(sum(num_counted))
    if aggregation == "constant":
        return float(num_sequences * max_length)
    raise ValueError(f"unknown aggregation: {aggregation!r}")


def masked_mean(
    value_N: Tensor, mask_N: Tensor, row_N: Tensor, aggregation: str, denominator: float
) -> Tensor:
    """The share of a micro-batch in the mean over the whole optimizer step.

    sum over counted tokens of value (divided by the number of counted tokens of its own sequence
    with "sequence") / denominator. Summed over the micro-batches of a step it is the mean; a
    masked token is as good as deleted.

    Args:
        value_N: Values per token, (N,); carries gradient.
        mask_N: Which tokens count, booleans, (N,).
        row_N: Sequence of each token within the micro-batch, (N,), from 0.
        aggregation: "sequence", "token" or "constant".
        denominator: From `denominator`, over all micro-batches of the step.

    Returns:
        A scalar in the values' unit; 0 with a gradient of 0 where nothing counts.
    """
    kept_N = torch.where(mask_N, value_N, torch.zeros_like(value_N))
    if aggregation == "sequence" and row_N.numel():
        counted_R = torch.bincount(row_N[mask_N], minlength=int(row_N.max()) + 1)
        kept_N = kept_N / counted_R.clamp(min=1)[row_N].to(value_N.dtype)
    return kept_N.sum() / (denominator or 1.0)
