import itertools
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.diagnostics import ngrams, repetition
from stableopd.diagnostics.repetition import (
    is_repetitive,
    label_rows,
    repetition_flags,
    repetition_rate,
    repetitive_tokens,
)
from stableopd.types import ConfigError


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


def long_runs(labels, min_run):
    kept = []
    for value, run in itertools.groupby(labels):
        length = len(list(run))
        kept += [value and length >= min_run] * length
    return kept


def brute_force(ids, ngram, min_run):
    labels = []
    for t in range(len(ids)):
        gram = ids[t - ngram + 1 : t + 1] if t + 1 >= ngram else None
        labels.append(
            gram is not None
            and any(ids[s - ngram + 1 : s + 1] == gram for s in range(ngram - 1, t))
        )
    return long_runs(labels, min_run)


def by_tuples(row, ngram, min_run=0):
    seen, labels = set(), [False] * min(ngram - 1, len(row))
    for stop in range(ngram, len(row) + 1):
        gram = tuple(row[stop - ngram : stop])
        labels.append(gram in seen)
        seen.add(gram)
    return long_runs(labels, min_run)


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


def some_rows(rng, num_rows, alphabet):
    """Rows of 0 to 300 ids; about half of each is a loop or a quotation of its beginning."""
    rows = []
    for _ in range(num_rows):
        row = rng.integers(0, alphabet, int(rng.integers(0, 150)))
        if len(row):
            again = np.resize(row[: int(rng.integers(1, 40))], int(rng.integers(0, 150)))
            row = np.concatenate((row, again))
        rows.append(row)
    return rows


@pytest.mark.parametrize("alphabet", [1, 2, 30, 32_768, 151_936, 2**40, 2**63 - 1])
@pytest.mark.parametrize("ngram", [1, 2, 3, 5, 8, 33])
def test_rows_are_labelled_one_by_one(alphabet, ngram):
    rng = np.random.default_rng(alphabet % 997 + ngram)
    rows = some_rows(rng, 40, alphabet)
    for min_run in (0, 5):
        found = label_rows(rows, ngram, min_run)
        assert [len(labels) for labels in found] == [len(row) for row in rows]
        for row, labels in zip(rows, found, strict=True):
            assert labels.tolist() == by_tuples(row.tolist(), ngram, min_run)
    assert np.concatenate(found).any()


def test_rows_longer_than_a_piece(monkeypatch):
    rows = some_rows(np.random.default_rng(3), 60, 9)
    whole = [labels.tolist() for labels in label_rows(rows, 4)]
    for tokens in (1, 10, 300, 2_000):
        monkeypatch.setattr(repetition, "_PIECE_TOKENS", tokens)
        assert [labels.tolist() for labels in label_rows(rows, 4)] == whole


def test_rows_of_any_kind():
    assert label_rows([]) == []
    rows = [[], [1, 1, 1], np.array([2, 2], dtype=np.int32), np.array([2**60, 2**60 + 1, 2**60])]
    found = [labels.tolist() for labels in label_rows(rows, 1)]
    assert found == [[], [False, True, True], [False, True], [False, False, True]]
    with pytest.raises(ConfigError, match="ngram must be at least 1, not 0"):
        label_rows([], ngram=0)


@pytest.mark.parametrize("multiplier", [0, 1, 2**40, 2**63])
def test_labels_do_not_depend_on_the_hash(monkeypatch, multiplier):
    """With bad multipliers different n-grams share a hash; the labels must stay exact."""
    rng = np.random.default_rng(5)
    rows = [*some_rows(rng, 25, 4), rng.integers(0, 4, 3_000)]
    tokens = np.concatenate(rows).astype(np.uint64)
    monkeypatch.setattr(ngrams, "_MULTIPLIERS", tuple([np.uint64(multiplier)] * 6))
    pairs = ngrams.equal_neighbours(ngrams.window_hashes(tokens, 5))
    assert not ngrams.same_windows(tokens, 5, *pairs)
    for row, labels in zip(rows, label_rows(rows, 5), strict=True):
        assert labels.tolist() == by_tuples(row.tolist(), 5)


def test_long_rollouts():
    rng = np.random.default_rng(6)
    for length in (16_384, 16_385, 40_000):
        row = rng.integers(0, 151_936, length)
        row[length // 2 :] = np.resize(row[:777], length - length // 2)
        row[rng.integers(0, length, 20)] = 7
        assert repetitive_tokens(row, 8).tolist() == by_tuples(row.tolist(), 8)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(st.integers(-3, 3), max_size=40), max_size=8),
    st.integers(1, 6),
    st.integers(0, 4),
)
def test_rows_as_any(rows, ngram, min_run):
    found = [labels.tolist() for labels in label_rows(rows, ngram, min_run)]
    assert found == [brute_force(row, ngram, min_run) for row in rows]


def test_windows_that_differ_are_told_apart():
    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 5, 2**50, 2, 3, 4], dtype=np.uint64)
    at = lambda *places: np.array(places, dtype=np.int64)  # noqa: E731
    assert ngrams.same_windows(tokens, 3, at(4), at(0))
    assert not ngrams.same_windows(tokens, 4, at(4), at(0))  # the last id differs
    assert not ngrams.same_windows(tokens, 4, at(8), at(0))  # the first id differs
    assert ngrams.same_windows(tokens, 3, at(9), at(1))
    assert ngrams.same_windows(tokens, 4, at(), at())


@pytest.mark.parametrize("num_threads", [0, 1, 2, 5])
def test_flags_of_many_texts(num_threads):
    texts = [random_text(900, seed) + "loop " * (seed % 3 * 100) for seed in range(300)]
    texts[7] = "\ud800" * 2_000
    flags = repetition_flags(texts, 400, 10.0, num_threads)
    assert flags.dtype == np.bool_
    assert flags.tolist() == [is_repetitive(text, 400, 10.0) for text in texts]
    assert 0.2 < flags.mean() < 0.8
    assert repetition_rate(texts, 400, 10.0) == flags.mean()


def test_flags_of_few_and_short_texts():
    assert repetition_flags([]).tolist() == []
    assert repetition_flags(["", "abc"] * 500).tolist() == [False] * 1_000
    assert repetition_flags(["a" * 20_000, "b"]).tolist() == [True, False]
