"""What one GPU tells in ten minutes: right results, losses, rollouts, steps, the demo, kernels.

    python benchmarks/gpu/check.py --output work/gpu-check

Every phase is a process of its own with a limit of seconds, prints one line, and has its results in
DIR/PHASE.json, row by row as they come: a run that is cut off loses what is under way only.
Exit code 0: all phases ran, and everything was right; 1: not so; 2: a wrong argument.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from plan import LIMITS, START

LOG = "check.log"
# What all phases import, once for all of them; a peer may be missing.
SHARED = ("stableopd.training.loop", "datasets", "trl.trainer.distillation_trainer")


class Record:
    """The JSON of one phase, on disk after every change of it."""

    def __init__(self, folder: Path, phase: str, facts: dict[str, Any]) -> None:
        self.path = folder / f"{phase}.json"
        self.content = {"phase": phase, **facts, "state": "running", "error": None, "rows": []}
        self.write()

    def write(self, **changes: Any) -> None:
        """Change fields and write the file, which is never half there."""
        self.content.update(changes)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self.path)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.write(rows=[*self.content["rows"], row])


def is_bad(row: dict[str, Any]) -> bool:
    """Whether a row tells of a fault of ours. A peer that is missing or fails is none."""
    return row.get("ok") is False or (row.get("side") == "ours" and bool(row.get("error_text")))


def load(phase: str) -> Any:
    """The module of a phase."""
    return importlib.import_module(f"phase_{phase}")


def _be_phase(phase: str, record: Record, setting: Any, log: Path) -> None:
    """In the child: make the rows of a phase."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    print(f"\n== {phase} ==", flush=True)
    import meter

    try:
        for row in load(phase).run(setting):
            print(json.dumps(row), flush=True)
            record.add(row)
        # Last, as this process must not touch the GPU where children of it do.
        record.write(environment=meter.environment(setting), state="done")
    except BaseException as error:
        traceback.print_exc()
        record.write(state="failed", error=meter.why(error))
        with contextlib.suppress(Exception):
            record.write(environment=meter.environment(setting))
    sys.stdout.flush()
    sys.stderr.flush()


def run_phase(
    phase: str, limit: float, setting: Any, folder: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Run a phase in a process that is killed at its limit, with all that it started.

    Returns:
        The content of its JSON.
    """
    record = Record(folder, phase, facts)
    start = time.monotonic()
    context: Any = multiprocessing.get_context(os.environ[START])
    child = context.Process(target=_be_phase, args=(phase, record, setting, folder / LOG))
    child.start()
    try:
        child.join(limit)
        is_cut = child.is_alive()
    finally:
        # What it started is in its group, which is there once it has begun.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()
    record.content = json.loads(record.path.read_text())
    if is_cut:
        record.write(state="cut off", error=f"stopped at its limit of {limit:g} s")
    elif record.content["state"] == "running":
        record.write(state="failed", error=f"its process ended with exit code {child.exitcode}")
    record.write(seconds=round(time.monotonic() - start, 1))
    return record.content


def told(found: dict[str, Any]) -> str:
    """The line of a phase."""
    rows = found["rows"]
    bad = [row for row in rows if is_bad(row)]
    summary = found["error"] or (f"{len(bad)} of {len(rows)} rows are wrong" if bad else "")
    if not summary:
        summary = load(found["phase"]).summary(rows)
    return f"{found['phase']:9} {found['state']:8} {found['seconds']:6.1f} s  {summary}"


def install(folder: Path, target: Path) -> list[str]:
    """Install what is missing here from a folder of wheels into another folder, and offer it.

    Returns:
        What was installed, or why it could not be, a package a line.
    """
    names = {re.split(r"-\d", wheel.name)[0].replace("_", "-") for wheel in folder.glob("*.whl")}
    missing = sorted(name for name in names if not _is_installed(name))
    if not missing:
        return []
    if not _pip(folder, target, *missing):
        lines = missing
    else:  # one that does not fit this Python is no reason to do without the others
        errors = {name: _pip(folder, target, name) for name in missing}
        lines = [f"{name} ({error})" if error else name for name, error in errors.items()]
    sys.path.append(str(target))
    offer(str(target))
    importlib.invalidate_caches()
    return lines


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def _pip(folder: Path, target: Path, *names: str) -> str:
    """Install packages from a folder; what pip says where it fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-compile", "--find-links", str(folder)]
    done = subprocess.run(
        [*command, "--target", str(target), *names], capture_output=True, text=True, check=False
    )
    said = done.stderr.strip().splitlines()
    return (said[-1] if said else "pip failed") if done.returncode else ""


def offer(*folders: str) -> None:
    """Let the processes that are started from here import from some folders."""
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*folders, known]))


@contextlib.contextmanager
def _offered(wheels: Path | None) -> Iterator[list[str]]:
    """What is missing, installed as long as this runs."""
    if wheels is None or not any(wheels.glob("*.whl")):
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="gpu-site-") as target:
        yield install(wheels, Path(target))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--phases", default=",".join(LIMITS), help="some of them: a,b")
    parser.add_argument("--quick", action="store_true", help="toy sizes: only that it works")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("work/gpu-check"), metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install from there if missing")
    parser.add_argument("--limit", type=float, help="seconds of every phase; its own")
    chosen = parser.parse_args()
    chosen.phases = [name for name in chosen.phases.split(",") if name]
    unknown = sorted(set(chosen.phases) - set(LIMITS))
    if unknown or not chosen.phases:
        parser.error(f"--phases: {', '.join(unknown) or 'none'}; there are {', '.join(LIMITS)}.")
    if chosen.device == "cpu" and not chosen.quick:
        parser.error("--device cpu is for --quick: the sizes are a GPU's.")
    if chosen.limit is not None and chosen.limit <= 0:
        parser.error("--limit: must be more than 0.")
    return chosen


def main() -> int:
    chosen = arguments()
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / LOG).write_text("")
    with _offered(chosen.wheels) as installed:
        print(f"installed for this run: {', '.join(installed) or 'nothing'}", flush=True)
        with (chosen.output / LOG).open("a") as log:
            return _main(chosen, installed, log)


def _main(chosen: argparse.Namespace, installed: list[str], log: IO[str]) -> int:
    import common

    os.environ.update(common.SETTINGS)
    offer(str(common.ROOT / "src"))
    # Whether there is a GPU must be asked without starting CUDA, which no child could use then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if chosen.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(common.num_threads())
    # Imported once: the phases are forked from here.
    import torch
    import transformers

    import meter

    for name in SHARED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            log.write(f"{name}: {error}\n")
    log.write(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --quick --device cpu shows that the script works.")
        return 2
    os.environ.setdefault(START, "fork" if meter.can_fork() else "spawn")
    setting = meter.Setting(chosen.device, chosen.quick)
    facts: dict[str, Any] = {
        "device": chosen.device,
        "quick": chosen.quick,
        "date": datetime.date.today().isoformat(),
        "installed": installed,
        "environment": None,
    }
    is_right = True
    for phase in chosen.phases:
        found = run_phase(phase, chosen.limit or LIMITS[phase], setting, chosen.output, facts)
        print(told(found), flush=True)
        is_right &= found["state"] == "done" and not any(map(is_bad, found["rows"]))
    return 0 if is_right else 1


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    sys.exit(main())
