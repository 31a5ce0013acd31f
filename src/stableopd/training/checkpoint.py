"""Saving the student and all that a run needs to go on to the same bits.

The random numbers of a step are drawn from (seed, step), and so is the order of the data: beside
the weights, the optimizer and the schedule, the step is all the state that there is.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableopd import models
from stableopd.models import LanguageModel
from stableopd.runfolder import RunFolder
from stableopd.types import RunFolderError

__all__ = ["load_adapter", "load_trainer", "restore", "restore_initial", "save"]

STATE = "state.pt"


def save(
    folder: RunFolder,
    step: int,
    student: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> None:
    """Write checkpoints/STEP: a model folder that `from_pretrained` opens, and `trainer/`.

    Args:
        folder: The run folder.
        step: Updates made so far.
        student: The student; with LoRA, its adapter is written.
        optimizer: Its state is written.
        scheduler: Its state is written.

    Raises:
        RunFolderError: It cannot be written; what was there before is intact.
    """
    with folder.new_checkpoint(step) as path:
        student.model.save_pretrained(path)
        student.tokenizer.save_pretrained(path)
        (path / "trainer").mkdir()
        state = {
            "step": step,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        torch.save(state, path / "trainer" / STATE)


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
    return _load_state(path, {"optimizer": optimizer, "scheduler": scheduler})


def _load_state(path: Path, parts: Mapping[str, Any]) -> int:
    file = path / "trainer" / STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, pickle.PickleError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunFolderError(
            f"{file}: the run cannot go on from here ({reason}); remove the folder {path} to go "
            "on from the checkpoint before it."
        ) from error
    return int(state["step"])


def load_adapter(student: LanguageModel, path: Path) -> None:
    """Put the weights of a saved LoRA adapter into the student's.

    Args:
        student: A student with an adapter of the same shape.
        path: A checkpoint of a run folder.

    Raises:
        RunFolderError: The checkpoint holds no adapter that fits.
    """
    import peft
    from safetensors.torch import load_file

    file = path / "adapter_model.safetensors"
    try:
        result = peft.set_peft_model_state_dict(student.model, load_file(file))
    except (OSError, RuntimeError) as error:
        raise RunFolderError(f"{file}: the adapter cannot be loaded ({error}).") from error
    if result.unexpected_keys:
        raise RunFolderError(
            f"{file}: the adapter does not fit this student: {result.unexpected_keys[0]!r}."
        )


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
    _load_state(path, {"optimizer": optimizer})
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
        for name, parameter in student.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])


def _set_rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
