"""The rollouts to look at: which ones, and what to show of them."""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from dataclasses import dataclass

import numpy as np

from stableopd.diagnostics.endings import place_loop
from stableopd.diagnostics.loops import Loop
from stableopd.diagnostics.prompt_table import key_of
from stableopd.diagnostics.repetition import repetitive_tokens
from stableopd.diagnostics.summary import Parameters, WorstRollout
from stableopd.diagnostics.sums import Observation
from stableopd.diagnostics.units import (
    NGRAM_OF_CHARACTERS,
    NGRAM_OF_WORDS,
    Units,
    characters,
    words,
)
from stableopd.types import Record

__all__ = ["Candidate", "WorstPool", "shorten"]

# Design: a table should not be twenty times the same prompt, or all of the last step.
_PER_PROMPT, _PER_STEP, _SPARE = 3, 5, 4

_SHOWN_CHARS, _BEGINNING, _BEFORE_LOOP, _END = 3_000, 500, 400, 800
_PROMPT_CHARS, _LOOP_CHARS = 300, 200


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rollout kept for the table, without its arrays.

    Attributes:
        record: The rollout; no ids, log-probs, advantages.
        num_repetitive: Repetitive units.
        num_units: All its units.
        by_token: Whether units are its token ids, else units of its text.
        loop: Its last loop, in units; None for none.
        length: In the unit of the set; None where unknown.
    """

    record: Record
    num_repetitive: int
    num_units: int
    by_token: bool
    loop: Loop | None
    length: int | None


class WorstPool:
    """The most repetitive rollouts so far: at most three of a prompt, and some to choose from."""

    def __init__(self, num_worst: int) -> None:
        self._size = _SPARE * num_worst
        self._num_worst = num_worst
        self._num_seen = 0
        # (repetitive units, minus the order of arrival) is unique, and the smallest goes first.
        self._heap: list[tuple[int, int, str, Candidate]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, seen: Observation, loop: Loop | None) -> None:
        """Keep a rollout if it is one of the worst."""
        self._num_seen += 1
        count = int(np.count_nonzero(seen.labels))
        if not self._size or (len(self._heap) == self._size and count <= self._heap[0][0]):
            return
        key = key_of(seen.record)
        same = [entry for entry in self._heap if key and entry[2] == key]
        if len(same) == _PER_PROMPT:
            least = min(same)
            if count <= least[0]:
                return
            self._heap.remove(least)
            heapq.heapify(self._heap)
        kept = dataclasses.replace(
            seen.record,
            prompt=_middle(seen.record.prompt, _PROMPT_CHARS),
            completion_ids=None,
            student_logps=None,
            teacher_logps=None,
            advantages=None,
        )
        candidate = Candidate(kept, count, len(seen.labels), seen.by_token, loop, seen.length)
        heapq.heappush(self._heap, (count, -self._num_seen, key, candidate))
        if len(self._heap) > self._size:
            heapq.heappop(self._heap)

    def worst(self, parameters: Parameters) -> tuple[WorstRollout, ...]:
        """The worst first; at most five of a step, unless there are not enough others."""
        ordered = [entry[3] for entry in sorted(self._heap, reverse=True)]
        chosen: list[int] = []
        of_step: Counter[int | None] = Counter()
        for place, candidate in enumerate(ordered):
            step = candidate.record.step
            if step is None or of_step[step] < _PER_STEP:
                chosen.append(place)
                of_step[step] += 1
        rest = [place for place in range(len(ordered)) if place not in set(chosen)]
        chosen = sorted((chosen + rest)[: self._num_worst])
        return tuple(_present(ordered[place], parameters) for place in chosen)


def _present(candidate: Candidate, parameters: Parameters) -> WorstRollout:
    record, loop, text = candidate.record, candidate.loop, candidate.record.completion
    by_character = parameters.unit == "characters" and not candidate.by_token
    units = characters(text) if by_character else words(text)
    ngram = NGRAM_OF_CHARACTERS if by_character else NGRAM_OF_WORDS
    if not candidate.by_token:
        ngram = parameters.ngram
    spans = _spans(text, units, ngram, parameters.min_run)
    place = None
    if loop is not None:
        own = None if candidate.by_token else units
        place = place_loop(text, loop, candidate.num_units, own)
    focus = place[0] if place is not None else spans[0][0] if spans else 0
    shown, gap, pieces = shorten(text, focus)
    return WorstRollout(
        source=record.source,
        line=record.line,
        step=record.step,
        prompt=record.prompt,
        completion=shown,
        gap=gap,
        spans=_moved(spans, pieces),
        loop_start=None if place is None else _move(place[0], pieces),
        loop_text="" if place is None else _middle(text[place[0] : place[1]], _LOOP_CHARS),
        loop_period=0 if loop is None else loop.period,
        loop_copies=0.0 if loop is None else loop.copies,
        length=candidate.num_units if candidate.length is None else candidate.length,
        repetitive_share=candidate.num_repetitive / max(1, candidate.num_units),
        stop_reason=record.stop_reason,
        correct=record.correct,
    )


def _spans(text: str, units: Units, ngram: int, min_run: int) -> list[tuple[int, int]]:
    """Repetitive stretches in characters; white space between two units joins them."""
    labels = repetitive_tokens(units.ids, ngram, min_run).astype(np.int8)
    edges = np.diff(np.concatenate(([0], labels, [0])).astype(np.int8))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    return list(zip(units.starts[first].tolist(), units.stops[last].tolist(), strict=True))


def shorten(
    text: str, focus: int
) -> tuple[str, tuple[int, int] | None, list[tuple[int, int, int]]]:
    """Cut a long text to about 3,000 characters, so that one place of it stays visible.

    Where the place is in the first 1,700 characters, the middle is left out after it, and the end
    is shown. Where it is later, what lies between the beginning and the place is left out, and so
    is the end, if it is long; a last line then says how much of it.

    Args:
        text: The text.
        focus: The character to show, with what comes after it.

    Returns:
        The shortened text; (place, number) of the gap in it, None for none; and its pieces, each
        (first character in `text`, one past the last, first character in the shortened text).
    """
    size = len(text)
    if size <= _SHOWN_CHARS * 1.1:
        return text, None, [(0, size, 0)]
    if focus <= _SHOWN_CHARS - _END - _BEGINNING:
        head = _SHOWN_CHARS - _END
        gap = (head, size - _END - head)
        return text[:head] + text[-_END:], gap, [(0, head, 0), (size - _END, size, head)]
    start = focus - _BEFORE_LOOP
    stop = start + _SHOWN_CHARS - _BEGINNING
    if size - stop < _END:
        stop = size
    rest = f"\n[… {size - stop:,} more characters]" if stop < size else ""
    shown = text[:_BEGINNING] + text[start:stop] + rest
    pieces = [(0, _BEGINNING, 0), (start, stop, _BEGINNING)]
    return shown, (_BEGINNING, start - _BEGINNING), pieces


def _move(place: int, pieces: list[tuple[int, int, int]]) -> int | None:
    for start, stop, at in pieces:
        if start <= place < stop:
            return place - start + at
    return None


def _moved(
    spans: list[tuple[int, int]], pieces: list[tuple[int, int, int]]
) -> tuple[tuple[int, int], ...]:
    """Spans in the shortened text: the parts of them that are shown."""
    return tuple(
        (max(first, start) - start + at, min(last, stop) - start + at)
        for start, stop, at in pieces
        for first, last in spans
        if max(first, start) < min(last, stop)
    )


def _middle(text: str, size: int) -> str:
    """A text of at most `size` characters and a sign: its beginning and its end."""
    half = size // 2
    return text if len(text) <= size else f"{text[:half]} … {text[-half:]}"
