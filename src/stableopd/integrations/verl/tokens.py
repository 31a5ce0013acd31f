"""The objective on the response tokens of one of verl's micro-batches.

Nothing here knows verl: tokens come in one after the other, as everywhere in `stableopd.objective`,
and the values go out in the same order. verl then takes its own mean over all rows and tokens, so
each value carries the factor that turns that mean into the sum of our means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stableopd.config import ObjectiveConfig, RepetitionConfig
from stableopd.diagnostics.credit import credit
from stableopd.diagnostics.repetition import label_rows
from stableopd.objective import advantage, divergence, loss
from stableopd.types import ConfigError

__all__ = ["Terms", "Tokens", "event_logps", "terms", "token_metrics"]


@dataclass(frozen=True)
class Tokens:
    """Response tokens that count, row by row and in order within a row.

    Attributes:
        id_N: Ids of the tokens.
        row_N: Row of each token in the micro-batch.
        index_N: Its place among the counted tokens of its row, from 0.
        length_N: How many counted tokens its row has.
        is_golden_N: Whether its row is a golden solution.
        logp_N: Log-prob under the student (of the stop event at a stop); carries gradient.
        old_logp_N: The same under the student that drew it.
        teacher_logp_N: The same under the teacher.
        sampled_logp_N: Log-prob of the very id under the student that drew it.
        reference_logp_N: The same under the reference; None without one.
        weight_N: Weights that correct the rollouts' log-probs; None without any.
    """

    id_N: Tensor
    row_N: Tensor
    index_N: Tensor
    length_N: Tensor
    is_golden_N: Tensor
    logp_N: Tensor
    old_logp_N: Tensor
    teacher_logp_N: Tensor
    sampled_logp_N: Tensor
    reference_logp_N: Tensor | None = None
    weight_N: Tensor | None = None

    def only(self, keep_N: Tensor) -> Tokens:
        """The tokens for which `keep_N` is true."""
        kept = {k: v[keep_N] for k, v in vars(self).items() if v is not None}
        return replace(self, **kept)


@dataclass(frozen=True)
class Terms:
    """The objective per token.

    Attributes:
        total_N: Weighted sum of the terms, (N,); carries gradient to `Tokens.logp_N`.
        parts: Each term unweighted, (N,), by the name it has in docs/metrics.md; no gradient.
        advantage_R: Advantage of the tokens of rollouts, (R,), before any weight.
    """

    total_N: Tensor
    parts: dict[str, Tensor]
    advantage_R: Tensor


def event_logps(
    id_N: Tensor,
    support_NK: Tensor,
    teacher_logp_NK: Tensor,
    mass_N: Tensor,
    stop_ids: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of each token, or of the stop event, from sums of probabilities over a support.

    The support of a position is K times the sampled id, or at a stop the K stop ids. With m its
    summed probability, log p = log(m / K), or log m at a stop: the logsumexp over the stop ids.

    Args:
        id_N: Ids of the tokens, (N,).
        support_NK: Ids of the support, (N, K).
        teacher_logp_NK: The teacher's log-prob of each of them, in nats, (N, K).
        mass_N: Sum of the student's probabilities over the support, (N,), float32 or wider; carries
            gradient.
        stop_ids: Ids that end a completion; K of them.

    Returns:
        Log-probs of student and teacher, in nats, (N,), and which tokens are stop events. The
        student's carry gradient, unless the probability is below the smallest normal float (-87
        nats in float32), which it then counts as.

    Raises:
        ConfigError: The support is not one of the two, or the sums are of half precision.
    """
    is_event_N = _events(id_N, support_NK.to(id_N.dtype), id_N.new_tensor(stop_ids))
    if is_event_N is None:
        raise ConfigError(
            "verl: the teacher's ids are neither the sampled token nor the stop ids; set "
            "+actor_rollout_ref.rollout.agent.agent_loop_manager_class="
            "stableopd.integrations.verl.manager.StopEventManager."
        )
    if torch.finfo(mass_N.dtype).bits < 32:
        raise ConfigError(f"verl: probabilities come as {mass_N.dtype}; they must be float32.")
    count_N = torch.where(is_event_N, 1, len(stop_ids)).to(mass_N.dtype)
    smallest = torch.finfo(mass_N.dtype).tiny
    logp_N = (mass_N / count_N).clamp(min=smallest).log()
    teacher_N = torch.logsumexp(teacher_logp_NK.to(mass_N.dtype), 1) - count_N.log()
    return logp_N, teacher_N, is_event_N


def terms(tokens: Tokens, objective: ObjectiveConfig, golden_share: float) -> Terms:
    """The objective per token, so that verl's mean over all rows gives the sum of our means.

    With B rows, of which M = golden_share B are golden and G = B - M are rollouts, a value of a
    rollout's token is multiplied by B / G and one of a golden token by B / M. Where only c of a
    row's n tokens count in a mean per row, its values are multiplied by n / c too.

    Args:
        tokens: The tokens.
        objective: Weights and switches of the terms.
        golden_share: Golden rows among all rows of the optimizer step, from 0 to below 1.

    Returns:
        The values per token; a token that does not count has 0.

    Source:
        arXiv 2604.08527 for the three terms.
    """
    rollout = tokens.only(~tokens.is_golden_N)
    advantage_R = advantage.shaped(
        objective.advantage or "log_ratio",
        rollout.teacher_logp_N,
        rollout.old_logp_N,
        objective.advantage_parameter,
    )
    parts = {"loss/opd": torch.zeros_like(tokens.logp_N)}
    total_R = torch.zeros_like(rollout.logp_N)
    reference_R = _reference(rollout, objective)
    if objective.lambda_policy:
        credited_R = advantage_R
        if reference_R is not None and objective.reference_kl == "k1":
            per_policy = (objective.beta_reference or 0.0) / objective.lambda_policy
            credited_R = advantage_R - per_policy * reference_R
        value_R = _policy(rollout, credited_R, objective)
        parts["loss/opd"] = _at(tokens, ~tokens.is_golden_N, value_R / (1.0 - golden_share))
        total_R = total_R + objective.lambda_policy * value_R
    if reference_R is not None:
        shown = reference_R.detach() / (1.0 - golden_share)
        parts["loss/reference_kl"] = _at(tokens, ~tokens.is_golden_N, shown)
        if objective.reference_kl != "k1":
            total_R = total_R + (objective.beta_reference or 0.0) * reference_R
    total_N = _at(tokens, ~tokens.is_golden_N, total_R / (1.0 - golden_share))
    if objective.lambda_gold:
        golden = tokens.only(tokens.is_golden_N)
        value_M = _golden(golden, objective) / golden_share
        parts["loss/golden"] = _at(tokens, tokens.is_golden_N, value_M)
        total_N = total_N + objective.lambda_gold * parts["loss/golden"]
    return Terms(total_N, {k: v.detach() for k, v in parts.items()}, advantage_R)


def token_metrics(
    tokens: Tokens, advantage_R: Tensor, stop_ids: tuple[int, ...], repetition: RepetitionConfig
) -> dict[str, list[float]]:
    """Our metrics of a micro-batch, named as in docs/metrics.md.

    Args:
        tokens: The tokens; golden rows are left out of every number.
        advantage_R: Advantage of the tokens of rollouts, as `terms` gives it.
        stop_ids: Ids that end a completion.
        repetition: What counts as repetitive.

    Returns:
        Lists of numbers by name, of which verl takes the mean over micro-batches and ranks: one
        number a rollout for `rollout/truncation_rate`, one a stop for `stop/...`, one for the
        others. A list is empty where there is nothing to take a mean of.
    """
    rollout = tokens.only(~tokens.is_golden_N)
    is_last_R = rollout.index_N == rollout.length_N - 1
    is_stop_R = torch.isin(rollout.id_N, torch.tensor(stop_ids, device=rollout.id_N.device))
    stopped = is_stop_R[is_last_R]
    ends = is_last_R & is_stop_R
    lengths = rollout.length_N[is_last_R].tolist()
    ids = rollout.id_N.cpu().split(lengths)
    labels = label_rows([x.numpy() for x in ids], repetition.ngram, repetition.min_run)
    flat = np.concatenate(labels) if labels else np.zeros(0, dtype=np.bool_)
    found = credit(advantage_R.float().cpu().numpy(), flat)
    numbers = {
        "rollout/repetitive_share": found.repetitive_share,
        "advantage/mean": advantage_R.double().mean().item(),
        "advantage/repetitive_mean": found.repetitive_mean,
        "advantage/regular_mean": found.regular_mean,
        "advantage/repetitive_weight": found.repetitive_weight,
        "logp/student_mean": rollout.logp_N.detach().double().mean().item(),
        "logp/teacher_mean": rollout.teacher_logp_N.double().mean().item(),
    }
    return {
        "rollout/truncation_rate": (~stopped).double().tolist(),
        "stop/student_logp": rollout.logp_N.detach()[ends].tolist(),
        "stop/teacher_logp": rollout.teacher_logp_N[ends].tolist(),
        **{k: [] if math.isnan(v) else [v] for k, v in numbers.items()},
    }


def _policy(rollout: Tokens, credited_R: Tensor, objective: ObjectiveConfig) -> Tensor:
    weight_R = advantage.prefix_weights(credited_R, rollout.row_N, objective.prefix_gain)
    value_R = loss.policy_gradient(
        rollout.logp_N, rollout.old_logp_N, weight_R * credited_R, objective.clip
    )
    if rollout.weight_N is not None:
        value_R = value_R * rollout.weight_N
    counts_R = advantage.first_n_mask(rollout.index_N, objective.first_n)
    if objective.first_n and objective.aggregation == "sequence":
        value_R = value_R * rollout.length_N / rollout.length_N.clamp(max=objective.first_n)
    return torch.where(counts_R, value_R, 0.0)


def _golden(golden: Tokens, objective: ObjectiveConfig) -> Tensor:
    value_M = loss.golden_cross_entropy(golden.logp_N)
    if objective.golden_stop_label:
        return value_M
    if objective.aggregation == "sequence":
        value_M = value_M * golden.length_N / (golden.length_N - 1).clamp(min=1)
    return torch.where(golden.index_N < golden.length_N - 1, value_M, 0.0)


def _reference(rollout: Tokens, objective: ObjectiveConfig) -> Tensor | None:
    if not objective.beta_reference or rollout.reference_logp_N is None:
        return None
    if objective.reference_kl == "k1":
        return divergence.k1(rollout.sampled_logp_N, rollout.reference_logp_N).detach()
    estimator = {"k2": divergence.k2, "k3": divergence.k3}[objective.reference_kl]
    return estimator(rollout.logp_N, rollout.reference_logp_N)


def _at(tokens: Tokens, where_N: Tensor, value: Tensor) -> Tensor:
    """The values at the places where `where_N` is true, 0 elsewhere."""
    places = where_N.nonzero(as_tuple=True)
    return torch.zeros_like(tokens.logp_N).index_put(places, value.to(tokens.logp_N.dtype))


def _events(id_N: Tensor, support_NK: Tensor, stops: Tensor) -> Tensor | None:
    """Which positions hold the stop event; None where a support is neither that nor the token."""
    if support_NK.shape[1] != stops.numel():
        return None
    is_event_N = torch.isin(id_N, stops)
    is_event_N &= (support_NK.sort(1).values == stops.sort().values).all(1)
    is_token_N = (support_NK == id_N.unsqueeze(1)).all(1)
    return is_event_N if bool((is_token_N | is_event_N).all()) else None
