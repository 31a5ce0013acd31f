"""Divergences between two models at one position: exact over the vocabulary, or from one token.

The exact ones take log-probs over the vocabulary and fit `logprobs.Against.compares`; they carry
gradient in their first argument. In all of them the student stands first and the other model,
teacher or reference, second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "agreement",
    "detached_reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "k1",
    "k2",
    "k3",
    "on_top_k",
    "reverse_kl",
    "top_k_agreement",
    "top_k_overlap",
]


def reverse_kl(logp_NV: Tensor, other_NV: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p_S(v) (log p_S(v) - log p_T(v)), exact.

    Args:
        logp_NV: Log-probs of the student, (N, V); carries gradient.
        other_NV: Log-probs of the teacher or reference, (N, V); gradient if it has any.

    Returns:
        Nats per position, (N,), never negative up to rounding.
    """
    return (logp_NV.exp() * (logp_NV - other_NV)).sum(-1)


def detached_reverse_kl(logp_NV: Tensor, other_NV: Tensor) -> Tensor:
    """`reverse_kl` as a number alone, with no gradient.

    Args:
        logp_NV: Log-probs of the student, (N, V).
        other_NV: Log-probs of the teacher or reference, (N, V).

    Returns:
        Nats per position, (N,).
    """
    return reverse_kl(logp_NV.detach(), other_NV.detach())


def forward_kl(logp_NV: Tensor, other_NV: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_T(v) (log p_T(v) - log p_S(v)), exact.

    Args:
        logp_NV: Log-probs of the student, (N, V); carries gradient.
        other_NV: Log-probs of the teacher or reference, (N, V); gradient if it has any.

    Returns:
        Nats per position, (N,), never negative up to rounding.
    """
    return (other_NV.exp() * (other_NV - logp_NV)).sum(-1)


def jensen_shannon(logp_NV: Tensor, other_NV: Tensor) -> Tensor:
    """JS = KL(student || m) / 2 + KL(teacher || m) / 2 with m = (p_S + p_T) / 2, exact.

    Args:
        logp_NV: Log-probs of the student, (N, V); carries gradient.
        other_NV: Log-probs of the teacher or reference, (N, V); gradient if it has any.

    Returns:
        Nats per position, (N,), between 0 and log 2 up to rounding.
    """
    mixture_NV = torch.logaddexp(logp_NV, other_NV) - math.log(2.0)
    return 0.5 * (reverse_kl(logp_NV, mixture_NV) + reverse_kl(other_NV, mixture_NV))


def on_top_k(
    divergence: Callable[[Tensor, Tensor], Tensor], logp_NV: Tensor, other_NV: Tensor, k: int
) -> Tensor:
    """A divergence on the teacher's k likeliest tokens, both sides renormalised there.

    Args:
        divergence: One of the exact divergences of this file.
        logp_NV: Log-probs of the student, (N, V); carries gradient.
        other_NV: Log-probs of the teacher, (N, V); they choose the support.
        k: Size of the support, at most V. With k = V this is `divergence` itself.

    Returns:
        Nats per position, (N,).

    Raises:
        ValueError: k is not between 1 and V.

    Source:
        Teacher top-K local support, arXiv 2603.25562 (K = 32).
    """
    if not 1 <= k <= other_NV.shape[-1]:
        raise ValueError(f"k must lie between 1 and the vocabulary's {other_NV.shape[-1]}: {k}")
    other_NK, support_NK = other_NV.topk(k, dim=-1)
    logp_NK = logp_NV.gather(-1, support_NK)
    return divergence(torch.log_softmax(logp_NK, -1), torch.log_softmax(other_NK, -1))


def k1(logp_N: Tensor, other_N: Tensor) -> Tensor:
    """One-token estimate log p_S - log p_O of KL(student || other): unbiased, of either sign.

    Its direct derivative has expectation zero: use it as a reward (with no gradient), never as a
    loss.

    Args:
        logp_N: Log-prob of the sampled token under the student, (N,).
        other_N: The same under the other model, (N,).

    Returns:
        Nats, (N,); gradient reaches both arguments.

    Source:
        Schulman, "Approximating KL divergence" (2020).
    """
    return logp_N - other_N


def k2(logp_N: Tensor, other_N: Tensor) -> Tensor:
    """One-token estimate (log p_S - log p_O)^2 / 2: biased, but its derivative is not.

    The expected derivative under the student's own samples is the gradient of
    KL(student || other) at fixed states.

    Args:
        logp_N: Log-prob of the sampled token under the student, (N,); carries gradient.
        other_N: The same under the other model, (N,).

    Returns:
        Nats, (N,), never negative.

    Source:
        Schulman, "Approximating KL divergence" (2020).
    """
    return 0.5 * (logp_N - other_N).square()


def k3(logp_N: Tensor, other_N: Tensor) -> Tensor:
    """One-token estimate q - 1 - log q with q = p_O / p_S: unbiased and never negative.

    A trap: its expected derivative is the gradient of KL(other || student), the other direction.

    Args:
        logp_N: Log-prob of the sampled token under the student, (N,); carries gradient.
        other_N: The same under the other model, (N,).

    Returns:
        Nats, (N,), never negative.

    Source:
        Schulman, "Approximating KL divergence" (2020).
    """
    log_q_N = other_N - logp_N
    return torch.expm1(log_q_N) - log_q_N


def top_k_agreement(logp_NV: Tensor, other_NV: Tensor, k: int) -> Tensor:
    """How far two models agree on their k likeliest tokens: overlap, and advantage within it.

    With O the tokens in both sets and p, q the student and the teacher renormalised over O:
    overlap = |O| / k, and advantage = 1 / |O| sum_{v in O} p(v) (log q(v) - log p(v)), which is
    -KL(p || q) / |O|. It is 0 where the student spreads its mass over O as the teacher does, and
    where O is empty.

    Args:
        logp_NV: Log-probs of the student, (N, V).
        other_NV: Log-probs of the teacher, (N, V).
        k: Size of both sets; cut to V where it is larger.

    Returns:
        For each position the overlap, a share between 0 and 1, and the advantage in nats, never
        positive up to rounding, (N, 2); no gradient. Both in one, as finding the sets is the work.

    Source:
        Equations 6 and 7 of arXiv 2604.13016, which takes k = 16.
    """
    k = min(k, logp_NV.shape[-1])
    with torch.no_grad():
        logp_NK, ids_NK = logp_NV.topk(k, dim=-1)
        other_NK, other_ids_NK = other_NV.topk(k, dim=-1)
        return agreement(logp_NK, ids_NK, other_NK, other_ids_NK)


def agreement(logp_NK: Tensor, ids_NK: Tensor, other_NK: Tensor, other_ids_NK: Tensor) -> Tensor:
    """`top_k_agreement` of sets that are found already.

    Args:
        logp_NK: Log-probs of the student's k likeliest tokens, (N, K).
        ids_NK: Their ids, (N, K).
        other_NK: Log-probs of the teacher's k likeliest tokens, (N, K).
        other_ids_NK: Their ids, (N, K).

    Returns:
        Overlap and advantage, (N, 2); no gradient is meant to pass.
    """
    is_same_NKK = other_ids_NK[:, :, None] == ids_NK[:, None, :]
    in_both_NK = is_same_NKK.any(-1)
    p_NK, q_NK = (
        x_NK.masked_fill(~in_both_NK, -math.inf).log_softmax(-1)
        for x_NK in (logp_NK.gather(-1, is_same_NKK.int().argmax(-1)), other_NK)
    )
    value_NK = torch.where(in_both_NK, p_NK.exp() * (q_NK - p_NK), 0.0)
    num_N = in_both_NK.sum(-1)
    overlap_N = in_both_NK.to(logp_NK.dtype).mean(-1)
    return torch.stack((overlap_N, value_NK.sum(-1) / num_N.clamp(min=1)), -1)


def top_k_overlap(logp_NV: Tensor, other_NV: Tensor, k: int) -> Tensor:
    """Share of the teacher's k likeliest tokens that are among the student's k likeliest.

    Args:
        logp_NV: Log-probs of the student, (N, V).
        other_NV: Log-probs of the teacher, (N, V).
        k: Size of both sets; cut to V where it is larger.

    Returns:
        A share between 0 and 1 for each position, (N,); no gradient.

    Source:
        Overlap of the top-k sets, arXiv 2604.13016.
    """
    return top_k_agreement(logp_NV, other_NV, k)[:, 0]
