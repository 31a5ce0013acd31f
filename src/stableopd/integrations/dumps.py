"""Rollout dumps of any framework, recognised and read as records in constant memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopd.integrations import dump_values as values
from stableopd.integrations.dump_files import find_files, read_rows, step_in_name
from stableopd.integrations.dump_formats import (
    FORMATS,
    ROLES,
    columns_of,
    detect,
    label,
    reach,
    unfold,
)
from stableopd.types import DataError, Record

__all__ = ["Dump", "open_dump"]

PEEKED_ROWS = 8
PEEKED_LINES = 100
NAMED = 20  # problems that are kept in words


class Dump:
    """A dump that was found and recognised; its records are read by `batches`.

    Attributes:
        format: A key of `dump_formats.FORMATS`.
        format_name: The format in words, as "verl (JSONL)".
        columns: Which column plays which role, where the format has columns.
        files: The files, in the order in which they are read.
        left_out: Files of rows beside them that are none of the dump: logs, evaluations, and
            files that are empty.
        num_files: How many files there are.
        num_bytes: Their size; what `on_bytes` is told adds up to it.
        damaged: The first 20 damaged lines, as "file, line 3: what is wrong".
        num_damaged: How many lines were damaged and skipped.
        dropped: The first 20 values that could not be used, though their line could.
        num_dropped: How many values were dropped.
        lengths_are_retokenised: Whether lengths are those of re-tokenised text, which lacks the
            stop token and may be split in other tokens than were drawn.
    """

    def __init__(
        self,
        files: Sequence[Path],
        left_out: Sequence[Path],
        format: str,
        columns: Mapping[str, str],
        strict: bool,
        tokenizer: Callable[[str], ArrayLike] | None,
        batch_size: int,
    ) -> None:
        self.files = tuple(files)
        self.left_out = tuple(left_out)
        self.format = format
        self.format_name = label(format, files, columns)
        self.columns = dict(columns)
        self.num_files = len(files)
        self.num_bytes = sum(file.stat().st_size for file in files)
        self.damaged: list[str] = []
        self.num_damaged = 0
        self.dropped: list[str] = []
        self.num_dropped = 0
        self.lengths_are_retokenised = False
        self._strict = strict
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def batches(self, on_bytes: Callable[[int], None] | None = None) -> Iterator[list[Record]]:
        """Read the records, in the order of the files; each call begins anew.

        Args:
            on_bytes: Is told how many bytes more were read, now and then.

        Yields:
            Lists of at most `batch_size` records, none of them empty.

        Raises:
            DataError: No line held a completion, a file cannot be read, or, where `strict`, a
                line is damaged.
        """
        self.damaged, self.num_damaged = [], 0
        self.dropped, self.num_dropped = [], 0
        records = self._records(on_bytes or (lambda count: None))
        num = 0
        while batch := list(itertools.islice(records, self._batch_size)):
            num += len(batch)
            yield batch
        if not num:
            what = f"; {self.damaged[0]}" if self.damaged else ""
            raise DataError(
                f"{self.files[0]}: no completion in {_count(self.num_files, 'file')} could be read "
                f"as {self.format_name} ({_count(self.num_damaged, 'damaged line')}{what})."
            )

    def _records(self, on_bytes: Callable[[int], None]) -> Iterator[Record]:
        for file in self.files:
            # prime-rl numbers the pieces of its stream; steps are folders there.
            numbered = file.parent / "rollouts.jsonl" if self.format == "prime-rl" else file
            source, step = str(file), step_in_name(numbered)
            kind = "row" if file.suffix == ".parquet" else "line"
            for line, row in read_rows(file, on_bytes):
                place = f"{source}, {kind} {line}"
                if isinstance(row, str):
                    self._damage(f"{place}: {row}")
                    continue
                try:
                    for roles in unfold(self.format, row, self.columns):
                        yield self._record(source, line, roles, step, place)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    self._damage(f"{place}: {_reason(error)}")

    def _record(
        self, source: str, line: int, roles: Mapping[str, Any], step: int | None, place: str
    ) -> Record:
        if roles.get("completion") is None:
            raise ValueError("no completion")
        text = values.completion_text(roles["completion"])

        def use(role: str, read: Callable[[Any], Any]) -> Any:
            if (value := roles.get(role)) is None:
                return None
            try:
                return read(value)
            except ValueError as error:
                self._drop(f"{place}: {role}: {error}")
                return None

        ids = use("completion_ids", values.ids)
        length = use("length", values.whole)
        if ids is not None and length not in (None, len(ids)):
            self._drop(f"{place}: length: {length} for {len(ids)} token ids")
        length = length if ids is None else len(ids)
        student = use("student_logprobs", values.numbers)
        teacher = use("teacher_logprobs", values.numbers)
        if length is None:
            length = next((len(x) for x in (student, teacher) if x is not None and x.ndim), None)
        ids, length = self._retokenise(text, ids, length)
        column = self.columns.get("stop_reason", "is_truncated")
        found_step = use("step", values.whole)
        return Record(
            source=source,
            line=line,
            completion=text,
            prompt=use("prompt", values.prompt_text) or "",
            prompt_id="" if roles.get("prompt_id") is None else str(roles["prompt_id"]),
            step=step if found_step is None else found_step,
            completion_ids=ids,
            num_tokens=length,
            stop_reason=use("stop_reason", lambda value: values.stop_reason(value, column)),
            student_logps=self._fitting(student, length, "student_logprobs", place),
            teacher_logps=self._fitting(teacher, length, "teacher_logprobs", place),
            advantages=self._spread(use("advantages", values.numbers), length, place),
            correct=use("correct", values.flag),
            score=use("score", values.number),
        )

    def _retokenise(
        self, text: str, ids: NDArray[np.int64] | None, length: int | None
    ) -> tuple[NDArray[np.int64] | None, int | None]:
        if ids is not None or self._tokenizer is None:
            return ids, length
        found = np.asarray(self._tokenizer(text), dtype=np.int64)
        if length is None:
            self.lengths_are_retokenised = True
            return found, len(found)
        return (found if len(found) == length else None), length

    def _fitting(
        self, found: NDArray[np.float64] | None, length: int | None, role: str, place: str
    ) -> NDArray[np.float64] | None:
        if found is None:
            return None
        if found.ndim != 1 or len(found) != length:
            what = f"{len(found)} numbers" if found.ndim else "one number"
            self._drop(f"{place}: {role}: {what} for {length} tokens")
            return None
        return found

    def _spread(
        self, found: NDArray[np.float64] | None, length: int | None, place: str
    ) -> NDArray[np.float64] | None:
        """Advantages by token; one for the whole rollout is every token's."""
        if found is None or found.ndim == 1:
            return self._fitting(found, length, "advantages", place)
        return None if length is None else np.full(length, found.item())

    def _damage(self, what: str) -> None:
        if self._strict:
            raise DataError(f"{what}.")
        self.num_damaged += 1
        if len(self.damaged) < NAMED:
            self.damaged.append(what)

    def _drop(self, what: str) -> None:
        if self._strict:
            raise DataError(f"{what}.")
        self.num_dropped += 1
        if len(self.dropped) < NAMED:
            self.dropped.append(what)


def open_dump(
    paths: Sequence[Path],
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    strict: bool = False,
    tokenizer: Callable[[str], ArrayLike] | None = None,
    batch_size: int = 256,
) -> Dump:
    """Find the files of a dump and recognise its format, by their first rows.

    Args:
        paths: Files and folders; see `dump_files.find_files`.
        format: A key of `dump_formats.FORMATS`, or "auto".
        mapping: Columns by role (see `dump_formats.ROLES`), dots reaching into objects. With a
            completion's column any JSONL or parquet is read.
        strict: Whether the first damaged line is an error.
        tokenizer: Text to token ids; gives lengths and ids where the dump has text alone.
        batch_size: Records of a batch.

    Returns:
        The dump, of which nothing but a few rows of each file was read.

    Raises:
        DataError: There is no dump, it is of no known format or of several, a role or column is
            not known, or everything in it is damaged.
    """
    chosen = dict(mapping or {})
    _check_choices(format, chosen)
    files, left_out = find_files(paths)
    empty = [file for file in files if not file.stat().st_size]
    if len(empty) == len(files) or (strict and empty):
        raise DataError(f"{empty[0]}: the file is empty; there is no rollout in it.")
    files = [file for file in files if file not in set(empty)]
    peeked = {file: _peek(file) for file in files}
    first = next((file for file in files if peeked[file]), None)
    if first is None:
        raise DataError(_nothing_readable(files[0]))
    if format == "auto":
        format = "generic" if "completion" in chosen else _common_format(files, peeked)
    columns = columns_of(format, peeked[first], chosen)
    if not format or (format == "generic" and "completion" not in columns):
        raise DataError(_unknown(first, peeked[first]))
    _check_columns(first, peeked[first], chosen, columns)
    return Dump(files, [*left_out, *empty], format, columns, strict, tokenizer, batch_size)


def _check_choices(format: str, mapping: Mapping[str, str]) -> None:
    if format not in ("auto", *FORMATS):
        raise DataError(f"format {format!r} is not known; choose from auto, {', '.join(FORMATS)}.")
    for role in mapping:
        if role not in ROLES:
            raise DataError(f"{role!r} is no role of a column; choose from {', '.join(ROLES)}.")


def _check_columns(
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
                f"{file}: no column {column!r} for the {role}; its columns are {_columns(rows)}."
            )


def _peek(file: Path) -> list[dict[str, Any]]:
    rows = (row for _, row in itertools.islice(read_rows(file, lambda _: None), PEEKED_LINES))
    return list(itertools.islice((row for row in rows if isinstance(row, dict)), PEEKED_ROWS))


def _common_format(files: Sequence[Path], peeked: Mapping[Path, list[dict[str, Any]]]) -> str:
    """The format of all files; of one that has no readable row nothing is said."""
    found: dict[str, Path] = {}
    for file in files:
        if rows := peeked[file]:
            found.setdefault(detect(file, rows), file)
    if len(found) > 1:
        (one, first), (other, second) = itertools.islice(found.items(), 2)
        names = [FORMATS.get(name, "of no known format") for name in (one, other)]
        raise DataError(
            f"Two kinds of dump in one call: {first} is {names[0]}, {second} is {names[1]}; give "
            "one kind, or name the format of all."
        )
    return next(iter(found))


def _columns(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(key for row in rows for key in row)
    return ", ".join(repr(key) for key in keys)


def _unknown(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        f"{file}: no known format, and no column that is known as a completion; its columns are "
        f"{_columns(rows)}; say which it is with a mapping, as completion=COLUMN."
    )


def _nothing_readable(file: Path) -> str:
    line, row = next(iter(read_rows(file, lambda _: None)), (1, "only blank lines"))
    with file.open("rb") as start:
        if start.read(64).lstrip().startswith(b"["):
            return (
                f"{file}: a JSON array; write one object a line: jq -c '.[]' {file} > "
                f"{file.with_suffix('.jsonl')}"
            )
    return f"{file}: no readable line; line {line}: {row}."


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    return str(error)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
