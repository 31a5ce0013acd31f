"""Where a run computes: device, precision, processes and trackers, by accelerate."""

from __future__ import annotations

import datetime
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from torch.distributed.fsdp import CPUOffloadPolicy

from stableopd.training.ranks import Ranks, shared
from stableopd.types import ConfigError

__all__ = [
    "Layout",
    "clock",
    "dtype_of",
    "lay_out",
    "make_accelerator",
    "require_one_process",
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# How long a process waits for the others before it gives them up for lost. They wait for each other
# while one writes a checkpoint or is the last to end its rollouts, which may take many minutes; one
# that dies is noticed at once.
PATIENCE = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Layout:
    """How the processes of a run hold the models.

    Attributes:
        ranks: The processes.
        device: Where this one computes.
        offloads: Whether sharded weights live on the CPU while they are not computed with.
    """

    ranks: Ranks
    device: torch.device
    offloads: bool = False


def make_accelerator(
    device: str, dtype: str, trackers: tuple[str, ...], folder: Path
) -> Accelerator:
    """Set up accelerate, for one process or for those that its launcher or torchrun started.

    Args:
        device: "auto" takes the GPU if there is one; otherwise the device's name.
        dtype: `student.dtype`; "auto" runs in bfloat16 autocast on a GPU that has it.
        trackers: Names of accelerate's trackers.
        folder: Where trackers write their files.

    Returns:
        The accelerator.

    Raises:
        ConfigError: The device is not there, or a tracker is not installed.
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
    return Accelerator(
        # Else processes that torchrun starts where there is no GPU would each believe to be alone.
        cpu=device == "cpu" or not torch.accelerator.is_available(),
        mixed_precision=mixed,
        log_with=list(trackers) or None,
        project_dir=str(folder / "trackers") if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def require_one_process(accelerator: Accelerator, command: str) -> Accelerator:
    """Refuse a launch of several processes for a command that has work for one.

    Args:
        accelerator: From `make_accelerator`.
        command: Name of the command, for the message.

    Returns:
        The accelerator.

    Raises:
        ConfigError: Several processes were launched.
    """
    if accelerator.num_processes > 1:
        told = ConfigError(
            f"{accelerator.num_processes} processes were launched, but stableopd {command} runs in "
            "one; start it without accelerate launch or torchrun."
        )
        raise shared(told)
    return accelerator


def lay_out(accelerator: Accelerator) -> Layout:
    """How the models are to be held: a copy in every process, or sharded by FSDP2.

    Args:
        accelerator: From `make_accelerator`. What was asked of accelerate (`accelerate launch
            --use_fsdp`, or the variables that it sets) is read here.

    Returns:
        The layout.

    Raises:
        ConfigError: Something was asked for that this program does not do.
    """
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in (*kinds, DistributedType.FSDP):
        raise ConfigError(
            f"accelerate was asked for {accelerator.distributed_type.value}, but stableopd trains "
            "with a copy of the models in each process, or with FSDP2: launch it without that."
        )
    rank, num = accelerator.process_index, accelerator.num_processes
    # Not accelerate's own word for it, as it knows no sharding on CPUs.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return Layout(Ranks(rank, num), accelerator.device)
    plugin = FullyShardedDataParallelPlugin()
    for is_wrong, reason in (
        (
            not torch.distributed.is_initialized(),
            "needs a launcher: use accelerate launch or torchrun.",
        ),
        (plugin.fsdp_version != 2, "is version 1: add --fsdp_version 2."),
        (
            plugin.activation_checkpointing,
            "is to checkpoint activations: set student.gradient_checkpointing = true instead.",
        ),
        (
            plugin.reshard_after_forward is not True,
            "is to keep gathered layers: leave --fsdp_reshard_after_forward out.",
        ),
    ):
        if is_wrong:
            raise ConfigError(f"FSDP was asked for of accelerate, but {reason}")
    # Else transformers would give weights to the main process alone, and nothing could be checked.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    return Layout(Ranks(rank, num, shards=True), accelerator.device, offloads)


def dtype_of(name: str, role: str, device: torch.device) -> torch.dtype:
    """The type of a model's weights.

    Args:
        name: "auto" or a type's name.
        role: "student" keeps float32 weights, whose small updates bfloat16 would round away;
            "teacher" takes bfloat16 on a GPU.
        device: Where the model runs.

    Returns:
        The type.

    Raises:
        ConfigError: The device has no such type.
    """
    if name == "float64" and device.type == "mps":
        raise ConfigError("dtype float64 does not exist on MPS; choose float32, or the CPU.")
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if role == "teacher" and device.type == "cuda" else torch.float32


def clock(device: torch.device) -> float:
    """Seconds of a clock, read when the device has computed all that it was given.

    A GPU computes while Python runs ahead; its time would otherwise count where Python happens to
    wait for a result.

    Args:
        device: Where the models are.

    Returns:
        Seconds since some moment.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
