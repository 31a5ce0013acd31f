"""Where a run computes: device, precision and trackers, by accelerate."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from accelerate import Accelerator

from stableopd.types import ConfigError

__all__ = ["dtype_of", "make_accelerator"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def make_accelerator(
    device: str, dtype: str, trackers: tuple[str, ...], folder: Path
) -> Accelerator:
    """Set up accelerate for one process.

    Args:
        device: "auto" takes the GPU if there is one; otherwise the device's name.
        dtype: `student.dtype`; "auto" runs in bfloat16 autocast on a GPU that has it.
        trackers: Names of accelerate's trackers.
        folder: Where trackers write their files.

    Returns:
        The accelerator.

    Raises:
        ConfigError: The device is not there, a tracker is not installed, or several processes
            were launched.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(
                f"run.trackers names {tracker!r}, which is not installed: pip install {tracker}."
            )
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (device == "cuda" and not has_cuda) or (device == "mps" and not has_mps):
        raise ConfigError(f"run.device = {device!r}, but torch finds no such device here.")
    wants_bf16 = dtype == "auto" and device in ("auto", "cuda") and has_cuda
    mixed = "bf16" if wants_bf16 and torch.cuda.is_bf16_supported() else "no"
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=mixed,
        log_with=list(trackers) or None,
        project_dir=str(folder / "trackers") if trackers else None,
    )
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"{accelerator.num_processes} processes were launched, but this version trains in one; "
            "run stableopd train without accelerate launch."
        )
    return accelerator


def dtype_of(name: str, role: str, device: torch.device) -> torch.dtype:
    """The type of a model's weights.

    Args:
        name: "auto" or a type's name.
        role: "student" keeps float32 weights, whose small updates bfloat16 would round away;
            "teacher" takes bfloat16 on a GPU.
        device: Where the model runs.

    Returns:
        The type.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if role == "teacher" and device.type == "cuda" else torch.float32
