"""The models of a run: loaded and checked, and shared out over the processes if that is asked for.

Every process reads all weights. Where they are to be sharded they are read to the CPU, so that no
GPU ever has to hold a whole model for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableopd import embedded, models
from stableopd.config import Config, ObjectiveConfig
from stableopd.config_templates import read_template
from stableopd.data.templates import give_template
from stableopd.model_files import find_files
from stableopd.models import LanguageModel
from stableopd.runfolder import newest_checkpoint
from stableopd.training.checkpoint import load_adapter
from stableopd.training.devices import Layout, dtype_of
from stableopd.training.inputs import weights_sum
from stableopd.training.sharding import shard
from stableopd.types import ConfigError, ModelError

__all__ = ["Models", "checkpoint_gradients", "load_models", "needs_teacher", "share_out"]


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Attributes:
        student: The student.
        teacher: The teacher; None for methods without one, and where it is served.
        reference: The student as it was at the start; None where no term can need it.
        initial: The student's trained parameters before any step, by name; empty where no
            rollback can need them.
        sums: Checksums of the weights of student.model ("student") and teacher.model ("teacher"),
            in the main process; those that were not read are left out.
    """

    student: LanguageModel
    teacher: LanguageModel | None
    reference: LanguageModel | None
    initial: Mapping[str, Tensor]
    sums: Mapping[str, str] = field(default_factory=dict[str, str])


def load_models(
    config: Config, layout: Layout, checkpoint: Path | None, needs_reference: bool
) -> Models:
    """Student, and teacher and reference where a term needs them or may come to need them.

    Args:
        config: The configuration.
        layout: Where this process computes, and whether weights are sharded.
        checkpoint: The checkpoint to go on from; None starts with the initial student.
        needs_reference: Whether the reference is, or may come to be, scored.

    Returns:
        The models.

    Raises:
        ModelError: One cannot be loaded, or student and teacher do not fit.
        ConfigError: The adapter is larger than the student's layers.
        RunFolderError: The checkpoint holds no adapter that fits.
    """
    o, s, t = config.objective, config.student, config.teacher
    read_template(config.data.chat_template)  # refused before weights are read
    source = _source(s.model, "student")
    has_teacher = needs_teacher(o) and not t.url
    if has_teacher:
        find_files(_source(t.model, "teacher"), f"teacher.model = {t.model!r}", t.gguf_file)
    device = torch.device("cpu") if layout.ranks.shards else layout.device
    dtype = dtype_of(s.dtype, "student", layout.device)
    initial: dict[str, Tensor] = {}
    sums: dict[str, str] = {}

    def load(path: str, gguf_file: str) -> LanguageModel:
        return models.load(path, role="student", dtype=dtype, device=device, gguf_file=gguf_file)

    def load_initial() -> LanguageModel:
        found = load(source, s.gguf_file)
        if layout.ranks.is_main and "student" not in sums:
            sums["student"] = weights_sum(found.model)
        return found

    if s.lora_rank:
        student = load_initial()
        _require_rank(student, s.lora_rank)
        student = models.add_lora(student, s.lora_rank, s.lora_alpha, s.lora_targets)
        if config.alarm.action == "rollback":
            adapter = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
            initial = {name: p.detach().clone() for name, p in adapter.items()}
        if checkpoint is not None:
            load_adapter(student, checkpoint)
    elif checkpoint is not None:
        student = load(str(checkpoint), "")
    else:
        student = load_initial()
    give_template(student.tokenizer, config.data.chat_template)
    if s.gradient_checkpointing:
        checkpoint_gradients(student.model)
    teacher = reference = None
    if has_teacher:
        teacher = models.load(
            _source(t.model, "teacher"),
            role="teacher",
            dtype=dtype_of(t.dtype, "teacher", layout.device),
            device=device,
            gguf_file=t.gguf_file,
        )
        models.require_same_tokenizer(student, teacher)
        if layout.ranks.is_main:
            sums["teacher"] = weights_sum(teacher.model)
    if needs_reference:
        # With an adapter the student's own base is the reference, and no second copy is held.
        reference = student if s.lora_rank else load_initial()
    return Models(student, teacher, reference, initial, sums)


def _require_rank(student: LanguageModel, rank: int) -> None:
    """Refuse an adapter that is larger than what it adapts, before it is made."""
    widths = [min(p.shape) for p in student.model.parameters() if p.ndim == 2]
    if widths and rank > max(widths):
        raise ConfigError(
            f"student.lora_rank = {rank} is more than the {max(widths)} that the widest layer of "
            f"{student.name!r} has; lower it, or set it to 0 to train all weights."
        )


def needs_teacher(objective: ObjectiveConfig) -> bool:
    """Whether a term needs a teacher.

    Args:
        objective: Weights of the terms, presets filled in.
    """
    has_credit = bool(objective.lambda_policy) and objective.advantage != "group_reward"
    return has_credit or bool(objective.lambda_divergence)


def share_out(loaded: Models, layout: Layout, keeps_initial: bool) -> Models:
    """See that all processes hold the same weights, and shard these where that is asked for.

    Args:
        loaded: The models as this process has read them; sharded in place.
        layout: The processes.
        keeps_initial: Whether a rollback may need the initial student.

    Returns:
        The models, with the initial parameters filled in.

    Raises:
        ConfigError: Another process has read other weights.
    """
    roles = {"student": loaded.student, "teacher": loaded.teacher, "reference": loaded.reference}
    found = {role: one.model for role, one in roles.items() if one is not None}
    if layout.ranks.num > 1:
        layout.ranks.require_same({role: _checksum(model) for role, model in found.items()})
    if layout.ranks.shards:
        for model in {id(model): model for model in found.values()}.values():
            shard(model, layout.device, layout.offloads)
    if keeps_initial and not loaded.initial and loaded.reference is not None:
        initial = dict(loaded.reference.model.named_parameters())
        return dataclasses.replace(loaded, initial=initial)
    return loaded


def checkpoint_gradients(model: Any) -> None:
    """Compute layers again in the backward pass, instead of keeping what they computed.

    Args:
        model: A transformers model, or a PEFT model around one; changed in place.
    """
    # Its name from transformers 5.20 on, and before.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    for module in model.modules():
        # In training mode are the checkpointing layers alone: dropout stays off, as in sampling.
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def _checksum(model: Any) -> str:
    """A number that other weights would hardly have; rounded, as machines may differ there."""
    return f"{sum(p.detach().sum(dtype=torch.float64).item() for p in model.parameters()):.6e}"


def _source(model: str, role: str) -> str:
    """Where a model's files are, by its setting; no folder of a run, which has several."""
    if model == "embedded":
        return str(embedded.path(role))
    if (checkpoint := newest_checkpoint(Path(model))) is not None:
        raise ModelError(
            f"{role}.model = {model!r} is the folder of a run, not a model's; its newest "
            f"checkpoint is {checkpoint}."
        )
    return model
