"""A file of lines that a command adds to, and goes on with after a kill.

Beside FILE stands FILE.settings.json, which says what made it: a line that other settings made must
not stand behind it. Lines are on disk before the next ones are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stableopd.runfolder.files import (
    append_line,
    json_line,
    read_lines,
    read_object,
    write_bytes,
    writing,
)
from stableopd.types import RunFolderError

__all__ = ["Journal"]

FORMAT = 1


class Journal:
    """The lines of a file that are there, and what adds to them.

    Args:
        path: The file.
        settings: All that decides a line, as JSON.

    Raises:
        RunFolderError: The file is something else, was made with other settings, or cannot be
            written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        beside = path.with_name(f"{path.name}.settings.json")
        whole = {"format": FORMAT, **settings}
        if beside.is_file():
            old = read_object(beside)
            for key in sorted({*old, *whole}):
                if old.get(key) != whole.get(key):
                    raise RunFolderError(
                        f"{path}: made with {key} = {old.get(key)!r}, and this is "
                        f"{whole.get(key)!r}; give the same options to go on, or another --output."
                    )
        elif path.exists():
            raise RunFolderError(
                f"{path} is there and was not made by this command ({beside.name} is missing); "
                "choose another --output."
            )
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(beside, [json.dumps(whole, indent=2).encode() + b"\n"])

    def rows(self) -> list[dict[str, Any]]:
        """The lines that are there, without a torn last one.

        Returns:
            JSON objects, in order.

        Raises:
            RunFolderError: A line is damaged.
        """
        return read_lines(self.path) if self.path.is_file() else []

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
