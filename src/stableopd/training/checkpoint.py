"""Saving the student and all that a run needs to go on to the same bits.

A checkpoint names the stop ids of the run, so that others who load it stop where the run did. It
holds whole weights and whole states, however they are shared out over processes, so a
run goes on with another number of these. The random numbers of a step are drawn from (seed, step),
and so is the order of the data: the state is the weights, the optimizer, the schedule and the step.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stableopd import models
from stableopd.models import LanguageModel
from stableopd.runfolder import RunFolder
from stableopd.runfolder.manifest import require_intact
from stableopd.text import one_line
from stableopd.training.ranks import Ranks
from stableopd.training.sharding import like, whole, whole_weights
from stableopd.types import RunFolderError

__all__ = ["load_adapter", "load_trainer", "restore", "restore_initial", "save"]

STATE = "state.pt"
GENERATION = "generation_config.json"

# What AdamW keeps of each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(
    folder: RunFolder,
    step: int,
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    ranks: Ranks,
    stop_ids: Sequence[int],
) -> None:
    """Write checkpoints/STEP: a model folder that `from_pretrained` opens, and `trainer/`.

    Args:
        folder: The run folder.
        step: Updates made so far.
        student: The student; with LoRA, its adapter is written.
        optimizer: Its state is written.
        scheduler: Its state is written.
        ranks: The processes; the main one writes.
        stop_ids: Ids that end a rollout of this run.

    Raises:
        RunFolderError: It cannot be written; what was there before is intact.
    """
    weights, optimizer_state = None, optimizer.state_dict()
    if ranks.shards:
        weights = whole_weights(student.model, keeps=ranks.is_main)
        optimizer_state = _whole_state(optimizer_state, keeps=ranks.is_main)
    state = {"step": step, "optimizer": optimizer_state, "scheduler": scheduler.state_dict()}

    def write() -> None:
        with folder.new_checkpoint(step) as path:
            student.model.save_pretrained(path, state_dict=weights)
            models.save_tokenizer(student, path)
            _write_stop_ids(path, student, stop_ids)
            (path / "trainer").mkdir()
            torch.save(state, path / "trainer" / STATE)

    ranks.on_main(write)


def _write_stop_ids(path: Path, student: LanguageModel, stop_ids: Sequence[int]) -> None:
    """Have generation_config.json name the ids that stopped the rollouts, and keep its rest."""
    file = path / GENERATION
    if file.is_file():
        settings = json.loads(file.read_text())
    else:  # PEFT writes none
        own = getattr(student.model, "generation_config", None)
        settings = {} if own is None else json.loads(own.to_json_string())
    settings["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def load_trainer(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> int:
    """Put the optimizer and the schedule back as they were.

    Args:
        path: A checkpoint of a run folder.
        optimizer: Takes the saved state.
        scheduler: Takes the saved state; the rate of the next step is that of its own schedule.

    Returns:
        The step at which it was saved.

    Raises:
        RunFolderError: The checkpoint holds no usable state of the trainer, or that of another
            step.
    """
    step = _load_state(path, optimizer, scheduler)
    # The same numbers again, unless the schedule has been given other steps.
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    _set_rates(optimizer, scheduler)
    return step


def _load_state(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> int:
    file = path / "trainer" / STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        step = _require_state(state, optimizer)
        if step != _step_of(path):
            raise ValueError(f"it is of step {step}")
        optimizer.load_state_dict(_shared_out(state["optimizer"], optimizer))
        if scheduler is not None:
            if state["scheduler"].get("last_epoch") != step:
                raise ValueError("the schedule is of another step")
            scheduler.load_state_dict(state["scheduler"])
    except (
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        pickle.PickleError,
    ) as error:
        reason = one_line(error)
        raise RunFolderError(
            f"{file}: the run cannot go on from here ({reason}); remove the folder {path} to go "
            "on from the checkpoint before it."
        ) from error
    return step


def _step_of(path: Path) -> int:
    """The step that a checkpoint's name says, also while it is being replaced."""
    return int(path.name.strip(".").partition(".")[0])


def _require_state(state: Any, optimizer: torch.optim.Optimizer) -> int:
    """Refuse a trainer's state that does not fit: torch would compute with it all the same.

    Args:
        state: What was read.
        optimizer: The optimizer that is to take it.

    Returns:
        Its step.

    Raises:
        ValueError: It is of another kind, or a tensor has another shape than its parameter.
    """
    kinds = {"step": int, "optimizer": dict, "scheduler": dict}
    if not isinstance(state, dict) or any(
        type(cast(dict[str, Any], state).get(name)) is not kind for name, kind in kinds.items()
    ):
        raise ValueError("it is not the state of a trainer")
    found = cast(dict[str, Any], state)
    groups, moments = found["optimizer"].get("param_groups"), found["optimizer"].get("state")
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if not isinstance(groups, list) or not isinstance(moments, dict):
        raise ValueError("it holds no state of an optimizer")
    if [len(group["params"]) for group in cast(list[Any], groups)] != mine:
        raise ValueError("it is of a student with other parameters")
    for theirs, own in zip(cast(list[Any], groups), optimizer.param_groups, strict=True):
        for name in theirs.keys() & own.keys():
            if type(theirs[name]) is not type(own[name]):
                raise ValueError(f"{name!r} of the optimizer is {theirs[name]!r}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, values in cast(dict[Any, Any], moments).items():
        if type(place) is not int or not 0 <= place < len(parameters):
            raise ValueError(f"it has a parameter {place!r}")
        for name in MOMENTS:
            shape = parameters[place].shape if name != "step" else torch.Size([])
            value = values.get(name)
            if not isinstance(value, Tensor) or value.shape != shape or value.is_sparse:
                raise ValueError(f"{name!r} of parameter {place} has another shape")
            if not value.is_floating_point():
                raise ValueError(f"{name!r} of parameter {place} is of type {value.dtype}")
    return found["step"]


def _whole_state(state: dict[str, Any], keeps: bool) -> dict[str, Any]:
    """An optimizer's state with all that is shared out in full, where this process keeps it."""
    found: dict[int, dict[str, Any]] = {}
    for place, values in state["state"].items():
        full = {k: whole(v).cpu() if isinstance(v, Tensor) else v for k, v in values.items()}
        found[place] = full if keeps else {}
    return {**state, "state": found}


def _shared_out(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state of an optimizer, shared out as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Any]] = {}
    for place, values in state["state"].items():
        shape = parameters[place].shape
        found[place] = {
            k: like(parameters[place], v) if isinstance(v, Tensor) and v.shape == shape else v
            for k, v in values.items()
        }
    return {**state, "state": found}


def load_adapter(student: LanguageModel, path: Path) -> None:
    """Put the weights of a saved LoRA adapter into the student's.

    Args:
        student: A student with an adapter of the same shape.
        path: A checkpoint of a run folder.

    Raises:
        RunFolderError: The checkpoint holds no adapter that fits.
    """
    file = path / "adapter_model.safetensors"
    try:
        saved = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{file}: the adapter cannot be loaded ({error}).") from error
    # PEFT leaves the adapter's own name out of its files.
    weights = {name: saved.pop(name.replace(".default", ""), None) for name in _trained(student)}
    wrong = next((name for name, weight in weights.items() if weight is None), None)
    if wrong or saved:
        raise RunFolderError(
            f"{file}: the adapter does not fit this student: {wrong or next(iter(saved))!r}."
        )
    _copy({name: weight for name, weight in weights.items() if weight is not None}, student)


def restore(
    student: LanguageModel, optimizer: torch.optim.Optimizer, scheduler: Any, path: Path
) -> None:
    """Put an earlier student back in place, with the optimizer that it had.

    The schedule of the learning rate goes on counting: it is not rewound.

    Args:
        student: Takes the weights of the checkpoint.
        optimizer: Takes its state.
        scheduler: Gives the learning rate of the next step.
        path: A checkpoint of a run folder.

    Raises:
        RunFolderError: The checkpoint holds no usable adapter or state of the trainer, or is not
            what was written.
        ModelError: It holds no usable weights.
    """
    require_intact(path, _step_of(path))
    if hasattr(student.model, "peft_config"):
        load_adapter(student, path)
    else:
        cpu = torch.device("cpu")
        saved = models.load(str(path), role="student", dtype=student.model.dtype, device=cpu)
        _copy(dict(saved.model.named_parameters()), student)
    _load_state(path, optimizer)
    _set_rates(optimizer, scheduler)


def restore_initial(
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    initial: Mapping[str, Tensor],
) -> None:
    """Put the initial student back in place, with a fresh optimizer.

    Args:
        student: Takes the weights.
        optimizer: Forgets its state.
        scheduler: Gives the learning rate of the next step; it is not rewound.
        initial: The trained parameters as they were at the start, by name.
    """
    _copy(initial, student)
    optimizer.state.clear()
    _set_rates(optimizer, scheduler)


def _copy(weights: Mapping[str, Tensor], student: LanguageModel) -> None:
    with torch.no_grad():
        for name, parameter in _trained(student).items():
            parameter.copy_(like(parameter, weights[name]))


def _trained(student: LanguageModel) -> dict[str, Tensor]:
    return {name: p for name, p in student.model.named_parameters() if p.requires_grad}


def _set_rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
