"""`make reproduce`: every run of this recipe, two at a time, and from where it was interrupted.

    python recipes/collapse-and-cure/reproduce.py --output work/reproduce --group main

Each process makes one run after the other on one thread: two threads on two cores are slower than
two runs of one. Ctrl-C ends it; the same command goes on with what is missing, a half-made
run from its last checkpoint. What failed is told at the end, and tried again by the next call.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the processes that are started, too

import experiments  # noqa: E402
import phase  # noqa: E402
import worlds  # noqa: E402
from experiments import Arm  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Job = tuple[str, Callable[..., None], tuple[Any, ...]]


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder of everything.")] = Path("work/reproduce"),
    group: Annotated[list[str], typer.Option(help="Some questions alone; all by default.")] = [],  # noqa: B006
    num_seeds: Annotated[int, typer.Option(min=1, help="At most so many seeds of an arm.")] = 99,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of every run; to try the script.")] = 0,
) -> None:
    """Make the models, the runs and the cells that are missing."""
    known = [*experiments.groups(), "phase"]
    for name in group:
        if name not in known:
            raise typer.BadParameter(f"{name}: choose from {', '.join(known)}.")
    chosen = group or known
    arms = experiments.all_arms([name for name in chosen if name != "phase"])
    cells = phase.cells() if "phase" in chosen else []
    jobs = jobs_of(arms, cells, num_seeds, output, steps)
    if jobs:
        note_commit(output)
    make_models(models_needed(arms, cells, num_seeds, output, steps), output, workers, steps)
    failed = work(jobs, workers, "runs")
    failed += work(finals_of(arms, num_seeds, output, steps), workers, "evaluations")
    if failed:
        raise typer.Exit(1)


def models_needed(
    arms: Sequence[Arm], cells: Sequence[phase.Cell], num_seeds: int, output: Path, steps: int
) -> list[str]:
    """The models of the runs and cells that are missing: what is done needs them no more."""
    missing = [
        arm
        for arm in arms
        if not all(arm.is_finished(seed, output, steps) for seed in arm.seeds[:num_seeds])
    ]
    names = experiments.models_of(missing)
    left = [cell for cell in cells if cell.seed < num_seeds and not cell.file(output).is_file()]
    return names + [name for name in phase.models_of(left) if name not in names]


def jobs_of(
    arms: Sequence[Arm], cells: Sequence[phase.Cell], num_seeds: int, output: Path, steps: int
) -> list[Job]:
    """The runs and cells that are missing.

    The paper's comparison comes first, then all else seed by seed: what is interrupted has few
    seeds of everything, and not all of little.
    """
    first = {arm.folder for arm in experiments.main_arms()}
    found: list[tuple[int, Job]] = []
    for cell in cells:
        if cell.seed < num_seeds and not cell.file(output).is_file():
            found.append((cell.seed, (cell.name, phase.make_cell, (cell, output, steps))))
    for arm in arms:
        for number, seed in enumerate(arm.seeds[:num_seeds]):
            if not arm.is_finished(seed, output, steps):
                job = (f"{arm.folder} s{seed}", make_run, (arm, seed, output, steps))
                found.append((-1 if arm.folder in first else number, job))
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def finals_of(arms: Sequence[Arm], num_seeds: int, output: Path, steps: int) -> list[Job]:
    """Evaluations of the embedded student and of the last students of the main comparisons."""
    jobs: list[Job] = []
    for arm in arms:
        for seed in arm.seeds[:num_seeds] if arm.world in ("B", "scarce") else ():
            model = arm.path(seed, output) / "checkpoints" / f"{steps or arm.steps:06d}"
            folder = output / "finals" / arm.folder / f"s{seed}"
            if arm.name in experiments.METHODS and not (folder / "summary.json").is_file():
                jobs.append((f"{arm.folder} s{seed}", make_final, (str(model), folder, steps)))
    start = output / "finals" / "start"
    if jobs and not (start / "summary.json").is_file():
        jobs.insert(0, ("start", make_final, ("embedded", start, steps)))
    return jobs


def note_commit(output: Path) -> None:
    """Keep which state of the code made the runs; a changed working tree is marked by a plus."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    told = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    file = output / "commits.txt"
    known = file.read_text().split() if file.is_file() else []
    if told and told not in known:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join([*known, told]) + "\n")


def make_models(names: Sequence[str], output: Path, workers: int, steps: int) -> None:
    """Pretrain what is missing: those that are made of others last."""
    out = output / "models"
    for late in (False, True):
        missing = [
            (name, make_model, (name, out, steps))
            for name in names
            if name.startswith("different") == late and not worlds.is_made(name, out)
        ]
        if work(missing, workers, "models"):
            raise typer.Exit(1)


def make_model(name: str, out: Path, steps: int) -> None:
    """One model, in a process of its own, whose losses go to a file beside it."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "worlds.py"), name, "--out", str(out)]
    if steps:
        command += ["--scale", "0.01"]
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def make_run(arm: Arm, seed: int, output: Path, steps: int) -> None:
    """Train one seed of one arm, or go on with it."""
    from stableopd import config, embedded
    from stableopd.training.loop import train
    from stableopd.training.setup import prepare

    path = arm.path(seed, output)
    overrides = arm.overrides(seed, path, output / "models")
    if steps:
        overrides += [f"run.steps={steps}", "eval.max_problems=8"]
    before = output / "runs" / arm.world / arm.goes_on / f"s{seed}"
    if arm.goes_on and not path.exists() and (before / "seconds.json").is_file():
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(before, part)
        part.rename(path)
    started = time.process_time()
    resumes = (path / "config.toml").is_file()
    run = prepare(config.load(embedded.path("demo"), overrides), resume=resumes)
    truncation: list[float] = []
    step = run.start_step
    for line in train(run, lambda: arm.ends and phase.is_collapsed(truncation)):
        step = line["step"]
        if "rollout/truncation_rate" in line:
            truncation.append(line["rollout/truncation_rate"])
    if arm.ends and phase.is_collapsed(truncation):
        (path / experiments.ENDED).write_text("")
    cpu_s = round(time.process_time() - started, 1)
    spent = {"step": step, "cpu_s": cpu_s, "is_whole": not resumes}
    (path / "seconds.json").write_text(json.dumps(spent) + "\n")


def make_final(model: str, folder: Path, steps: int) -> None:
    """`stableopd eval -k 8` on all held-out problems, with the demo's budget and RepRate."""
    from stableopd import config, embedded
    from stableopd.evaluate.command import run_eval
    from stableopd.evaluate.settings import Settings

    demo = config.load(embedded.path("demo"))
    settings = Settings(
        model,
        ("embedded",),
        num_samples=8,
        max_new_tokens=demo.rollout.max_new_tokens,
        window_chars=demo.repetition.window_chars,
        ratio=demo.repetition.ratio,
        batch_size=512,
        max_problems=8 if steps else 0,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run_eval(settings, folder)


def work(jobs: Sequence[Job], workers: int, what: str) -> int:
    """Do all jobs, some at a time; how many failed."""
    console = Console()
    context = multiprocessing.get_context("spawn")
    failed = 0
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ProcessPoolExecutor(workers, context, initializer=_one_thread) as pool,
    ):
        task = progress.add_task(what, total=len(jobs))
        running: dict[Future[None], str] = {
            pool.submit(function, *arguments): name for name, function, arguments in jobs
        }
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    name, error = running.pop(future), future.exception()
                    failed += error is not None
                    console.print(f"{name}: {error or 'done'}", highlight=False, soft_wrap=True)
                    progress.advance(task)
        except KeyboardInterrupt:
            for process in pool._processes.values():  # they would finish their runs first
                process.kill()
            raise
    return failed


def _one_thread() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


if __name__ == "__main__":
    app()
