import math

import numpy as np
import pytest

from stableopd.diagnostics.credit import credit
from stableopd.diagnostics.overlap import find_agreement
from stableopd.diagnostics.truncation import length_statistics, truncation_rate
from stableopd.types import StopReason

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


def test_agreement_compares_the_ends_of_each_curve():
    lines = [{"step": s, "overlap/ratio": s / 10, "overlap/advantage": None} for s in range(1, 11)]
    lines[0]["entropy/gap"] = 0.5
    found = find_agreement(lines)
    assert found.ratio == pytest.approx((0.3, 0.8))
    assert found.entropy_gap == (0.5, 0.5)
    assert math.isnan(found.advantage[0])
    assert "overlap of the top-k sets 0.30 at first and 0.80 at last" in found.text()
    assert "advantage" not in found.text()
    assert find_agreement([{"step": 1, "overlap/ratio": math.nan}]).text() == ""
