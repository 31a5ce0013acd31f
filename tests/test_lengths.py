import dataclasses
import math

import numpy as np
import pytest

from collect_parts import BUDGET, PARAMETERS, as_plain, make_records, measure, same
from stableopd.diagnostics.collect import Collector
from stableopd.diagnostics.lengths import Lengths, is_pile_up
from stableopd.types import Record, StopReason


def lengths_of(values, cut=()):
    lengths = Lengths()
    for place, value in enumerate(values):
        lengths.add(value, place in cut)
    return lengths


def summarise(records, **settings):
    collector = Collector(PARAMETERS, **settings)
    collector.add(records)
    return collector.summary()


def of_length(number, line=1, step=0, **fields):
    return Record("made.jsonl", line, "x", step=step, num_tokens=number, **fields)


def piled(values, longest):
    return is_pile_up(lengths_of(values), sum(value == longest for value in values))


def test_pile_up_by_its_rules():
    spread = list(range(1, 100))
    assert piled([*spread, *([100] * 11)], 100)  # 11 against 1 per length just below
    assert not piled([*spread, *([100] * 10)], 100)
    assert not piled(spread, 99)
    assert piled([5, 9, 100, 100, 100], 100)
    assert not piled([5, 9, 100, 100], 100)
    assert piled([*([5] * 297), 100, 100, 100], 100)
    assert not piled([*([5] * 298), 100, 100, 100], 100)  # 3 of 301 are less than 1%
    assert piled([3, 3, 16, 16, 16], 16)
    assert not piled([3, 3, 15, 15, 15], 15)
    assert piled([64] * 3, 64)
    assert not piled([63] * 300, 63)
    assert not is_pile_up(Lengths(), 0)


def test_answers_that_are_all_alike_are_no_pile_up():
    alike = [*([27] * 900), *([26] * 30), *([23] * 20), 12]
    assert not piled(alike, 27)
    assert piled([*alike, *([90] * 40)], 90)
    assert piled([79, 79, 1, 1, *([100] * 50)], 100)
    assert piled([80, 80, 1, 1, *([100] * 50)], 100)
    assert not piled([80, 80, 80, 1, *([100] * 50)], 100)  # most others are nearly as long


@pytest.mark.parametrize("seed", range(3))
def test_pile_up_in_lengths_as_they_come(seed):
    rng = np.random.default_rng(seed)
    long = [rng.geometric(0.002, 2_000), rng.lognormal(6, 0.7, 2_000).astype(int)]
    short = [rng.integers(16, 21, 2_000), rng.normal(500, 3, 2_000).astype(int)]
    for values in (*long, *short):
        assert not piled(values.tolist(), int(values.max()))
    for values in long:  # the same, with a tenth cut off
        budget = int(np.percentile(values, 90))
        assert piled(np.minimum(values, budget).tolist(), budget)


def test_truncation_from_a_pile_up():
    marked = make_records(300, 4)
    records = [dataclasses.replace(r, stop_reason=None) for r in marked]
    found = summarise(records)
    assert (found.truncation_source, found.budget) == ("pile-up", BUDGET)
    stops = {"num_stops": 0, "student_stop_logp": math.nan, "teacher_stop_logp": math.nan}
    same(found.overall, dataclasses.replace(measure(marked), **stops))
    same(found.truncated, measure([r for r in marked if r.stop_reason == StopReason.LENGTH]))
    for entry in found.by_step:
        chosen = [r for r in marked if r.step == entry.step]
        assert entry.measures.truncation_rate == measure(chosen).truncation_rate
    expected = summarise(marked)
    assert found.by_prompt == expected.by_prompt
    assert as_plain(found.histogram) == as_plain(expected.histogram)
    assert found.answered_before_loop == expected.answered_before_loop == 0.0


def test_a_step_that_stays_short_has_no_cut_off_rollouts():
    records = [of_length(n, step=0) for n in (30, 30, 30)]
    records += [of_length(n, step=1) for n in (100, 100, 100, 7)]
    found = summarise(records)
    assert [entry.measures.truncation_rate for entry in found.by_step] == [0.0, 0.75]
    assert found.overall.truncation_rate == 3 / 7
    assert found.truncated.mean_length == 100.0


def test_no_pile_up_is_unknown():
    found = summarise([of_length(n) for n in range(20, 90)])
    assert (found.truncation_source, found.budget) == ("unknown", None)
    assert math.isnan(found.overall.truncation_rate)
    assert math.isnan(found.by_step[0].measures.truncation_rate)
    assert found.truncated.num_rollouts == 0
    assert found.histogram.truncated.sum() == 0


def test_truncation_from_a_given_budget():
    records = [of_length(n) for n in (100, 99, 98, 97, 10, 101)]
    found = summarise(records, max_new_tokens=100)
    assert (found.truncation_source, found.budget) == ("max-new-tokens", 100)
    assert found.overall.truncation_rate == 2 / 6
    assert found.truncated.mean_length == 100.5
    found = summarise(records, max_new_tokens=100, tolerance=0.02)
    assert found.overall.truncation_rate == 4 / 6
    assert (found.histogram.edges[-2], found.histogram.counts[-1]) == (98.0, 4)
    assert found.histogram.truncated.tolist()[-2:] == [0, 4]
    assert summarise(records, max_new_tokens=500).overall.truncation_rate == 0.0


def test_the_file_goes_before_a_given_budget():
    records = [of_length(n, stop_reason=StopReason.STOP) for n in (100, 100, 50)]
    found = summarise(records, max_new_tokens=100)
    assert (found.truncation_source, found.overall.truncation_rate) == ("file", 0.0)
    collector = Collector(max_new_tokens=100)
    collector.add([*records * 10, of_length(100)])
    assert collector.summary().overall.truncation_rate == 1 / 31
    assert collector.notes[-1] == "1 of 31 rollouts have no stop reason; length decides for 1."


def partly_known(num_unknown, num_rollouts=100):
    """Rollouts of 100 whose reason is unknown, and shorter ones that are known to have stopped."""
    known = {"stop_reason": StopReason.STOP, "prompt_id": "a"}
    records = [of_length(20 + i % 50, **known) for i in range(num_rollouts - num_unknown)]
    return [*records, *[of_length(100, prompt_id="b") for _ in range(num_unknown)]]


def same_but_worst(found, expected):
    """The list of the worst shows each rollout's reason as the file has it."""
    found, expected = (dataclasses.replace(each, worst=()) for each in (found, expected))
    assert as_plain(found) == as_plain(expected)


def test_reasons_that_many_rollouts_lack_are_not_trusted():
    found = summarise(partly_known(5))
    assert (found.truncation_source, found.overall.truncation_rate) == ("file", 0.0)
    found = summarise(partly_known(6))
    assert (found.truncation_source, found.budget) == ("pile-up", 100)
    assert found.overall.truncation_rate == 0.06
    assert [entry.truncation_rate for entry in found.by_prompt] == [1.0, 0.0]
    assert found.histogram.truncated.sum() == 6
    bare = [dataclasses.replace(r, stop_reason=None) for r in partly_known(6)]
    same_but_worst(summarise(bare), found)


@pytest.mark.parametrize("budget", [60, 100, 500])
def test_a_given_budget_decides_against_untrusted_reasons(budget):
    records = partly_known(30)
    bare = [dataclasses.replace(r, stop_reason=None) for r in records]
    found, expected = (summarise(r, max_new_tokens=budget) for r in (records, bare))
    same_but_worst(found, expected)
    assert found.truncation_source == "max-new-tokens"
    assert found.overall.truncation_rate == sum(r.num_tokens >= budget for r in records) / 100


def test_untrusted_reasons_may_leave_nothing_known():
    records = partly_known(30)
    records = [dataclasses.replace(r, num_tokens=20 + i) for i, r in enumerate(records)]
    collector = Collector(PARAMETERS)
    collector.add(records)
    found = collector.summary()
    assert found.truncation_source == "unknown"
    rates = [found.overall, found.by_step[0].measures, *found.by_prompt]
    assert all(math.isnan(entry.truncation_rate) for entry in rates)
    assert found.histogram.truncated.sum() == 0
    assert collector.notes[-1] == (
        "30 of 100 rollouts have no usable stop reason, more than 5%: the reasons of the others "
        "are not used either, and how many were cut off is unknown."
    )


def test_pile_ups_of_characters_must_be_large():
    lengths = lengths_of([*range(1, 92), *([100] * 9)])
    assert is_pile_up(lengths, 9)
    assert not is_pile_up(lengths, 9, "characters")
    assert is_pile_up(lengths_of([*range(1, 91), *([100] * 10)]), 10, "characters")
    for share, source in ((0.05, "unknown"), (0.2, "pile-up")):
        num = int(100 * share)
        texts = [*("x" * (i % 70) for i in range(100 - num)), *["y" * 90] * num]
        found = summarise([Record("made.jsonl", i, text) for i, text in enumerate(texts)])
        assert (found.length_unit, found.truncation_source) == ("characters", source)


def test_budget_of_a_file_is_where_most_were_cut():
    cut = {"stop_reason": StopReason.LENGTH}
    assert summarise([of_length(n, **cut) for n in (100, 100, 90, 80)]).budget == 100
    assert summarise([of_length(n, **cut) for n in (100, 90, 80)]).budget is None
    assert summarise([of_length(n, stop_reason=StopReason.STOP) for n in (9, 9)]).budget is None


def test_quantiles_of_long_lengths_are_within_one_percent():
    rng = np.random.default_rng(1)
    values = rng.lognormal(8, 1, 3_000).astype(int).tolist()
    found = summarise([of_length(n) for n in values]).overall
    assert found.median_length == pytest.approx(np.median(values), rel=0.01)
    assert found.p90_length == pytest.approx(np.percentile(values, 90), rel=0.01)
    assert found.mean_length == pytest.approx(np.mean(values))
    assert found.max_length == max(values)
    budget = summarise([of_length(n) for n in (8_192, 8_192, 8_192, 100)]).overall
    assert (budget.median_length, budget.p90_length) == (8_192.0, 8_192.0)


@pytest.mark.parametrize("seed", range(40))
def test_histogram_agrees_with_plain_counts(seed):
    rng = np.random.default_rng(seed)
    most = int(10 ** rng.uniform(0, 5))
    values = rng.integers(0, most, int(rng.integers(1, 300))).tolist()
    budget = int(rng.integers(1, 2 * most)) if seed % 2 else None
    cut = {place for place, value in enumerate(values) if budget and value >= budget}
    found = lengths_of(values, cut).histogram(budget)
    assert (np.diff(found.edges) > 0).all()
    assert found.edges[0] == 0
    assert found.edges[-1] > max(values)
    assert 1 <= len(found.counts) == len(found.edges) - 1 <= 70
    for edges, count, truncated in zip(
        zip(found.edges, found.edges[1:], strict=False), found.counts, found.truncated, strict=True
    ):
        inside = [place for place, value in enumerate(values) if edges[0] <= value < edges[1]]
        assert count == len(inside)
        assert truncated == len(cut & set(inside))
    if budget and budget <= max(values):
        assert found.edges[-2] == budget


@pytest.mark.parametrize(("budget", "width"), [(8192, 256), (1024, 32), (3000, 75), (112, 2)])
def test_bins_below_a_budget_are_equal(budget, width):
    edges = lengths_of([1, budget]).histogram(budget).edges
    assert set(np.diff(edges[:-1])) == {width}
    assert edges[-2] == budget


def test_bins_without_a_budget_have_nice_edges():
    for longest, width in ((10, 1), (39, 1), (40, 2), (999, 50), (1_999, 50), (30_000, 1_000)):
        assert set(np.diff(lengths_of([3, longest]).histogram(None).edges)) == {width}


def test_lengths_beyond_the_table_are_counted_in_classes():
    values = [3, 131_071, 131_072, 300_001, 1_000_000, 1_000_000]
    lengths = lengths_of(values, {4, 5})
    assert lengths.maximum == 1_000_000
    found = lengths.histogram(None)
    assert found.counts.sum() == 6
    assert found.truncated.tolist()[-1] == found.counts.tolist()[-1] == 2
    assert lengths.num_between(0, 2_000_000) == 6
    assert lengths.num_between(200_000, 400_000) == 1
