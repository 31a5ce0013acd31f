"""Advantages against hand values, loops and limits."""

import math
import statistics

import pytest
import torch

from stableopd.objective.advantage import (
    first_n_mask,
    group_reward,
    log_ratio,
    prefix_weights,
    shaped,
)

# Teacher and student log-probs whose log-ratios are 2, -3, 0, 0.5, -0.25, -5.
TEACHER = torch.tensor([-1.0, -4.0, -2.0, -0.5, -1.25, -6.0], dtype=torch.float64)
STUDENT = torch.tensor([-3.0, -1.0, -2.0, -1.0, -1.00, -1.0], dtype=torch.float64)
RATIOS = [2.0, -3.0, 0.0, 0.5, -0.25, -5.0]
FORMS = [
    ("log_ratio", None),
    ("clip", 1.5),
    ("soft_log", None),
    ("tanh", 1.5),
    ("power", 0.5),
    ("floor", 0.05),
]


def extremes():
    """Teacher and student log-probs with log-ratios of about -1e4 and +1e4."""
    return torch.tensor([-1e4, -1e-9]).double(), torch.tensor([-1e-9, -1e4]).double()


def test_log_ratio_by_hand():
    assert log_ratio(TEACHER, STUDENT).tolist() == RATIOS


@pytest.mark.parametrize(
    ("form", "parameter", "by_hand"),
    [
        ("log_ratio", None, RATIOS),
        ("clip", 1.5, [1.5, -1.5, 0.0, 0.5, -0.25, -1.5]),
        (
            "soft_log",
            None,
            [math.log(3), -math.log(4), 0, math.log(1.5), -math.log(1.25), -math.log(6)],
        ),
        ("tanh", 1.5, [1.5 * math.tanh(a) for a in RATIOS]),
        (
            "power",
            0.5,
            [
                math.exp(-0.5) - math.exp(-1.5),
                math.exp(-2) - math.exp(-0.5),
                0.0,
                math.exp(-0.25) - math.exp(-0.5),
                math.exp(-0.625) - math.exp(-0.5),
                math.exp(-3) - math.exp(-0.5),
            ],
        ),
        ("floor", 0.1, [2.0, -math.log(9), 0.0, 0.5, -0.25, -math.log(9)]),
        ("floor", 0.5, [2.0, 0.0, 0.0, 0.5, 0.0, 0.0]),
    ],
)
def test_forms_by_hand(form, parameter, by_hand):
    assert shaped(form, TEACHER, STUDENT, parameter).tolist() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(("form", "parameter"), FORMS)
def test_every_form_keeps_zero_sign_and_order(form, parameter):
    ratio = torch.linspace(-4, 4, 81, dtype=torch.float64)
    student = torch.full_like(ratio, -5.0)
    found = shaped(form, student + ratio, student, parameter)
    assert found.shape == ratio.shape
    assert found[40].item() == 0.0
    assert ((found.sign() == ratio.sign()) | (found == 0)).all()
    assert (found.diff() >= 0).all()


@pytest.mark.parametrize(("form", "parameter"), FORMS)
def test_no_form_carries_gradient(form, parameter):
    teacher, student = TEACHER.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    assert not shaped(form, teacher, student, parameter).requires_grad
    assert not log_ratio(teacher, student).requires_grad
    assert not group_reward(student, 2).requires_grad
    assert not prefix_weights(teacher, torch.zeros(6, dtype=torch.long), 0.5).requires_grad
    assert not prefix_weights(teacher, torch.zeros(6, dtype=torch.long), 0.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("form", "parameter"), FORMS)
def test_values_stay_finite_at_the_extremes_and_keep_the_dtype(form, parameter, dtype):
    teacher, student = (x.to(dtype) for x in extremes())
    found = shaped(form, teacher, student, parameter)
    assert found.isfinite().all()
    assert found.dtype == dtype
    assert found[0] < 0 < found[1]


def test_bounded_forms_are_bounded():
    teacher, student = extremes()
    assert shaped("clip", teacher, student, 1.5).tolist() == [-1.5, 1.5]
    assert shaped("tanh", teacher, student, 1.5).tolist() == [-1.5, 1.5]
    assert shaped("power", teacher, student, 0.5).tolist() == pytest.approx([-1.0, 1.0])
    assert shaped("floor", teacher, student, 0.05)[0].item() == pytest.approx(math.log(0.05 / 0.95))
    size = math.log1p(1e4 - 1e-9)
    assert shaped("soft_log", teacher, student).tolist() == pytest.approx([-size, size])


def test_special_parameters_equal_another_form():
    plain = log_ratio(TEACHER, STUDENT)
    assert torch.equal(shaped("clip", TEACHER, STUDENT, 1e6), plain)
    assert torch.equal(shaped("floor", TEACHER, STUDENT, 1e-12), plain)
    torch.testing.assert_close(
        shaped("power", TEACHER, STUDENT, 1e-7) / 1e-7, plain, rtol=1e-5, atol=1e-6
    )
    near = STUDENT + 1e-4 * plain
    for form in ("tanh", "soft_log"):
        torch.testing.assert_close(
            shaped(form, near, STUDENT, 1.0), 1e-4 * plain, rtol=1e-3, atol=0
        )
    probability = TEACHER.exp() - STUDENT.exp()
    torch.testing.assert_close(shaped("power", TEACHER, STUDENT, 1.0), probability)


def test_the_floor_is_what_a_mixture_leaves_at_least():
    """log of ((1 - l) q + l p) / p is at least log l; the floor is that up to 1 / (1 - l)."""
    weight = 0.05
    p, q = STUDENT.exp(), (TEACHER - 50).exp()
    mixed = (((1 - weight) * q + weight * p) / ((1 - weight) * p)).log()
    floor = shaped("floor", TEACHER - 50, STUDENT, weight)
    torch.testing.assert_close(mixed, floor)


@pytest.mark.parametrize("form", ["clip", "tanh", "power", "floor"])
@pytest.mark.parametrize("parameter", [None, 0.0, -1.0])
def test_a_form_with_a_parameter_refuses_none_and_what_is_not_positive(form, parameter):
    with pytest.raises(ValueError, match=form):
        shaped(form, TEACHER, STUDENT, parameter)


def test_other_errors():
    for weight in (1.0, 1.5):
        with pytest.raises(ValueError, match="below 1"):
            shaped("floor", TEACHER, STUDENT, weight)
    for parameter in (None, 1.0):
        with pytest.raises(ValueError, match="unknown form of the advantage: 'whitened'"):
            shaped("whitened", TEACHER, STUDENT, parameter)


def test_group_reward_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 2.0, 6.0], dtype=torch.float64)
    by_hand = []
    for group in ([1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 2.0, 6.0]):
        deviation = statistics.stdev(group) + 1e-4
        by_hand += [(r - statistics.mean(group)) / deviation for r in group]
    assert group_reward(rewards, 4).tolist() == pytest.approx(by_hand)
    assert group_reward(torch.tensor([1.0, 0.0]).double(), 2).tolist() == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 8])
def test_equal_rewards_give_exactly_nothing(size, dtype):
    rewards = torch.tensor([0.1, 0.7, 1 / 3, 1.0, 0.0, -2.3], dtype=dtype).repeat_interleave(size)
    assert torch.count_nonzero(group_reward(rewards, size)) == 0


def test_group_reward_is_centred_and_blind_to_a_shift():
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = group_reward(rewards, 6)
    torch.testing.assert_close(found.reshape(4, 6).sum(1), torch.zeros(4).double())
    torch.testing.assert_close(group_reward(rewards + 7.0, 6), found)
    assert group_reward(torch.zeros(0), 4).shape == (0,)


@pytest.mark.parametrize(("number", "size"), [(6, 4), (4, 1), (4, 0), (4, -2), (3, 8)])
def test_group_reward_refuses_sizes_that_do_not_fit(number, size):
    with pytest.raises(ValueError, match=f"{number} rewards cannot be split in groups of {size}"):
        group_reward(torch.ones(number), size)


def test_first_n_mask():
    index = torch.tensor([0, 1, 2, 3, 0, 1, 0])
    assert first_n_mask(index, 2).tolist() == [True, True, False, False, True, True, True]
    assert first_n_mask(index, 1).tolist() == [True, False, False, False, True, False, True]
    for keeps_all in (0, 4, 99):
        assert first_n_mask(index, keeps_all).tolist() == [True] * 7
    assert first_n_mask(index, 0).dtype == first_n_mask(index, 2).dtype == torch.bool
    assert first_n_mask(index[:0], 3).shape == (0,)


def weights_by_loop(advantage, row, gain):
    found = []
    for i, own in enumerate(row):
        mine = [abs(a) for a, r in zip(advantage, row, strict=True) if r == own]
        before = [abs(a) for a, r in zip(advantage[:i], row[:i], strict=True) if r == own]
        share = math.fsum(before) / math.fsum(mine) if math.fsum(mine) > 0 else 1.0
        found.append(1 + gain * (1 - share))
    return found


@pytest.mark.parametrize("gain", [0.25, 0.5, 2.0])
@pytest.mark.parametrize(
    "rows", [[0] * 12, [0, 0, 0, 1, 2, 2, 2, 2, 5, 5, 5, 5], [3] * 5 + [1] * 7]
)
def test_prefix_weights_by_loop(rows, gain):
    generator = torch.Generator().manual_seed(len(set(rows)))
    advantage = torch.randn(12, generator=generator, dtype=torch.float64)
    found = prefix_weights(advantage, torch.tensor(rows), gain)
    assert found.tolist() == pytest.approx(
        weights_by_loop(advantage.tolist(), rows, gain), rel=1e-12
    )
    assert (found >= 1).all()
    assert (found <= 1 + gain).all()
    for row in set(rows):
        own = found[torch.tensor(rows) == row]
        assert own[0].item() == pytest.approx(1 + gain, rel=1e-12)
        assert (own.diff() <= 1e-12).all()


def test_prefix_weights_by_hand():
    advantage = torch.tensor([-1.0, 2.0, -1.0, 0.0, 4.0])
    found = prefix_weights(advantage, torch.tensor([0, 0, 0, 1, 1]), 0.5)
    assert found.tolist() == pytest.approx([1.5, 1.375, 1.125, 1.5, 1.5])
    assert found.dtype == torch.float32


def test_rows_without_advantage_weigh_one_and_do_not_touch_the_others():
    advantage = torch.tensor([0.0, 0.0, 1.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    found = prefix_weights(advantage, torch.tensor([0, 0, 1, 1, 2, 2]), 0.5)
    assert found.tolist() == [1.0, 1.0, 1.5, 1.375, 1.0, 1.0]
    assert prefix_weights(advantage, torch.zeros(6, dtype=torch.long), 0.0).tolist() == [1.0] * 6
    assert prefix_weights(advantage[:0], torch.zeros(0, dtype=torch.long), 0.5).shape == (0,)


def test_long_rows_in_float32():
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(40_000, generator=generator)
    advantage[30_000:] *= 1e-5  # a rollout on which the models nearly agree
    row = torch.tensor([0] * 10_000 + [1] * 20_000 + [2] * 10_000)
    found = prefix_weights(advantage, row, 0.5).double()
    for r in range(3):
        mine = advantage[row == r].double().abs()
        before = torch.cat([torch.zeros(1).double(), mine.cumsum(0)[:-1]])
        wanted = 1 + 0.5 * (1 - before / mine.sum())
        torch.testing.assert_close(found[row == r], wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_very_different_size(dtype):
    advantage = torch.tensor([1e4] * 50 + [1e-8] * 4, dtype=dtype)
    row = torch.tensor([0] * 50 + [1] * 4)
    found = prefix_weights(advantage, row, 0.5)[50:].double()
    wanted = torch.tensor([1.5, 1.375, 1.25, 1.125]).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
