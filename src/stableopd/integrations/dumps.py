"""Rollout dumps of any framework, recognised and read as records in constant memory."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stableopd.diagnostics.losses import LossCounter, Losses
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
    take_steps,
    unknown,
)
from stableopd.integrations.dump_files import find_files
from stableopd.integrations.dump_formats import (
    columns_of,
    detect,
    label,
    late_columns,
    needed_columns,
    unfold,
)
from stableopd.integrations.dump_rows import Break, column_kinds, read_rows, size_of
from stableopd.integrations.dump_steps import NO_STEPS, StepAttempts, name_steps, step_in_name
from stableopd.types import DataError, Record, StopReason

__all__ = ["Dump", "open_dump"]

NAMED = 20  # problems that are kept in words
LONGEST_REASON = 40  # characters of an unknown stop reason that are kept
BATCH_BYTES = 2**24  # of a batch's texts and numbers, but for its last record

# What a row that has not the shape of its format may raise while it is taken apart.
SHAPE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
SHAPE_ERRORS = (*SHAPE_ERRORS, RecursionError, MemoryError)


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
        num_damaged: How many lines were damaged and skipped, and files broken off.
        dropped: The first 20 values that could not be used, though their line could.
        num_dropped: How many values were dropped.
        unknown_reasons: How often each unknown stop reason came; at most 20 of them.
        losses: How many rollouts could not be read, and where they were.
        has_earlier_attempts: Whether files hold steps that a resumed run wrote again.
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
        steps: str = "",
        empty: Sequence[Path] = (),
    ) -> None:
        self._empty = set(empty)
        self._order = tuple(files)
        self.files = tuple(file for file in files if file not in self._empty)
        self.left_out = (*left_out, *empty)
        self.format = format
        self.format_name = label(format, self.files, columns)
        self.columns = dict(columns)
        self.num_files = len(self.files)
        self.num_bytes = sum(map(size_of, self.files))
        self.damaged: list[str] = []
        self.num_damaged = 0
        self.dropped: list[str] = []
        self.num_dropped = 0
        self.unknown_reasons: dict[str, int] = {}
        self.lengths_are_retokenised = False
        self._no_steps = steps == NO_STEPS
        has_column = "step" in columns and not steps
        # prime-rl numbers the pieces of its stream; steps are folders there.
        numbered = [file.parent / "rollouts.jsonl" for file in files]
        self._named_steps, self._note_on_names = (
            ({f: step_in_name(n) for f, n in zip(files, numbered, strict=True)}, "")
            if format == "prime-rl"
            else name_steps(files, steps, format == "generic" and not has_column)
        )
        if has_column:
            self._note_on_names = ""
        self._begin()
        self._meanings = dict(meanings or {})
        self._strict = strict
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def _begin(self) -> None:
        """Forget what the last reading counted."""
        self.damaged: list[str] = []
        self.num_damaged = 0
        self.dropped: list[str] = []
        self.num_dropped = 0
        self.unknown_reasons: dict[str, int] = {}
        self._places: dict[int, tuple[int, int]] = {}  # of a step, its first and its last file
        self._steps_of: dict[int, tuple[int, bool]] = {}  # of a file, a step, and whether the only
        self._counter, self._num_lines, self._num_files = LossCounter(), 0, 0
        self._lost_files, self._num_without_step = 0, 0
        self._num_replaced, self._replaced = 0, (2**63, -1)
        self._attempts = StepAttempts()

    @property
    def shared_steps(self) -> int:
        """How many steps came from more than one file, as those of several runs do.

        Files of one folder that hold one step each are the parts of it.
        """

        def are_parts(one: int, other: int) -> bool:
            is_alone = self._steps_of[one][1] and self._steps_of[other][1]
            return is_alone and self._order[one].parent == self._order[other].parent

        places = self._places.values()
        return sum(one != other and not are_parts(one, other) for one, other in places)

    @property
    def losses(self) -> Losses:
        """What could not be read so far; of files that tell no number, that of the others."""
        num_steps, num_read = len(self._places), self._counter.num_read
        lost_files = self._lost_files * num_read / max(self._num_files, 1)
        per_step = num_read / num_steps if num_steps else 1.0
        return self._counter.losses(lost_files, per_step, self._num_without_step)

    @property
    def has_earlier_attempts(self) -> bool:
        """Whether a file holds steps that a resumed run wrote again, as far as it was read."""
        return bool(self._attempts.cuts())

    @property
    def notes(self) -> list[str]:
        """What the user may mend, one sentence each: stop reasons that are not known."""
        said = [self._note_on_names] if self._note_on_names else []
        if self._num_replaced:
            first, last = self._replaced
            said.append(
                f"Steps {first} to {last} stand more than once in a file, as a resumed run writes "
                f"them: the last attempt counts, and {self._num_replaced:,} rollouts of earlier "
                "ones do not."
            )
        if self._attempts.has_several_runs:
            said.append(
                "A file begins anew at its first step: if it holds several runs, diagnose them "
                "one at a time."
            )
        if not self.unknown_reasons:
            return said
        most = sorted(self.unknown_reasons, key=lambda word: -self.unknown_reasons[word])[:3]
        named = ", ".join(f"{word!r} ({self.unknown_reasons[word]:,})" for word in most)
        more = ", ..." if len(self.unknown_reasons) > len(most) else ""
        column = self.columns.get("stop_reason", "stop_reason")
        return [
            *said,
            f"Unknown stop reasons in column {column!r}: {named}{more}; where one means cut off, "
            f"say so with --map truncated_value={shlex.quote(most[0])}, where it does not, with "
            "stopped_value.",
        ]

    def batches(
        self, on_bytes: Callable[[int], None] | None = None, last_attempts: bool = False
    ) -> Iterator[list[Record]]:
        """Read the records, in the order of the files; each call begins anew.

        Args:
            on_bytes: Is told how many bytes more were read, now and then.
            last_attempts: Leave out what a resumed run wrote again later, as the reading before
                this one found it.

        Yields:
            Lists of at most `batch_size` records and of about 16 MB, none of them empty.

        Raises:
            DataError: No line held a completion, a file cannot be read, or, where `strict`, a
                line is damaged.
        """
        cuts = self._attempts.cuts() if last_attempts else {}
        self._begin()
        num, batch, size = 0, list[Record](), 0
        for record in self._records(on_bytes or (lambda _: None), cuts):
            num += 1
            batch.append(record)
            size += _size(record)
            if len(batch) == self._batch_size or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch
        if not num:
            what = f"; {self.damaged[0]}" if self.damaged else ""
            raise DataError(
                f"{self.files[0]}: no completion in {count(self.num_files, 'file')} could be read "
                f"as {self.format_name} ({count(self.num_damaged, 'damaged line')}{what})."
            )

    def _records(
        self, on_bytes: Callable[[int], None], cuts: Mapping[tuple[int, int], int]
    ) -> Iterator[Record]:
        keys: set[str] = set()
        steps_of_others = {self._named_steps[file] for file in self.files}
        for place_of_file, file in enumerate(self._order):
            source, step = str(file), self._named_steps[file]
            if file in self._empty:
                if step is not None and step not in steps_of_others:  # else a rank without rows
                    self._lose(Break("empty"), 0)
                continue
            kind = "row" if file.suffix == ".parquet" else "line"
            before = self._counter.num_read
            for line, row in read_rows(file, on_bytes, self._wanted(file, keys)):
                place = f"{source}, {kind} {line}"
                if isinstance(row, str | Break):
                    self._damage(f"{place}: {row if isinstance(row, str) else row.reason}")
                    self._lose(row, self._counter.num_read - before)
                    continue
                self._num_lines += 1
                if not row.keys() <= keys:
                    keys |= row.keys()
                    self.columns = late_columns(self.format, keys, self.columns)
                try:
                    for roles in unfold(self.format, row, self.columns):
                        record = self._record(source, line, roles, step, place)
                        self._counter.read()
                        self._note_step(record.step, place_of_file)
                        stretch = self._attempts.see(place_of_file, record.step)
                        cut = cuts.get((place_of_file, stretch))
                        if cut is None or record.step is None or record.step < cut:
                            yield record
                        else:
                            self._replace(record.step)
                except SHAPE_ERRORS as error:
                    self._damage(f"{place}: {_reason(error)}")
                    self._lose("", 0)
            self._num_files += self._counter.num_read > before

    def _wanted(self, file: Path, keys: set[str]) -> set[str] | None:
        """The columns of a table that play a role; None reads all that there are."""
        kinds = column_kinds(file)
        if kinds is None:
            return None
        keys |= kinds.keys()
        self.columns = late_columns(self.format, keys, self.columns)
        return needed_columns(self.format, self.columns)

    def _lose(self, what: str | Break, num_of_file: int) -> None:
        """Count the rollouts that are lost with a line, or with the rest of a file."""
        num_read, num_lines = self._counter.num_read, self._num_lines
        per_line = num_read / num_lines if num_lines else 1.0
        if isinstance(what, str):
            self._counter.lose(max(round(per_line), 1))
        elif what.num_rows is not None:
            self._counter.lose(max(round(what.num_rows * per_line), 1))
        elif num_of_file:  # as many an equal part of the file as were read of it
            share = min(what.share, 0.999)
            self._counter.lose(max(round(num_of_file * share / (1 - share)), 1))
        elif self._num_files:
            self._counter.lose(max(round(num_read / self._num_files), 1))
        else:
            self._lost_files += 1

    def _replace(self, step: int) -> None:
        self._num_replaced += 1
        self._replaced = (min(self._replaced[0], step), max(self._replaced[1], step))

    def _note_step(self, step: int | None, file: int) -> None:
        if step is None:
            return
        self._places[step] = (self._places.get(step, (file, file))[0], file)
        first, is_only = self._steps_of.get(file, (step, True))
        self._steps_of[file] = (first, is_only and first == step)

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
        completion = roles.get("completion")
        has_only_ids = completion is None and "completion" not in self.columns
        if completion is None and (not has_only_ids or roles.get("completion_ids") is None):
            raise ValueError("no completion")
        text = "" if has_only_ids else values.completion_text(completion)
        values.fits_text(text)

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
        if has_only_ids and ids is None:
            raise ValueError("no completion, and no token ids that can be used")
        student = use("student_logprobs", values.logprobs)
        teacher = use("teacher_logprobs", values.logprobs)
        if length is None:
            length = next((len(x) for x in (student, teacher) if x is not None and x.ndim), None)
        ids, length = self._retokenise(text, ids, length)
        found_step = None if self._no_steps else use("step", values.whole)
        if found_step is None and _is_given(roles.get("step")) and not self._no_steps:
            self._num_without_step += step is None
        return Record(
            source=source,
            line=line,
            completion=text,
            prompt=use("prompt", lambda value: values.fits_text(values.prompt_text(value))) or "",
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
    steps = take_steps(chosen)
    files, left_out = find_files(paths)
    empty = [file for file in files if file.is_file() and not size_of(file)]
    if len(empty) == len(files) or (strict and empty):
        raise DataError(f"{empty[0]}: the file is empty; there is no rollout in it.")
    kinds: dict[Path, str] = {}
    rows: list[dict[str, Any]] = []
    for file in files:
        if found := peek(file, chosen):
            rows = rows or found
            kinds[file] = detect(file, found)
    first = next(iter(kinds), None)
    if first is None:
        raise DataError(nothing_readable(next(file for file in files if file not in empty)))
    if format == "auto":
        format = "generic" if "completion" in chosen else common_format(kinds)
        if "completion" not in chosen:
            refuse_others(format, first, left_out)
    columns = columns_of(format, rows, chosen)
    if not format or (
        format == "generic" and not columns.keys() & {"completion", "completion_ids"}
    ):
        raise DataError(unknown(first, rows))
    check_columns(first, rows, chosen, columns)
    if steps:
        columns.pop("step", None)
    if meanings and "stop_reason" not in columns and format != "prime-rl":
        raise DataError(f"{first}: no column of stop reasons; name it, as stop_reason=COLUMN.")
    return Dump(
        files, left_out, format, columns, strict, tokenizer, batch_size, meanings, steps, empty
    )


def _size(record: Record) -> int:
    """About how many bytes a record takes."""
    arrays = (record.completion_ids, record.student_logps, record.teacher_logps, record.advantages)
    texts = len(record.completion) + len(record.prompt)
    return texts + sum(array.nbytes for array in arrays if array is not None)


def _is_given(value: Any) -> bool:
    """Whether a row has a value there: not null, and not nan."""
    return value is not None and value == value


def _reason(error: BaseException) -> str:
    """What is wrong with a row, in words."""
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    if isinstance(error, ValueError):
        return str(error)
    return f"not the shape that such a row has ({error or type(error).__name__})"
