"""Measuring rollouts that stream by: batches of records in, a `Summary` out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stableopd.diagnostics.assumptions import list_assumptions, trusts_reasons
from stableopd.diagnostics.endings import ends_in_loop, has_answer, markers_inside, place_loop
from stableopd.diagnostics.lengths import Lengths, is_pile_up
from stableopd.diagnostics.loops import Loop, find_loops
from stableopd.diagnostics.places import PositionSums
from stableopd.diagnostics.prompt_table import MAX_PROMPTS, PromptTable
from stableopd.diagnostics.repetition import label_rows, repetition_flags
from stableopd.diagnostics.summary import Parameters, PromptMeasures, StepMeasures, Summary
from stableopd.diagnostics.sums import Observation, Sums, add, observe, ratio, to_measures
from stableopd.diagnostics.units import (
    MAX_WORD,
    NGRAM_OF_CHARACTERS,
    NGRAM_OF_WORDS,
    Units,
    characters,
    words,
)
from stableopd.diagnostics.worst import WorstPool
from stableopd.types import Record, StopReason

__all__ = ["Collector"]

# The first rollouts decide what is measured; they wait until there are so many, or so much of
# them, so that it does not matter in which batches they come.
_NUM_FIRST, _FIRST_CHARACTERS = 64, 2**25

# So many rollouts are labelled at once: enough for the threads, few enough for the memory, which
# takes up to 90 bytes a character.
_CHUNK, _CHUNK_CHARACTERS = 256, 2**21

_NO_IDS = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class _Group:
    """The rollouts of a step: all, those known to be cut off, the longest (`top` long).

    `over` has those over the budget, whatever their reasons.
    """

    every: Sums = field(default_factory=Sums)
    cut: Sums = field(default_factory=Sums)
    over: Sums = field(default_factory=Sums)
    longest: Sums = field(default_factory=Sums)
    top: int = -1


class Collector:
    """Measures rollouts batch by batch; what it keeps grows with steps and prompts alone.

    What is measured is decided by the first 64 rollouts: repetition on token ids where most have
    them, else on words, or on characters where there are hardly any words; lengths in tokens where
    most have a number of tokens, else in characters. Rollouts that differ from the first are
    measured as well as they can be, and `notes` says so. The result does not depend on how the
    rollouts are cut into batches.

    A rollout is cut off where its stop reason says so; where it has none, where its length in
    tokens is at least (1 - tolerance) `max_new_tokens`. If neither is known of any rollout, the
    longest ones of all count as cut off where they pile up (`lengths.is_pile_up`); else TruncRate
    is nan. Reasons that more than 5% of the rollouts lack are not used: the unknown ones may be
    just those of the rollouts that were cut off.
    """

    def __init__(
        self,
        parameters: Parameters | None = None,
        max_new_tokens: int | None = None,
        num_worst: int = 20,
        tolerance: float = 0.0,
        answer_marker: str = "",
        max_prompts: int = MAX_PROMPTS,
    ) -> None:
        """Start with no rollouts.

        Args:
            parameters: What to measure repetition with; None for the defaults. `ngram` and
                `min_run` are in tokens or words; where the text turns out to have no words, they
                are multiplied by 4 for characters. A `unit` other than "tokens" is kept even
                where there are token ids.
            max_new_tokens: The length budget of the run, for files that do not say which rollouts
                were cut off; None where unknown.
            num_worst: How many rollouts `Summary.worst` holds.
            tolerance: Share of the budget by which a cut-off rollout may be shorter, for lengths
                that were counted by tokenizing the text again.
            answer_marker: What begins a final answer in this data, beside the usual ways.
            max_prompts: How many prompts are told apart.
        """
        self._asked = self._parameters = parameters or Parameters()
        self._max_new_tokens = max_new_tokens
        self._least_cut = math.ceil((1 - tolerance) * (max_new_tokens or 0))
        self._answer_marker = answer_marker
        self._waiting: list[Record] | None = []
        self._length_unit = "tokens"
        self._groups: dict[int | None, _Group] = {}
        self._prompts = PromptTable(max_prompts)
        self._lengths = Lengths()
        self._positions = PositionSums()
        self._worst = WorstPool(num_worst)
        self._longest_cut: int = 0
        self._num_longest_cut: int = 0

    def add(self, records: Sequence[Record]) -> None:
        """Measure a batch of rollouts, of any size; batches of 100 or more are quicker."""
        if self._waiting is None:
            self._measure(records)
            return
        self._waiting += records
        if _num_first(self._waiting) is not None:
            self._decide()

    def summary(self) -> Summary:
        """Everything measured so far; more rollouts may be added afterwards."""
        self._decide()
        every, known = self._total("every"), self._total("cut")
        source, budget = self._budget(every, known)
        piled = budget if source == "pile-up" else None
        # The reasons are there, but too many rollouts lack one.
        by_length = source != "file" and every.num_reasons > 0
        cut = known
        if piled is not None:
            cut = self._total("longest", piled)
        elif by_length:
            cut = self._total("over")
        counted = piled is not None or by_length
        pile = cut.num_rollouts if counted else 0
        rate = ratio(pile, every.num_lengths) if counted else None
        if source == "unknown":
            rate = math.nan
        edge = self._least_cut if source == "max-new-tokens" else budget
        return Summary(
            parameters=self._parameters,
            length_unit=self._length_unit,
            truncation_source=source,
            budget=budget,
            overall=to_measures(every, rate),
            by_step=self._by_step(source, piled, by_length),
            num_prompts=len(self._prompts),
            by_prompt=self._by_prompt(source, piled, by_length),
            histogram=self._lengths.histogram(edge, pile, by_length),
            positions=self._positions.positions(),
            worst=self._worst.worst(self._parameters),
            truncated=to_measures(cut, 1.0 if pile else None),
            answered_before_loop=ratio(cut.num_answered, cut.num_loop_ends),
            marker_share=ratio(cut.num_marked, cut.num_endings),
            markers=tuple(sorted(cut.markers, key=lambda m: (-cut.markers[m], m))),
        )

    @property
    def notes(self) -> list[str]:
        """What was assumed or left out so far, one sentence each."""
        self._decide()
        every = self._total("every")
        return list_assumptions(
            every,
            asked=self._asked,
            parameters=self._parameters,
            length_unit=self._length_unit,
            max_new_tokens=self._max_new_tokens,
            source=self._budget(every, self._total("cut"))[0],
            num_prompts=len(self._prompts),
            num_without_prompt=self._prompts.num_left_out,
        )

    def _total(self, which: str, top: int | None = None) -> Sums:
        """Sums over all steps, in order; with `top` over those whose longest are so long."""
        total = Sums()
        for step in self._steps():
            group = self._groups[step]
            if top is None or group.top == top:
                add(total, getattr(group, which))
        return total

    def _steps(self) -> list[int | None]:
        return sorted(self._groups, key=lambda step: (step is None, step or 0))

    def _budget(self, every: Sums, known: Sums) -> tuple[str, int | None]:
        """Where the knowledge of cut-offs comes from, and the length at which they happen."""
        given = self._max_new_tokens if self._length_unit == "tokens" else None
        if trusts_reasons(every):
            most = self._num_longest_cut * 2 >= known.num_lengths > 0
            return "file", given or (self._longest_cut if most else None)
        if given is not None and every.num_lengths:
            return "max-new-tokens", given
        longest = self._lengths.maximum
        num_longest = self._total("longest", longest).num_rollouts
        if is_pile_up(self._lengths, num_longest, self._length_unit):
            return "pile-up", longest
        return "unknown", None

    def _by_step(self, source: str, piled: int | None, by_length: bool) -> tuple[StepMeasures, ...]:
        found: list[StepMeasures] = []
        for step in self._steps():
            if step is None:
                continue
            group, rate = self._groups[step], None
            if piled is not None:
                num_cut = group.longest.num_rollouts if group.top == piled else 0
                rate = ratio(num_cut, group.every.num_lengths)
            elif by_length:
                rate = ratio(group.over.num_rollouts, group.every.num_lengths)
            if source == "unknown":
                rate = math.nan
            found.append(StepMeasures(step, to_measures(group.every, rate)))
        return tuple(found)

    def _by_prompt(
        self, source: str, piled: int | None, by_length: bool
    ) -> tuple[PromptMeasures, ...]:
        found = self._prompts.measures(piled, by_length)
        if source != "unknown":
            return found
        return tuple(dataclasses.replace(entry, truncation_rate=math.nan) for entry in found)

    def _decide(self) -> None:
        """Decide what to measure, if that is open, and measure the rollouts that wait for it."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, None
        first, asked = waiting[: _num_first(waiting)], self._asked
        if sum(_num_tokens(record) is not None for record in first) * 2 <= len(first):
            self._length_unit = "characters"
        with_ids = sum(record.completion_ids is not None for record in first)
        if asked.unit == "tokens" and with_ids * 2 <= len(first):
            unit = _text_unit(first)
            scale = NGRAM_OF_CHARACTERS // NGRAM_OF_WORDS if unit == "characters" else 1
            self._parameters = dataclasses.replace(
                asked, unit=unit, ngram=asked.ngram * scale, min_run=asked.min_run * scale
            )
        self._measure(waiting)

    def _measure(self, records: Sequence[Record]) -> None:
        parameters = self._parameters
        for chunk in _chunks(records):
            units = [_units(record, parameters.unit) for record in chunk]
            rows = [
                _ids(record) if found is None else found.ids
                for record, found in zip(chunk, units, strict=True)
            ]
            labels = label_rows(rows, parameters.ngram, parameters.min_run)
            texts = [record.completion for record in chunk]
            flags = repetition_flags(texts, parameters.window_chars, parameters.ratio).tolist()
            for each in zip(chunk, units, rows, labels, flags, strict=True):
                self._count(*each)

    def _count(
        self,
        record: Record,
        units: Units | None,
        row: NDArray[np.int64],
        labels: NDArray[np.bool_],
        flag: bool,
    ) -> None:
        """Add one rollout to every sum."""
        loops = self._loops(row, labels)
        length = _num_tokens(record)
        if self._length_unit == "characters":
            length = len(record.completion) if _has_text(record) else None
        over = self._is_over(length)
        seen = Observation(
            record=record,
            labels=labels,
            by_token=units is None,
            ends_in_loop=ends_in_loop(loops, len(row)),
            repetitive_text=flag if _has_text(record) else None,
            length=length,
            truncated=self._is_cut(record, over),
            other_unit=(units is None) != (self._parameters.unit == "tokens"),
            over_budget=bool(over),
        )
        one, advantages = observe(seen)
        group = self._groups.setdefault(record.step, _Group())
        is_top = length is not None and length >= group.top
        if seen.truncated or over or is_top:
            self._look_at_end(one, seen, loops, units)
        add(group.every, one)
        if seen.truncated:
            add(group.cut, one)
        if over:
            add(group.over, one)
        if is_top and length is not None:
            if length > group.top:
                group.longest, group.top = Sums(), length
            add(group.longest, one)
        if length is not None:
            self._lengths.add(length, bool(seen.truncated))
            if seen.truncated and length >= self._longest_cut:
                same = self._num_longest_cut if length == self._longest_cut else 0
                self._longest_cut, self._num_longest_cut = length, same + 1
        self._prompts.add(seen)
        self._positions.add(record.step, labels, advantages)
        self._worst.add(seen, loops[-1] if loops else None)

    def _loops(self, row: NDArray[np.int64], labels: NDArray[np.bool_]) -> tuple[Loop, ...]:
        # A loop of three copies and 2n units has more than n / 3 repetitive ones, if all count.
        ngram = self._parameters.ngram
        if self._parameters.min_run <= 1 and np.count_nonzero(labels) * 3 < ngram:
            return ()
        return find_loops(row, ngram)

    def _is_cut(self, record: Record, over: bool | None) -> bool | None:
        if record.stop_reason is not None:
            return record.stop_reason == StopReason.LENGTH
        return over

    def _is_over(self, length: int | None) -> bool | None:
        if self._max_new_tokens is None or length is None or self._length_unit != "tokens":
            return None
        return length >= self._least_cut

    def _look_at_end(
        self, one: Sums, seen: Observation, loops: tuple[Loop, ...], units: Units | None
    ) -> None:
        """Note markers inside a rollout, and whether an answer comes before its last loop."""
        text = seen.record.completion
        if not text:
            return
        markers = markers_inside(text)
        one.num_endings, one.num_marked = 1, int(bool(markers))
        one.markers = dict.fromkeys(markers, 1)
        if seen.ends_in_loop:
            one.num_loop_ends = 1
            if has_answer(text, self._answer_marker):
                # An answer that is said over and over is complete after its first time.
                place = place_loop(text, loops[-1], len(seen.labels), units)
                before = text if place is None else text[: place[1]]
                one.num_answered = int(has_answer(before, self._answer_marker))


def _num_first(records: Sequence[Record]) -> int | None:
    """How many of the first rollouts decide what is measured; None while there are too few."""
    size = 0
    for place, record in enumerate(records, start=1):
        size += _num_characters(record)
        if place == _NUM_FIRST or size >= _FIRST_CHARACTERS:
            return place
    return None


def _chunks(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Rollouts that are labelled at once, in order."""
    start, size = 0, 0
    for place, record in enumerate(records):
        more = _num_characters(record)
        if place > start and (place - start == _CHUNK or size + more > _CHUNK_CHARACTERS):
            yield records[start:place]
            start, size = place, 0
        size += more
    if start < len(records):
        yield records[start:]


def _num_characters(record: Record) -> int:
    return max(len(record.completion), len(_ids(record)))


def _units(record: Record, unit: str) -> Units | None:
    """The units of a rollout's text; None where its token ids are to be used."""
    has_ids = record.completion_ids is not None
    if has_ids and (unit == "tokens" or not _has_text(record)):
        return None
    return characters(record.completion) if unit == "characters" else words(record.completion)


def _ids(record: Record) -> NDArray[np.int64]:
    return _NO_IDS if record.completion_ids is None else record.completion_ids


def _num_tokens(record: Record) -> int | None:
    if record.num_tokens is None and record.completion_ids is not None:
        return len(record.completion_ids)
    return record.num_tokens


def _has_text(record: Record) -> bool:
    """Whether the file has the text: several tokens are not an empty one."""
    return bool(record.completion) or len(_ids(record)) <= 1


def _text_unit(records: Sequence[Record]) -> str:
    """Words, or characters where most words are as long as `words` lets them be."""
    sizes: list[int] = []
    for record in records:
        found = words(record.completion[:20_000])
        sizes += (found.stops - found.starts).tolist()
    return "characters" if sizes and float(np.median(sizes)) >= MAX_WORD else "words"
