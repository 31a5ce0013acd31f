"""Rollout dumps of any framework, recognised and read as records in constant memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopd.integrations import dump_values as values
from stableopd.integrations.dump_checks import (
    check_choices,
    check_columns,
    common_format,
    count,
    nothing_readable,
    peek,
    refuse_others,
    take_meanings,
    unknown,
)
from stableopd.integrations.dump_files import find_files, read_rows, step_in_name
from stableopd.integrations.dump_formats import columns_of, label, late_columns, unfold
from stableopd.types import DataError, Record, StopReason

__all__ = ["Dump", "open_dump"]

NAMED = 20  # problems that are kept in words
LONGEST_REASON = 40  # characters of an unknown stop reason that are kept


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
        unknown_reasons: How often each unknown stop reason came; at most 20 of them.
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
        meanings: Mapping[str, StopReason] | None = None,
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
        self.unknown_reasons: dict[str, int] = {}
        self.lengths_are_retokenised = False
        self._file_of_step: dict[int, int] = {}  # -1 for several
        self._meanings = dict(meanings or {})
        self._strict = strict
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    @property
    def shared_steps(self) -> int:
        """How many steps came from more than one file, as those of several runs do."""
        return sum(place < 0 for place in self._file_of_step.values())

    @property
    def notes(self) -> list[str]:
        """What the user may mend, one sentence each: stop reasons that are not known."""
        if not self.unknown_reasons:
            return []
        most = sorted(self.unknown_reasons, key=lambda word: -self.unknown_reasons[word])[:3]
        named = ", ".join(f"{word!r} ({self.unknown_reasons[word]:,})" for word in most)
        more = ", ..." if len(self.unknown_reasons) > len(most) else ""
        column = self.columns.get("stop_reason", "stop_reason")
        return [
            f"Unknown stop reasons in column {column!r}: {named}{more}; where one means cut off, "
            f"say so with --map truncated_value={most[0]}, where it does not, with stopped_value."
        ]

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
        self.unknown_reasons, self._file_of_step = {}, {}
        records = self._records(on_bytes or (lambda _: None))
        num = 0
        while batch := list(itertools.islice(records, self._batch_size)):
            num += len(batch)
            yield batch
        if not num:
            what = f"; {self.damaged[0]}" if self.damaged else ""
            raise DataError(
                f"{self.files[0]}: no completion in {count(self.num_files, 'file')} could be read "
                f"as {self.format_name} ({count(self.num_damaged, 'damaged line')}{what})."
            )

    def _records(self, on_bytes: Callable[[int], None]) -> Iterator[Record]:
        keys: set[str] = set()
        for place_of_file, file in enumerate(self.files):
            # prime-rl numbers the pieces of its stream; steps are folders there.
            numbered = file.parent / "rollouts.jsonl" if self.format == "prime-rl" else file
            source, step = str(file), step_in_name(numbered)
            kind = "row" if file.suffix == ".parquet" else "line"
            for line, row in read_rows(file, on_bytes):
                place = f"{source}, {kind} {line}"
                if isinstance(row, str):
                    self._damage(f"{place}: {row}")
                    continue
                if not row.keys() <= keys:
                    keys |= row.keys()
                    self.columns = late_columns(self.format, keys, self.columns)
                try:
                    for roles in unfold(self.format, row, self.columns):
                        record = self._record(source, line, roles, step, place)
                        self._note_step(record.step, place_of_file)
                        yield record
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    self._damage(f"{place}: {_reason(error)}")

    def _note_step(self, step: int | None, file: int) -> None:
        if step is not None and self._file_of_step.setdefault(step, file) != file:
            self._file_of_step[step] = -1

    def _reason(self, value: Any) -> StopReason | None:
        column = self.columns.get("stop_reason", "is_truncated")
        try:
            return values.stop_reason(value, column, self._meanings)
        except ValueError:
            word = str(value)[:LONGEST_REASON]
            if word in self.unknown_reasons or len(self.unknown_reasons) < NAMED:
                self.unknown_reasons[word] = self.unknown_reasons.get(word, 0) + 1
            raise

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
            self._drop(f"{place}: length: {length} for {count(len(ids), 'token id')}")
        length = length if ids is None else len(ids)
        student = use("student_logprobs", values.numbers)
        teacher = use("teacher_logprobs", values.numbers)
        if length is None:
            length = next((len(x) for x in (student, teacher) if x is not None and x.ndim), None)
        ids, length = self._retokenise(text, ids, length)
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
            stop_reason=use("stop_reason", self._reason),
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
            what = count(len(found), "number") if found.ndim else "one number"
            tokens = "an unknown number of tokens" if length is None else count(length, "token")
            self._drop(f"{place}: {role}: {what} for {tokens}")
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
            completion's column any JSONL or parquet is read. Beside columns, "truncated_value"
            and "stopped_value" list stop reasons, separated by commas, that mean so.
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
    meanings = take_meanings(chosen)
    check_choices(format, chosen)
    files, left_out = find_files(paths)
    empty = [file for file in files if not file.stat().st_size]
    if len(empty) == len(files) or (strict and empty):
        raise DataError(f"{empty[0]}: the file is empty; there is no rollout in it.")
    files = [file for file in files if file not in set(empty)]
    peeked = {file: peek(file) for file in files}
    first = next((file for file in files if peeked[file]), None)
    if first is None:
        raise DataError(nothing_readable(files[0]))
    if format == "auto":
        format = "generic" if "completion" in chosen else common_format(files, peeked)
        if "completion" not in chosen:
            refuse_others(format, first, left_out)
    columns = columns_of(format, peeked[first], chosen)
    if not format or (format == "generic" and "completion" not in columns):
        raise DataError(unknown(first, peeked[first]))
    check_columns(first, peeked[first], chosen, columns)
    if meanings and "stop_reason" not in columns and format != "prime-rl":
        raise DataError(f"{first}: no column of stop reasons; name it, as stop_reason=COLUMN.")
    others = [*left_out, *empty]
    return Dump(files, others, format, columns, strict, tokenizer, batch_size, meanings)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    return str(error)
