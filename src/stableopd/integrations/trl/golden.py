"""Golden solutions of the rows of a TRL data set, as token ids that end in a stop."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stableopd.data.golden import encode_golden
from stableopd.data.vocabulary import require_rows
from stableopd.rollout.stops import StopPlan
from stableopd.types import DataError, Prompt

__all__ = ["Solutions"]

# Rows of a stream that are looked at before training, so that a wrong column is told at once.
NUM_FIRST = 64

logger = logging.getLogger(__name__)


@dataclass
class Solutions:
    """The golden solutions of a data set.

    Attributes:
        column: Their column: text, one assistant message in a list, or token ids that end in a
            stop; None in a row without one.
        tokenizer: The student's tokenizer.
        stops: Which ids stop; text gets the student's own.
        num_tokens: Ids that both models share.
        max_tokens: The longest completion, with its stop; None for no limit.
        num_refused: Rows of a stream that `collate` left out because they cannot be used.
    """

    column: str
    tokenizer: Any
    stops: StopPlan
    num_tokens: int
    max_tokens: int | None
    num_refused: int = field(default=0, init=False)

    def require(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        """Refuse golden solutions that cannot be used, before training.

        Args:
            dataset: Rows with prompts and solutions. All are looked at where it has a length, the
                first ones of a stream.

        Raises:
            DataError: The column is not there, is empty, no solution fits, or one cannot be used
                (of a stream: none of the first can).
        """
        is_stream = not isinstance(dataset, Sized)
        has_column = has_solution = fits = False
        num_rows = 0
        refused: list[DataError] = []
        for row in itertools.islice(_rows(dataset, self.column), NUM_FIRST if is_stream else None):
            num_rows += 1
            has_column = has_column or self.column in row
            has_solution = has_solution or row.get(self.column) is not None
            try:
                fits = bool(self.ids(row)) or fits
            except DataError as error:
                refused.append(DataError(f"train_dataset, row {num_rows}: {error}"))
        rows = f"the first {num_rows} rows" if is_stream else f"all {num_rows} rows"
        if num_rows and not has_column:
            raise DataError(
                f"train_dataset has no column {self.column!r}, which the golden term needs; name "
                "the column of the solutions in solution_column, or set lambda_gold to 0."
            )
        if num_rows and not has_solution:
            raise DataError(
                f"column {self.column!r} is empty in {rows}; the golden term needs solutions "
                "there, or lambda_gold = 0."
            )
        if refused and not (is_stream and fits):
            more = f" ({len(refused)} of {num_rows} rows are refused)" if len(refused) > 1 else ""
            raise DataError(f"{str(refused[0]).removesuffix('.')}{more}.")
        if num_rows and not fits:
            raise DataError(
                f"no golden solution of {rows} fits into max_completion_length = "
                f"{self.max_tokens} tokens; raise it, or give shorter solutions."
            )

    def ids(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """A row's golden completion.

        A solution that is too long is left out and not cut: cut off, it would teach not to stop.

        Args:
            row: A row of the data set.

        Returns:
            Token ids of which the last one, and only that one, is a stop; () where the row has no
            solution, or one that is too long.

        Raises:
            DataError: The solution holds a stop within, or a token that a model has no row for, is
                no single message of the assistant, or is given as token ids that do not end with a
                stop.
        """
        solution, name = row.get(self.column), str(row.get("prompt"))[:60]
        if solution is None:
            return ()
        if isinstance(solution, list) and solution and isinstance(solution[0], Mapping):
            solution = _content(solution, name)
        if isinstance(solution, str):
            prompt, label_id = Prompt(repr(name), "", solution), self.stops.label_id
            ids = encode_golden(prompt, self.tokenizer, label_id, self.stops.decode_ids)
            require_rows(
                [(f"prompt {name!r}, golden solution", ids)], self.tokenizer, self.num_tokens
            )
        else:
            ids = self._checked(solution, name)
        return ids if self.max_tokens is None or len(ids) <= self.max_tokens else ()

    def _checked(self, solution: Any, name: str) -> tuple[int, ...]:
        """Token ids as they are given, which must be ids and end with the only stop."""
        given = solution.tolist() if hasattr(solution, "tolist") else solution
        if not isinstance(given, list | tuple) or not all(
            type(i) is int and 0 <= i < self.num_tokens for i in given
        ):
            raise DataError(
                f"prompt {name!r}: the golden solution is neither text, nor one assistant "
                f"message, nor a list of token ids from 0 to {self.num_tokens - 1}."
            )
        places = [place for place, i in enumerate(given) if i in self.stops.decode_ids]
        if places != [len(given) - 1]:
            raise DataError(
                f"prompt {name!r}: the golden solution's token ids do not end with a stop, or "
                f"hold one within; end them with id {self.stops.label_id}, or give text."
            )
        return tuple(given)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """The golden completions of some rows, padded on the right.

        A row of a stream whose solution cannot be used is left out, counted and warned of: an error
        in one process would leave the others waiting.

        Args:
            rows: Rows of the data set.

        Returns:
            Token ids and mask, both (B, T). The mask counts tokens, so a padding id that is also a
            stop hides no label; a row without a solution has none.
        """
        golden = [torch.tensor(self._ids_or_none(row), dtype=torch.long) for row in rows]
        masks = [torch.ones_like(ids) for ids in golden]
        return pad_sequence(golden, batch_first=True), pad_sequence(masks, batch_first=True)

    def _ids_or_none(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        try:
            return self.ids(row)
        except DataError as error:
            self.num_refused += 1
            if self.num_refused == 1:
                logger.warning(
                    "A golden solution is left out, as others like it will be: %s", error
                )
            return ()


def _rows(dataset: Any, column: str) -> Iterator[Mapping[str, Any]]:
    """The rows, of which only the columns that are needed are read where that is possible."""
    names = getattr(dataset, "column_names", None) or ()
    if hasattr(dataset, "select_columns") and hasattr(dataset, "__len__"):
        dataset = dataset.select_columns([name for name in ("prompt", column) if name in names])
    if hasattr(dataset, "__iter__"):
        return iter(dataset)
    return (dataset[place] for place in range(len(dataset)))


def _content(messages: Sequence[Mapping[str, Any]], name: str) -> str:
    """The text of one assistant message."""
    message = messages[0]
    if len(messages) != 1 or message.get("role") != "assistant":
        raise DataError(f"prompt {name!r}: a golden solution is one assistant message.")
    if not isinstance(message.get("content"), str):
        raise DataError(f"prompt {name!r}: the content of its golden solution is no text.")
    return message["content"]
