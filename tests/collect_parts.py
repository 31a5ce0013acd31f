"""Made rollouts, and every measurement of them by plain Python: the other side of Collector."""

import dataclasses
import math

import numpy as np

from stableopd.diagnostics.loops import find_loops
from stableopd.diagnostics.repetition import is_repetitive
from stableopd.diagnostics.summary import Measures, Parameters
from stableopd.diagnostics.units import words
from stableopd.types import Record, StopReason

BUDGET = 120
PARAMETERS = Parameters(window_chars=200, ratio=3.0)
VOCABULARY = [f"w{number}" for number in range(80)]


def make_records(num_rollouts, seed=0, steps=5, with_ids=True, with_reasons=True):
    """Rollouts of up to BUDGET words; in later steps more of them loop, until they are cut off."""
    rng = np.random.default_rng(seed)
    records = []
    for line in range(1, num_rollouts + 1):
        step = int(rng.integers(0, steps))
        loops = rng.random() < step / steps
        length = BUDGET if loops else int(rng.integers(1, BUDGET - 10))
        ids = rng.integers(0, len(VOCABULARY), length)
        if loops:
            at = int(rng.integers(0, 60))
            ids[at:] = np.resize(ids[at : at + int(rng.integers(1, 15))], length - at)
        student, teacher = -rng.exponential(size=(2, length))
        reason = StopReason.LENGTH if length == BUDGET else StopReason.STOP
        records.append(
            Record(
                source="made.jsonl",
                line=line,
                completion=" ".join(VOCABULARY[i] for i in ids),
                prompt=f"prompt {line % 7}",
                step=step,
                completion_ids=ids if with_ids else None,
                num_tokens=length if with_ids else None,
                stop_reason=reason if with_reasons else None,
                student_logps=student if with_ids else None,
                teacher_logps=teacher if with_ids else None,
                correct=bool(rng.random() < 0.5) if rng.random() < 0.7 else None,
                score=float(rng.normal()) if rng.random() < 0.5 else None,
            )
        )
    return records


def labels_of(record, parameters):
    """Repetitive units of a rollout, as a list."""
    ids = record.completion_ids
    row = (words(record.completion).ids if ids is None else ids).tolist()
    seen, labels = set(), []
    for place in range(len(row)):
        gram = tuple(row[max(0, place + 1 - parameters.ngram) : place + 1])
        whole = len(gram) == parameters.ngram
        labels.append(whole and gram in seen)
        if whole:
            seen.add(gram)
    return labels


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def measure(records, parameters=PARAMETERS):
    """`Measures` of records that all have token ids, log-probs and a stop reason."""
    lengths = [len(record.completion_ids) for record in records]
    labels = [labels_of(record, parameters) for record in records]
    flat = [label for row in labels for label in row]
    advantages = [
        float(value)
        for r in records
        for value in (r.teacher_logps - r.student_logps if r.advantages is None else r.advantages)
    ]
    pairs = list(zip(advantages, flat, strict=True))
    weight = sum(abs(value) for value in advantages)
    stops = [record for record in records if record.stop_reason == StopReason.STOP]
    loops = [find_loops(record.completion_ids, parameters.ngram) for record in records]
    return Measures(
        num_rollouts=len(records),
        num_stops=len(stops),
        mean_length=mean(lengths),
        median_length=float(np.median(lengths)) if lengths else math.nan,
        p90_length=float(np.percentile(lengths, 90)) if lengths else math.nan,
        max_length=float(max(lengths)) if lengths else math.nan,
        truncation_rate=mean(r.stop_reason == StopReason.LENGTH for r in records),
        repetition_rate=mean(
            is_repetitive(r.completion, parameters.window_chars, parameters.ratio) for r in records
        ),
        repetitive_share=mean(flat),
        loop_share=mean(
            any(loop.stop >= length - 1 for loop in found)
            for found, length in zip(loops, lengths, strict=True)
        ),
        accuracy=mean(r.correct for r in records if r.correct is not None),
        score=mean(r.score for r in records if r.score is not None),
        advantage=mean(advantages),
        repetitive_advantage=mean(value for value, label in pairs if label),
        regular_advantage=mean(value for value, label in pairs if not label),
        repetitive_weight=sum(abs(value) for value, label in pairs if label) / weight
        if weight
        else math.nan,
        student_logp=mean(float(value) for r in records for value in r.student_logps),
        teacher_logp=mean(float(value) for r in records for value in r.teacher_logps),
        student_stop_logp=mean(float(r.student_logps[-1]) for r in stops),
        teacher_stop_logp=mean(float(r.teacher_logps[-1]) for r in stops),
    )


def same(found, expected, tolerance=1e-9):
    """Whether two `Measures` are equal, nan to nan."""
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        close = math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12)
        assert close or (math.isnan(a) and math.isnan(b)), (field.name, a, b)


def as_plain(value):
    """A `Summary` as nested lists and numbers that compare with ==; nan becomes a word."""
    if dataclasses.is_dataclass(value):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return as_plain(value.tolist())
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return "nan" if isinstance(value, float) and math.isnan(value) else value
