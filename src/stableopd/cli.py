"""The command line: `stableopd train | demo | report`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stableopd.types import ConfigError, StableOPDError

if TYPE_CHECKING:
    from stableopd.rollout.stops import Finding

__all__ = ["app", "main"]

app = typer.Typer(
    help="On-policy distillation of language models that does not collapse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a field of the configuration."),
]


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    try:
        app()
    except StableOPDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback()
def _stableopd() -> None:
    """On-policy distillation of language models that does not collapse."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML, such as recipes/own-models/train.toml.")],
    set_: Overrides = [],  # noqa: B006 (typer reads the default and never changes it)
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of run.output.")
    ] = False,
) -> None:
    """Train a student: opd, stable_opd, sft, grpo or gkd, as the configuration says."""
    from stableopd.config import load

    settings = load(config, set_)

    from stableopd.report.page import write_page
    from stableopd.terminal import LiveView
    from stableopd.training.loop import train as steps
    from stableopd.training.preflight import examine
    from stableopd.training.setup import prepare

    run = prepare(settings, resume)
    name, total = settings.objective.method, settings.run.steps
    if run.start_step >= total:
        print(f"{run.folder.path} has made all of its {total} steps already.")
        return
    if not resume:
        _show_audit(examine(run))
    last = run.start_step
    with (
        _finish_step_on_interrupt() as interrupted,
        LiveView(f"{name} in {run.folder.path}", total, [name]) as view,
    ):
        for note in run.notes:
            view.message(note)
        for line in steps(run, lambda: bool(interrupted)):
            view.update(name, line)
            last = line["step"]
    write_page([(name, run.folder)], run.folder.path / "report.html", str(run.folder.path))
    print(f"Report: {run.folder.path / 'report.html'}")
    if last < total:
        again = "" if resume else " and --resume"
        print(f"Stopped after step {last} of {total}. Go on with the same command{again}.")
        raise typer.Exit(130)


def _show_audit(findings: Sequence[Finding]) -> None:
    """Print what was found about stops, and refuse what cannot work."""
    from rich.console import Console

    from stableopd.terminal import table

    rows = [(f.level, f.name, f"{f.message} {f.fix}".strip()) for f in findings]
    Console().print(table(("", "check", "what was found"), rows, "Before the first step"))
    for finding in findings:
        if finding.level == "FAIL":
            raise ConfigError(f"{finding.name}: {finding.message} {finding.fix}")


@contextlib.contextmanager
def _finish_step_on_interrupt() -> Iterator[list[int]]:
    """Collect interrupts in a list that the loop looks at; the second one ends at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("Interrupted: finishing this step and saving.", file=sys.stderr)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the two runs.")] = Path("runs/demo"),
    set_: Overrides = [],  # noqa: B006 (typer reads the default and never changes it)
) -> None:
    """Show the collapse and the cure: OPD and StableOPD from the same embedded student."""
    from stableopd.demo import run_demo

    run_demo(output, set_)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, the first to be shown first.")],
    output: Annotated[
        Path | None, typer.Option(help="The HTML file; report.html of the first run by default.")
    ] = None,
) -> None:
    """Write one HTML page about one or more runs."""
    from stableopd.report.page import write_page
    from stableopd.runfolder import RunFolder

    folders = [(path.name, RunFolder.open(path)) for path in runs]
    page = output or folders[0][1].path / "report.html"
    write_page(folders, page, " and ".join(name for name, _ in folders))
    print(f"Report: {page}")
