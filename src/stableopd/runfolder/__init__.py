"""The run folder: everything about a run, written and read here alone.

    config.toml               the resolved configuration; a folder that has one is a run
    environment.json          versions and machine
    metrics.jsonl             one line a step
    events.jsonl              one line for each time that the alarm spoke or acted
    rollouts/000010.jsonl     the rollouts of step 10, one a line
    failed/000012.jsonl       a batch whose loss was not finite
    checkpoints/000050/       a model folder, with `trainer/` next to the weights
    report.html               and other files made from the above
    .lock                     while a process writes

Files are written beside their place, synced and renamed: a kill at any moment leaves the old one or
the new one. `metrics.jsonl` and `events.jsonl` grow in place: a kill can tear the last line, which
readers ignore and `rewind` removes. One process writes, which holds a lock; others may read
meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stableopd.runfolder.files import (
    TEMPORARY,
    append_line,
    filling,
    finite,
    json_line,
    read,
    read_lines,
    read_object,
    reading,
    refusal,
    remove,
    sync,
    sync_tree,
    write_bytes,
    writing,
)
from stableopd.runfolder.kinds import as_config, as_environment, as_event, as_metrics
from stableopd.runfolder.lock import LOCK, hold, release
from stableopd.runfolder.manifest import write_manifest
from stableopd.types import RunFolderError

__all__ = ["RunFolder", "newest_checkpoint", "write_atomically"]

CONFIG, ENVIRONMENT = "config.toml", "environment.json"
METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
ROLLOUTS, FAILED, CHECKPOINTS = "rollouts", "failed", "checkpoints"
PAGE = "report.html"

# What a run writes: a folder that holds one of these is taken. Those before FOLDERS mark a run.
RUN_FILES, FOLDERS = (CONFIG, METRICS), (ROLLOUTS, FAILED, CHECKPOINTS)
WRITTEN = (*RUN_FILES, ENVIRONMENT, EVENTS, *FOLDERS, PAGE)

REPLACED = ".replaced"  # a complete checkpoint that a new one of its step is about to replace


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader, or a kill, sees the old file or the new one and no third.

    Raises:
        RunFolderError: The disk is full, read-only, or not ours to write.
    """
    write_bytes(path, [text.encode("utf-8", errors="backslashreplace")])


class RunFolder:
    """A folder that holds one run, at `path`; made by `create` or `open`, which check it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def claim(cls, path: str | Path) -> RunFolder:
        """Check that a new run may be made here, before hours are spent on it; writes nothing.

        Raises:
            RunFolderError: It already holds a run, is a file, or is not ours to write.
        """
        folder = cls(Path(path))
        with writing(folder.path):
            if folder.path.exists() and not folder.path.is_dir():
                raise RunFolderError(f"{path}: is a file, not a folder; choose another run.output.")
            taken = [name for name in WRITTEN if (folder.path / name).exists()]
            parent = folder.path
            while not parent.exists():
                parent = parent.parent
        if any(name in RUN_FILES for name in taken):
            raise RunFolderError(
                f"{path}: already holds a run; choose another run.output or continue it with "
                "--resume."
            )
        if taken:
            raise RunFolderError(
                f"{path}: holds {taken[0]}, which a run would replace, but no {CONFIG} of a run; "
                "choose another run.output or move it away."
            )
        if not os.access(parent, os.W_OK):
            read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
            raise refusal(folder.path, OSError(errno.EROFS if read_only else errno.EACCES, ""))
        return folder

    @classmethod
    def create(
        cls, path: str | Path, config_toml: str, environment: Mapping[str, Any]
    ) -> RunFolder:
        """Make the folder of a new run.

        Args:
            path: Where; parents are made, and other files in it are left as they are.
            config_toml: The resolved configuration.
            environment: What to keep about versions and machine, as JSON values.

        Raises:
            RunFolderError: It already holds a run, is a file, or cannot be written.
        """
        folder = cls.claim(path)
        with writing(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        # The configuration comes first: after a kill in between, --resume starts the run.
        folder.write_text(CONFIG, config_toml)
        folder.write_environment(environment)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open the folder of an existing run, to read it or to continue it; changes nothing.

        Raises:
            RunFolderError: It is not the folder of a run.
        """
        folder = cls(Path(path))
        with reading(folder.path):
            if not (folder.path / CONFIG).is_file():
                fault = f"has no {CONFIG}" if folder.path.is_dir() else "no such folder"
                raise RunFolderError(f"{path}: {fault}; give the run.output of a run.")
            for name in FOLDERS:
                if (folder.path / name).exists() and not (folder.path / name).is_dir():
                    raise RunFolderError(f"{folder.path / name}: is no folder; restore it.")
        return folder

    @property
    def page(self) -> Path:
        """Where the page of the run is, or will be."""
        return self.path / PAGE

    def lock(self) -> str:
        """Keep other processes from writing here, until this one ends or calls `unlock`.

        Returns:
            "", or a sentence for the user where the file system has no locks.

        Raises:
            RunFolderError: Another process is writing here, or the folder cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        return hold(self.path / LOCK, self.path)

    def unlock(self) -> None:
        """Let other processes write here; does nothing where this one holds no lock."""
        release(self.path / LOCK)

    def config_text(self) -> str:
        """The text of `config.toml`."""
        try:
            return read(self.path / CONFIG).decode()
        except UnicodeDecodeError:
            raise RunFolderError(f"{self.path / CONFIG}: not valid UTF-8; restore it.") from None

    def config_table(self) -> dict[str, dict[str, Any]]:
        """The tables of `config.toml`, unchecked; RunFolderError where it is not TOML."""
        return as_config(self.config_text(), str(self.path / CONFIG))

    def environment(self) -> dict[str, Any]:
        """What `create` was told about versions and machine; RunFolderError without it."""
        path = self.path / ENVIRONMENT
        return as_environment(read_object(path), str(path))

    def has_environment(self) -> bool:
        """Whether `environment.json` is there; a kill as the run began may have left none."""
        return (self.path / ENVIRONMENT).exists()

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Replace what is kept about versions, machine and inputs."""
        self.write_text(ENVIRONMENT, json.dumps(finite(environment), indent=2) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write a file such as `report.html` atomically, and return its path."""
        write_atomically(self.path / name, text)
        return self.path / name

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`, on disk when this returns.

        Args:
            line: A flat mapping with "step"; numbers that are not finite are written as null.

        Raises:
            RunFolderError: It cannot be written; the lines before it are intact.
        """
        append_line(self.path / METRICS, line)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl` in order, without a torn last one."""
        path = self.path / METRICS
        return read_lines(path, as_metrics) if path.exists() else []

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Add one line with "step" to `events.jsonl`, as `append_metrics` does."""
        append_line(self.path / EVENTS, event)

    def events(self) -> list[dict[str, Any]]:
        """All lines of `events.jsonl` in order, without a torn last one."""
        path = self.path / EVENTS
        return read_lines(path, as_event) if path.exists() else []

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rollouts of a step, one row a line, replacing what was there."""
        self._write_rows(ROLLOUTS, step, rows)

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """The rollouts of a step; RunFolderError where none were written."""
        return read_lines(self.path / ROLLOUTS / f"{step:06d}.jsonl")

    def rollout_steps(self) -> list[int]:
        """The steps whose rollouts were written, in order."""
        return sorted(self._numbered(ROLLOUTS, ".jsonl"))

    def write_failure(self, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Keep the batch of a step whose loss was not finite, and return the file's path."""
        return self._write_rows(FAILED, step, rows)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        path = self.path / CHECKPOINTS / f"{step:06d}"
        replaced = path.with_name(f".{path.name}{REPLACED}")
        return replaced if replaced.is_dir() and not path.exists() else path

    def checkpoints(self) -> list[int]:
        """The steps that have a complete checkpoint, in order."""
        return sorted({*self._numbered(CHECKPOINTS, ""), *self._numbered(CHECKPOINTS, REPLACED)})

    @contextlib.contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """Fill a checkpoint; it appears, complete and on disk, when the block ends without error.

        Args:
            step: Its step. One that exists is replaced.

        Yields:
            A temporary folder to write into. It is removed if the block raises.
        """
        final = self.path / CHECKPOINTS / f"{step:06d}"
        temporary = final.with_name(f".{final.name}{TEMPORARY}")
        try:
            with writing(final):
                final.parent.mkdir(exist_ok=True)
                remove(temporary)
                temporary.mkdir()
            with filling(final):
                yield temporary
                write_manifest(temporary, step)
                sync_tree(temporary)
                self._publish(temporary, final)
        finally:
            remove(temporary)

    def prune_checkpoints(self, keep: int, spared: Collection[int] = ()) -> None:
        """Remove all but the last `keep` checkpoints and those of `spared` steps; 0 keeps all."""
        for step in self.checkpoints()[:-keep] if keep else []:
            if step not in spared:
                self._drop_checkpoint(step)

    def rewind(self, step: int) -> None:
        """Forget everything after `step`, so that the run can go on from its checkpoint.

        Removes later checkpoints, lines of metrics and events, rollouts, torn last lines, and what
        killed writes left over. Batches that failed are kept: they are evidence.
        """
        with writing(self.path):
            self._tidy()
        # The newest go first: a kill here leaves checkpoints that the metrics still cover.
        for later in reversed(self.checkpoints()):
            if later > step:
                self._drop_checkpoint(later)
        for name, lines in ((METRICS, self.metrics()), (EVENTS, self.events())):
            if (self.path / name).exists():
                kept = [line for line in lines if line["step"] <= step]
                write_bytes(self.path / name, map(json_line, kept))
        with writing(self.path):
            for later in self.rollout_steps():
                if later > step:
                    (self.path / ROLLOUTS / f"{later:06d}.jsonl").unlink()

    def _write_rows(self, room: str, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = self.path / room / f"{step:06d}.jsonl"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write_bytes(path, map(json_line, rows))
        return path

    def _numbered(self, room: str, ending: str) -> Iterator[int]:
        hidden = r"\." if ending == REPLACED else ""
        pattern = re.compile(rf"{hidden}(\d{{6,}}){re.escape(ending)}")
        folder = self.path / room
        if folder.is_dir():
            for entry in folder.iterdir():
                if found := pattern.fullmatch(entry.name):
                    yield int(found[1])

    def _publish(self, temporary: Path, final: Path) -> None:
        # A folder cannot be renamed over a full one. Between the two renames the old checkpoint
        # is still found under its other name, so at no moment is there none.
        replaced = final.with_name(f".{final.name}{REPLACED}")
        if final.exists():
            remove(replaced)
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync(final.parent)
        remove(replaced)

    def _drop_checkpoint(self, step: int) -> None:
        path = self.checkpoint_path(step)
        doomed = path.with_name(f".{step:06d}{TEMPORARY}")
        with writing(path):
            remove(doomed)
            # Renamed first, so that a kill does not leave half of it under its name.
            os.rename(path, doomed)
            remove(doomed)
            remove(path.with_name(f".{step:06d}{REPLACED}"))

    def _tidy(self) -> None:
        for step in list(self._numbered(CHECKPOINTS, REPLACED)):
            path = self.path / CHECKPOINTS / f"{step:06d}"
            replaced = path.with_name(f".{path.name}{REPLACED}")
            if path.exists():
                remove(replaced)
            else:
                os.rename(replaced, path)
        for folder in (self.path, *(self.path / r for r in (ROLLOUTS, FAILED, CHECKPOINTS))):
            if folder.is_dir():
                for left in list(folder.glob(f".*{TEMPORARY}")):
                    remove(left)


def newest_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint of a folder that holds a run; None for any other folder.

    Args:
        path: A folder, such as one that was given where a model's is needed.
    """
    try:
        folder = RunFolder.open(path)
        steps = folder.checkpoints()
    except (RunFolderError, OSError):
        return None
    return folder.checkpoint_path(steps[-1]) if steps else None
