"""Saving the student and all that a run needs to go on to the same bits.

A checkpoint holds whole weights and whole states, however they are shared out over processes, so a
run goes on with another number of these. The random numbers of a step are drawn from (seed, step),
and so is the order of the data: beside the weights, the optimizer and the schedule, the step is all
the state that there is.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stableopd import models
from stableopd.models import LanguageModel
from stableopd.runfolder import RunFolder
from stableopd.training.ranks import Ranks
from stableopd.training.sharding import like, whole, whole_weights
from stableopd.types import RunFolderError

__all__ = ["load_adapter", "load_trainer", "restore", "restore_initial", "save"]

STATE = "state.pt"


def save(
    folder: RunFolder,
    step: int,
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    ranks: Ranks,
) -> None:
    """Write checkpoints/STEP: a model folder that `from_pretrained` opens, and `trainer/`.

    Args:
        folder: The run folder.
        step: Updates made so far.
        student: The student; with LoRA, its adapter is written.
        optimizer: Its state is written.
        scheduler: Its state is written.
        ranks: The processes; the main one writes.

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
            student.tokenizer.save_pretrained(path)
            (path / "trainer").mkdir()
            torch.save(state, path / "trainer" / STATE)

    ranks.on_main(write)


def load_trainer(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> int:
    """Put the optimizer and the schedule back as they were.

    Args:
        path: A checkpoint of a run folder.
        optimizer: Takes the saved state.
        scheduler: Takes the saved state.

    Returns:
        The step at which it was saved.

    Raises:
        RunFolderError: The checkpoint holds no usable state of the trainer.
    """
    return _load_state(path, optimizer, scheduler)


def _load_state(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> int:
    file = path / "trainer" / STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(_shared_out(state["optimizer"], optimizer))
        if scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
    except (
        OSError,
        EOFError,
        LookupError,
        ValueError,
        RuntimeError,
        pickle.PickleError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunFolderError(
            f"{file}: the run cannot go on from here ({reason}); remove the folder {path} to go "
            "on from the checkpoint before it."
        ) from error
    return int(state["step"])


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
        RunFolderError: The checkpoint holds no usable adapter or state of the trainer.
        ModelError: It holds no usable weights.
    """
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
