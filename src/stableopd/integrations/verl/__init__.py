"""stableopd inside verl 0.9.1: a distillation loss, a policy loss and an agent loop, registered.

verl loads this module by itself in every process where stableopd is installed (entry point group
`verl.plugins`), or where `VERL_USE_EXTERNAL_MODULES=stableopd.integrations.verl` says so. Then

    distillation.distillation_loss.loss_mode=stableopd        stops scored as one event
    distillation.distillation_loss.loss_mode=stableopd_token  stops scored as tokens
    actor_rollout_ref.actor.policy_loss.loss_mode=stableopd   the paper's clipped surrogate
    agent_name = "stableopd_mixture" in the training file     one golden solution per prompt

docs/engines.md tells what each carries, and recipes/verl how a run is started.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# In the ordinary environment verl is not installed; nothing but verl imports this module.
from verl.trainer.distillation.losses import (  # pyright: ignore[reportMissingImports]
    DistillationLossSettings,
    register_distillation_loss,
)
from verl.trainer.ppo.core_algos import (  # pyright: ignore[reportMissingImports]
    agg_loss,
    register_policy_loss,
)
from verl.utils.metric import AggregationType, Metric  # pyright: ignore[reportMissingImports]
from verl.workers.utils.padding import (  # pyright: ignore[reportMissingImports]
    no_padding_2_padding,
)

from stableopd.integrations.verl import rollouts as _rollouts  # noqa: F401 (it registers itself)
from stableopd.integrations.verl.settings import (
    EVENT_LOSS,
    TOKEN_LOSS,
    Settings,
    check_verl,
    read_settings,
)
from stableopd.integrations.verl.tokens import Tokens, event_logps, terms, token_metrics
from stableopd.objective import loss
from stableopd.types import ConfigError

__all__ = ["distillation_loss", "policy_loss"]


@register_distillation_loss(DistillationLossSettings(names=[EVENT_LOSS], use_topk=True))
@register_distillation_loss(DistillationLossSettings(names=[TOKEN_LOSS], use_estimator=True))
def distillation_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """StableOPD per token, as verl asks for it: verl aggregates the values and differentiates.

    lambda_policy policy_gradient + lambda_gold cross entropy of golden rows + beta_reference KL to
    the reference, each with the factor that turns verl's mean over all rows into our mean over the
    term's own rows.

    Args:
        config: verl's `ActorConfig`.
        distillation_config: verl's `DistillationConfig`, with our settings in it.
        model_output: `log_probs` (TOKEN_LOSS) or `student_mass` (EVENT_LOSS), nested, over prompt
            and response; carries gradient.
        data: The micro-batch: `prompts`, `responses`, `response_mask`, `old_log_probs`,
            `teacher_logprobs`, `teacher_ids`; `ref_log_prob`, `is_golden`, `rollout_is_weights`
            where used.

    Returns:
        Values per response token, (B, T), 0 where the mask is; metrics, names beginning with
        `stableopd/`.

    Raises:
        ConfigError: A setting of verl or of ours that would give another objective.

    Source:
        arXiv 2604.08527; stops as one event: arXiv 2609.20511.
    """
    settings = read_settings(distillation_config)
    check_verl(config, distillation_config, settings, data.keys())
    mask_BT = _padded(data["response_mask"]).bool()
    tokens = _tokens(settings, model_output, data, mask_BT)
    golden_share = 1.0 / config.rollout_n if settings.objective.lambda_gold else 0.0
    found = terms(tokens, settings.objective, golden_share)
    metrics: dict[str, Any] = dict(
        token_metrics(tokens, found.advantage_R, settings.stop_ids, settings.repetition)
    )
    for name, value_N in found.parts.items():
        mean = agg_loss(
            loss_mat=_grid(mask_BT, value_N),
            loss_mask=mask_BT,
            loss_agg_mode=config.loss_agg_mode,
            dp_size=data["dp_size"],
            batch_num_tokens=data["batch_num_tokens"],
            global_batch_size=data["global_batch_size"],
            loss_scale_factor=config.loss_scale_factor,
        )
        # Each micro-batch holds its share of the mean over the step.
        metrics[name] = Metric(AggregationType.SUM, mean)
    return _grid(mask_BT, found.total_N), {f"stableopd/{k}": v for k, v in metrics.items()}


@register_policy_loss("stableopd")
def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped surrogate of the paper, for task rewards beside the distillation or without it.

    -min(r A, clip(r, 1 - eps, 1 + eps) A) with eps = `actor.clip_ratio`. verl's own ("vanilla")
    also caps the loss at `clip_ratio_c` |A| where A is negative and r is large, and has two eps.

    Args:
        old_log_prob: Log-probs under the student that drew the tokens, nats, (B, T).
        log_prob: The same under the student now, (B, T); carries gradient.
        advantages: Advantages, (B, T); taken as constants.
        response_mask: Which tokens count, (B, T).
        loss_agg_mode: verl's way to take the mean.
        config: verl's `ActorConfig`.
        rollout_is_weights: Weights that correct the rollouts' log-probs, (B, T), or None.

    Returns:
        The aggregated loss and metrics.

    Raises:
        ConfigError: verl gave no configuration.

    Source:
        arXiv 2604.08527, L_OPD.
    """
    if config is None:
        raise ConfigError("verl: the policy loss 'stableopd' needs the actor's configuration.")
    value_BT = loss.policy_gradient(log_prob, old_log_prob, advantages, config.clip_ratio)
    if rollout_is_weights is not None:
        value_BT = value_BT * rollout_is_weights
    mean = agg_loss(
        loss_mat=value_BT,
        loss_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        **config.global_batch_info,
    )
    mask_BT = response_mask.bool()
    ratio_N = (log_prob.detach() - old_log_prob)[mask_BT].exp()
    outside = (ratio_N - 1.0).abs() > config.clip_ratio
    return mean, {"actor/ratio_outside_clip": outside.double().mean().item()}


def _tokens(
    settings: Settings, model_output: dict[str, Tensor], data: Any, mask_BT: Tensor
) -> Tokens:
    """The counted response tokens of a micro-batch."""
    id_N = _padded(data["responses"])[mask_BT]
    sampled_N = _wide(_padded(data["old_log_probs"])[mask_BT])
    teacher_NK = no_padding_2_padding(data["teacher_logprobs"], data)[mask_BT]
    old_N = sampled_N
    if settings.objective.stop == "event":
        if "student_mass" not in model_output:
            raise ConfigError(
                "verl: this engine gives no student_mass; the stop event needs actor.strategy="
                "fsdp or fsdp2 without fused kernels."
            )
        logp_N, teacher_N, is_event_N = event_logps(
            id_N,
            no_padding_2_padding(data["teacher_ids"], data)[mask_BT],
            teacher_NK,
            no_padding_2_padding(model_output["student_mass"], data)[mask_BT],
            settings.stop_ids,
        )
        # The event's log-prob at drawing time is not kept: at stops the ratio is 1.
        old_N = torch.where(is_event_N, logp_N.detach(), sampled_N)
    else:
        logp_N = _wide(no_padding_2_padding(model_output["log_probs"], data)[mask_BT])
        teacher_N = _wide(teacher_NK[:, 0])
    index_BT = mask_BT.long().cumsum(1) - 1
    length_BT = mask_BT.sum(1, keepdim=True).expand_as(mask_BT)
    golden_B1 = torch.zeros_like(mask_BT[:, :1])
    if settings.objective.lambda_gold:
        flag = data["is_golden"]
        golden_B1 = (flag.values() if flag.is_nested else flag).reshape(-1, 1).bool()
    optional = {
        name: _wide(_padded(data[key])[mask_BT]) if key in data else None
        for name, key in (("reference_logp_N", "ref_log_prob"), ("weight_N", "rollout_is_weights"))
    }
    return Tokens(
        id_N=id_N,
        row_N=mask_BT.nonzero()[:, 0],
        index_N=index_BT[mask_BT],
        length_N=length_BT[mask_BT],
        is_golden_N=golden_B1.expand_as(mask_BT)[mask_BT],
        logp_N=logp_N,
        old_logp_N=old_N,
        teacher_logp_N=teacher_N,
        sampled_logp_N=sampled_N,
        **optional,
    )


def _padded(tensor: Tensor) -> Tensor:
    """Rows of different lengths as one padded tensor."""
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _wide(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _grid(mask_BT: Tensor, value_N: Tensor) -> Tensor:
    """Values of the counted tokens at their places, (B, T); 0 elsewhere."""
    grid_BT = torch.zeros(mask_BT.shape, dtype=value_N.dtype, device=value_N.device)
    return grid_BT.index_put(mask_BT.nonzero(as_tuple=True), value_N)
