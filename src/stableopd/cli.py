"""The command line: `stableopd train | eval | demo | diagnose | doctor | ...`, here and beside."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stableopd.cli_offline import ChatTemplate, NoChatTemplate, TemplateKwargs, golden, score
from stableopd.config_templates import chosen_template, parse_kwargs, with_template_value
from stableopd.types import ConfigError, StableOPDError

if TYPE_CHECKING:
    from stableopd.rollout.stops import Finding
    from stableopd.training.setup import Run

__all__ = ["app", "main"]

app = typer.Typer(
    help="On-policy distillation of language models that does not collapse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a field of the configuration."),
]


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2.

    A fault of the program's own is a traceback and exit code 70, so that no caller takes it for
    the answer 1 (a collapse, a FAIL, a run that the alarm stopped).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may not be in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    # transformers fetches code for some layers from the hub, where the package kernels is there.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        app(args=with_template_value(sys.argv[1:]))
    except StableOPDError as error:
        if _is_first_here() or not error.is_shared:
            from stableopd.text import shown

            print(f"error: {shown(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(70)


def _is_first_here() -> bool:
    """Whether this is the only process of a run on this machine, or the first of several."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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
    allow_changed: Annotated[
        list[str],
        typer.Option(
            metavar="NAMES", help="With --resume: data, eval, student, teacher may have changed."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Train a student: opd, stable_opd, sft, grpo or gkd, as the configuration says."""
    from stableopd.config import load

    try:
        settings = load(config, set_)
    except ConfigError as error:
        error.is_shared = True  # all processes of a machine read this file
        raise

    from stableopd.training.inputs import allowed_names
    from stableopd.training.loop import train as steps
    from stableopd.training.preflight import examine
    from stableopd.training.setup import prepare

    run = prepare(settings, resume, allowed_names(allow_changed, resume))
    if run.start_step >= settings.run.steps:
        if run.ranks.is_main:
            _show_finished(run)
        return
    if not resume:
        _show_audit(examine(run), run.ranks.is_main)
    try:
        with _finish_step_on_interrupt() as interrupted:
            lines = steps(run, lambda: bool(interrupted))
            if run.ranks.is_main:
                last, events = _show_steps(run, lines)
            else:
                # The main process shows and reports, and its exit code is that of the run.
                collections.deque(lines, maxlen=0)
                return
    except KeyboardInterrupt:
        if run.ranks.is_main:
            _show_kept(run)
        raise typer.Exit(130) from None
    _report(run, last, events, resume)


def _show_finished(run: Run) -> None:
    """Say that nothing is left to do, and do what a kill after the last checkpoint left undone."""
    from stableopd.training.setup import tidy

    total = run.config.run.steps
    print(f"{run.folder.path} has made all of its {total} steps already.")
    try:
        tidy(run)
        if not run.folder.page.exists():
            _report(run, total, [], is_resumed=True)
    finally:
        run.folder.unlock()


def _show_kept(run: Run) -> None:
    """Say what is left of a run that a second interrupt ended within a step."""
    kept = run.folder.checkpoints() if run.folder.path.is_dir() else []
    metrics = run.folder.metrics()
    last = metrics[-1]["step"] if metrics else 0
    if kept:
        again = f", and makes the {last - kept[-1]} steps after it again" if last > kept[-1] else ""
        told = f"the checkpoint of step {kept[-1]} is kept: --resume goes on from it{again}."
    else:
        told = f"no checkpoint was written in {last} steps: --resume starts from the first step."
    print(f"Ended within step {last + 1}: {told}", file=sys.stderr)


def _show_steps(run: Run, lines: Iterator[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """Show the steps while they are made: the last of them, and what the alarm said after it."""
    from stableopd.terminal import LiveView, alarm_message

    name, total = run.config.objective.method, run.config.run.steps
    last, events = run.start_step, list[dict[str, Any]]()
    with LiveView(f"{name} in {run.folder.path}", total, [name]) as view:
        for note in run.notes:
            view.message(note)
        for line in lines:
            view.update(name, line)
            last = line["step"]
            events = [event for event in run.folder.events() if event["step"] == last]
            for event in events:
                view.message(alarm_message(event))
    return last, events


def _report(run: Run, last: int, events: list[dict[str, Any]], is_resumed: bool) -> None:
    """Write the page of a run that has ended, and say how it ended."""
    from stableopd.diagnose.command import read_runs
    from stableopd.report.page import write_page
    from stableopd.terminal import stop_message

    total = run.config.run.steps
    found = read_runs([run.folder.path])
    write_page(found, run.folder.page, str(run.folder.path))
    print(found[0].verdict.headline)
    print(f"Report: {run.folder.page}")
    if events and events[-1]["action"] == "stop":
        print(stop_message(events[-1], total, run.config.alarm.action))
        raise typer.Exit(1)
    if last < total:
        again = "" if is_resumed else " and --resume"
        print(f"Stopped after step {last} of {total}. Go on with the same command{again}.")
        raise typer.Exit(130)


def _show_audit(findings: Sequence[Finding], prints: bool) -> None:
    """Print what was found about stops, and refuse what cannot work."""
    from rich.console import Console

    from stableopd.terminal import table

    rows = [(f.level, f.name, f"{f.message} {f.fix}".strip()) for f in findings]
    if prints:
        Console().print(table(("", "check", "what was found"), rows, "Before the first step"))
    for finding in findings:
        if finding.level == "FAIL":
            error = ConfigError(f"{finding.name}: {finding.message} {finding.fix}")
            error.is_shared = True
            raise error


@contextlib.contextmanager
def _finish_step_on_interrupt() -> Iterator[list[int]]:
    """Collect interrupts in a list that the loop looks at; the second one ends at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        if _is_first_here():
            print(
                "Interrupted: finishing this step and saving. A second Ctrl-C ends at once, "
                "without saving.",
                file=sys.stderr,
            )

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Option(help="Folder, checkpoint or adapter of a run, hub name, embedded.")
    ],
    data: Annotated[
        list[str], typer.Option(help="Problems with answers: .jsonl, .parquet; may be repeated.")
    ],
    num_samples: Annotated[int, typer.Option("-k", "--samples", min=1, help="Answers each.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/eval"),
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="0: what the context leaves, at most 4096.")
    ] = 0,
    max_problems: Annotated[int, typer.Option(min=0, help="Of each data set; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 64,
    grader: Annotated[
        str, typer.Option(help="math (math-verify), exact, or auto: math, embedded data exact.")
    ] = "auto",
    answer_marker: Annotated[str, typer.Option(help="What stands before an exact answer.")] = "",
    chat_template: ChatTemplate = "auto",
    no_chat_template: NoChatTemplate = False,
    chat_template_kwargs: TemplateKwargs = [],  # noqa: B006
    prompt_column: Annotated[str, typer.Option(help="Dots reach into objects.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="Dots reach into objects.")] = "answer",
    gguf_file: Annotated[str, typer.Option(help="GGUF file in the model's folder.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 on CUDA, else float32.")] = "auto",
    time_limit: Annotated[float, typer.Option(help="Seconds to grade one answer.")] = 10.0,
    window_chars: Annotated[int, typer.Option(min=1, help="L of RepRate, characters.")] = 10_000,
    ratio: Annotated[float, typer.Option(help="tau of RepRate.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Answer problems k times each: avg@k, pass@k, truncation, repetition; goes on after a kill."""
    from stableopd.evaluate.command import run_eval
    from stableopd.evaluate.settings import Settings

    settings = Settings(
        model=model,
        data=tuple(data),
        num_samples=num_samples,
        gguf_file=gguf_file,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        max_problems=max_problems,
        seed=seed,
        batch_size=batch_size,
        grader=grader,
        answer_marker=answer_marker,
        chat_template=chosen_template(chat_template, no_chat_template),
        chat_template_kwargs=parse_kwargs(chat_template_kwargs),
        prompt_column=prompt_column,
        answer_column=answer_column,
        device=device,
        dtype=dtype,
        time_limit=time_limit,
        window_chars=window_chars,
        ratio=ratio,
    )
    raise typer.Exit(run_eval(settings, output, as_json))


app.command()(score)
app.command()(golden)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the two runs.")] = Path("runs/demo"),
    set_: Overrides = [],  # noqa: B006 (typer reads the default and never changes it)
) -> None:
    """Show the collapse and the cure: OPD and StableOPD from the same embedded student."""
    from stableopd.demo import run_demo

    run_demo(output, set_)


@app.command()
def diagnose(
    paths: Annotated[list[Path], typer.Argument(help="A run folder, or files of rollout dumps.")],
    format_: Annotated[
        str, typer.Option("--format", help="auto, stableopd, trl, verl, slime, nemo-rl, ...")
    ] = "auto",
    map_: Annotated[
        list[str],
        typer.Option(
            "--map", metavar="ROLE=COLUMN", help="Where to find what, as completion=text."
        ),
    ] = [],  # noqa: B006 (typer reads the default and never changes it)
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=2**53, help="The length budget: as long as this is cut off."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json or its folder: counts tokens of text.")
    ] = None,
    window_chars: Annotated[
        int, typer.Option(min=1, max=2**31, help="L of RepRate, characters.")
    ] = 10_000,
    ratio: Annotated[float, typer.Option(min=1.0, max=1e6, help="tau of RepRate.")] = 10.0,
    ngram: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="n of repetitive tokens; 8.")
    ] = None,
    min_run: Annotated[
        int, typer.Option(min=0, max=2**31, help="Shortest repetitive run that counts.")
    ] = 0,
    answer_marker: Annotated[str, typer.Option(help="What stands before a final answer.")] = "",
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse damaged lines.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow a run that goes on.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds between looks.")
    ] = 10.0,
) -> None:
    """Say what happened in a run of any framework; exit code 0 healthy, 1 collapse."""
    from stableopd.diagnose import command
    from stableopd.diagnose.runs import Reading

    reading = Reading(
        format=format_,
        mapping=command.parse_mapping(map_),
        strict=strict,
        max_new_tokens=max_new_tokens,
        tokenizer=command.load_tokenizer(tokenizer) if tokenizer else None,
        window_chars=window_chars,
        ratio=ratio,
        ngram=ngram,
        min_run=min_run,
        answer_marker=answer_marker,
    )
    if watch:
        raise typer.Exit(command.watch_path(paths, reading, interval, as_json))
    raise typer.Exit(command.diagnose_command(paths, reading, as_json, html))


@app.command()
def doctor(
    student: Annotated[str, typer.Option(help="Folder, hub name or embedded.")] = "",
    teacher: Annotated[str, typer.Option(help="Folder, hub name or embedded.")] = "",
    data: Annotated[str, typer.Option(help="The training data, .jsonl or .parquet.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="Take all of this from a training configuration.")
    ] = None,
    set_: Overrides = [],  # noqa: B006 (typer reads the default and never changes it)
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The length budget.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts to sample on.")] = 8,
    chat_template: Annotated[str, typer.Option(help="auto, none, or a file with a template.")] = "",
    chat_template_kwargs: TemplateKwargs = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Look at models and data before a run: OK, WARN or FAIL, and the fix; exit code 1 on FAIL."""
    from stableopd.doctor.command import run_doctor

    kwargs = parse_kwargs(chat_template_kwargs)
    code = run_doctor(
        student, teacher, data, config, set_, max_new_tokens, num_prompts, chat_template, as_json,
        kwargs,
    )  # fmt: skip
    raise typer.Exit(code)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; seeds of one arm are grouped.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("comparison.html"),
) -> None:
    """Set runs beside each other: same axes, seeds as a band, confidence intervals, configs."""
    from stableopd.diagnose import command

    command.compare_runs(runs, output)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[
        Path | None, typer.Option(help="The HTML file; report.html of the run by default.")
    ] = None,
) -> None:
    """Write the page of a run."""
    from stableopd.diagnose.command import page_path, read_runs
    from stableopd.report.page import write_page
    from stableopd.text import shown

    if output is not None:
        page_path(output, [run])
    found = read_runs([run])  # first: a folder that is no run gets no page
    page = page_path(output or run / "report.html", [run])
    write_page(found, page, str(run))
    print(shown(f"Report: {page}"))
