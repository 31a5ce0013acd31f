"""Golden solutions of the rows of a TRL data set, as token ids that end in a stop."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stableopd.data.golden import encode_golden
from stableopd.rollout.stops import StopPlan
from stableopd.types import DataError, Prompt

__all__ = ["Solutions"]

# Rows that are looked at before training, so that a wrong column is told at once.
NUM_FIRST = 64


@dataclass(frozen=True)
class Solutions:
    """The golden solutions of a data set.

    Attributes:
        column: Their column: text, one assistant message in a list, or token ids that end in a
            stop; None in a row without one.
        tokenizer: The student's tokenizer.
        stops: Which ids stop; text gets the student's own.
        max_tokens: The longest completion, with its stop; None for no limit.
    """

    column: str
    tokenizer: Any
    stops: StopPlan
    max_tokens: int | None

    def require(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        """Refuse golden solutions that cannot be used, from the first rows of a data set.

        Args:
            dataset: Rows with prompts and solutions.

        Raises:
            DataError: The column is not there, is empty, or no solution fits; or as `ids`.
        """
        rows = list(itertools.islice(dataset, NUM_FIRST))
        if rows and not any(self.column in row for row in rows):
            raise DataError(
                f"train_dataset has no column {self.column!r}, which the golden term needs; name "
                "the column of the solutions in solution_column, or set lambda_gold to 0."
            )
        if rows and all(row.get(self.column) is None for row in rows):
            raise DataError(
                f"column {self.column!r} is empty in the first {len(rows)} rows; the golden term "
                "needs solutions there, or lambda_gold = 0."
            )
        golden = [self.ids(row) for row in rows]
        if rows and not any(golden):
            raise DataError(
                f"none of the first {len(rows)} golden solutions fits into max_completion_length "
                f"= {self.max_tokens} tokens; raise it, or give shorter solutions."
            )

    def ids(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """A row's golden completion.

        A solution that is too long is left out and not cut: cut off, it would teach not to stop.

        Args:
            row: A row of the data set.

        Returns:
            Token ids of which the last one alone is a stop; () where the row has no solution, or
            one that is too long.

        Raises:
            DataError: The solution holds a stop within, is no single message of the assistant, or
                is given as token ids that do not end with a stop.
        """
        solution, name = row.get(self.column), str(row["prompt"])[:60]
        if solution is None:
            return ()
        if isinstance(solution, list) and solution and isinstance(solution[0], dict):
            if len(solution) != 1 or solution[0].get("role") != "assistant":
                raise DataError(f"prompt {name!r}: a golden solution is one assistant message.")
            solution = solution[0]["content"]
        if isinstance(solution, str):
            ids = encode_golden(Prompt(name, "", solution), self.tokenizer, self.stops.label_id)
        else:
            ids = tuple(map(int, solution))
            stops = [place for place, i in enumerate(ids) if i in self.stops.decode_ids]
            if stops != [len(ids) - 1]:
                raise DataError(
                    f"prompt {name!r}: the golden solution's token ids do not end with a stop, or "
                    f"hold one within; end them with id {self.stops.label_id}, or give text."
                )
        return ids if self.max_tokens is None or len(ids) <= self.max_tokens else ()

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """The golden completions of some rows, padded on the right.

        Args:
            rows: Rows of the data set.

        Returns:
            Token ids and mask, both (B, T). The mask counts tokens, so a padding id that is also a
            stop hides no label; a row without a solution has none.

        Raises:
            DataError: As `ids`.
        """
        golden = [torch.tensor(self.ids(row), dtype=torch.long) for row in rows]
        masks = [torch.ones_like(ids) for ids in golden]
        return pad_sequence(golden, batch_first=True), pad_sequence(masks, batch_first=True)
