"""Rows of data from files and folders, each with its place, so that a message can name it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.text import one_line
from stableopd.types import DataError

__all__ = ["Row", "read_rows"]

LINE_FILES = (".jsonl", ".json")
ROW_FILES = (*LINE_FILES, ".parquet")
# Design: far above any problem, and far below what would fill a machine's memory.
MOST_LINE_BYTES = 32 << 20
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Row:
    """One row as it was read.

    Attributes:
        place: File and line (or row), for messages.
        fallback_id: The id of the row where the data gives none.
        values: The columns by name.
    """

    place: str
    fallback_id: str
    values: dict[str, Any]


def read_rows(path: Path, split: str) -> Iterator[Row]:
    """Read a data set row by row.

    Args:
        path: A .jsonl, .json or .parquet file, a folder of them, or a folder that
            `datasets.save_to_disk` wrote.
        split: Which part of a folder that has parts.

    Yields:
        The rows, in order; blank lines are left out, but counted.

    Raises:
        DataError: There is no such data, it cannot be read, or a line is not an object.
    """
    try:
        if path.is_dir():
            yield from _folder_rows(path, split)
        elif not path.exists():
            raise DataError(
                f"{path}: no such file or folder; give a {', '.join(ROW_FILES)} file, a datasets "
                'folder or "embedded".'
            )
        elif not path.is_file():  # a pipe would be waited for, and a device never ends
            raise DataError(f"{path}: is neither a file nor a folder; save the rows to a file.")
        else:
            yield from _file_rows(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}).") from None


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix in LINE_FILES:
        return _line_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}; give a {', '.join(ROW_FILES)} file."
    )


def _line_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(MOST_LINE_BYTES + 1), b"")
        for number, raw in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if len(raw) > MOST_LINE_BYTES:
                raise DataError(
                    f"{place}: longer than {MOST_LINE_BYTES >> 20} MiB, the most that is read of a "
                    "line; write one problem per line."
                )
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: not valid UTF-8 at byte {error.start + 1} of the line; save the "
                    "file as UTF-8."
                ) from None
            if not text.strip():
                continue
            try:
                values = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: not valid JSON ({error.msg}, at character {error.pos + 1}); write "
                    "one object per line."
                ) from None
            except (ValueError, RecursionError) as error:  # a number too long, or too many brackets
                raise DataError(f"{place}: JSON that is too large ({one_line(error)}).") from None
            if not isinstance(values, dict):
                raise DataError(
                    f"{place}: JSON, but not an object ({type(values).__name__}); write one object "
                    "with the columns as keys per line."
                )
            yield Row(place, f"{path.name}:{number}", values)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", f"{path.name}:{number}", values)
    except UnicodeDecodeError:
        raise DataError(
            f"{path}, after row {number}: text that is not valid UTF-8; write it as UTF-8."
        ) from None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        # The latter two come of values that Python cannot hold, such as dates after its last year.
        where = f"{path}, after row {number}" if number else f"{path}"
        raise DataError(f"{where}: not a readable parquet file ({one_line(error)}).") from None


def _folder_rows(path: Path, split: str) -> Iterator[Row]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        yield from _dataset_rows(path, split)
        return
    files = sorted(f for f in path.iterdir() if f.suffix in ROW_FILES and f.is_file())
    if not files:
        raise DataError(
            f"{path}: neither a folder that datasets.save_to_disk wrote nor one with "
            f"{', '.join(ROW_FILES)} files in it."
        )
    chosen = [f for f in files if _split_of(f) == split]
    others = {_split_of(f) for f in files} - {""}
    if not chosen and others:
        raise DataError(
            f"{path}: holds files of {', '.join(sorted(others))} but none of {split!r}; give the "
            "file itself instead of the folder."
        )
    for file in chosen or files:
        yield from _file_rows(file)


def _split_of(file: Path) -> str:
    """The split that a name such as train-00000-of-00002.parquet begins with, or ""."""
    word = file.stem.replace("_", "-").replace(".", "-").partition("-")[0]
    return word if word in SPLITS else ""


def _dataset_rows(path: Path, split: str) -> Iterator[Row]:
    import pyarrow
    from datasets import DatasetDict, load_from_disk

    number = 0
    try:
        loaded = load_from_disk(path)
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise DataError(
                    f"{path}: holds the splits {', '.join(map(str, loaded))} but no {split!r}; "
                    "give the folder of one split, which is inside."
                )
            loaded = loaded[split]
        for values in loaded.with_format(None):
            number += 1
            yield Row(f"{path}, row {number}", f"{path.name}:{number}", dict(values))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: not a readable datasets folder ({one_line(error)}); save it again with "
            "save_to_disk."
        ) from None
