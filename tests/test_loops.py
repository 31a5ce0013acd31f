import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.diagnostics import ngrams
from stableopd.diagnostics.loops import Loop, find_loops
from stableopd.types import ConfigError


def by_all_periods(ids, ngram, min_copies):
    """Every maximal stretch of every period; of equal stretches the smallest period stays."""
    periods = {}
    for period in range(1, len(ids)):
        place = period
        while place < len(ids):
            stop = place
            while stop < len(ids) and ids[stop] == ids[stop - period]:
                stop += 1
            start = place - period
            if stop - start >= max(min_copies * period, 2 * ngram):
                periods.setdefault((start, stop), period)
            place = stop + 1
    loops = [Loop(a, b, period, (b - a) / period) for (a, b), period in periods.items()]
    outer = [
        loop
        for loop in loops
        if not any(o is not loop and o.start <= loop.start and loop.stop <= o.stop for o in loops)
    ]
    return tuple(sorted(outer, key=lambda loop: loop.start))


def random_ids(rng):
    """Few different ids, with stretches in them that repeat."""
    ids = rng.integers(0, int(rng.integers(1, 4)), int(rng.integers(0, 90))).tolist()
    for _ in range(int(rng.integers(0, 3))):
        copy = rng.integers(0, int(rng.integers(1, 6)), int(rng.integers(1, 25)))
        at = int(rng.integers(0, len(ids) + 1))
        ids[at:at] = np.resize(copy, int(rng.integers(1, 80))).tolist()
    return ids


def agree_with_all_periods(rng, num_rounds):
    num_loops = 0
    for _ in range(num_rounds):
        ids, ngram = random_ids(rng), int(rng.integers(1, 10))
        min_copies = float(rng.choice([2.01, 2.2, 2.5, 3, 3, 3.5, 5]))
        found = find_loops(ids, ngram, min_copies)
        assert found == by_all_periods(ids, ngram, min_copies), (ids, ngram, min_copies)
        num_loops += len(found)
    assert num_loops > num_rounds / 2


def test_loops_agree_with_all_periods():
    agree_with_all_periods(np.random.default_rng(0), 600)


@pytest.mark.parametrize("multiplier", [0, 1, 2**60])
def test_loops_do_not_depend_on_the_hash(monkeypatch, multiplier):
    monkeypatch.setattr(ngrams, "_MULTIPLIERS", tuple([np.uint64(multiplier)] * 6))
    agree_with_all_periods(np.random.default_rng(1), 150)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.integers(0, 60),
    st.lists(st.integers(0, 2), max_size=12),
    st.integers(1, 6),
)
def test_loops_as_any(before, copy, length, after, ngram):
    ids = before + np.resize(copy, length).tolist() + after
    found = find_loops(ids, ngram)
    assert found == by_all_periods(ids, ngram, 3.0)
    for loop in found:
        assert all(
            ids[i] == ids[i - loop.period] for i in range(loop.start + loop.period, loop.stop)
        )
        assert loop.copies == (loop.stop - loop.start) / loop.period >= 3


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 9, 16, 17, 100, 511, 512, 513, 3_000])
def test_a_loop_of_any_period_is_found_where_it_is(period):
    rng = np.random.default_rng(period)
    lead, copy = rng.integers(0, 32_768, 2_000), rng.permutation(40_000)[:period] + 40_000
    loop = np.resize(copy, 5 * period + period // 2 + 16)
    ids = np.concatenate((lead, loop, rng.integers(0, 32_768, 300)))
    size = len(loop)
    assert find_loops(ids) == (Loop(2_000, 2_000 + size, period, size / period),)


def test_fewest_copies_and_shortest_loop():
    assert find_loops([1, 2] * 8) == (Loop(0, 16, 2, 8.0),)
    assert find_loops([1, 2] * 8, ngram=9) == ()  # 2n = 18 is the least
    assert find_loops([7] * 15) == ()
    assert find_loops(list(range(30)) * 3) == (Loop(0, 90, 30, 3.0),)
    assert find_loops((list(range(30)) * 3)[:-1]) == ()
    assert find_loops((list(range(30)) * 3)[:-1], min_copies=2.9) == (Loop(0, 89, 30, 89 / 30),)


def test_text_that_comes_back_once_is_no_loop():
    rng = np.random.default_rng(2)
    prompt, rest = rng.integers(0, 30_000, 400), rng.integers(0, 30_000, 300)
    assert find_loops(np.concatenate((prompt, rest, prompt))) == ()
    assert find_loops(np.concatenate((prompt, prompt))) == ()
    assert find_loops(np.concatenate((prompt, rest, prompt, rest[:9], prompt))) == ()


def test_loops_in_a_loop_are_one_and_two_loops_are_two():
    inner = [*([1] * 20), 2, 3]
    assert find_loops(inner * 4) == (Loop(0, 88, 22, 4.0),)
    two = find_loops([1, 2, 3] * 10 + [9, 8] * 10)
    assert two == (Loop(0, 30, 3, 10.0), Loop(30, 50, 2, 10.0))


def test_empty_and_short_and_extreme_ids():
    assert find_loops([]) == find_loops([1]) == find_loops(list(range(1_000))) == ()
    ids = [2**62, -100] * 30
    assert find_loops(ids) == (Loop(0, 60, 2, 30.0),)
    assert find_loops(np.array(ids[:4] * 10, dtype=np.int64)) == (Loop(0, 40, 2, 20.0),)


@pytest.mark.parametrize("min_copies", [2.0, 0.0, float("nan")])
def test_settings_that_cannot_be(min_copies):
    with pytest.raises(ConfigError, match="min_copies must be more than 2, not"):
        find_loops([1] * 50, min_copies=min_copies)
    with pytest.raises(ConfigError, match="ngram must be at least 1, not 0"):
        find_loops([1] * 50, ngram=0)
