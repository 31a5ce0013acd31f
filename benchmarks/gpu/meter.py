"""What the phases of the GPU check share: device, clocks, peak memory, errors, child processes."""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# This repository's package, not another that is installed; helpers of tests and benchmarks last.
sys.path.insert(0, str(ROOT / "src"))
sys.path += [str(ROOT / "tests"), str(HERE.parent)]

import torch  # noqa: E402

import common  # noqa: E402
from common import Clock, Memory  # noqa: E402
from plan import START  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "liger-kernel", "numpy")
# Timed calls; slower ones are timed once.
REPEATS, SLOW_S = 3, 3.0


@dataclass(frozen=True)
class Setting:
    """Where a phase computes, and whether only to see that it works."""

    device: str
    quick: bool

    def choose(self, usual: Any, quick: Any) -> Any:
        """One of two values, by `quick`."""
        return quick if self.quick else usual

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The types in which a GPU computes."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}


class MissingError(Exception):
    """A peer is not there; the message is for its cell."""


def seconds_of(function: Callable[[], Any], device: str) -> float:
    """Median wall seconds of a call whose first one has been made."""
    found: list[float] = []
    while len(found) < REPEATS and not (found and found[0] > SLOW_S):
        start = Clock.now(device)
        function()
        found.append(Clock.now(device).since(start)["wall_s"])
    return statistics.median(found)


def peak_mb_of(function: Callable[[], Any], device: str) -> float:
    """MB that a call takes at its peak above what is there before."""
    memory = Memory(device)
    function()
    return memory.grown()["memory_mb"]


def why(error: BaseException) -> str:
    """An error for a cell of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    first = (str(error).strip().splitlines() or [""])[0]
    return str(error) if isinstance(error, MissingError) else f"{type(error).__name__}: {first}"


def free(device: str) -> None:
    """Give back what an earlier side has left, after an error too."""
    import gc

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest magnitude wanted; inf if something is not finite."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return error if bool(torch.isfinite(found).all()) else float("inf")


def forked(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call a function in a process of its own; what it takes of a GPU is free again afterwards.

    Nothing may have been computed on a GPU in this process.
    """
    context: Any = multiprocessing.get_context(os.environ[START])
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(writer, function, argument))
    child.start()
    writer.close()
    try:
        result, error = reader.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the process ended with exit code {child.exitcode}") from None
    child.join()
    if error is not None:
        raise error
    return result


def can_fork() -> bool:
    """Whether a process that is forked here could use CUDA; an import may have started it."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_tell_of_fork)
    child.start()
    child.join()
    return child.exitcode == 0


def _tell_of_fork() -> None:
    sys.exit(int(torch.cuda._is_in_bad_fork()))


def _answer(writer: Any, function: Callable[[Any], Any], argument: Any) -> None:
    try:
        writer.send((function(argument), None))
    except BaseException as error:
        traceback.print_exc()
        # Their own class may need more than a message, and would not come through.
        told = MissingError(why(error)) if isinstance(error, ModuleNotFoundError) else None
        writer.send((None, told or RuntimeError(why(error))))


def environment(setting: Setting) -> dict[str, Any]:
    """The card, the machine and the versions."""
    on_gpu = setting.device == "cuda"
    card = torch.cuda.get_device_properties(0) if on_gpu else None
    return {
        "card": card.name if card else common.cpu_name(),
        "memory_gb": round(card.total_memory / 1e9, 1) if card else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def version_of(package: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
