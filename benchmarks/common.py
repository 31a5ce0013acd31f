"""What the benchmarks share: processes, clocks, memory, medians, tables, the environment.

A measurement runs in a process of its own, `python FILE JSON`, and prints one JSON object as its
last line. The sides of a comparison alternate.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
# Models and data that the benchmarks make; may be deleted at any time.
FOLDER = Path(os.environ.get("STABLEOPD_BENCH_FOLDER", ROOT / "work" / "bench"))
PACKAGES = ("stableopd", "torch", "transformers", "trl", "tokenizers", "numpy")
RUNS = 5

# Both sides get the same. CI keeps the peers from sending telemetry.
SETTINGS = {
    "CI": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for on its command line."""

    runs: int
    quick: bool

    def choose(self, usual: Any, quick: Any) -> Any:
        """One of two values, by `quick`."""
        return quick if self.quick else usual


def options(doc: str | None, minutes: float) -> Options:
    """Read the command line, and print what is measured where and how long it may take."""
    _use_wanted_python()
    text = (doc or "").strip()
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=None, help=f"runs of each side ({RUNS})")
    parser.add_argument("--quick", action="store_true", help="one tiny run: only that it works")
    chosen = parser.parse_args()
    runs = chosen.runs or (1 if chosen.quick else RUNS)
    if runs < 1:
        parser.error("--runs must be 1 or more.")
    told = "well under a minute" if chosen.quick else f"about {minutes * runs / RUNS:.1f} minutes"
    print(f"{Path(sys.argv[0]).name}: {told} on a quiet core.", file=sys.stderr, flush=True)
    print(environment(runs), flush=True)
    if chosen.quick:
        print("\n**Quick: tiny sizes; the numbers mean nothing.**")
    return Options(runs, chosen.quick)


def python() -> str:
    """The interpreter of the measurements, in whose environment both sides are installed."""
    return sys.executable


def _use_wanted_python() -> None:
    """Start again under STABLEOPD_BENCH_PYTHON, so that the versions printed are those measured."""
    wanted = os.environ.get("STABLEOPD_BENCH_PYTHON")
    # Not resolved: the interpreters of all environments link to one file.
    if wanted and os.path.abspath(wanted) != os.path.abspath(sys.executable):
        os.execv(wanted, [wanted, *sys.argv])


def num_threads() -> int:
    """Threads of a measurement."""
    return int(os.environ.get("OMP_NUM_THREADS") or "1")


def child_environment() -> dict[str, str]:
    """The environment variables of a measurement."""
    return {**os.environ, **SETTINGS, "OMP_NUM_THREADS": str(num_threads())}


def environment(runs: int) -> str:
    """One line on machine, load and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    named: list[str] = []
    for name in PACKAGES:
        try:
            named.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            named.append(f"{name} missing")
    return (
        f"{cpu_name()}, {cores} cores, load {load:.1f} at the start, {num_threads()} thread(s), "
        f"Python {platform.python_version()}, {', '.join(named)}; "
        f"medians of {runs} runs (lowest-highest)"
    )


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(file: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Run `file` on a specification in a process of its own; what it printed last."""
    done = subprocess.run(
        [python(), file, json.dumps(spec)],
        capture_output=True,
        text=True,
        env=child_environment(),
        check=False,
    )
    if done.returncode:
        sys.exit(f"{Path(file).name} {json.dumps(spec)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def alternate(
    file: str, sides: dict[str, dict[str, Any]], runs: int
) -> dict[str, list[dict[str, Any]]]:
    """Measure every side `runs` times in turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, spec in sides.items():
            found[name].append(measure(file, spec))
    return found


def answer(compute: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be the process of a measurement: compute what the command line asks for, and print it."""
    result = compute(json.loads(sys.argv[1]))
    print("\n" + json.dumps(result), flush=True)


def is_measurement() -> bool:
    """Whether this process was started by `measure`."""
    return len(sys.argv) == 2 and sys.argv[1].startswith("{")


@dataclass(frozen=True)
class Clock:
    """Wall seconds and CPU seconds of this process at a moment."""

    wall_s: float
    cpu_s: float

    @classmethod
    def now(cls, device: str = "cpu") -> Clock:
        """Read both; of a GPU, when it has computed all that it was given."""
        if device == "cuda":
            _cuda().synchronize()
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Clock, count: int = 1) -> dict[str, float]:
        """Seconds from `start` to here, for each of `count` things."""
        return {
            "wall_s": (self.wall_s - start.wall_s) / count,
            "cpu_s": (self.cpu_s - start.cpu_s) / count,
        }


class Memory:
    """Peak memory above its level when this is made: resident memory of this process, or a GPU's.

    The kernel's peak is set back to the level then, so that loading does not count. Memory that
    was freed before, and would hide growth, is handed back first. Of a GPU it is what torch has
    allocated for tensors.
    """

    def __init__(self, device: str = "cpu") -> None:
        gc.collect()
        self.device = device
        if device == "cuda":
            _cuda().synchronize()
            _cuda().empty_cache()
            _cuda().reset_peak_memory_stats()
            self.level_mb = _cuda().memory_allocated() / 1e6
            return
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            raise SystemExit(f"peak memory is measured through Linux's /proc: {error}") from None
        self.level_mb = _status_mb("VmRSS")

    def grown(self) -> dict[str, float]:
        """Peak above the level, and the peak itself, in MB (10^6 bytes)."""
        on_gpu = self.device == "cuda"
        peak_mb = _cuda().max_memory_allocated() / 1e6 if on_gpu else _status_mb("VmHWM")
        return {"memory_mb": peak_mb - self.level_mb, "process_mb": peak_mb}


def _cuda() -> Any:
    import torch

    return torch.cuda


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/self/status has no {name}")


def spread(values: Sequence[float], digits: int) -> str:
    """Median, lowest and highest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def of(results: Sequence[dict[str, Any]], key: str) -> list[float]:
    """A quantity of every run."""
    return [float(r[key]) for r in results]


@dataclass(frozen=True)
class Row:
    """One compared quantity: ours beside the peer's, and the target of their ratio.

    With `limit_s` the target is one of our seconds, whatever the peer needs.
    """

    what: str
    quantity: str
    ours: Sequence[float]
    peer: Sequence[float]
    digits: int
    target: float | None
    at_least: bool = False
    limit_s: float | None = None

    HEADER: ClassVar[str] = (
        "| what | quantity | ours | peer | ours / peer | target | met |\n"
        "|---|---|---|---|---|---|---|"
    )

    def markdown(self) -> str:
        ratios = [a / b if b else float("inf") for a, b in zip(self.ours, self.peer, strict=True)]
        cells = [self.what, self.quantity]
        cells += [spread(self.ours, self.digits), spread(self.peer, self.digits)]
        cells.append(spread(ratios, 2))
        if self.limit_s is None:
            cells += judged(statistics.median(ratios), self.target, self.at_least)
        else:
            cells += judged(statistics.median(self.ours), self.limit_s, unit=" s")
        return "| " + " | ".join(cells) + " |"


def judged(value: float, target: float | None, at_least: bool = False, unit: str = "") -> list[str]:
    """The cells of a target and whether a value meets it; the value counts as it is shown."""
    if target is None:
        return ["", ""]
    shown = round(value, 2)
    met = shown >= target if at_least else shown <= target
    return [f"{'≥' if at_least else '≤'} {target:g}{unit}", "yes" if met else "**no**"]


def require_close(
    what: str, ours: Sequence[float], peer: Sequence[float], rel: float, least: float = 0.0
) -> None:
    """End the program where two lists of numbers differ; nothing is timed then.

    Numbers below `least` are compared as if they were that large.
    """
    pairs = list(zip(ours, peer, strict=True))
    if not pairs or any(not abs(a - b) <= rel * max(abs(a), abs(b), least) for a, b in pairs):
        sys.exit(f"the two sides disagree on {what}: {list(ours)} and {list(peer)}")
