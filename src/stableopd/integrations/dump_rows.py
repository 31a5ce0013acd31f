"""The rows of a file, one by one, whatever its bytes are: columns, or what is wrong with them.

What is read at once is bounded, so that a small file cannot take the machine's memory: a line, and
the columns of a parquet row that play a role, by `MOST_BYTES`. docs/dumps.md states the limits.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from stableopd.text import one_line
from stableopd.types import DataError

__all__ = [
    "Break",
    "RawRow",
    "binary_columns",
    "column_kinds",
    "looking_at",
    "read_rows",
    "size_of",
]

# Design: the largest line or row. A step of 512 rollouts of 64 KB is one line of ms-swift; a line
# of JSON takes up to twenty times its size once it is read.
MOST_BYTES = 32 * 2**20

PROGRESS_BYTES = 1 << 20
BATCH_ROWS = 256
# Above so many bytes in a row group rows may differ much from their mean.
LARGE_GROUP = 8 * MOST_BYTES
LARGE_GROUP_ROWS = 16

# What pyarrow and the conversion of its values raise on damaged files.
PARQUET_ERRORS = (OSError, ValueError, ArithmeticError, MemoryError, RecursionError)
PARQUET_ERRORS = (*PARQUET_ERRORS, TypeError, LookupError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Break:
    """A file cannot be read from here on.

    Attributes:
        reason: Why.
        num_rows: How many rows are lost; None where that is not known.
        share: Where it is not known: how much of the file, in bytes, was not read.
    """

    reason: str
    num_rows: int | None = None
    share: float = 1.0


# A row's line (from 1) and its columns, or what is wrong with it.
RawRow = tuple[int, dict[str, Any] | str | Break]


@contextlib.contextmanager
def looking_at(path: Path) -> Iterator[None]:
    """Turn what pathlib and the operating system say of a path into one sentence.

    Raises:
        DataError: The path cannot be looked at or opened.
    """
    try:
        yield
    except RuntimeError:  # pathlib's word for a link to itself
        raise DataError(f"{path}: a link to itself, which leads nowhere.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({_first_line(error)}).") from None


def size_of(path: Path) -> int:
    """The size of a regular file in bytes; 0 of whatever else stands under its name."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def column_kinds(path: Path) -> dict[str, bool] | None:
    """Whether each column of a parquet file, but for those of bytes, is of single numbers.

    None of other files, and of those that cannot be read.
    """
    if path.suffix != ".parquet":
        return None
    from pyarrow import types

    tests = (types.is_integer, types.is_floating, types.is_boolean)
    try:
        fields = [field for field in _schema(path) if not _is_binary(field.type)]
    except PARQUET_ERRORS:
        return None
    return {field.name: any(test(field.type) for test in tests) for field in fields}


def binary_columns(path: Path) -> list[str]:
    """The columns of bytes in a parquet file, which are not read: images and the like."""
    with contextlib.suppress(*PARQUET_ERRORS):
        return [field.name for field in _schema(path) if _is_binary(field.type)]
    return []


def read_rows(
    path: Path,
    on_bytes: Callable[[int], None],
    columns: Collection[str] | None = None,
    most_bytes: int | None = None,
) -> Iterator[RawRow]:
    """Read a file row by row.

    Args:
        path: A parquet file, or one with a JSON object a line, plain or gzipped.
        on_bytes: Is told, now and then, how many bytes more of the file were read; the numbers
            add up to the file's size.
        columns: Of a parquet file, the columns to read; None reads all but bytes.
        most_bytes: Reading stops after the line, or rows, with which so many bytes were read.

    Yields:
        The line (row) number from 1, and the columns or, for a damaged line, what is wrong.
        Blank lines are passed over. A file that breaks off ends with a `Break`.

    Raises:
        DataError: The file is there and cannot be opened.
    """
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        yield 1, Break("a link to nothing" if path.is_symlink() else "the file has gone")
        return
    except OSError as error:
        yield 1, Break(_first_line(error))
        return
    if not is_regular:
        yield 1, Break("a pipe or a device, not a file")
        return
    with looking_at(path), path.open("rb") as raw:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(raw, path, on_bytes, columns, most_bytes)
        else:
            yield from _line_rows(cast(BinaryIO, raw), path, on_bytes, most_bytes)


def _line_rows(
    raw: BinaryIO, path: Path, on_bytes: Callable[[int], None], most_bytes: int | None
) -> Iterator[RawRow]:
    number, told, total, looked = 0, 0, 0, 0
    size = os.fstat(raw.fileno()).st_size
    lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
    try:
        while line := lines.readline(MOST_BYTES + 1):
            number += 1
            total += len(line)
            if total - looked >= PROGRESS_BYTES:
                looked, place = total, raw.tell()
                on_bytes(place - told)
                told = place
            if len(line) > MOST_BYTES:
                _pass_line(lines, line)
                yield number, f"a line of more than {MOST_BYTES >> 20} MiB, which is not read"
            elif row := _parse(line, number):
                yield number, row
            if most_bytes is not None and total >= most_bytes:
                return
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        share = _share_left(raw, size, total, isinstance(error, EOFError))
        reason = f"the gzip file breaks off here ({_first_line(error)})"
        yield number + 1, Break(reason if path.suffix == ".gz" else _first_line(error), None, share)
    on_bytes(size - told)


def _share_left(raw: BinaryIO, size: int, total: int, is_cut: bool) -> float:
    """How much of a gzip file comes after a place where it is damaged, of which `total` was read.

    It ends with the size of its content, but where it is cut off.
    """
    share = 1 - min(raw.tell(), size) / max(size, 1)
    if is_cut or size < 4:
        return share
    content = int.from_bytes(os.pread(raw.fileno(), 4, size - 4), "little")
    return max(share, 1 - total / content) if content > total else share


def _pass_line(lines: Any, line: bytes) -> None:
    """Read to the end of a line without keeping it."""
    while line and not line.endswith(b"\n"):
        line = lines.readline(PROGRESS_BYTES)


def _parse(line: bytes, number: int) -> dict[str, Any] | str:
    """The object of a line, what is wrong with it, or "" for a blank line."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if not text.strip():
            return ""
        row: Any = json.loads(text.rstrip())
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the line is cut off"
        return f"not valid JSON ({error.msg}, at character {error.pos + 1}){cut}"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"JSON that is too large ({one_line(error)})"
    if not isinstance(row, dict):
        return f"JSON, but not an object ({type(row).__name__})"
    return cast(dict[str, Any], row) or "an empty object"


def _parquet_rows(
    raw: Any,
    path: Path,
    on_bytes: Callable[[int], None],
    columns: Collection[str] | None,
    most_bytes: int | None,
) -> Iterator[RawRow]:
    import pyarrow.parquet as parquet

    size, told, number, taken = os.fstat(raw.fileno()).st_size, 0, 0, 0
    total = 0
    is_open = False
    try:
        # Without pre_buffer a row group is not held in memory as a whole.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            total, is_open = file.metadata.num_rows, True
            fields = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
            names = [name for name in fields if columns is None or name in columns]
            for group in range(file.metadata.num_row_groups):
                rows = _batch_rows(path, file, group, names)
                for batch in file.iter_batches(rows, row_groups=[group], columns=names):
                    for row in _rows_of(batch):
                        number += 1
                        yield number, row
                    place = size * number // max(total, number)
                    on_bytes(place - told)
                    told, taken = place, taken + batch.nbytes
                    if most_bytes is not None and taken >= most_bytes:
                        return
    except PARQUET_ERRORS as error:
        reason = f"not readable as parquet from here on ({_first_line(error)})"
        yield number + 1, Break(reason, max(total - number, 0) if is_open else None)
    on_bytes(size - told)


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; one that is too large, or that Python cannot hold, as damage."""
    if batch.nbytes <= MOST_BYTES:
        with contextlib.suppress(*PARQUET_ERRORS):
            rows = batch.to_pylist()
            yield from rows
            return
    for place in range(batch.num_rows):
        row = batch.slice(place, 1)
        if row.nbytes > MOST_BYTES:
            yield f"a row of more than {MOST_BYTES >> 20} MiB, which is not read"
            continue
        try:
            (found,) = row.to_pylist()
        except PARQUET_ERRORS as error:
            found = f"a value that cannot be read ({_first_line(error)})"
        yield found


def _batch_rows(path: Path, file: Any, group: int, names: Sequence[str]) -> int:
    """How many rows of a row group are read at once, so that they take about `MOST_BYTES`.

    A value that a dictionary holds once may stand in every row, so that the size of the row group
    says little: the longest of the dictionary's values is looked at. For plain values the mean is.
    """
    # pyarrow ends the process where damaged metadata are looked at that it has not read before.
    next(file.iter_batches(1, row_groups=[group], columns=names), None)
    found, schema = file.metadata.row_group(group), file.metadata.schema
    paths = [schema.column(place).path for place in range(len(schema))]
    wanted = [
        found.column(place)
        for place, leaf in enumerate(paths)
        if leaf in names or leaf.partition(".")[0] in names
    ]
    num_rows = max(found.num_rows, 1)
    stored = sum(column.total_uncompressed_size for column in wanted)
    values = sum(column.num_values for column in wanted)
    most = min(BATCH_ROWS, LARGE_GROUP_ROWS if stored > LARGE_GROUP else BATCH_ROWS)
    per_row = 8 * values / num_rows + stored / num_rows
    texts = [c for c in wanted if c.physical_type == "BYTE_ARRAY"]
    if most * sum(c.total_uncompressed_size for c in texts) > MOST_BYTES:
        longest = _longest_of_dictionaries(path, group, [c.path_in_schema for c in texts], names)
        per_row += sum(
            length * column.num_values / num_rows
            for column, length in zip(texts, longest, strict=True)
        )
    return max(1, min(most, int(MOST_BYTES / max(per_row, 1))))


def _longest_of_dictionaries(
    path: Path, group: int, leaves: Sequence[str], names: Sequence[str]
) -> list[int]:
    """Bytes of the longest value in the dictionary of each column of texts; 0 without one."""
    import pyarrow.parquet as parquet
    from pyarrow import compute

    def longest(array: Any) -> int:
        kind = array.type
        if hasattr(kind, "value_type") and hasattr(array, "dictionary"):
            sizes = compute.call_function("binary_length", [array.dictionary])
            return compute.call_function("max", [sizes]).as_py() or 0
        inner = [array.field(i) for i in range(kind.num_fields)] if _is_struct(kind) else []
        inner += [array.values] if hasattr(array, "values") and not inner else []
        return max(map(longest, inner), default=0)

    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}
    with parquet.ParquetFile(path, read_dictionary=list(leaves), **options) as file:
        batch = next(file.iter_batches(1, row_groups=[group], columns=list(names)), None)
    if batch is None:
        return [0 for _ in leaves]
    by_name = {name: longest(batch.column(name)) for name in batch.schema.names}
    heads = (leaf if leaf in by_name else leaf.partition(".")[0] for leaf in leaves)
    return [by_name.get(head, 0) for head in heads]


def _is_struct(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_struct(kind))


def _schema(path: Path) -> Any:
    import pyarrow.parquet as parquet

    return parquet.read_schema(path)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _first_line(error: BaseException) -> str:
    """What an error says, in one line; pyarrow's go over several."""
    said = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    lines = str(said).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__
