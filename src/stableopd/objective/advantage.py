"""The advantage of each token: how much the teacher likes it better than the student did.

Nothing here carries gradient: an advantage is a constant of the update. Tokens of several rollouts
lie one after the other; `row_N` says which rollout each belongs to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["first_n_mask", "group_reward", "log_ratio", "prefix_weights", "shaped"]

# Keeps the division finite where all rewards of a group are equal (TRL's value).
GROUP_EPSILON = 1e-4


def log_ratio(teacher_logp_N: Tensor, student_logp_N: Tensor) -> Tensor:
    """The paper's advantage: A = log pi_T(y_t) - log pi_old(y_t).

    It is raw: not centred and not whitened. Its mean is -KL(student || teacher), so it is negative
    wherever the two models differ.

    Args:
        teacher_logp_N: Log-prob of each token under the teacher, in nats, (N,).
        student_logp_N: The same under the student that drew it, (N,).

    Returns:
        Nats, (N,), positive where the teacher likes the token better; no gradient.

    Source:
        arXiv 2604.08527, the advantage of L_OPD.
    """
    return (teacher_logp_N - student_logp_N).detach()


def shaped(
    form: str, teacher_logp_N: Tensor, student_logp_N: Tensor, parameter: float | None = None
) -> Tensor:
    """The log-ratio A, or one of its bounded forms.

    log_ratio: A.  clip: min(max(A, -c), c).  soft_log: sign(A) log(1 + |A|).  tanh: c tanh(A).
    power: pi_T^a - pi_S^a.  floor: max(A, log(l / (1 - l))), what a mixture with weight l of the
    student in the teacher would leave at least.

    Args:
        form: Name of the form, as above.
        teacher_logp_N: Log-prob of each token under the teacher, in nats, (N,).
        student_logp_N: The same under the student that drew it, (N,).
        parameter: c, a or l of the form; not looked at by `log_ratio` and `soft_log`.

    Returns:
        (N,), nats (power: a difference of probabilities); zero where the models agree, unless
        the floor lies above zero; no gradient.

    Raises:
        ValueError: The form is unknown, or its parameter is missing or out of range.

    Source:
        Bounded advantages in arXiv 2606.17199, 2607.13399, 2603.11137, 2607.29209.
    """
    advantage_N = log_ratio(teacher_logp_N, student_logp_N)
    if form == "log_ratio":
        return advantage_N
    if form == "soft_log":
        return advantage_N.sign() * advantage_N.abs().log1p()
    if form not in ("clip", "tanh", "power", "floor"):
        raise ValueError(f"unknown form of the advantage: {form!r}")
    if parameter is None or parameter <= 0:
        raise ValueError(f"advantage {form!r} needs a positive parameter, not {parameter}")
    if form == "clip":
        return advantage_N.clamp(-parameter, parameter)
    if form == "tanh":
        return parameter * advantage_N.tanh()
    if form == "power":
        return ((parameter * teacher_logp_N).exp() - (parameter * student_logp_N).exp()).detach()
    if parameter >= 1:
        raise ValueError(f"the floor's mixture weight must lie below 1, not {parameter}")
    return advantage_N.clamp(min=math.log(parameter / (1 - parameter)))


def group_reward(reward_N: Tensor, group_size: int) -> Tensor:
    """The advantage of GRPO: a rollout's reward against the others of its prompt.

    A_i = (r_i - mean of the group) / (standard deviation of the group + 1e-4).

    Args:
        reward_N: One reward per rollout, (N,), the rollouts of a prompt next to each other.
        group_size: Rollouts of one prompt; divides N, and is at least 2.

    Returns:
        One advantage per rollout, (N,), without unit; zero where all of a group are equal.

    Raises:
        ValueError: The group size does not divide the number of rewards, or is below 2.

    Source:
        DeepSeekMath, arXiv 2402.03300, outcome supervision.
    """
    if group_size < 2 or reward_N.numel() % group_size:
        raise ValueError(f"{reward_N.numel()} rewards cannot be split in groups of {group_size}")
    groups = reward_N.detach().reshape(-1, group_size)
    # Counted from the first reward: rounding in a mean of equal rewards, divided by the small
    # epsilon, would leave an advantage of up to 1e-3 where there must be none.
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (deviation + GROUP_EPSILON)).reshape(-1)


def first_n_mask(index_N: Tensor, first_n: int) -> Tensor:
    """Credit for early tokens alone: true for the first n tokens of each rollout.

    Args:
        index_N: Place of each token in its completion, from 0, (N,).
        first_n: How many tokens keep their credit; 0 keeps all.

    Returns:
        Booleans, (N,).

    Source:
        arXiv 2602.15260.
    """
    return index_N < first_n if first_n > 0 else torch.ones_like(index_N, dtype=torch.bool)


def prefix_weights(advantage_N: Tensor, row_N: Tensor, gain: float) -> Tensor:
    """Weights that trust early tokens: w_t = 1 + g (1 - sum_{s<t} |A_s| / sum_s |A_s|).

    The first token of a rollout weighs 1 + g, and the weight falls to 1 as the rollout's total
    of |A| is used up.

    Args:
        advantage_N: Advantages, (N,).
        row_N: Rollout of each token, (N,); the tokens of a rollout lie together, in order.
        gain: g, not negative; 0 gives weights of 1.

    Returns:
        Weights, (N,), between 1 and 1 + g; no gradient. 1 where a rollout's |A| is 0 throughout.

    Source:
        arXiv 2606.22600 (g = 0.5).
    """
    if gain == 0.0 or advantage_N.numel() == 0:
        return torch.ones_like(advantage_N)
    # Sums over a whole micro-batch want float64, which Apple's GPUs do not have.
    has_float64 = advantage_N.device.type != "mps"
    size_N = advantage_N.detach().abs().to(torch.float64 if has_float64 else torch.float32)
    starts_N = torch.ones_like(row_N)
    starts_N[1:] = row_N[1:] != row_N[:-1]
    segment_N = starts_N.cumsum(0) - 1
    total_R = torch.zeros(int(segment_N[-1]) + 1, dtype=size_N.dtype, device=size_N.device)
    total_R = total_R.index_add(0, segment_N, size_N)
    before_N = size_N.cumsum(0) - size_N - (total_R.cumsum(0) - total_R)[segment_N]
    total_N = total_R[segment_N]
    share_N = torch.where(total_N > 0, before_N / total_N, 1.0).clamp(0.0, 1.0)
    return (1.0 + gain * (1.0 - share_N)).to(advantage_N.dtype)
