"""The folder of an evaluation: what decided it, a line for each problem, and the summary.

    settings.json        the settings, what the model stops with, a fingerprint of it, and one of
                         each data set and of its prompts as token ids
    DATA.jsonl           a line for each problem of a data set, in its order
    summary.json         made from the above

Lines are appended and on disk before the next problems are answered. A kill loses the problems that
were being answered, which the same command answers again, with the same draws. One process writes,
which holds a lock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from stableopd.runfolder.files import (
    TEMPORARY,
    append_line,
    json_line,
    read_lines,
    read_object,
    write_bytes,
    writing,
)
from stableopd.runfolder.lock import LOCK, hold, release
from stableopd.types import Prompt, RunFolderError

__all__ = ["Store", "fingerprint", "require_same"]

# 2: stop ids, prompts as token ids, and the settings of an adapter decide, too.
FORMAT = 2

SETTINGS = "settings.json"

# What to say of a setting that is a hash, or of no use to the user.
WORDS = {
    "format": "another version wrote down less of what decides an answer",
    "ids": "the rollouts are other tokens now, as after a change of the chat template or tokenizer",
    "problems": "the problems have changed",
    "prompt_ids": (
        "the prompts are other tokens now, as after a change of the chat template or tokenizer"
    ),
    "prompts": "the prompts have changed",
    "rollouts": "the rollouts have changed",
    "weights": "the model's files have changed",
}

# What a row holds beside texts: a list with a value for each answer.
LISTS: dict[str, type] = {
    "correct": bool,
    "lengths": int,
    "stop_reasons": str,
    "repetitive": bool,
    "completions": str,
}


class Store:
    """The folder, opened for settings that it was made with or that are new."""

    def __init__(self, path: Path, settings: Mapping[str, Any], sets: Mapping[str, Any]) -> None:
        """Open a folder, or make it, and keep other processes out until `close`.

        Args:
            path: The folder.
            settings: All that decides a row, as JSON; `num_samples` among it.
            sets: For each data set by name, what it was read from.

        Raises:
            RunFolderError: The folder holds another evaluation, another process is at work in it,
                or it cannot be written.
        """
        self.path, self._num_samples = path, settings["num_samples"]
        with writing(path):
            if not (path / SETTINGS).is_file() and _is_taken(path):
                raise RunFolderError(
                    f"{path} is there and holds no evaluation (no {SETTINGS}); choose another "
                    "--output."
                )
            path.mkdir(parents=True, exist_ok=True)
        self.note = hold(path / LOCK, path)
        try:
            self.sets = {**_known_sets(path, settings, sets), **sets}
            whole = {"format": FORMAT, "settings": dict(settings), "sets": self.sets}
            write_bytes(path / SETTINGS, [json.dumps(whole, indent=2).encode() + b"\n"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write to the folder."""
        release(self.path / LOCK)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a data set that are there.

        Args:
            name: Of the data set.

        Returns:
            The rows, in order; without a torn last line.

        Raises:
            RunFolderError: A row is damaged, or there are more of them than problems.
        """
        file = self.path / f"{name}.jsonl"
        rows = read_lines(file, self._as_row) if file.is_file() else []
        if len(rows) > (total := self.sets[name]["num_problems"]):
            raise RunFolderError(
                f"{file}: has {len(rows)} rows for {total} problems, as two processes leave it; "
                "remove the file to answer them again, or choose another --output."
            )
        return rows

    def require_order(
        self, name: str, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]
    ) -> None:
        """Refuse rows that do not stand where their problems do.

        Args:
            name: Of the data set.
            rows: Its rows.
            prompts: Its problems.

        Raises:
            RunFolderError: A row is of another problem than its place says.
        """
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False), start=1):
            if row["id"] != prompt.id:
                raise RunFolderError(
                    f"{self.path / name}.jsonl, line {number}: is of the problem {row['id']!r}, "
                    f"and that of {prompt.id!r} belongs there; remove the file to answer again, or "
                    "choose another --output."
                )

    def _as_row(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """Refuse a row that no evaluation with these settings writes."""
        wrong = [
            name
            for name, kind in LISTS.items()
            if not isinstance(row.get(name), list)
            or len(row[name]) != self._num_samples
            or not all(type(value) is kind for value in row[name])
        ]
        counts = ("num_correct", "num_timeouts")
        wrong += [n for n in counts if type(row.get(n)) is not int or not 0 <= row[n] <= 2**53]
        wrong += [] if isinstance(row.get("id"), str) else ["id"]
        if wrong or row["num_correct"] != sum(row["correct"]) or max(row["lengths"]) > 2**53:
            raise RunFolderError(
                f"{where}: {wrong[0] if wrong else 'a number'!r} is not what an evaluation writes; "
                "restore the file, or remove it to answer again."
            )
        return row

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


def _is_taken(path: Path) -> bool:
    """Whether there is something else than what a kill in the first write leaves."""
    left = (LOCK, f".{SETTINGS}{TEMPORARY}")
    return path.exists() and (
        not path.is_dir() or any(entry.name not in left for entry in path.iterdir())
    )


def _known_sets(
    path: Path, settings: Mapping[str, Any], sets: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The data sets of a folder that was made with these settings; none of a new one."""
    file = path / SETTINGS
    if not file.is_file():
        return {}
    old = read_object(file)
    require_same(path, {"format": old.get("format")}, {"format": FORMAT})
    require_same(path, old.get("settings"), settings)
    known = old.get("sets")
    if not isinstance(known, dict) or not all(
        isinstance(of, dict) and type(of.get("num_problems")) is int
        for of in cast(dict[str, Any], known).values()
    ):
        raise RunFolderError(f"{file}: 'sets' is not what an evaluation writes; restore it.")
    found = cast(dict[str, dict[str, Any]], known)
    for name, of in sets.items():
        if name in found:
            require_same(path, found[name], of, f"{name}: ")
    return found


def require_same(path: Path, old: Any, new: Mapping[str, Any], where: str = "") -> None:
    """Refuse to add to what other settings made.

    Args:
        path: What is there, for the message.
        old: The settings that it was made with, as they were read.
        new: Those of now.
        where: What they are of, for the message.

    Raises:
        RunFolderError: One of them differs.
    """
    before: Mapping[str, Any] = old if isinstance(old, Mapping) else {}
    for key in [*new, *(key for key in before if key not in new)]:
        if before.get(key) != new.get(key):
            if key in WORDS:
                raise RunFolderError(
                    f"{path}: cannot be added to: {where}{WORDS[key]}; choose another --output."
                )
            raise RunFolderError(
                f"{path}: made with {where}{key} = {before.get(key)!r}, and this is "
                f"{new.get(key)!r}; give the same options to go on, or another --output."
            )


def fingerprint(parts: Sequence[Any]) -> str:
    """A hash that changes when files, problems or token ids do.

    Args:
        parts: Files, problems, or lists of token ids.

    Returns:
        SHA-256 in hexadecimal.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, Prompt):
            total.update(repr((part.id, part.prompt, part.answer)).encode())
        else:
            total.update(f"{part!r}\n".encode())
    return total.hexdigest()
