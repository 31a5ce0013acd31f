"""Divergences against hand values, loops and enumerated expectations."""

import math

import pytest
import torch

from stableopd.objective.divergence import (
    forward_kl,
    jensen_shannon,
    k1,
    k2,
    k3,
    on_top_k,
    reverse_kl,
    top_k_agreement,
    top_k_overlap,
)
from stableopd.objective.logprobs import log_distribution

EXACT = [reverse_kl, forward_kl, jensen_shannon]
LOG2 = math.log(2.0)


def logits(n=6, v=7, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(n, v, generator=generator, dtype=torch.float64, device="cpu")
    return scale * made.to(torch.get_default_device())


def log_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def kl_by_loop(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def by_loop(divergence, p, q):
    """One divergence of two lists of probabilities, student first."""
    if divergence is reverse_kl:
        return kl_by_loop(p, q)
    if divergence is forward_kl:
        return kl_by_loop(q, p)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return kl_by_loop(p, middle) / 2 + kl_by_loop(q, middle) / 2


def test_hand_values():
    student, teacher = log_of([1 / 2, 1 / 2]), log_of([1 / 4, 3 / 4])
    assert reverse_kl(student, teacher).item() == pytest.approx(LOG2 - math.log(3) / 2)
    assert forward_kl(student, teacher).item() == pytest.approx(0.75 * math.log(3) - LOG2)
    by_hand = (
        (math.log(4 / 3) + math.log(4 / 5)) / 4 + math.log(2 / 3) / 8 + math.log(6 / 5) * 3 / 8
    )
    assert jensen_shannon(student, teacher).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("divergence", EXACT)
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_equal_to_loops(divergence, scale):
    student = torch.log_softmax(logits(seed=1, scale=scale), -1)
    teacher = torch.log_softmax(logits(seed=2, scale=scale), -1)
    found = divergence(student, teacher)
    assert found.shape == (6,)
    for value, p, q in zip(
        found.tolist(), student.exp().tolist(), teacher.exp().tolist(), strict=True
    ):
        assert value == pytest.approx(by_loop(divergence, p, q), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("divergence", EXACT)
def test_zero_on_equals_with_no_gradient_and_not_negative(divergence):
    own = logits(scale=3.0).requires_grad_()
    student = torch.log_softmax(own, -1)
    same = divergence(student, student.detach())
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-14)
    (grad,) = torch.autograd.grad(same.sum(), own)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-14)
    for seed in range(10):
        other = torch.log_softmax(logits(seed=seed + 5, scale=4.0), -1)
        assert (divergence(student, other) > 0).all()


def test_jensen_shannon_is_symmetric_and_bounded():
    one = torch.log_softmax(logits(seed=3, scale=20.0), -1)
    two = torch.log_softmax(logits(seed=4, scale=20.0), -1)
    torch.testing.assert_close(jensen_shannon(one, two), jensen_shannon(two, one))
    assert (jensen_shannon(one, two) <= LOG2 + 1e-12).all()
    apart = torch.log_softmax(torch.tensor([[0.0, -900.0], [-900.0, 0.0]]).double(), -1)
    torch.testing.assert_close(
        jensen_shannon(apart, apart.flip(0)), torch.full((2,), LOG2).double()
    )


@pytest.mark.parametrize("divergence", EXACT)
def test_gradcheck(divergence):
    def of_logits(own, other):
        return divergence(torch.log_softmax(own, -1), torch.log_softmax(other, -1))

    inputs = (logits(3, 5, 1).requires_grad_(), logits(3, 5, 2).requires_grad_())
    assert torch.autograd.gradcheck(of_logits, inputs)


def test_closed_form_gradients():
    own = logits(seed=1).requires_grad_()
    student, teacher = torch.log_softmax(own, -1), torch.log_softmax(logits(seed=2), -1)
    p, q = student.detach().exp(), teacher.exp()
    kl = reverse_kl(student, teacher)
    (grad,) = torch.autograd.grad(kl.sum(), own, retain_graph=True)
    ratio = student.detach() - teacher
    torch.testing.assert_close(grad, p * (ratio - kl.detach().unsqueeze(1)))
    (grad,) = torch.autograd.grad(forward_kl(student, teacher).sum(), own)
    torch.testing.assert_close(grad, p - q)


@pytest.mark.parametrize("divergence", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stops", [[4, 1], [0, 6, 2]])
def test_merged_stop_ids_give_the_divergence_over_the_merged_support(divergence, dtype, stops):
    own = logits(seed=1, scale=2.0).to(dtype).requires_grad_()
    other = logits(seed=2, scale=2.0).to(dtype)
    event = torch.tensor(stops)
    found = divergence(
        log_distribution(own, event_ids=event), log_distribution(other, event_ids=event)
    )

    def merged(tensor):
        p = torch.softmax(tensor.double(), -1)
        kept = [v for v in range(7) if v not in stops]
        return torch.cat([p[:, kept], p[:, stops].sum(-1, keepdim=True)], -1)

    wide = own.detach().double().requires_grad_()
    wanted = divergence(merged(wide).log(), merged(other).log())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    p, q = merged(wide)[0].tolist(), merged(other)[0].tolist()
    assert found[0].item() == pytest.approx(by_loop(divergence, p, q), rel=1e-5)
    (grad,) = torch.autograd.grad(found.sum(), own)
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), wide)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", EXACT)
@pytest.mark.parametrize("event", [None, [4, 1]])
def test_the_whole_vocabulary_as_top_k_is_the_divergence(divergence, event):
    event = None if event is None else torch.tensor(event)
    own = logits(seed=1).requires_grad_()
    student = log_distribution(own, event_ids=event)
    teacher = log_distribution(logits(seed=2), event_ids=event)
    whole, on_all = divergence(student, teacher), on_top_k(divergence, student, teacher, 7)
    torch.testing.assert_close(on_all, whole)
    grads = [torch.autograd.grad(d.sum(), own, retain_graph=True)[0] for d in (on_all, whole)]
    torch.testing.assert_close(*grads)


def test_top_k_by_hand():
    student = log_of([0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1])
    teacher = log_of([0.5, 0.1, 0.3, 0.1], [0.05, 0.6, 0.05, 0.3])
    # The teacher likes 0 and 2 in the first row, 1 and 3 in the second.
    renormalised = [([0.25, 0.75], [0.625, 0.375]), ([0.5, 0.5], [2 / 3, 1 / 3])]
    for divergence in EXACT:
        found = on_top_k(divergence, student, teacher, 2).tolist()
        assert found == pytest.approx([by_loop(divergence, p, q) for p, q in renormalised])
        assert on_top_k(divergence, student, teacher, 1).tolist() == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("divergence", EXACT)
@pytest.mark.parametrize("k", [2, 3])
def test_top_k_gradient_is_right_and_stays_on_the_support(divergence, k):
    teacher = torch.log_softmax(logits(3, 5, 2), -1)

    def of_logits(own):
        return on_top_k(divergence, torch.log_softmax(own, -1), teacher, k)

    own = logits(3, 5, 1).requires_grad_()
    assert torch.autograd.gradcheck(of_logits, (own,))
    (grad,) = torch.autograd.grad(of_logits(own).sum(), own)
    for row, liked in enumerate(teacher.topk(k).indices.tolist()):
        outside = [v for v in range(5) if v not in liked]
        assert grad[row, outside].abs().max() < 1e-14
        assert grad[row, liked].abs().min() > 1e-6


@pytest.mark.parametrize("k", [0, -1, 8])
def test_top_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=f"vocabulary's 7: {k}"):
        on_top_k(reverse_kl, torch.log_softmax(logits(), -1), torch.log_softmax(logits(), -1), k)


def expectation(estimator, student, other):
    """Sum over every possible token of its probability (a constant) times the estimate."""
    total = torch.zeros(student.shape[0], dtype=student.dtype)
    for v in range(student.shape[1]):
        total = total + student[:, v].detach().exp() * estimator(student[:, v], other[:, v])
    return total


def test_expected_values_of_the_estimators():
    student = torch.log_softmax(logits(seed=1, scale=2.0), -1)
    other = torch.log_softmax(logits(seed=2, scale=2.0), -1)
    kl = reverse_kl(student, other)
    torch.testing.assert_close(expectation(k1, student, other), kl)
    torch.testing.assert_close(expectation(k3, student, other), kl)
    second_moment = (student.exp() * (student - other) ** 2).sum(-1) / 2
    torch.testing.assert_close(expectation(k2, student, other), second_moment)
    assert ((second_moment - kl).abs() > 1e-3).all()  # k2's value is biased, as its docs say


def test_expected_gradients_of_the_estimators():
    own = logits(seed=1, scale=1.5).requires_grad_()
    student, other = torch.log_softmax(own, -1), torch.log_softmax(logits(seed=2), -1)

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), own, retain_graph=True)[0]

    towards, away = gradient(reverse_kl(student, other)), gradient(forward_kl(student, other))
    torch.testing.assert_close(gradient(expectation(k2, student, other)), towards)
    torch.testing.assert_close(gradient(expectation(k3, student, other)), away)
    assert (towards - away).abs().max() > 0.1
    nothing = gradient(expectation(k1, student, other))
    torch.testing.assert_close(nothing, torch.zeros_like(own), rtol=0, atol=1e-14)

    def as_reward(logp, ref):
        return k1(logp, ref).detach() * logp

    torch.testing.assert_close(gradient(expectation(as_reward, student, other)), towards)


def test_estimators_by_hand():
    own, other = log_of(0.5, 0.2, 0.2), log_of(0.25, 0.2, 0.8)
    assert k1(own, other).tolist() == pytest.approx([LOG2, 0.0, -2 * LOG2])
    assert k2(own, other).tolist() == pytest.approx([LOG2**2 / 2, 0.0, 2 * LOG2**2])
    assert k3(own, other).tolist() == pytest.approx([0.5 - 1 + LOG2, 0.0, 4 - 1 - 2 * LOG2])


def test_k3_is_exact_for_small_differences_and_never_negative():
    difference = torch.tensor([1e-3, -1e-3, 1e-4, -2.0, 3.0])
    own = torch.full((5,), -5.0)
    found = k3(own, own + difference)
    exact = [math.expm1(d) - d for d in ((own + difference) - own).double().tolist()]
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), torch.tensor(exact).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_estimators_gradcheck(estimator):
    generator = torch.Generator().manual_seed(0)
    own, other = -torch.rand(2, 9, generator=generator, dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(estimator, (own.requires_grad_(), other.requires_grad_()))


def test_overlap_by_hand():
    student = log_of([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.4, 0.3, 0.05])
    teacher = log_of([0.1, 0.4, 0.2, 0.3], [0.1, 0.2, 0.4, 0.3], [0.1, 0.05, 0.25, 0.6])
    assert top_k_overlap(student, teacher, 1).tolist() == [0.0, 0.0, 0.0]
    assert top_k_overlap(student, teacher, 2).tolist() == [0.5, 1.0, 0.5]
    assert top_k_overlap(student, teacher, 3).tolist() == pytest.approx([2 / 3, 1.0, 2 / 3])
    for k in (4, 5, 1000):
        assert top_k_overlap(student, teacher, k).tolist() == [1.0, 1.0, 1.0]
    assert top_k_overlap(student.requires_grad_(), teacher, 2).requires_grad is False


@pytest.mark.parametrize("k", [1, 3, 5])
def test_overlap_by_loops_and_as_a_symmetric_share(k):
    one, two = logits(20, 9, 1), logits(20, 9, 2)
    found = top_k_overlap(one, two, k)
    for value, a, b in zip(found.tolist(), one.tolist(), two.tolist(), strict=True):
        tops = [set(sorted(range(9), key=x.__getitem__)[-k:]) for x in (a, b)]
        assert value == pytest.approx(len(tops[0] & tops[1]) / k)
    torch.testing.assert_close(found, top_k_overlap(two, one, k))


def test_agreement_by_hand():
    student = log_of([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.1, 0.1])
    teacher = log_of([0.1, 0.5, 0.2, 0.2], [0.1, 0.2, 0.6, 0.1], [0.05, 0.05, 0.3, 0.6])
    # k = 3, first row: both sets hold the tokens 0, 1, 2 or 1, 2, 3; the overlap is 1 and 2, with
    # p = (.6, .4) and q = (5, 2) / 7.
    first = (0.6 * math.log(5 / 7 / 0.6) + 0.4 * math.log(2 / 7 / 0.4)) / 2
    found = top_k_agreement(student[:1], log_of([0.1, 0.5, 0.2, 0.19]), 3)
    assert found.tolist()[0] == pytest.approx([2 / 3, first])
    # k = 2: only token 1 is shared, so p = q = 1; tokens 2 and 3 against 1 and 2; none shared.
    found = top_k_agreement(student, teacher, 2)
    assert found[0].tolist() == pytest.approx([0.5, 0.0])
    assert found[1].tolist() == pytest.approx([0.5, 0.0])
    assert found[2].tolist() == [0.0, 0.0]
    # k = 4 and more: all tokens, so the advantage is -KL(student || teacher) / 4.
    for k in (4, 9):
        whole = top_k_agreement(student, teacher, k)
        torch.testing.assert_close(whole[:, 1], -reverse_kl(student, teacher) / 4)
        assert whole[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert top_k_agreement(student.requires_grad_(), teacher, 2).requires_grad is False


@pytest.mark.parametrize("k", [1, 3, 6])
def test_agreement_by_loops(k):
    one, two = (torch.log_softmax(logits(20, 9, seed), -1) for seed in (1, 2))
    found = top_k_agreement(one, two, k)
    assert found.shape == (20, 2)
    torch.testing.assert_close(found[:, 0], top_k_overlap(one, two, k))
    for (_, value), a, b in zip(found.tolist(), one.tolist(), two.tolist(), strict=True):
        tops = [set(sorted(range(9), key=x.__getitem__)[-k:]) for x in (a, b)]
        both = sorted(tops[0] & tops[1])
        p, q = ([math.exp(x[v]) for v in both] for x in (a, b))
        kl = kl_by_loop([x / sum(p) for x in p], [x / sum(q) for x in q])
        assert value == pytest.approx(-kl / max(1, len(both)))
        assert value <= 1e-12


def test_agreement_with_ids_that_were_merged_into_the_stop_event():
    one, two = (
        log_distribution(logits(6, 5, seed), event_ids=torch.tensor([1, 3])) for seed in (1, 2)
    )
    found = top_k_agreement(one, two, 5)
    assert found.isfinite().all()
    kept = [0, 1, 2, 4]
    torch.testing.assert_close(found[:, 1] * 5, -reverse_kl(one[:, kept], two[:, kept]))


@pytest.mark.parametrize("divergence", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_distributions_stay_finite(divergence, dtype):
    hard = torch.tensor([[0.0, -1e4, -1e4], [-1e4, 0.0, -2e4], [0.0, 0.0, 0.0]])
    own = hard.to(dtype).requires_grad_()
    other = torch.log_softmax(own.detach().roll(1, 0), -1)
    found = divergence(torch.log_softmax(own, -1), other)
    (grad,) = torch.autograd.grad(found.sum(), own)
    assert found.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", EXACT)
def test_no_positions(divergence):
    nothing = torch.zeros(0, 5)
    assert divergence(nothing, nothing).shape == (0,)
    assert on_top_k(divergence, nothing, nothing, 2).shape == (0,)
    assert top_k_overlap(nothing, nothing, 2).shape == (0,)
    assert top_k_agreement(nothing, nothing, 2).shape == (0, 2)
