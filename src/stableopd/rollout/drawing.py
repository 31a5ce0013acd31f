"""One token for each row of logits, by the inverse of the distribution function.

`torch.multinomial` draws a random number for each token of the vocabulary (22 ns each on a CPU),
and a log-softmax beside it is a second pass. Here exp is taken once; sums over blocks find the
block in which a single uniform number falls, and the running sum inside that block finds the token.
The log-prob comes from the same sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw", "greedy", "wide_dtype"]

# Tokens in a block. 128 to 1024 cost the same within the noise on a CPU.
BLOCK = 256


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature).

    A token whose logit is -inf, or so far below the largest that exp gives zero, is never drawn.

    Args:
        logits_BV: Logits in float32 or float64.
        uniform_B: Numbers in [0, 1), in `wide_dtype`; each decides one token.
        temperature: Above 0.

    Returns:
        The tokens, (B,), and their log-probs in nats, (B,), in the type of the logits. Where a row
        has a NaN, an inf, or nothing but -inf, the token is some valid id and the log-prob NaN.
    """
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    weight_BV = logits_BV - peak_B1
    if temperature != 1:
        weight_BV.div_(temperature)
    weight_BV.exp_()
    block_BN = _block_sums(weight_BV)
    sum_BN = block_BN.cumsum(-1, dtype=uniform_B.dtype)
    total_B1 = sum_BN[:, -1:]
    target_B1 = uniform_B[:, None] * total_B1
    at_B1 = _place(sum_BN, target_B1)
    size_B1 = block_BN.gather(1, at_B1)
    before_B1 = sum_BN.gather(1, at_B1) - size_B1
    share_B1 = ((target_B1 - before_B1) / size_B1).clamp_(0, 1)
    # The sum of a block was rounded in the type of the logits; as a share of it, the target lies
    # inside the block in any rounding.
    index_BK = at_B1 * BLOCK + torch.arange(min(BLOCK, logits_BV.shape[1]), device=logits_BV.device)
    inside_BK = weight_BV.gather(1, index_BK.clamp(max=logits_BV.shape[1] - 1))
    inside_BK = inside_BK.masked_fill_(index_BK >= logits_BV.shape[1], 0)
    inside_BK = inside_BK.cumsum(-1, dtype=uniform_B.dtype)
    token_B1 = at_B1 * BLOCK + _place(inside_BK, share_B1 * inside_BK[:, -1:])
    token_B1.clamp_(max=logits_BV.shape[1] - 1)  # only a row with a NaN lies beyond
    logp_B1 = (logits_BV.gather(1, token_B1) - peak_B1) / temperature - total_B1.log()
    return token_B1[:, 0], logp_B1[:, 0].to(logits_BV.dtype)


def greedy(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens and their log-probs at temperature 1.

    Args:
        logits_BV: Logits in float32 or float64.

    Returns:
        The tokens, (B,), and their log-probs in nats, (B,), NaN where the logits are not finite.
    """
    token_B1 = logits_BV.argmax(-1, keepdim=True)
    logp_B1 = logits_BV.gather(1, token_B1) - logits_BV.logsumexp(-1, keepdim=True)
    return token_B1[:, 0], logp_B1[:, 0]


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type in which running sums and uniform numbers are held.

    Args:
        device: Where the logits are.

    Returns:
        float64; float32 on MPS, which has no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _block_sums(weight_BV: Tensor) -> Tensor:
    """Sums over blocks of `BLOCK` tokens, (B, N); the last block may be shorter."""
    whole, rest = divmod(weight_BV.shape[1], BLOCK)
    sum_BN = weight_BV[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(-1)
    if not rest:
        return sum_BN
    return torch.cat([sum_BN, weight_BV[:, whole * BLOCK :].sum(-1, keepdim=True)], dim=1)


def _place(sum_BN: Tensor, target_B1: Tensor) -> Tensor:
    """First place whose running sum exceeds the target, so that it adds something to the sum.

    A target that rounding has put on the total goes to the last place that adds something.
    """
    found_B1 = torch.searchsorted(sum_BN, target_B1, right=True)
    last_B1 = torch.searchsorted(sum_BN, sum_BN[:, -1:].contiguous())
    return torch.minimum(found_B1, last_B1).clamp_(max=sum_BN.shape[1] - 1)
