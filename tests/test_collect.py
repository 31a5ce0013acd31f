import dataclasses
import gc
import math
import sys

import numpy as np
import pytest

from collect_parts import BUDGET, PARAMETERS, as_plain, labels_of, make_records, measure, same
from stableopd.diagnostics.collect import Collector
from stableopd.diagnostics.summary import Parameters
from stableopd.types import Record, StopReason

STOP, LENGTH = StopReason.STOP, StopReason.LENGTH


def summarise(records, parameters=PARAMETERS, **settings):
    collector = Collector(parameters, **settings)
    collector.add(records)
    return collector.summary()


def notes_of(records, **settings):
    collector = Collector(PARAMETERS, **settings)
    collector.add(records)
    return collector.notes


def record(line=1, completion="a b c", **fields):
    return Record("made.jsonl", line, completion, **fields)


@pytest.mark.parametrize("seed", range(4))
def test_measures_agree_with_plain_sums(seed):
    records = make_records(150, seed)
    found = summarise(records)
    same(found.overall, measure(records))
    same(found.truncated, measure([r for r in records if r.stop_reason == LENGTH]))
    assert [entry.step for entry in found.by_step] == [0, 1, 2, 3, 4]
    for entry in found.by_step:
        same(entry.measures, measure([r for r in records if r.step == entry.step]))
    assert 0.05 < found.overall.repetition_rate < 0.9
    assert 0.05 < found.overall.loop_share < 0.9
    assert (found.truncation_source, found.budget) == ("file", BUDGET)
    assert (found.length_unit, found.parameters) == ("tokens", PARAMETERS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reasons", [True, False])
def test_batches_do_not_matter(seed, reasons):
    records = make_records(260, seed, with_reasons=reasons)
    records[5] = dataclasses.replace(records[5], completion_ids=None, step=None)
    records[90] = dataclasses.replace(records[90], completion_ids=None, num_tokens=None)
    whole = as_plain(summarise(records))
    rng = np.random.default_rng(seed)
    for most in (1, 40, 300):
        collector, place = Collector(PARAMETERS), 0
        while place < len(records):
            size = int(rng.integers(0, most + 1))
            collector.add(records[place : place + size])
            place += size
        assert as_plain(collector.summary()) == whole
        assert as_plain(collector.summary()) == whole  # asking changes nothing


def test_positions_agree_with_plain_sums():
    records = make_records(80, 1, steps=2)
    records += [dataclasses.replace(r, step=None) for r in make_records(5, 2)]
    found = summarise(records).positions
    assert found.steps.tolist() == [-1, 0, 1]
    assert (found.width, found.num_tokens.shape) == (2, (3, 60))
    for row, step in enumerate([None, 0, 1]):
        chosen = [r for r in records if r.step == step]
        for place in range(60):
            units, repetitive, advantages = 0, 0, []
            for r in chosen:
                part = slice(2 * place, 2 * place + 2)
                units += len(r.completion_ids[part])
                repetitive += sum(labels_of(r, PARAMETERS)[part])
                advantages += (r.teacher_logps - r.student_logps)[part].tolist()
            assert found.num_tokens[row, place] == units
            assert found.num_repetitive[row, place] == repetitive
            assert found.num_scored[row, place] == len(advantages)
            assert found.advantage[row, place] == pytest.approx(sum(advantages))


@pytest.mark.parametrize("longest", [1, 63, 64, 65, 128, 129, 5_000])
def test_positions_have_at_most_64_bins(longest):
    lengths = [3, longest, 1, 40]
    records = [record(i, completion_ids=np.arange(n), step=0) for i, n in enumerate(lengths)]
    found = summarise(records).positions
    longest = max(lengths)
    assert found.width == 2 ** math.ceil(math.log2(max(longest, 64) / 64))
    assert found.num_tokens.shape == (1, math.ceil(longest / found.width))
    assert found.num_tokens.sum() == sum(lengths)
    assert found.num_scored.sum() == 0


def test_advantages_of_the_file_come_first():
    rng = np.random.default_rng(0)
    records = [
        dataclasses.replace(r, advantages=rng.normal(size=r.num_tokens)) for r in make_records(70)
    ]
    same(summarise(records).overall, measure(records))
    alone = [dataclasses.replace(r, student_logps=None, teacher_logps=None) for r in records]
    found = summarise(alone).overall
    assert found.advantage == pytest.approx(measure(records).advantage)
    assert math.isnan(found.student_logp)
    assert found.num_stops == 0


def test_log_probs_that_are_not_finite_are_left_out():
    student, teacher = np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-1.5, -np.inf, np.nan, -3.0])
    one = record(completion_ids=np.arange(4), student_logps=student, teacher_logps=teacher)
    stopped = dataclasses.replace(one, stop_reason=STOP, teacher_logps=teacher[[0, 3, 3, 1]])
    found = summarise([one, stopped]).overall
    assert found.student_logp == -2.5
    assert found.teacher_logp == pytest.approx((-1.5 - 3.0 - 1.5 - 3.0 - 3.0) / 5)
    assert found.advantage == pytest.approx((-0.5 + 1.0 - 0.5 - 1.0 + 0.0) / 5)
    assert found.regular_advantage == found.advantage
    assert found.repetitive_weight == 0.0
    assert found.num_stops == 0  # the last one has no finite log-prob under the teacher
    assert "3 log-probs or advantages are not finite: the means leave them out." in notes_of(
        [one, stopped]
    )
    bins = summarise([one, stopped]).positions
    assert bins.num_scored.tolist() == [[2, 1, 1, 1]]
    assert bins.advantage.tolist() == [[-1.0, -1.0, 0.0, 1.0]]


def test_both_infinite_log_probs_do_not_warn():
    low = np.array([-np.inf, -1.0])
    one = record(completion_ids=np.arange(2), student_logps=low, teacher_logps=low)
    assert summarise([one]).overall.advantage == 0.0


def test_log_probs_that_are_not_one_per_token():
    student, teacher = np.array([-1.0, -2.0, -3.0]), np.array([-1.5, -1.0, -2.5])
    one = record(
        completion_ids=np.arange(4), student_logps=student, teacher_logps=teacher, stop_reason=STOP
    )
    found = summarise([one])
    assert found.overall.advantage == pytest.approx(1.0 / 3)
    assert math.isnan(found.overall.regular_advantage)
    assert found.overall.num_stops == 0
    assert found.positions.num_scored.sum() == 0
    assert notes_of([one]) == [
        "1 of 1 rollouts do not have one log-prob or advantage per token: these count in the "
        "means, but not by class or position."
    ]


def test_text_alone():
    with_ids = make_records(200, 3)
    text = make_records(200, 3, with_ids=False, with_reasons=False)
    found, expected = summarise(text), measure(with_ids)
    assert found.parameters == dataclasses.replace(PARAMETERS, unit="words")
    assert found.length_unit == "characters"
    # A word of the text is a token of the ids, so the labels are the same.
    assert found.overall.repetitive_share == expected.repetitive_share
    assert found.overall.loop_share == expected.loop_share
    assert found.overall.repetition_rate == expected.repetition_rate
    assert found.overall.max_length == max(len(r.completion) for r in text)
    assert math.isnan(found.overall.truncation_rate)
    assert math.isnan(found.overall.advantage)
    assert found.truncation_source == "unknown"
    assert notes_of(text) == [
        "The files have no token ids: repetition is measured on words (n = 8)."
    ]
    assert "cannot be applied" in notes_of(text, max_new_tokens=5)[-1]


def test_text_with_log_probs_but_no_ids():
    values = np.array([-1.0, -2.0])
    one = record(student_logps=values, teacher_logps=values - 1, stop_reason=STOP, num_tokens=2)
    found = summarise([one])
    assert found.overall.advantage == -1.0
    assert (found.overall.num_stops, found.overall.teacher_stop_logp) == (1, -3.0)
    assert math.isnan(found.overall.regular_advantage)
    assert (found.length_unit, found.overall.mean_length) == ("tokens", 2.0)


def test_text_without_words_is_measured_in_characters():
    rng = np.random.default_rng(0)
    letters = ["".join(map(chr, rng.integers(97, 123, 400))) for _ in range(10)]
    records = [record(i, text + text[:100] * 4) for i, text in enumerate(letters)]
    found = summarise(records, Parameters(min_run=5))
    assert found.parameters == Parameters(ngram=32, min_run=20, unit="characters")
    # 400 letters come again, but two seams of 31 n-grams each are new: before the first copy
    # of the 100 letters and before the second.
    assert found.overall.repetitive_share == pytest.approx((400 - 2 * 31) / 800)
    assert found.worst[0].loop_period == 100
    assert found.worst[0].loop_start == 400
    assert found.worst[0].loop_text == records[0].completion[:100]


def test_a_unit_that_was_asked_for_is_kept():
    found = summarise(make_records(50), Parameters(unit="words"))
    assert found.parameters.unit == "words"
    assert found.positions.num_scored.sum() == 0


def test_ids_alone():
    records = [dataclasses.replace(r, completion="") for r in make_records(100)]
    found, expected = summarise(records), measure(make_records(100))
    assert found.overall.repetitive_share == expected.repetitive_share
    assert math.isnan(found.overall.repetition_rate)
    assert math.isnan(found.marker_share)
    assert found.worst[0].completion == ""
    assert (found.worst[0].loop_start, found.worst[0].loop_copies > 3) == (None, True)
    assert notes_of(records) == ["100 of 100 rollouts have no text: RepRate leaves them out."]


def test_files_that_mix():
    records = make_records(100)
    records[70] = dataclasses.replace(
        records[70], completion_ids=None, num_tokens=None, stop_reason=None
    )
    assert notes_of(records) == [
        "1 of 100 rollouts have no token ids: their repetition is measured on words.",
        "1 of 100 rollouts have no length in tokens: the lengths leave them out.",
        "1 of 100 rollouts have no stop reason; TruncRate leaves them out.",
    ]
    found = summarise(records).overall
    known = [r for r in records if r.stop_reason]
    assert found.truncation_rate == measure(known).truncation_rate
    assert found.mean_length == measure(known).mean_length
    assert found.repetitive_share == measure(make_records(100)).repetitive_share


def test_files_of_text_with_some_ids():
    records = make_records(100, with_ids=False)
    records[70] = dataclasses.replace(records[70], completion="", completion_ids=np.arange(30))
    assert notes_of(records)[1:] == [
        "1 of 100 rollouts have no text: their repetition is measured on token ids.",
        "1 of 100 rollouts have no text: RepRate leaves them out.",
        "1 of 100 rollouts have no length in characters: the lengths leave them out.",
    ]
    found = summarise(records)
    assert found.histogram.counts.sum() == 99


def test_empty():
    found = summarise([])
    assert found.overall.num_rollouts == found.num_prompts == 0
    assert found.by_step == found.by_prompt == found.worst == found.markers == ()
    assert found.positions.num_tokens.shape == (0, 0)
    assert len(found.histogram.counts) == 0
    assert math.isnan(found.overall.truncation_rate)
    assert notes_of([]) == []


def test_one_rollout_of_nothing():
    found = summarise([record(completion="")])
    assert found.overall.num_rollouts == 1
    assert found.overall.repetition_rate == 0.0
    assert math.isnan(found.overall.repetitive_share)
    assert found.overall.max_length == 0


def test_rollouts_without_a_step_count_overall_alone():
    records = make_records(90)
    records[::3] = [dataclasses.replace(r, step=None) for r in records[::3]]
    found = summarise(records)
    same(found.overall, measure(records))
    assert sum(entry.measures.num_rollouts for entry in found.by_step) == 60


def size_of(collector):
    """Bytes of everything that a collector holds."""
    seen, stack, total = set(), [collector], 0
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        stack += gc.get_referents(item)
    return total


def test_memory_does_not_grow_with_the_rollouts():
    records = make_records(300)
    sizes = []
    collector = Collector(PARAMETERS)
    for _ in range(4):
        collector.add(records)
        collector.add(records)
        sizes.append(size_of(collector))
    assert sizes[-1] <= sizes[0] * 1.02
