"""Whether a dump can be read as asked, and what is said where it cannot."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stableopd.integrations.dump_files import free_name, is_beside
from stableopd.integrations.dump_formats import (
    FORMATS,
    KNOWN_COLUMNS,
    ROLES,
    columns_of,
    detect,
    reach,
)
from stableopd.integrations.dump_rows import (
    Break,
    binary_columns,
    column_kinds,
    looking_at,
    read_rows,
    size_of,
)
from stableopd.integrations.dump_steps import NO_STEPS, STEPS_OF_FILES
from stableopd.types import DataError, StopReason

__all__ = [
    "check_choices",
    "check_columns",
    "common_format",
    "count",
    "nothing_readable",
    "peek",
    "refuse_others",
    "take_meanings",
    "take_steps",
    "unknown",
]

PEEKED_ROWS = 8
PEEKED_LINES = 100
PEEKED_BYTES = 2**23
UNREAD = "(not read)"  # stands for a value of a column that plays no role

# Roles of a mapping that are no columns: values of the stop reason, and what they mean.
MEANINGS = {"truncated_value": StopReason.LENGTH, "stopped_value": StopReason.STOP}


def take_meanings(mapping: dict[str, str]) -> dict[str, StopReason]:
    """Take what is said of stop reasons out of a mapping: words in lower case, what they mean."""
    found: dict[str, StopReason] = {}
    for role, meaning in MEANINGS.items():
        words = [word.strip().lower() for word in mapping.get(role, "").split(",")]
        words = [word for word in words if word]
        if role in mapping and not words:
            raise DataError(f"{role} names no value; give it one, as {role}=VALUE.")
        for word in words:
            if found.setdefault(word, meaning) is not meaning:
                raise DataError(f"{word!r} cannot be both a truncated_value and a stopped_value.")
        mapping.pop(role, None)
    return found


def take_steps(mapping: dict[str, str]) -> str:
    """Take out of a mapping what is said of steps that no column has; "" for nothing."""
    if mapping.get("step") in (STEPS_OF_FILES, NO_STEPS):
        return mapping.pop("step")
    return ""


def refuse_others(format: str, file: Path, left_out: Sequence[Path]) -> None:
    """Refuse rollouts of another framework among the files that a folder's search passed over."""
    for other in left_out:
        if is_beside(other) or not size_of(other) or not (rows := peek(other)):
            continue
        name = detect(other, rows)
        # Rows of no framework that have no step are rather a data set.
        is_other = name if name != "generic" else "step" in columns_of(name, rows, {})
        if is_other and name != format:
            raise DataError(_two_kinds((file, format), (other, name)))


def check_choices(format: str, mapping: Mapping[str, str]) -> None:
    """Refuse a format or a role that does not exist."""
    if format not in ("auto", *FORMATS):
        raise DataError(f"format {format!r} is not known; choose from auto, {', '.join(FORMATS)}.")
    for role in mapping:
        if role not in ROLES:
            known = ", ".join((*ROLES, *MEANINGS))
            raise DataError(f"{role!r} is no role of a column; choose from {known}.")


def check_columns(
    file: Path,
    rows: Sequence[Mapping[str, Any]],
    mapping: Mapping[str, str],
    columns: Mapping[str, str],
) -> None:
    """Refuse a mapping to a column that is nowhere; rows may leave out a column, or have null."""
    needed = {role: columns[role] for role in ("completion", *mapping) if role in columns}
    for role, column in needed.items():
        if not any(column in row or reach(row, column) is not None for row in rows):
            raise DataError(
                f"{file}: no column {column!r} for the {role}; its columns are "
                f"{_columns(file, rows)}."
            )


def peek(file: Path, mapping: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The first rows of a file, up to 8, that are no damage.

    Args:
        file: The file.
        mapping: Columns by role that the user named.

    Returns:
        The rows; of a table the columns that may play a role, and of others the name.
    """
    kinds = column_kinds(file)
    wanted = None
    if kinds is not None:
        named = {column.partition(".")[0] for column in (mapping or {}).values()}
        named |= {*KNOWN_COLUMNS, *(mapping or {}).values()}
        wanted = {name for name, is_number in kinds.items() if is_number or name in named}
    found: list[dict[str, Any]] = []
    rows = read_rows(file, lambda _: None, wanted, PEEKED_BYTES)
    for _, row in itertools.islice(rows, PEEKED_LINES):
        if isinstance(row, dict):
            found.append(dict.fromkeys(kinds or (), UNREAD) | row)
        if len(found) == PEEKED_ROWS:
            break
    return found


def common_format(kinds: Mapping[Path, str]) -> str:
    """The format of all files; of one that has no readable row nothing is said."""
    found: dict[str, Path] = {}
    for file, kind in kinds.items():
        found.setdefault(kind, file)
    if len(found) > 1:
        one, other = itertools.islice(((file, name) for name, file in found.items()), 2)
        raise DataError(_two_kinds(one, other))
    return next(iter(found))


def _two_kinds(*both: tuple[Path, str]) -> str:
    said = [f"{file} is {FORMATS.get(name, 'of no known format')}" for file, name in both]
    return f"Two kinds of dump in one call: {', '.join(said)}; give one kind, or name the files."


def _columns(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for row in rows for key in row)
    named = [repr(key) for key in keys]
    if file.suffix == ".parquet":
        named += [f"{name!r} (bytes, which are not read)" for name in binary_columns(file)]
    return ", ".join(named)


def unknown(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """What is said of a file whose rows are no rollouts."""
    return (
        f"{file}: no known format, and no column that is known as a completion; its columns are "
        f"{_columns(file, rows)}; say which it is with a mapping, as completion=COLUMN."
    )


def nothing_readable(file: Path) -> str:
    """What is said of a file without a readable row."""
    line, row = next(read_rows(file, lambda _: None, most_bytes=PEEKED_BYTES), (0, ""))
    if not line and file.suffix == ".parquet":
        return f"{file}: the table has no rows; there is no rollout in it."
    if isinstance(row, Break):
        return f"{file}: {row.reason}."
    with looking_at(file), file.open("rb") as start:
        if start.read(64).lstrip().startswith(b"["):
            return (
                f"{file}: a JSON array; write one object a line: jq -c '.[]' "
                f"{shlex.quote(str(file))} > {shlex.quote(str(free_name(file)))}"
            )
    said = row if line else "only blank lines"
    return f"{file}: no readable line; line {max(line, 1)}: {said}."


def count(number: int, what: str) -> str:
    """A number of things in words, as "1 file" or "2 files"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
