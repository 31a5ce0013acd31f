"""`stableopd demo`: the collapse and the cure, side by side, from the embedded models.

Each arm is a `stableopd train` of its own in a process of its own, and what is shown is read from
the two run folders. Both arms read the same file, and differ in `objective.method` alone.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from stableopd import config as configuration
from stableopd import embedded
from stableopd.report.finals import FINAL_STEPS
from stableopd.runfolder import RunFolder
from stableopd.runfolder.files import reading
from stableopd.terminal import LiveView, alarm_message, table
from stableopd.types import RunFolderError, TrainingError

__all__ = ["ARMS", "run_demo", "table_row"]

ARMS = {"OPD": "opd", "StableOPD": "stable_opd"}
POLL_SECONDS = 0.5


@dataclass
class _Arm:
    """One arm of the demo: its folder, its process, and how much of it was shown."""

    name: str
    path: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    num_shown: int = 0
    num_told: int = 0

    def lines(self) -> list[dict[str, Any]]:
        return RunFolder.open(self.path).metrics() if self._has_run() else []

    def events(self) -> list[dict[str, Any]]:
        return RunFolder.open(self.path).events() if self._has_run() else []

    def _has_run(self) -> bool:
        return (self.path / "config.toml").is_file()


def run_demo(output: Path, overrides: Sequence[str]) -> None:
    """Run both arms, show them live, and write the table, the figures and the page.

    A demo that was interrupted is continued; beside a finished one a new one is made.

    Args:
        output: Folder of the two runs; a number is added where it holds a finished demo.
        overrides: "section.key=value", for both arms.

    Raises:
        StableOPDError: An arm failed; the message is the arm's own.
    """
    file = embedded.path("demo")
    for name in ("objective.method", "run.output"):
        if any(override.startswith(f"{name}=") for override in overrides):
            raise configuration.ConfigError(f"--set {name}: the demo sets it for each arm.")
    settings = configuration.load(file, overrides)
    with reading(output):
        output = _free_folder(output, settings.run.steps)
    together = len(os.sched_getaffinity(0)) >= 2 if hasattr(os, "sched_getaffinity") else True
    started = time.monotonic()
    arms: list[_Arm] = []
    with LiveView(f"OPD and StableOPD in {output}", settings.run.steps, list(ARMS)) as view:
        try:
            for name, method in ARMS.items():
                arms.append(_start(name, method, file, output, overrides))
                if not together:
                    _watch(view, arms[-1:])
            _watch(view, arms)
        finally:
            _end(arms)
    folders = [(arm.name, RunFolder.open(arm.path)) for arm in arms]
    console = Console()
    console.print(_results(folders, settings.repetition))
    # Matplotlib is loaded once the arms have ended, not before they start.
    from stableopd.diagnose.command import read_runs
    from stableopd.report.page import write_page

    _write_figures(folders, output, settings.repetition)
    found = [
        dataclasses.replace(diagnosis, name=arm.name)
        for arm, diagnosis in zip(arms, read_runs([arm.path for arm in arms]), strict=True)
    ]
    write_page(found, output / "report.html", "The collapse and the cure")
    for diagnosis in found:
        console.print(Text(f"{diagnosis.name}: {diagnosis.verdict.headline}"), soft_wrap=True)
    console.print(f"Figures: {output}/*.png    Page: {output / 'report.html'}", soft_wrap=True)
    console.print(f"Both arms took {time.monotonic() - started:.0f} s.")


def _free_folder(output: Path, num_steps: int) -> Path:
    number, folder = 1, output
    while _is_finished(folder, num_steps):
        number += 1
        folder = output.with_name(f"{output.name}-{number}")
    return folder


def _is_finished(output: Path, num_steps: int) -> bool:
    paths = [output / method for method in ARMS.values()]
    if not all((path / "config.toml").is_file() for path in paths):
        return False
    lines = [RunFolder.open(path).metrics() for path in paths]
    return all(line and line[-1]["step"] >= num_steps for line in lines)


def _start(name: str, method: str, file: Path, output: Path, overrides: Sequence[str]) -> _Arm:
    path = output / method
    command = [sys.executable, "-m", "stableopd", "train", str(file)]
    for override in (*overrides, f"objective.method={method}", f"run.output={path}"):
        command += ["--set", override]
    if (path / "config.toml").is_file():
        command.append("--resume")
    # Two threads each on two cores would be many times slower than one each.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `_end`)
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    return _Arm(name, path, process, log)


def _watch(view: LiveView, arms: Sequence[_Arm]) -> None:
    """Show new lines of all arms until every one has ended."""
    running = True
    while running:
        running = any(arm.process.poll() is None for arm in arms)
        for arm in arms:
            lines = arm.lines()
            for line in lines[arm.num_shown :]:
                view.update(arm.name, line)
            arm.num_shown = max(arm.num_shown, len(lines))
            events = arm.events()
            for event in events[arm.num_told :]:
                view.message(f"{arm.name}: {alarm_message(event)}")
            arm.num_told = max(arm.num_told, len(events))
            _require_success(arm)
        if running:
            time.sleep(POLL_SECONDS)


def _require_success(arm: _Arm) -> None:
    if arm.process.poll() in (None, 0):
        return
    arm.log.seek(0)
    said = arm.log.read().decode(errors="replace").strip().splitlines()
    reason = next((line for line in reversed(said) if line.startswith("error: ")), said[-1])
    raise TrainingError(f"the arm {arm.name} ended early: {reason.removeprefix('error: ')}")


def _end(arms: Sequence[_Arm]) -> None:
    for arm in arms:
        if arm.process.poll() is None:
            arm.process.terminate()
    for arm in arms:
        arm.process.wait()
        arm.log.close()


def _results(
    folders: Sequence[tuple[str, RunFolder]], repetition: configuration.RepetitionConfig
) -> Any:
    """The table of the demo: start, then the end of each arm."""
    runs = [(name, folder.metrics()) for name, folder in folders]
    steps = {name: [line for line in lines if line["step"] > 0] for name, lines in runs}
    first_name, first = runs[0]
    if not steps[first_name]:
        raise RunFolderError(f"{folders[0][1].path}: has no step to show.")
    rows = [["start", *table_row(first, is_start=True)]]
    rows += [[f"{name}, end", *table_row(lines)] for name, lines in runs]
    columns = ("", "accuracy", "TruncRate", "RepRate", "length")
    made = table(columns, rows, "From the same student")
    made.caption = (
        "accuracy: held-out problems. The rest: training rollouts, mean of the last "
        f"{FINAL_STEPS} steps. RepRate: L = {repetition.window_chars} characters, "
        f"tau = {repetition.ratio:g}."
    )
    return made


def table_row(lines: Sequence[dict[str, Any]], is_start: bool = False) -> list[str]:
    """The cells of a row of the demo's table: accuracy, TruncRate, RepRate, length.

    Args:
        lines: Lines of metrics of one arm, with at least one step.
        is_start: Whether the row is of the first step, or of the last ones.
    """
    steps = [line for line in lines if line["step"] > 0]
    evaluated = lines[:1] if is_start else lines
    trained = steps[:1] if is_start else steps[-FINAL_STEPS:]
    accuracy = [line["eval/accuracy"] for line in evaluated if "eval/accuracy" in line]
    cells = [f"{accuracy[-1]:.2f}" if accuracy else "-"]
    for name, form in (
        ("rollout/truncation_rate", ".2f"),
        ("rollout/repetition_rate", ".2f"),
        ("rollout/mean_length", ".0f"),
    ):
        cells.append(format(statistics.fmean(line[name] for line in trained), form))
    return cells


def _write_figures(
    folders: Sequence[tuple[str, RunFolder]],
    output: Path,
    repetition: configuration.RepetitionConfig,
) -> None:
    from stableopd.report import figures

    runs = {name: [folder.metrics()] for name, folder in folders}
    figures.save_png(figures.dynamics_figure(runs, repetition), output / "figure-1-dynamics.png")
    figures.save_png(figures.logprob_figure(runs), output / "figure-2-logprobs.png")
    figures.save_png(figures.credit_figure(runs, repetition), output / "figure-3-credit.png")
    figures.save_png(
        figures.comparison_figure(runs, repetition), output / "figure-4-comparison.png"
    )
