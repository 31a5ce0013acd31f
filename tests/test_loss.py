"""Loss terms against hand values; masked_mean against loops, deletion and accumulation."""

import math

import pytest
import torch

from stableopd.objective.loss import (
    denominator,
    golden_cross_entropy,
    masked_mean,
    policy_gradient,
)

AGGREGATIONS = ["sequence", "token", "constant"]
NAN, INF = float("nan"), float("inf")


def double(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


# ratio, advantage, loss with clip 0.2, its derivative by the log-prob
BY_HAND = [
    (0.5, 2.0, -1.0, -1.0),  # unlikelier and liked: pulled back
    (1.5, 2.0, -2.4, 0.0),  # far enough already
    (0.5, -2.0, 1.6, 0.0),  # far enough already
    (1.5, -2.0, 3.0, 3.0),  # likelier and disliked: pulled back
    (1.1, 2.0, -2.2, -2.2),
    (0.9, 2.0, -1.8, -1.8),
    (1.1, -2.0, 2.2, 2.2),
    (0.9, -2.0, 1.8, 1.8),
    (1.0, 3.0, -3.0, -3.0),
    (1.0, -3.0, 3.0, 3.0),
    (1.3, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), BY_HAND)
def test_clipped_policy_gradient_by_hand(ratio, advantage, loss, slope):
    old = double([-0.7])
    logp = (old + math.log(ratio)).requires_grad_()
    found = policy_gradient(logp, old, double([advantage]), 0.2)
    assert found.item() == pytest.approx(loss, abs=1e-15)
    found.sum().backward()
    assert logp.grad.item() == pytest.approx(slope, abs=1e-15)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), BY_HAND)
def test_policy_gradient_without_clip(ratio, advantage, loss, slope):
    old = double([-0.7])
    logp = (old + math.log(ratio)).requires_grad_()
    found = policy_gradient(logp, old, double([advantage]))
    found.sum().backward()
    assert found.item() == pytest.approx(-ratio * advantage, abs=1e-15)
    assert logp.grad.item() == pytest.approx(-ratio * advantage, abs=1e-15)


@pytest.mark.parametrize("clip", [None, 0.0, 0.2, 5.0])
def test_at_ratio_one_the_gradient_is_that_of_the_log_prob(clip):
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    advantage = double([2.0, -3.0, 0.0, 0.5, -0.1, 1e4, -1e4, 1.0])
    logp = torch.log_softmax(logits, -1)[torch.arange(8), torch.arange(8) % 5]
    found = policy_gradient(logp, logp.detach(), advantage, clip)
    assert torch.equal(found, -advantage)
    (grad,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((-advantage * logp).sum(), logits)
    torch.testing.assert_close(grad, wanted)


def test_policy_gradient_holds_old_log_prob_and_advantage_constant():
    logp, old, advantage = double([-1.0], True), double([-1.1], True), double([2.0], True)
    policy_gradient(logp, old, advantage, 0.2).sum().backward()
    assert logp.grad is not None
    assert old.grad is None
    assert advantage.grad is None


def test_policy_gradient_gradcheck_off_the_corners():
    old = double([-1.0] * 8)
    logp = old + double([0.05, -0.05, 0.5, -0.5] * 2)
    advantage = double([1.0] * 4 + [-2.0] * 4)
    for clip in (None, 0.2):
        assert torch.autograd.gradcheck(
            lambda x, clip=clip: policy_gradient(x, old, advantage, clip), (logp.requires_grad_(),)
        )


def test_golden_cross_entropy():
    logp = double([-0.5, 0.0, -1e4], True)
    found = golden_cross_entropy(logp)
    assert found.tolist() == [0.5, 0.0, 1e4]
    found.sum().backward()
    assert logp.grad.tolist() == [-1.0] * 3


def test_denominator_by_hand():
    counted = [3, 0, 5, 1]
    assert denominator(counted, "sequence", 10) == 3.0
    assert denominator(counted, "token", 10) == 9.0
    assert denominator(counted, "constant", 10) == 30.0
    for aggregation in AGGREGATIONS:
        assert denominator([], aggregation, 10) == denominator([0, 0], aggregation, 10) == 0.0
    with pytest.raises(ValueError, match="unknown aggregation: 'mean'"):
        denominator(counted, "mean", 10)


def mean_by_loop(value, mask, row, aggregation, max_length):
    """The mean over a whole step, sequence by sequence."""
    total, sequences, tokens = 0.0, 0, 0
    for own in sorted(set(row)):
        mine = [v for v, m, r in zip(value, mask, row, strict=True) if r == own and m]
        if not mine:
            continue
        sequences += 1
        tokens += len(mine)
        total += sum(mine) / len(mine) if aggregation == "sequence" else sum(mine)
    count = {"sequence": sequences, "token": tokens, "constant": sequences * max_length}[
        aggregation
    ]
    return total / count if count else 0.0


ROW = [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4]
MASKS = {
    "all": [1] * 15,
    "some": [1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1],
    "a row without": [1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1],
    "the last row without": [1] * 13 + [0, 0],
    "one token": [0] * 7 + [1] + [0] * 7,
    "none": [0] * 15,
}


def counts(mask, row):
    return [sum(m for m, r in zip(mask, row, strict=True) if r == own) for own in range(5)]


def values(seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(15, generator=generator, dtype=torch.float64)
    return found.requires_grad_(grad)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masked_mean_by_loop_and_masked_equals_deleted(aggregation, mask):
    value, keep, row = values(grad=True), torch.tensor(mask).bool(), torch.tensor(ROW)
    divisor = denominator(counts(mask, ROW), aggregation, 11)
    found = masked_mean(value, keep, row, aggregation, divisor)
    assert found.shape == ()
    wanted = mean_by_loop(value.tolist(), mask, ROW, aggregation, 11)
    assert found.item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)

    all_kept = torch.ones(int(keep.sum()), dtype=torch.bool)
    deleted = masked_mean(value[keep], all_kept, row[keep], aggregation, divisor)
    torch.testing.assert_close(deleted, found, rtol=1e-14, atol=1e-15)
    grads = [torch.autograd.grad(x, value)[0] for x in (found, deleted)]
    torch.testing.assert_close(*grads)
    assert torch.count_nonzero(grads[0][~keep]) == 0
    if keep.any():
        assert (grads[0][keep] > 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_masked_never_reaches_value_or_gradient(aggregation, poison):
    mask = MASKS["some"]
    keep, row = torch.tensor(mask).bool(), torch.tensor(ROW)
    divisor = denominator(counts(mask, ROW), aggregation, 11)
    clean = values(grad=True)
    dirty = torch.where(keep, values(), poison).requires_grad_()
    means = [masked_mean(x, keep, row, aggregation, divisor) for x in (clean, dirty)]
    assert torch.equal(*means)
    for mean in means:
        mean.backward()
    assert torch.equal(clean.grad, dirty.grad)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("number", [15, 0])
def test_nothing_counted_is_zero_with_a_zero_gradient(aggregation, number):
    value = torch.full((number,), NAN, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(number, dtype=torch.bool)
    found = masked_mean(value, none, torch.tensor(ROW)[:number], aggregation, 0.0)
    assert found.item() == 0.0
    found.backward()
    assert torch.equal(value.grad, torch.zeros(number, dtype=torch.float64))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_divisor_is_used_as_given(aggregation):
    """A rank's share of the divisor may lie below one: 1 sequence over 4 ranks is 0.25."""
    value, keep, row = values(), torch.ones(15, dtype=torch.bool), torch.tensor(ROW)
    one = masked_mean(value, keep, row, aggregation, 1.0)
    for divisor in (0.25, 3.0, 0.8):
        found = masked_mean(value, keep, row, aggregation, divisor)
        torch.testing.assert_close(found, one / divisor)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_constant_value_has_itself_as_mean(aggregation):
    value = torch.full((15,), 0.37, dtype=torch.float64)
    for mask in list(MASKS.values())[:-1]:
        max_length = 1 if aggregation != "constant" else sum(mask)
        divisor = denominator(counts(mask, ROW), aggregation, max_length)
        found = masked_mean(
            value, torch.tensor(mask).bool(), torch.tensor(ROW), aggregation, divisor
        )
        rows = sum(n > 0 for n in counts(mask, ROW))
        assert found.item() == pytest.approx(0.37 / (rows if aggregation == "constant" else 1))


def small_model():
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6)
    return torch.nn.Sequential(embedding, torch.nn.Tanh(), head).double()


def step_gradients(split, mask, aggregation, clip):
    """Gradients of one optimizer step whose sequences are put in micro-batches as in `split`."""
    model = small_model()
    tokens = torch.randint(6, (16,), generator=torch.Generator().manual_seed(1))
    old, advantage = values(2) * 0.1 - 1.8, values(3)
    keep, row = torch.tensor(mask).bool(), torch.tensor(ROW)
    divisor = denominator(counts(mask, ROW), aggregation, 11)
    total = 0.0
    for sequences in split:
        rows, places = [], []
        for new, own in enumerate(sequences):
            mine = (row == own).nonzero().flatten()
            rows += [new] * len(mine)
            places.append(mine)
        here = torch.cat(places)
        logp = torch.log_softmax(model(tokens[here]), -1)
        logp = logp.gather(1, tokens[here + 1].unsqueeze(1)).squeeze(1)
        loss = policy_gradient(logp, old[here], advantage[here], clip)
        mean = masked_mean(loss, keep[here], torch.tensor(rows), aggregation, divisor)
        mean.backward()
        total += mean.item()
    return total, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("clip", [None, 0.2])
def test_micro_batches_add_up_to_one_batch(aggregation, mask, clip):
    whole, whole_grads = step_gradients([[0, 1, 2, 3, 4]], mask, aggregation, clip)
    for split in ([[0, 1], [2, 3, 4]], [[3], [1], [4], [0], [2]], [[4, 2, 0], [1, 3]]):
        total, grads = step_gradients(split, mask, aggregation, clip)
        assert total == pytest.approx(whole, abs=1e-13)
        for got, want in zip(grads, whole_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    if any(mask):
        assert max(g.abs().max() for g in whole_grads) > 1e-4


def test_sequences_weigh_the_same_and_tokens_weigh_the_same():
    """Unequal lengths: four tokens of 1 in one sequence, one token of 6 in another."""
    value, row = double([1.0, 1.0, 1.0, 1.0, 6.0]), torch.tensor([0, 0, 0, 0, 1])
    keep = torch.ones(5, dtype=torch.bool)
    for aggregation, wanted in (("sequence", 3.5), ("token", 2.0), ("constant", 0.5)):
        divisor = denominator([4, 1], aggregation, 10)
        assert masked_mean(value, keep, row, aggregation, divisor).item() == pytest.approx(wanted)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_long_sequences_in_float32(aggregation):
    number = 100_000
    value = torch.rand(number, generator=torch.Generator().manual_seed(0))
    row = torch.arange(number) // 60_000
    keep = torch.arange(number) % 3 > 0
    found = masked_mean(value, keep, row, aggregation, 7.0)
    exact = masked_mean(value.double(), keep, row, aggregation, 7.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
