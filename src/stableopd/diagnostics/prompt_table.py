"""Rollouts by prompt, in a table of bounded size."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from stableopd.diagnostics.summary import PromptMeasures
from stableopd.diagnostics.sums import Observation, ratio
from stableopd.types import Record

__all__ = ["MAX_PROMPTS", "PromptTable", "key_of"]

# Design: about 50 MB. Prompts that are first seen after so many are not followed.
MAX_PROMPTS = 100_000

_PROMPT_CHARS = 200
_NUM_SHOWN = 50


@dataclass(slots=True)
class _Row:
    prompt: str
    num_rollouts: int = 0
    num_lengths: int = 0
    length: int = 0
    num_known: int = 0
    num_truncated: int = 0
    num_texts: int = 0
    num_repetitive: int = 0
    longest: int = -1
    num_longest: int = 0
    num_over: int = 0


class PromptTable:
    """Counts by prompt.

    Attributes:
        num_left_out: Rollouts of prompts for which there was no room.
    """

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self.num_left_out = 0
        self._max_prompts = max_prompts
        self._rows: dict[str, _Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, seen: Observation) -> None:
        """Count a rollout; one without a prompt counts nowhere."""
        key = key_of(seen.record)
        if not key:
            return
        row = self._rows.get(key)
        if row is None:
            if len(self._rows) >= self._max_prompts:
                self.num_left_out += 1
                return
            row = self._rows[key] = _Row(seen.record.prompt[:_PROMPT_CHARS])
        row.num_rollouts += 1
        row.num_known += seen.truncated is not None
        row.num_truncated += bool(seen.truncated)
        row.num_over += seen.over_budget
        row.num_texts += seen.repetitive_text is not None
        row.num_repetitive += bool(seen.repetitive_text)
        if seen.length is not None:
            row.num_lengths += 1
            row.length += seen.length
            if seen.length > row.longest:
                row.longest, row.num_longest = seen.length, 0
            row.num_longest += seen.length == row.longest

    def measures(self, pile: int | None, by_length: bool = False) -> tuple[PromptMeasures, ...]:
        """The prompts with most cut-off, then most repetitive, rollouts; at most 50.

        Args:
            pile: The length at which rollouts count as cut off; None where the records or a budget
                say so.
            by_length: Whether the budget says so of all, against the reasons of the records.
        """

        def num_truncated(row: _Row) -> int:
            if pile is None:
                return row.num_over if by_length else row.num_truncated
            return row.num_longest if row.longest == pile else 0

        worst = sorted(
            self._rows.items(),
            key=lambda item: (num_truncated(item[1]), item[1].num_repetitive),
            reverse=True,  # a stable sort: among equals the first seen comes first
        )
        return tuple(
            PromptMeasures(
                prompt_id=key,
                prompt=row.prompt,
                num_rollouts=row.num_rollouts,
                mean_length=ratio(row.length, row.num_lengths),
                truncation_rate=ratio(
                    num_truncated(row),
                    row.num_lengths if by_length or pile is not None else row.num_known,
                ),
                repetition_rate=ratio(row.num_repetitive, row.num_texts),
            )
            for key, row in worst[:_NUM_SHOWN]
        )


def key_of(record: Record) -> str:
    """What tells a rollout's prompt from others: its id, else 16 digits made of its text, or ""."""
    if record.prompt_id or not record.prompt:
        return record.prompt_id
    return blake2b(record.prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
