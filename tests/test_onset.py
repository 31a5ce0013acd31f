import json
import math
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableopd.diagnostics.onset import find_onset
from stableopd.diagnostics.ramps import Series, fit_phases

DATA = Path(__file__).parent / "data" / "alarm"
X = np.arange(1, 101)


def drawn(rates, num_rollouts, seed):
    rng = np.random.default_rng(seed)
    return rng.binomial(num_rollouts, np.clip(rates, 0, 1)) / num_rollouts


def ramp(steps, start, stop, before, after):
    return np.interp(steps, [start, stop], [before, after])


def kinds(rates, num_rollouts, seeds=20):
    found = [find_onset(X, drawn(rates, num_rollouts, seed)) for seed in range(seeds)]
    return found, {o.kind for o in found}


def test_a_step_by_hand():
    found = find_onset(range(1, 21), [0.1] * 10 + [0.9] * 10)
    assert (found.kind, found.step, found.interval, found.width) == ("rise", 11, (11, 11), 0.0)
    assert (found.before, found.after, found.end) == pytest.approx((0.1, 0.9, 0.9))
    assert found.confidence > 0.999
    assert found.text == (
        "Rises from 0.10 to 0.90 at once from step 11 (95%: 11 to 11); confidence 1.00."
    )


def test_a_ramp_without_noise():
    """The first step above the old level is the onset; the width runs to the first at the new."""
    found = find_onset(X, ramp(X, 40, 70, 0.5, 0.95))
    assert (found.kind, found.step, found.width) == ("rise", 41, 29.0)
    assert (found.before, found.after) == pytest.approx((0.5, 0.95))
    assert found.interval is not None
    assert found.interval[0] <= 41 <= found.interval[1]


@pytest.mark.parametrize("num_rollouts", [16, 64, 256])
def test_the_transition_of_the_paper(num_rollouts):
    """From .5 to .95 within 30 steps, with the noise of sampling."""
    found, seen = kinds(ramp(X, 40, 70, 0.5, 0.95), num_rollouts)
    assert seen == {"rise"}
    assert all(abs(o.step - 41) <= 12 for o in found)
    assert np.median([abs(o.step - 41) for o in found]) <= 4
    assert np.median([o.width for o in found]) == pytest.approx(29, abs=4)
    covered = [o.interval[0] <= 41 <= o.interval[1] for o in found]
    assert np.mean(covered) >= 0.8


@pytest.mark.parametrize("num_rollouts", [16, 64, 256])
@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 1.0])
def test_noise_about_a_level_is_no_change(level, num_rollouts):
    found, seen = kinds(np.full(100, level), num_rollouts)
    assert seen == {"none"}
    assert max(o.confidence for o in found) < 0.5
    assert all(o.step is None and o.interval is None and o.width == 0 for o in found)
    assert all(o.before == o.after == pytest.approx(level, abs=0.05) for o in found)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_levels_without_noise(level):
    found = find_onset(X, [level] * 100)
    assert (found.kind, found.before, found.after, found.end) == ("none", level, level, level)
    assert found.confidence < 0.01


def test_false_positives_and_detection_on_series():
    """The small version of the study: few in noise, nearly all changes of 0.25."""
    quiet, loud = 0, 0
    for seed in range(80):
        p = (0.02, 0.1, 0.3, 0.5, 0.8)[seed % 5]
        quiet += find_onset(X, drawn(np.full(100, p), 16, seed)).kind != "none"
        loud += find_onset(X, drawn(np.where(X < 40, 0.2, 0.45), 16, 1000 + seed)).kind == "rise"
    assert quiet <= 2
    assert loud >= 76


def test_counts_keep_a_few_rollouts_from_making_phases():
    rates = [drawn(np.full(100, 0.02), 4, seed) for seed in range(20)]
    without = sum(find_onset(X, r).kind != "none" for r in rates)
    with_counts = sum(find_onset(X, r, np.full(100, 4)).kind != "none" for r in rates)
    assert with_counts <= 1 < without


def test_counts_weigh():
    """Two steps of 640 rollouts and many of 1: the many are noise."""
    rates = np.where(X % 2 == 0, 0.5, np.where(X % 4 == 1, 0.0, 1.0))
    counts = np.where(X % 2 == 0, 640, 1)
    assert find_onset(X, rates, counts).before == pytest.approx(0.5, abs=0.02)
    assert find_onset(X, rates, np.where(X % 4 == 1, 0, counts)).before > 0.5


@pytest.mark.parametrize(
    ("rates", "kind"),
    [
        (np.linspace(0.1, 0.35, 100), "none"),  # a drift, and a small one
        (np.linspace(0.5, 0.3, 100), "none"),
        (np.linspace(0.1, 0.7, 100), "rise"),  # a drift over all of the run, and a large one
        (ramp(X, 10, 85, 0.1, 0.95), "rise"),  # a slow lock
        (np.where(X < 40, 0.6, 0.1), "fall"),
    ],
)
def test_drifts_and_falls(rates, kind):
    found, seen = kinds(rates, 64, 10)
    assert seen == {kind}
    if kind == "rise":
        assert all(o.width > 40 for o in found)
    if kind == "fall":
        assert all(o.step == 40 for o in found)
    assert "drift" in find_onset(X, np.linspace(0.1, 0.35, 100)).text


def test_a_rise_that_comes_back_has_healed():
    rates = 0.05 + 0.39 * np.interp(X, [30, 38, 50, 60], [0, 1, 1, 0])
    found, seen = kinds(rates, 64)
    assert seen == {"healed"}
    assert all(abs(o.step - 31) <= 3 for o in found)
    assert all(o.after == pytest.approx(0.44, abs=0.05) and o.end < 0.1 for o in found)
    assert "comes back" in found[0].text


def test_a_rise_that_stays_half_way_has_not_healed():
    rates = np.where(X < 30, 0.05, np.where(X < 60, 0.95, 0.55))
    found = find_onset(X, drawn(rates, 64, 0))
    assert (found.kind, found.step) == ("rise", 30)


def test_a_small_bump_is_no_lock():
    """The run that inflated from .23 to .41 for a moment and recovered."""
    rates = np.interp(X, [0, 12, 15, 30, 100], [0.23, 0.39, 0.41, 0.11, 0.06])
    _, seen = kinds(rates, 64, 10)
    assert seen <= {"none", "fall", "healed"}


def test_two_rises_are_one():
    rates = np.where(X < 30, 0.1, np.where(X < 60, 0.5, 0.95))
    found, seen = kinds(rates, 64)
    assert seen == {"rise"}
    assert all(o.step == 30 and o.width == 30 for o in found)
    assert all(o.after == pytest.approx(0.95, abs=0.03) for o in found)


def test_a_bump_or_a_dip_before_the_lock_is_passed_over():
    bump = 0.05 + 0.39 * np.interp(X, [20, 25, 30, 35], [0, 1, 1, 0])
    for rates, step in (
        (np.where(X < 30, 0.5, np.where(X < 60, 0.1, 0.95)), 60),
        (np.where(X <= 60, bump, ramp(X, 60, 75, 0.05, 0.95)), 61),
    ):
        found, seen = kinds(rates, 64, 10)
        assert seen == {"rise"}
        assert all(abs(o.step - step) <= 3 for o in found)


def test_a_single_step_off_is_nothing():
    for place in (0, 1, 50, 98, 99):
        rates = drawn(np.full(100, 0.1), 64, place)
        rates[place] = 1.0
        assert find_onset(X, rates).kind == "none", place


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (1, 5), (2, 5), (3, 4)])
def test_an_early_rise(start, stop):
    """Cause A runs away at once: even one step of the old level is enough."""
    found, seen = kinds(ramp(X, start, stop, 0.1, 0.97), 64, 10)
    assert seen == {"rise"}
    assert all(abs(o.step - start - 1) <= 1 for o in found)


def test_a_run_that_ends_while_it_rises():
    found, seen = kinds(ramp(X, 80, 120, 0.1, 0.95), 64, 10)
    assert seen == {"rise"}
    assert all(abs(o.step - 81) <= 4 for o in found)
    assert "still rising" in find_onset(X, ramp(X, 80, 120, 0.1, 0.95)).text


def test_gaps_order_nan_and_equal_steps():
    rng = np.random.default_rng(3)
    steps = np.sort(rng.choice(np.arange(1, 1001), 60, replace=False))
    rates = drawn(ramp(steps, 500, 560, 0.1, 0.9), 64, 0)
    found = find_onset(steps.tolist(), rates)
    assert found.kind == "rise"
    assert found.step in steps
    assert found.interval is not None
    assert found.interval[0] <= 560
    assert found.interval[1] >= 501
    order = rng.permutation(60)
    assert find_onset(steps[order].tolist(), rates[order]) == found
    doubled = find_onset([*steps, *steps], [*rates, *rates])
    assert (doubled.kind, doubled.step) == (found.kind, found.step)
    holes = rates.copy()
    holes[::7] = math.nan
    keep = ~np.isnan(holes)
    assert find_onset(steps.tolist(), holes) == find_onset(steps[keep].tolist(), rates[keep])


@pytest.mark.parametrize("rates", [[], [0.5], [0.0] * 3 + [1.0] * 4, [math.nan] * 30])
def test_too_short(rates):
    found = find_onset(range(len(rates)), rates)
    assert (found.kind, found.step, found.interval, found.confidence) == (
        "too short",
        None,
        None,
        0.0,
    )
    known = [r for r in rates if not math.isnan(r)]
    assert math.isnan(found.before) if not known else found.before == pytest.approx(np.mean(known))
    assert "nan" not in found.text


def test_eight_steps_are_enough():
    found = find_onset(range(1, 9), [0.1] * 4 + [0.9] * 4)
    assert (found.kind, found.step) == ("rise", 5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], not in \[0, 1.2\]"):
        find_onset(range(10), [0.0] * 9 + [1.2])
    with pytest.raises(ValueError, match="9 steps, 10 rates and 10 counts"):
        find_onset(range(9), [0.0] * 10)


def squares(basis, rates, weights):
    """Weighted residual sum of squares, by the library's own least squares."""
    root = np.sqrt(weights)[:, None]
    fit, *_ = np.linalg.lstsq(basis * root, rates * root[:, 0], rcond=None)
    return float((weights * (rates - basis @ fit) ** 2).sum())


def test_fits_are_the_best_there_are():
    """Against a search of all ramps and of all pairs of ramps, one after the other."""
    rng = np.random.default_rng(7)
    for n in (12, 14):
        steps = np.cumsum(rng.integers(1, 4, n)).astype(float)
        rates = np.clip(ramp(steps, steps[4], steps[7], 0.2, 0.8) + rng.normal(0, 0.1, n), 0, 1)
        weights = rng.uniform(0.5, 1.5, n)
        weights /= weights.mean()
        one, two = math.inf, math.inf
        shapes = {
            (a, b): np.clip((steps - steps[a]) / (steps[b] - steps[a]), 0, 1)
            for a, b in combinations(range(n), 2)
        }
        half = {k: int(np.argmax(g >= 0.5)) for k, g in shapes.items()}
        for key, g in shapes.items():
            if n - half[key] >= 3:
                one = min(one, squares(np.stack([np.ones(n), g], 1), rates, weights))
        for p, q in combinations_with_replacement(sorted(shapes), 2):
            if p[1] <= q[0] and half[q] - half[p] >= 3 and n - half[q] >= 3:
                basis = np.stack([np.ones(n), shapes[p], shapes[q]], 1)
                two = min(two, squares(basis, rates, weights))
        fits = fit_phases(Series(steps, rates, weights))
        constant, drift = np.ones((n, 1)), np.stack([np.ones(n), steps], 1)
        expected = [squares(constant, rates, weights), squares(drift, rates, weights), one, two]
        assert [fit.rss for fit in fits] == pytest.approx(expected)


def test_long_series():
    steps = np.arange(1, 2001)
    found = find_onset(steps, drawn(ramp(steps, 900, 930, 0.5, 0.95), 16, 0))
    assert found.kind == "rise"
    assert found.step == pytest.approx(901, abs=15)
    bump = 0.1 + 0.4 * np.interp(steps, [900, 905, 925, 930], [0, 1, 1, 0])
    found = find_onset(steps, drawn(bump, 16, 0))
    assert found.kind == "healed"
    assert found.step == pytest.approx(901, abs=8)


@pytest.mark.parametrize(
    ("name", "kind", "first", "last"),
    [
        ("opd-s3", "rise", 50, 58),
        ("slow-s20", "rise", 105, 130),
        ("budget40-s20", "rise", 35, 45),
        ("stable-s3", "none", None, None),
        ("tanh-s20", "none", None, None),
        ("short-s0", "none", None, None),
    ],
)
def test_real_runs(name, kind, first, last):
    lines = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "rollout/truncation_rate" in line]
    rates = [line["rollout/truncation_rate"] for line in lines]
    found = find_onset([line["step"] for line in lines], rates, [64] * len(lines))
    assert found.kind == kind
    assert found.step is None if first is None else first <= found.step <= last


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1) | st.just(math.nan)), max_size=40),
)
def test_any_series_gets_an_answer(pairs):
    steps, rates = [s for s, _ in pairs], [r for _, r in pairs]
    found = find_onset(steps, rates)
    assert 0 <= found.confidence <= 1
    assert found.text.endswith(".")
    if found.step is None:
        assert found.kind in ("none", "too short")
        assert found.interval is None
    else:
        assert found.interval is not None
        assert found.interval[0] <= found.step <= found.interval[1]
        assert found.step in steps
        assert found.width >= 0
        assert 0 <= found.before <= 1
        assert 0 <= found.after <= 1
