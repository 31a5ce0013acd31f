"""A file of lines that a command adds to, and goes on with after a kill.

Next to FILE stands FILE.settings.json, which says what made it: a line that other settings made
must not follow it. Lines are on disk before the next ones are made. One process writes, which holds
a lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stableopd.evaluate.store import require_same
from stableopd.runfolder.files import (
    append_line,
    json_line,
    read_lines,
    read_object,
    write_bytes,
    writing,
)
from stableopd.runfolder.lock import LOCK, hold, release
from stableopd.types import RunFolderError

__all__ = ["Journal", "settings_of"]

# 2: prompts as token ids, and the settings of an adapter decide, too.
FORMAT = 2


class Journal:
    """The lines of a file that are there, and what adds to them, until `close`.

    Args:
        path: The file.
        settings: All that decides a line, as JSON.
        check: Takes a line and its place, and refuses what the command does not write.

    Raises:
        RunFolderError: The file is something else, was made with other settings, another process
            is writing to it, or it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        check: Callable[[dict[str, Any], str], dict[str, Any]],
    ) -> None:
        self.path, self._check = path, check
        self._lock = path.with_name(f".{path.name}{LOCK}")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.note = hold(self._lock, path)
        try:
            self._open({"format": FORMAT, **settings})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write to the file."""
        release(self._lock)

    def _open(self, whole: Mapping[str, Any]) -> None:
        path, beside = self.path, settings_of(self.path)
        if beside.is_file():
            require_same(path, read_object(beside), whole)
        elif path.exists():
            raise RunFolderError(
                f"{path} is there and was not made by this command ({beside.name} is missing); "
                "choose another --output."
            )
        write_bytes(beside, [json.dumps(whole, indent=2).encode() + b"\n"])

    def rows(self) -> list[dict[str, Any]]:
        """The lines that are there, without a torn last one.

        Returns:
            JSON objects, in order.

        Raises:
            RunFolderError: A line is damaged.
        """
        return read_lines(self.path, self._check) if self.path.is_file() else []

    def num_done(self, total: int, together: int) -> int:
        """How many lines are done, once the rest of a killed group is cut off.

        Args:
            total: Lines of the finished file.
            together: Lines that are made together, and decide each other's last digits.

        Returns:
            `total`, or a number of whole groups.

        Raises:
            RunFolderError: There are more than that, or the file cannot be written.
        """
        num = len(self.rows())
        if num > total:
            raise RunFolderError(
                f"{self.path}: has {num} lines for {total}, as two processes leave it; remove it "
                "to begin again, or choose another --output."
            )
        done = num if num == total else num - num % together
        if done != num:
            self.keep(done)
        return done

    def keep(self, num: int) -> None:
        """Cut the file back to its first lines.

        Args:
            num: Lines to keep.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_bytes(self.path, map(json_line, self.rows()[:num]))

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append lines.

        Args:
            rows: What they hold.

        Raises:
            RunFolderError: They cannot be written; the lines before them are intact.
        """
        for row in rows:
            append_line(self.path, row)


def settings_of(path: Path) -> Path:
    """The file that says what made the lines of another.

    Args:
        path: The file of lines.
    """
    return path.with_name(f"{path.name}.settings.json")
