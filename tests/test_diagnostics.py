import itertools
import math
import zlib

import numpy as np
import pytest

from stableopd.diagnostics.credit import credit
from stableopd.diagnostics.repetition import is_repetitive, repetition_rate, repetitive_tokens
from stableopd.diagnostics.truncation import length_statistics, truncation_rate
from stableopd.types import ConfigError, StopReason

STOP, LENGTH = StopReason.STOP, StopReason.LENGTH


def test_truncation_rate_counts_length_stops():
    assert truncation_rate([STOP, LENGTH, LENGTH, STOP, LENGTH]) == pytest.approx(3 / 5)
    assert truncation_rate([STOP]) == 0.0
    assert truncation_rate([LENGTH] * 7) == 1.0
    assert math.isnan(truncation_rate([]))


def test_length_statistics_by_hand():
    found = length_statistics([4, 1, 3, 2])
    assert (found.mean, found.median, found.maximum) == (2.5, 2.5, 4.0)
    assert found.p90 == pytest.approx(3.7)  # 3 + 0.7 * (4 - 3): rank 0.9 * 3 = 2.7
    one = length_statistics([7])
    assert (one.mean, one.median, one.p90, one.maximum) == (7.0, 7.0, 7.0, 7.0)
    empty = length_statistics([])
    assert all(math.isnan(v) for v in (empty.mean, empty.median, empty.p90, empty.maximum))


def random_text(length, seed=0):
    letters = np.random.default_rng(seed).integers(32, 127, length)
    return "".join(map(chr, letters))


def test_is_repetitive_is_strict_in_the_length():
    assert not is_repetitive("a" * 10_000)
    assert is_repetitive("a" * 10_001)
    assert not is_repetitive("a" * 20, window_chars=20, ratio=1.0)
    assert is_repetitive("a" * 21, window_chars=20, ratio=1.0)


def test_is_repetitive_looks_at_the_last_window_alone():
    loop = "and so on, " * 1_000
    text = random_text(20_000)
    assert is_repetitive(text + loop)
    assert not is_repetitive(loop + text)
    assert not is_repetitive(text)


def test_is_repetitive_is_strict_in_the_ratio_and_counts_bytes():
    text = "x" + "né" * 50
    tail = text[-100:].encode()
    exact = len(tail) / len(zlib.compress(tail))
    assert len(tail) == 150
    assert not is_repetitive(text, window_chars=100, ratio=exact)
    assert is_repetitive(text, window_chars=100, ratio=exact - 1e-9)


def test_is_repetitive_accepts_a_lone_surrogate():
    assert is_repetitive("\ud800" * 300, window_chars=200, ratio=2.0)


def test_repetition_rate_is_over_all_texts():
    loop, plain, short = "ab" * 10_000, random_text(20_000), "ab"
    assert repetition_rate([loop, plain, short, loop]) == 0.5
    assert repetition_rate([short]) == 0.0
    assert math.isnan(repetition_rate([]))
    assert repetition_rate(["abc" * 40, short], window_chars=100, ratio=3.0) == 0.5


def brute_force(ids, ngram, min_run):
    labels = []
    for t in range(len(ids)):
        gram = ids[t - ngram + 1 : t + 1] if t + 1 >= ngram else None
        labels.append(
            gram is not None
            and any(ids[s - ngram + 1 : s + 1] == gram for s in range(ngram - 1, t))
        )
    kept = []
    for value, run in itertools.groupby(labels):
        length = len(list(run))
        kept += [value and length >= min_run] * length
    return kept


def test_repetitive_tokens_agree_with_brute_force():
    rng = np.random.default_rng(1)
    positives = 0
    for _ in range(600):
        alphabet = int(rng.integers(1, 5))
        ids = rng.integers(0, alphabet, int(rng.integers(0, 60))).tolist()
        ngram, min_run = int(rng.integers(1, 12)), int(rng.integers(0, 6))
        found = repetitive_tokens(ids, ngram, min_run)
        assert found.dtype == np.bool_
        assert found.tolist() == brute_force(ids, ngram, min_run)
        positives += int(found.sum())
    assert positives > 1_000


def test_repetitive_tokens_by_hand():
    # "1 2 3" ends first at place 2, then at places 6 and 9.
    assert np.flatnonzero(repetitive_tokens([1, 2, 3, 9, 1, 2, 3, 1, 2, 3], 3)).tolist() == [6, 9]
    # An n-gram may overlap its earlier occurrence.
    assert repetitive_tokens([5] * 5, 3).tolist() == [False, False, False, True, True]
    assert repetitive_tokens([1, 2, 1], 1).tolist() == [False, False, True]


def test_repetitive_tokens_of_extreme_ids():
    big = 2**62
    ids = [big, -100, big, -100, big, -big]
    assert repetitive_tokens(ids, 2).tolist() == [False, False, False, True, True, False]


def test_repetitive_tokens_of_short_and_empty_sequences():
    assert repetitive_tokens([], 8).shape == (0,)
    assert repetitive_tokens([1] * 8, 8).tolist() == [False] * 8
    assert repetitive_tokens([1] * 7, 8).tolist() == [False] * 7
    assert repetitive_tokens(np.array([1] * 9, dtype=np.int32), 8).tolist() == [False] * 8 + [True]


def test_min_run_keeps_runs_of_exactly_that_length():
    ids = [1] * 8 + [2] + [1] * 5
    labels = repetitive_tokens(ids, 2)
    assert labels.tolist() == [False] * 2 + [True] * 6 + [False] * 2 + [True] * 4
    assert repetitive_tokens(ids, 2, min_run=4).tolist() == labels.tolist()
    assert repetitive_tokens(ids, 2, min_run=5).tolist() == labels.tolist()[:10] + [False] * 4
    assert not repetitive_tokens(ids, 2, min_run=7).any()


def test_a_long_loop_is_labelled_from_its_second_round_on():
    lead, loop = list(range(100, 400)), list(range(50))
    labels = repetitive_tokens(lead + loop * 100, ngram=8, min_run=64)
    assert labels.tolist() == [False] * (300 + 50 + 7) + [True] * (99 * 50 - 7)


def test_ngram_below_one_is_refused():
    with pytest.raises(ConfigError, match="ngram must be at least 1, not 0"):
        repetitive_tokens([1, 2], ngram=0)


def test_credit_by_hand():
    found = credit([-0.1, -0.3, 0.2, -0.6], [True, False, True, False])
    assert found.repetitive_mean == pytest.approx(0.05)
    assert found.regular_mean == pytest.approx(-0.45)
    assert found.repetitive_share == 0.5
    assert found.repetitive_weight == pytest.approx(0.3 / 1.2)


def test_credit_means_join_to_the_mean_of_all():
    rng = np.random.default_rng(2)
    advantages, labels = rng.normal(size=500), rng.random(500) < 0.3
    found = credit(advantages, labels)
    share = found.repetitive_share
    joined = share * found.repetitive_mean + (1 - share) * found.regular_mean
    assert joined == pytest.approx(advantages.mean())
    other = credit(advantages, ~labels)
    assert other.repetitive_weight == pytest.approx(1 - found.repetitive_weight)
    assert (other.repetitive_mean, other.regular_mean) == (
        found.regular_mean,
        found.repetitive_mean,
    )


def test_credit_of_empty_classes():
    none = credit([-1.0, -2.0], [False, False])
    assert math.isnan(none.repetitive_mean)
    assert (none.regular_mean, none.repetitive_share, none.repetitive_weight) == (-1.5, 0.0, 0.0)
    every = credit([-1.0], [True])
    assert math.isnan(every.regular_mean)
    assert (every.repetitive_share, every.repetitive_weight) == (1.0, 1.0)
    empty = credit([], [])
    assert math.isnan(empty.repetitive_share)
    assert math.isnan(credit([0.0, 0.0], [True, False]).repetitive_weight)


def test_credit_of_infinite_advantages_does_not_warn():
    found = credit([-math.inf, math.inf, -1.0], [True, True, False])
    assert math.isnan(found.repetitive_mean)
    assert found.regular_mean == -1.0
    assert math.isnan(found.repetitive_weight)


def test_credit_refuses_arrays_that_do_not_match():
    with pytest.raises(ValueError, match="2 advantages do not match 1 labels"):
        credit([1.0, 2.0], [True])
