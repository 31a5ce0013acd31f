"""`stableopd diagnose --watch`: the alarm of the training loop, on a folder that still grows."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.diagnose.runs import Reading, ask, is_run_folder, lines_of, measure, open_paths
from stableopd.diagnostics.alarm import Alarm, Level
from stableopd.runfolder import RunFolder
from stableopd.types import DataError

__all__ = ["Seen", "watch"]

ENDINGS = (".jsonl", ".parquet", ".jsonl.gz")


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


def watch(path: Path, reading: Reading, wait: Callable[[], bool]) -> Iterator[Seen]:
    """Follow a run, step by step, until it ends, collapses, or is no longer to be watched.

    Args:
        path: The folder of a run of this program, or a folder into which another framework writes
            one file or more a step.
        reading: How to read dumps.
        wait: Called when nothing is new; returns whether to go on watching.

    Yields:
        Every step once, in order, those that are there already first.

    Raises:
        StableOPDError: The folder cannot be read.
    """
    if not path.is_dir():
        raise DataError(f"{path}: is not a folder; --watch follows the folder of a run.")
    lines = _run_lines(RunFolder.open(path), wait) if is_run_folder(path) else None
    alarm = Alarm()
    for line in lines if lines is not None else _dump_lines(path, reading, wait):
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
    path: Path, reading: Reading, wait: Callable[[], bool]
) -> Iterator[Mapping[str, Any]]:
    """One line a step from files that appear; a file counts once its size has settled."""
    sizes: dict[Path, int] = {}
    read: set[Path] = set()
    while True:
        found = {file: file.stat().st_size for file in path.rglob("*") if _is_dump(file)}
        # A file that was there before the watch began is complete if a second look agrees.
        settled = [file for file in found if sizes.get(file) == found[file] and file not in read]
        lines: list[dict[str, Any]] = []
        for file in settled:
            read.add(file)
            if found[file]:
                lines += lines_of(measure(open_paths([file], reading), reading)[0])
        yield from sorted(lines, key=lambda line: line["step"])
        sizes = found
        if not wait():
            return


def _is_dump(file: Path) -> bool:
    return file.name.endswith(ENDINGS) and file.is_file()
