"""The folder of an evaluation: what decided it, a line for each problem, and the summary.

    settings.json        the settings, the model's fingerprint, and one of each data set
    DATA.jsonl           a line for each problem of a data set, in its order
    summary.json         made from the above

Lines are appended and on disk before the next problems are answered. A kill loses the problems that
were being answered, which the same command answers again, with the same draws.
"""

from __future__ import annotations

import hashlib
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
from stableopd.types import Prompt, RunFolderError

__all__ = ["Store", "fingerprint"]

FORMAT = 1


class Store:
    """The folder, opened for settings that it was made with or that are new."""

    def __init__(self, path: Path, settings: Mapping[str, Any], sets: Mapping[str, Any]) -> None:
        """Open a folder, or make it.

        Args:
            path: The folder.
            settings: All that decides a row, as JSON.
            sets: For each data set by name, what it was read from.

        Raises:
            RunFolderError: The folder holds another evaluation, or cannot be written.
        """
        self.path = path
        file = path / "settings.json"
        known: dict[str, Any] = {}
        if file.is_file():
            old = read_object(file)
            _require_same(path, old.get("settings"), settings)
            known = old.get("sets") or {}
            for name, of in sets.items():
                if name in known:
                    _require_same(path, known[name], of, f"{name}: ")
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(
                f"{path} is there and holds no evaluation (no settings.json); choose another "
                "--output."
            )
        self.sets = {**known, **sets}
        whole = {"format": FORMAT, "settings": dict(settings), "sets": self.sets}
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        write_bytes(file, [json.dumps(whole, indent=2).encode() + b"\n"])

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a data set that are there.

        Args:
            name: Of the data set.

        Returns:
            The rows, in order; without a torn last line.

        Raises:
            RunFolderError: A row is damaged.
        """
        file = self.path / f"{name}.jsonl"
        return read_lines(file) if file.is_file() else []

    def keep(self, name: str, num: int) -> None:
        """Cut a data set's file back to its first rows, which a kill may have left in part.

        Args:
            name: Of the data set.
            num: Rows to keep.

        Raises:
            RunFolderError: It cannot be written.
        """
        write_bytes(self.path / f"{name}.jsonl", map(json_line, self.rows(name)[:num]))

    def add(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows; they are on disk when this returns.

        Args:
            name: Of the data set.
            rows: Of its next problems.

        Raises:
            RunFolderError: They cannot be written; the rows before them are intact.
        """
        for row in rows:
            append_line(self.path / f"{name}.jsonl", row)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json.

        Args:
            summary: What it holds beside the format.

        Raises:
            RunFolderError: It cannot be written.
        """
        text = json.dumps({"format": FORMAT, **summary}, indent=2)
        write_bytes(self.path / "summary.json", [text.encode() + b"\n"])


def _require_same(path: Path, old: Any, new: Mapping[str, Any], where: str = "") -> None:
    before: Mapping[str, Any] = old if isinstance(old, Mapping) else {}
    for key in [*new, *(key for key in before if key not in new)]:
        if before.get(key) != new.get(key):
            raise RunFolderError(
                f"{path}: made with {where}{key} = {before.get(key)!r}, and this is "
                f"{new.get(key)!r}; give the same options to go on, or another --output."
            )


def fingerprint(parts: Sequence[Path] | Sequence[Prompt]) -> str:
    """A hash that changes when files or problems do.

    Args:
        parts: Files, or problems.

    Returns:
        SHA-256 in hexadecimal.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            total.update(repr((part.id, part.prompt, part.answer)).encode())
    return total.hexdigest()
