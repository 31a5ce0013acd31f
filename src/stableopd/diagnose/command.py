"""`stableopd diagnose`: read, judge, show; and `--watch`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from stableopd.diagnose.runs import (
    Reading,
    diagnose_dump,
    diagnose_run,
    is_run_folder,
    open_paths,
)
from stableopd.diagnose.show import as_json, show
from stableopd.diagnose.watch import Seen, watch
from stableopd.diagnostics.alarm import Level
from stableopd.diagnostics.verdict import Diagnosis
from stableopd.integrations.dump_rows import looking_at, size_of
from stableopd.runfolder import RunFolder
from stableopd.runfolder.outputs import choose_output, is_our_page
from stableopd.terminal import table
from stableopd.text import one_line, shown
from stableopd.types import ConfigError, DataError, ModelError

__all__ = [
    "compare_runs",
    "diagnose_command",
    "diagnose_paths",
    "load_tokenizer",
    "page_path",
    "parse_mapping",
    "read_runs",
    "watch_path",
]

# 2 is for what cannot be read, as with every command.
HEALTHY, COLLAPSED, TOO_LITTLE = 0, 1, 3

# Design: characters of a text that the tokenizer of its writer must know.
KNOWN_SHARE = 0.5

# What a watcher prints of each step.
WATCHED = (
    ("TruncRate", "rollout/truncation_rate", ".2f"),
    ("repetitive", "rollout/repetitive_share", ".2f"),
    ("length", "rollout/mean_length", ".0f"),
    ("accuracy", "rollout/accuracy", ".2f"),
)


def diagnose_command(
    paths: Sequence[Path], reading: Reading, as_object: bool, html: Path | None
) -> int:
    """Diagnose one run, print what was found, and write its page where one is asked for.

    Args:
        paths: One run folder, or files and folders of dumps.
        reading: How to read dumps.
        as_object: Print one JSON object, instead of text for people.
        html: Where to write the page; None for none.

    Returns:
        The exit code: 0 healthy, 1 collapse, 3 too little data.

    Raises:
        StableOPDError: Something cannot be read or written; the message says why.
    """
    if html is not None:
        page_path(html, paths)
    found = diagnose_paths(paths, reading)
    if html is not None:
        from stableopd.report.page import write_page

        write_page([found], html, found.name)
    code = _show(found, as_object)
    if html is not None and not as_object:
        print(shown(f"Page: {html}"))
    return code


def _show(diagnosis: Diagnosis, as_object: bool) -> int:
    if as_object:
        print(json.dumps(as_json(diagnosis), allow_nan=False))
    else:
        show(diagnosis, Console())
    if diagnosis.verdict.collapsed:
        return COLLAPSED
    return TOO_LITTLE if diagnosis.verdict.cause == "too little data" else HEALTHY


def diagnose_paths(paths: Sequence[Path], reading: Reading) -> Diagnosis:
    """Diagnose one run: the folder of a run of this program, or dumps of another framework.

    Args:
        paths: One run folder, or files and folders of dumps.
        reading: How to read dumps; of a run folder its own settings hold.

    Returns:
        The diagnosis.

    Raises:
        StableOPDError: It cannot be read; the message says why.
    """
    for path in paths:
        with looking_at(path):
            if not os.path.lexists(path):
                raise DataError(f"{path}: no such file or folder.")
    runs = [path for path in paths if is_run_folder(path)]
    if len(runs) > 1:
        raise ConfigError(
            f"{runs[0]} and {runs[1]} are two runs; diagnose one at a time, or set them beside "
            "each other with `stableopd compare`."
        )
    if runs and len(paths) > 1:
        raise ConfigError(f"{runs[0]} is a whole run; give it alone.")
    if runs and reading.format in ("auto", "stableopd") and not reading.mapping:
        return read_runs(runs)[0]
    dump = open_paths(paths, reading)
    count = "1 file" if dump.num_files == 1 else f"{dump.num_files:,} files"
    print(shown(f"Reading {count} as {dump.format_name}."), file=sys.stderr)
    with _progress(dump.num_bytes) as on_bytes:
        return diagnose_dump(dump, reading, on_bytes)


def read_runs(paths: Sequence[Path]) -> list[Diagnosis]:
    """Diagnose run folders of this program, one after the other, with a progress bar.

    Args:
        paths: The folders.

    Returns:
        One diagnosis a folder.

    Raises:
        RunFolderError: One of them is no run.
    """
    folders = [RunFolder.open(path) for path in paths]
    sizes = [size_of(file) for folder in folders for file in folder.path.glob("rollouts/*.jsonl")]
    with _progress(sum(sizes)) as on_bytes:
        return [diagnose_run(folder, on_bytes) for folder in folders]


def watch_path(paths: Sequence[Path], reading: Reading, interval_s: float, as_object: bool) -> int:
    """Follow a run until it ends, collapses, or is interrupted, and print what the alarm says.

    Args:
        paths: One folder.
        reading: How to read dumps.
        interval_s: Seconds between two looks.
        as_object: A JSON object a step, instead of lines for people.

    Returns:
        The exit code: 1 once the alarm says collapse, else 0.

    Raises:
        StableOPDError: The folder cannot be read.
    """
    if len(paths) != 1:
        raise ConfigError("--watch follows one folder; give one path.")

    def wait() -> bool:
        time.sleep(interval_s)
        return True

    def say(text: str) -> None:
        print(shown(text), file=sys.stderr, flush=True)

    level = Level.OK
    # A watcher is ended by an interrupt: that is no error.
    with contextlib.suppress(KeyboardInterrupt):
        for seen in watch(paths[0], reading, wait, say):
            level = seen.alarm.level
            _tell(seen, as_object)
    return COLLAPSED if level is Level.COLLAPSE else HEALTHY


def _tell(seen: Seen, as_object: bool) -> None:
    step, alarm = seen.line["step"], seen.alarm
    if as_object:
        told = {"step": step, "level": alarm.level, "reason": alarm.reason}
        print(json.dumps(told), flush=True)
        return
    if not any(name in seen.line for _, name, _ in WATCHED):
        return
    numbers = [
        f"{label} {seen.line[name]:{form}}"
        for label, name, form in WATCHED
        if isinstance(seen.line.get(name), int | float)
    ]
    print("  ".join([f"step {step}", *numbers]), flush=True)
    if seen.is_new:
        print(shown(f"{alarm.level.upper()}: {alarm.reason or 'back to normal.'}"), flush=True)


def compare_runs(paths: Sequence[Path], output: Path) -> None:
    """Write the comparison of several runs as a page, and print its table.

    Args:
        paths: Run folders.
        output: The HTML file.

    Raises:
        RunFolderError: A folder is no run, or the file cannot be written.
    """
    from stableopd.report.compare import final_table, group_arms, write_comparison

    page_path(output, paths)
    for place, path in enumerate(paths):
        if any(path.resolve() == other.resolve() for other in paths[:place]):
            raise ConfigError(f"{path}: is given twice; each run counts once.")
    arms = group_arms(read_runs(paths))
    write_comparison(arms, output, "Comparison")
    columns, rows, caption = final_table(arms)
    made = table(columns, rows, "")
    made.caption, made.caption_justify = caption, "left"
    Console().print(made)
    print(shown(f"Page: {output}"))


def page_path(path: Path, inputs: Sequence[Path]) -> Path:
    """Check that a page can be written, before anything is read for it, and make its folder.

    Args:
        path: The HTML file.
        inputs: What the command reads.

    Returns:
        The same path.

    Raises:
        ConfigError: It is something else than a page of ours, or its folder cannot be written.
    """
    choose_output(path, inputs, is_our_page, "page")
    return path


def parse_mapping(given: Sequence[str]) -> dict[str, str] | None:
    """Read `--map ROLE=COLUMN` options.

    Args:
        given: The options as typed.

    Returns:
        Role to column; None where none was given.

    Raises:
        ConfigError: One of them is not of that form.
    """
    pairs = [option.partition("=") for option in given]
    for option, (role, _, column) in zip(given, pairs, strict=True):
        if not role or not column:
            raise ConfigError(f"--map {option}: write it as ROLE=COLUMN, as completion=text.")
    return {role: column for role, _, column in pairs} or None


@contextlib.contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal; standard output stays clean."""
    console = Console(stderr=True)
    columns = (TextColumn("Reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("Reading", total=num_bytes)
        yield lambda count: progress.update(task, advance=count)


def load_tokenizer(source: str) -> Callable[[str], Sequence[int]]:
    """A function from text to token ids, from a tokenizer.json.

    Args:
        source: The file, a model folder that holds it, or a name on the hub.

    Returns:
        The function; no special tokens are added.

    Raises:
        ModelError: There is none, or it cannot be loaded.
    """
    from tokenizers import Tokenizer

    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        # The library raises bare Exception for whatever goes wrong.
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif path.exists():
            raise FileNotFoundError(f"no {file.name} in it")
        else:
            tokenizer = Tokenizer.from_pretrained(source)
    except Exception as error:
        reason = one_line(error)
        raise ModelError(
            f"--tokenizer {source}: cannot be loaded ({reason}); give a tokenizer.json or a "
            "folder that holds one."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknown_id = tokenizer.token_to_id(unknown) if unknown else None

    def encode(text: str) -> Sequence[int]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        known = sum(
            stop - start
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
            if token != unknown_id
        )
        if known < KNOWN_SHARE * len(text.replace(" ", "")):
            raise ModelError(
                f"--tokenizer {source}: does not know the text {text[:40]!r}; give the tokenizer "
                "of the model that wrote it."
            )
        return encoding.ids

    return encode
