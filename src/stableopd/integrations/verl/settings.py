"""Our settings inside a verl configuration, and what verl must be set to beside them.

verl's configuration classes take no unknown field. A table that may hold anything, which verl does
not read and which reaches the agent loops, the driver and the loss alike, is `inference.custom` of
the teacher. So ours is `distillation.teacher_models.<name>.inference.custom.stableopd`: fields of
`[objective]` and `[repetition]` of our own configuration, and `stop_ids`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stableopd.config import ObjectiveConfig, RepetitionConfig, parse
from stableopd.types import ConfigError

__all__ = ["Settings", "check_verl", "read_settings"]

# Names under which verl finds us.
EVENT_LOSS = "stableopd"
TOKEN_LOSS = "stableopd_token"
AGENT_LOOP = "stableopd_mixture"

WHERE = "inference.custom.stableopd"

# Our aggregation and the name that verl gives to it.
AGGREGATIONS = {
    "sequence": "seq-mean-token-mean",
    "token": "token-mean",
    "constant": "seq-mean-token-sum-norm",
}


@dataclass(frozen=True)
class Settings:
    """What stableopd is asked to do inside verl.

    Attributes:
        objective: Weights and switches of the terms, presets filled in.
        repetition: What counts as a repetitive token.
        stop_ids: Ids that end a completion, the student's own first.
    """

    objective: ObjectiveConfig
    repetition: RepetitionConfig
    stop_ids: tuple[int, ...]


def read_settings(distillation: Any) -> Settings:
    """Our settings, from verl's `distillation` configuration.

    Args:
        distillation: verl's `DistillationConfig`, or the OmegaConf node it is made of.

    Returns:
        The checked settings.

    Raises:
        ConfigError: The table is missing, differs between teachers, has an unknown key or a wrong
            value, or asks for something that verl cannot carry.
    """
    tables = _tables(distillation)
    if any(table != tables[0] for table in tables):
        raise ConfigError(f"verl: {WHERE} must be the same for every teacher.")
    table = dict(tables[0])
    ids = table.pop("stop_ids", None)
    stop_ids = tuple(ids) if isinstance(ids, list | tuple) else ()
    if not stop_ids or not all(type(i) is int and i >= 0 for i in stop_ids):
        raise ConfigError(
            f"verl: {WHERE}.stop_ids must list the ids that end a completion, the student's own "
            f"first, such as [151643, 151645]; it is {ids!r}."
        )
    if len(set(stop_ids)) < len(stop_ids):
        raise ConfigError(f"verl: {WHERE}.stop_ids names an id twice: {list(stop_ids)}.")
    repetition = {f.name for f in dataclasses.fields(RepetitionConfig)}
    sections = {
        "objective": {k: v for k, v in table.items() if k not in repetition},
        "repetition": {k: v for k, v in table.items() if k in repetition},
        # Models and data are verl's own; our checks only want to hear that they exist.
        "student": {"model": "verl"},
        "teacher": {"model": "verl"},
        "data": {"train": "verl"},
    }
    config = parse(sections, source=WHERE)
    _refuse(config.objective)
    return Settings(config.objective, config.repetition, stop_ids)


def check_verl(actor: Any, distillation: Any, settings: Settings, fields: Iterable[str]) -> None:
    """Refuse what verl would silently turn into another objective.

    Args:
        actor: verl's `ActorConfig`.
        distillation: verl's `DistillationConfig`.
        settings: Ours.
        fields: Names of the fields of the batch.

    Raises:
        ConfigError: The first setting of verl that does not fit, with the value that does.
    """
    present = set(fields)
    for wrong, reason in (
        *_loss_rules(actor, distillation.distillation_loss, settings.objective),
        *_batch_rules(actor, settings.objective, present),
    ):
        if wrong:
            raise ConfigError(f"verl: {reason}.")


def _loss_rules(actor: Any, verl_loss: Any, o: ObjectiveConfig) -> list[tuple[bool, str]]:
    is_event = verl_loss.loss_mode == EVENT_LOSS
    return [
        (
            is_event != (o.stop == "event"),
            f"loss_mode = {verl_loss.loss_mode} does not score stops as stop = {o.stop!r} says; "
            f"{EVENT_LOSS} goes with 'event', {TOKEN_LOSS} with 'token'",
        ),
        (
            verl_loss.use_policy_gradient,
            "set distillation_loss.use_policy_gradient=False: the policy gradient is in this loss, "
            "and verl would take minus the loss for an advantage",
        ),
        (
            verl_loss.loss_max_clamp is not None,
            "set distillation_loss.loss_max_clamp=null and bound the advantage instead",
        ),
        (
            is_event and verl_loss.use_chunked_topk,
            "set distillation_loss.use_chunked_topk=False, which rounds probabilities to bfloat16",
        ),
        (
            actor.loss_agg_mode != AGGREGATIONS[o.aggregation],
            f"aggregation = {o.aggregation!r} needs actor.loss_agg_mode="
            f"{AGGREGATIONS[o.aggregation]}, not {actor.loss_agg_mode}",
        ),
        (
            verl_loss.use_task_rewards and bool(o.lambda_gold or o.beta_reference),
            "with distillation_loss.use_task_rewards=True verl trains on golden rows as rollouts "
            "and adds its own reference KL; set it to False, or lambda_gold and beta_reference to "
            "0",
        ),
    ]


def _batch_rules(actor: Any, o: ObjectiveConfig, present: set[str]) -> list[tuple[bool, str]]:
    return [
        (
            bool(o.beta_reference) and "ref_log_prob" not in present,
            "beta_reference needs the reference's log-probs: set actor.use_kl_loss=True",
        ),
        (
            bool(o.lambda_gold) and "is_golden" not in present,
            f"lambda_gold needs golden rows: give the training file a column agent_name with "
            f"{AGENT_LOOP!r} (recipes/verl)",
        ),
        (
            bool(o.lambda_gold) and actor.rollout_n < 2,
            "lambda_gold needs actor_rollout_ref.rollout.n of 2 or more: one of the n is the "
            "golden solution",
        ),
    ]


def _refuse(o: ObjectiveConfig) -> None:
    """What the hooks of verl cannot carry."""
    for wrong, reason in (
        (
            o.advantage == "group_reward",
            "advantage = 'group_reward' is verl's own adv_estimator=grpo",
        ),
        (
            bool(o.lambda_divergence) or o.baseline == "kl",
            "the divergence term and baseline = 'kl' need the teacher's whole distribution, and "
            "verl's teachers are servers that give single log-probs",
        ),
        (
            bool(o.beta_reference) and o.reference_kl == "exact",
            "reference_kl = 'exact' needs the reference's whole distribution, and verl's workers "
            "give one log-prob per token; choose 'k1', 'k2' or 'k3'",
        ),
        (
            bool(o.beta_reference) and o.reference_kl != "k1" and o.stop == "event",
            "the reference's stop event is not known in verl, so with stop = 'event' "
            "reference_kl must be 'k1', the reward",
        ),
        (
            o.mask_truncated,
            "mask_truncated changes how many rollouts count, which a micro-batch does not know",
        ),
        (
            o.aggregation == "token" and (bool(o.lambda_gold) or bool(o.first_n)),
            "aggregation = 'token' divides by verl's count of all tokens, golden ones and late "
            "ones too; choose 'sequence' or 'constant' with lambda_gold or first_n",
        ),
    ):
        if wrong:
            raise ConfigError(f"verl: {reason}.")


def _tables(distillation: Any) -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = []
    for teacher in distillation.teacher_models.values():
        table = (teacher.inference.get("custom") or {}).get("stableopd")
        if table is None:
            raise ConfigError(
                f"verl: no {WHERE} for a teacher; add "
                f"'+distillation.teacher_models.teacher_model.{WHERE}="
                "{method:stable_opd,reference_kl:k1,stop_ids:[...]}'."
            )
        tables.append({str(k): _plain(v) for k, v in table.items()})
    if not tables:
        raise ConfigError("verl: distillation.teacher_models is empty.")
    return tables


def _plain(value: Any) -> Any:
    """Lists of OmegaConf as lists."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    return list(value)
