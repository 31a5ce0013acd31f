"""`stableopd diagnose --watch`: the alarm of the training loop, on a folder that still grows."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.diagnose.runs import Reading, ask, is_run_folder, measure, open_paths
from stableopd.diagnostics.alarm import Alarm, Level
from stableopd.diagnostics.lines import lines_of
from stableopd.runfolder import RunFolder
from stableopd.types import DataError

__all__ = ["Seen", "watch"]

ENDINGS = (".jsonl", ".parquet", ".jsonl.gz")
PATIENCE = 5  # looks at an unchanged file whose last line is not complete


@dataclass(frozen=True, slots=True)
class Seen:
    """One step that a watcher saw.

    Attributes:
        line: Its metrics, with the names of docs/metrics.md.
        alarm: The state of the alarm after it.
        is_new: Whether the level differs from that of the step before.
    """

    line: Mapping[str, Any]
    alarm: Alarm
    is_new: bool


def watch(
    path: Path,
    reading: Reading,
    wait: Callable[[], bool],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Seen]:
    """Follow a run, step by step, until it ends, collapses, or is no longer to be watched.

    Args:
        path: The folder of a run of this program, or a folder into which another framework writes
            one file or more a step.
        reading: How to read dumps.
        wait: Called when nothing is new; returns whether to go on watching.
        say: Told in a sentence what is waited for, and what cannot be read.

    Yields:
        Every step once, in order, those that are there already first.

    Raises:
        StableOPDError: The folder cannot be read.
    """
    if path.exists() and not path.is_dir():
        raise DataError(f"{path}: is not a folder; --watch follows the folder of a run.")
    if not path.exists():
        say(f"Waiting for {path}.")
    while not (is_run_folder(path) or _dumps(path)):
        if not wait():
            return
    is_run = is_run_folder(path)
    lines = (
        _run_lines(RunFolder.open(path), wait) if is_run else _dump_lines(path, reading, wait, say)
    )
    alarm = Alarm()
    for place, line in enumerate(lines):
        if place == 0 and not is_run and "rollout/truncation_rate" not in line:
            say(
                "The files do not say which rollouts were cut off: without --max-new-tokens (with "
                "--tokenizer for text) the alarm can warn, and hardly call a collapse."
            )
        before, alarm = alarm.level, ask(alarm, line)
        yield Seen(line, alarm, alarm.level is not before)
        if alarm.level is Level.COLLAPSE:
            return


def _run_lines(folder: RunFolder, wait: Callable[[], bool]) -> Iterator[Mapping[str, Any]]:
    """The lines of metrics.jsonl as they are written, up to the run's last step."""
    try:
        last = tomllib.loads(folder.config_text()).get("run", {}).get("steps")
    except tomllib.TOMLDecodeError:
        last = None
    num_seen = 0
    while True:
        lines = folder.metrics()
        yield from lines[num_seen:]
        num_seen = max(num_seen, len(lines))
        is_done = bool(lines) and isinstance(last, int) and lines[-1]["step"] >= last
        if is_done or not wait():
            return


def _dump_lines(
    path: Path, reading: Reading, wait: Callable[[], bool], say: Callable[[str], None]
) -> Iterator[Mapping[str, Any]]:
    """One line a step from files that appear; a file is read once it has stopped growing."""
    sizes: dict[Path, int] = {}
    quiet: dict[Path, int] = {}
    read: set[Path] = set()
    while True:
        found = {file: file.stat().st_size for file in _dumps(path)}
        for file, size in found.items():
            quiet[file] = quiet.get(file, 0) + 1 if size and sizes.get(file) == size else 0
        # A writer may pause in the middle of a line: such a file gets more time.
        settled = [
            f for f in found if f not in read and quiet[f] >= (1 if _is_whole(f) else PATIENCE)
        ]
        lines: list[dict[str, Any]] = []
        for file in settled:
            read.add(file)
            try:
                lines += lines_of(measure(open_paths([file], reading), reading)[0])
            except DataError as error:
                say(f"passed over: {error}")
        yield from sorted(lines, key=lambda line: line["step"])
        sizes = found
        if not wait():
            return


def _is_whole(file: Path) -> bool:
    """Whether a file of lines ends with its last line's end; of other files nothing is known."""
    if not file.name.endswith(".jsonl"):
        return True
    with file.open("rb") as opened:
        opened.seek(-1, os.SEEK_END)
        return opened.read(1) == b"\n"


def _dumps(path: Path) -> list[Path]:
    return [f for f in path.rglob("*") if f.name.endswith(ENDINGS) and f.is_file()]
