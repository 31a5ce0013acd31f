"""Files that a kill leaves whole, and what the operating system refuses, as one sentence."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from stableopd.types import RunFolderError

__all__ = [
    "REMEDIES",
    "TEMPORARY",
    "append_line",
    "filling",
    "finite",
    "json_line",
    "read",
    "read_lines",
    "read_object",
    "reading",
    "refusal",
    "remove",
    "sync",
    "sync_tree",
    "write_bytes",
    "writing",
]

TEMPORARY = ".tmp"  # unfinished writes and halves of deletions: safe to remove at any time

FULL = "what was written before is intact, so free some space and continue with --resume"
REMEDIES = {
    errno.ENOSPC: f"the disk is full; {FULL}",
    errno.EDQUOT: f"the disk quota is used up; {FULL}",
    errno.EACCES: "permission denied; choose another place",
    errno.EPERM: "permission denied; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
}


def refusal(path: Path, error: OSError) -> RunFolderError:
    """The error that says what could not be written, why, and what to do."""
    reason = REMEDIES.get(error.errno or 0, f"{error.strerror or error}; choose another place")
    return RunFolderError(f"{path}: cannot be written: {reason}.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one sentence about a path."""
    try:
        yield
    except OSError as error:
        raise refusal(path, error) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """As `writing`, for looking at a path, whose name may be too long or not ours to enter."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunFolderError(f"{path}: cannot be read: {reason}; give another path.") from error


@contextlib.contextmanager
def filling(path: Path) -> Iterator[None]:
    """As `writing`, for a folder that is filled with weights."""
    try:
        yield
    except Exception as error:
        # Writers of weights report a full disk as errors of their own kinds, some of which
        # (safetensors) have removed their half of a file by now.
        told = os.strerror(errno.ENOSPC) in str(error)
        if told or shutil.disk_usage(_existing(path)).free < 4096:
            raise refusal(path, OSError(errno.ENOSPC, str(error))) from error
        if isinstance(error, OSError) and error.errno in REMEDIES:
            raise refusal(path, error) from error
        raise


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def write_bytes(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file beside its place, sync it, and rename it.

    Args:
        path: Where. What is there before is replaced, and kept if anything fails.
        pieces: Its bytes.

    Raises:
        RunFolderError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file, on disk when this returns; a torn last line is replaced.

    Args:
        path: The file; it is made where there is none.
        row: What `json_line` takes.

    Raises:
        RunFolderError: It cannot be written; the lines before it are intact.
    """
    data = json_line(row)
    # Without a buffer: one would write the rest of a failed line when the file is closed.
    with writing(path), path.open("ab", buffering=0) as file:
        size = _whole_lines(path)
        os.truncate(path, size)
        try:
            while data:
                data = data[os.write(file.fileno(), data) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)
            raise


def _whole_lines(path: Path) -> int:
    """Size of a file of lines without a torn last one, in bytes."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) in (b"", b"\n"):
            return size
        file.seek(0)
        return file.read().rfind(b"\n") + 1


def sync(path: Path) -> None:
    """Have a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Have a folder and all that is in it on disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """A JSON value with None for the floats that JSON has no word for (nan, infinities)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in cast(list[Any], value)]
    return value


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of a .jsonl file, in UTF-8."""
    text = json.dumps(finite(row), ensure_ascii=False)
    # A lone surrogate has no UTF-8; as an escape it is valid JSON and reads back the same.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def read(path: Path) -> bytes:
    """The bytes of a file; RunFolderError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise RunFolderError(f"{path}: cannot be read: {reason}; is the run complete?") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; RunFolderError where there is none."""
    return _parse(read(path), str(path))


def read_lines(
    path: Path, check: Callable[[dict[str, Any], str], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file without a torn last line.

    Args:
        path: The file.
        check: Takes each object and its place, and refuses what cannot stand there.

    Returns:
        The objects, in order.

    Raises:
        RunFolderError: It cannot be read, or a line is no JSON object or refused.
    """
    # Split on the byte: a completion may hold characters that str.splitlines takes for line ends.
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read(path).split(b"\n")[:-1], start=1):
        where = f"{path}, line {number}"
        row = _parse(line, where)
        rows.append(check(row, where) if check else row)
    return rows


def _parse(data: bytes, where: str) -> dict[str, Any]:
    # ValueError: not JSON, not UTF-8, or a number of too many digits.
    with contextlib.suppress(ValueError, RecursionError):
        row: Any = json.loads(data, parse_constant=_no_number)
        if isinstance(row, dict):
            return cast(dict[str, Any], row)
    raise RunFolderError(f"{where}: not a JSON object; restore it.")


def _no_number(_word: str) -> None:
    """NaN and the infinities are written as null, and read as such."""
