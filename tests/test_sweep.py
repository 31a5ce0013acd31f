"""One sweep over the vocabulary against whole distributions, in values and in gradients."""

import functools
import itertools

import pytest
import torch

from stableopd.objective import likeliest as likeliest_module
from stableopd.objective import logprobs
from stableopd.objective.divergence import (
    detached_reverse_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    top_k_agreement,
)
from stableopd.objective.heads import Against, Head
from stableopd.objective.likeliest import BLOCK, BLOCK_ELSEWHERE, block_maxima, likeliest
from stableopd.objective.logprobs import score_tokens
from stableopd.objective.swept import can_sweep, score_by_sweep
from stableopd.objective.tiles import TiledHead

# More rows than a group of `TILE` has, several column tiles, and a last block that is not full.
N, V, D = 37, 203, 8
TILE = 9 * BLOCK
STOPS = torch.tensor([7, 0, 150])
agreement = functools.partial(top_k_agreement, k=6)


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")
    return made.to(torch.get_default_device())


def targets():
    generator = torch.Generator().manual_seed(1)
    target_N = torch.randint(V, (N,), generator=generator, device="cpu").to(STOPS.device)
    target_N[:3] = STOPS
    return target_N


def leaves(dtype=torch.float64):
    shapes = [(N, D), (V, D), (V,)]
    return [rand(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]


def beside(dtype=torch.float64):
    """A teacher with everything that can be asked, and a reference."""
    teacher = Head(rand(V, 5, seed=4, dtype=dtype), None, 1.0, 3.0)
    compares = (agreement, detached_reverse_kl, forward_kl)
    reference = Head(rand(V, D, seed=6, dtype=dtype), rand(V, seed=7, dtype=dtype))
    return [
        Against(rand(N, 5, seed=3, dtype=dtype), teacher, compares, 1.3),
        Against(rand(N, D, seed=5, dtype=dtype), reference, (reverse_kl,)),
    ]


def numbers(scores):
    """All that was scored, and a loss over all that carries gradient."""
    values = [scores.logp_N, scores.entropy_N, scores.stop_logp_N]
    for other in scores.others:
        values += [other.logp_N, other.entropy_N, other.stop_logp_N, *other.comparisons]
    loss = sum(
        (rand(N, seed=30 + i, dtype=v.dtype) * v).sum()
        for i, v in enumerate(values)
        if v.requires_grad
    )
    return values, loss


def same(found, wanted, tolerance):
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_stops", [1, 3])
@pytest.mark.parametrize(
    ("event", "biased", "softcap", "scale", "temperature"),
    list(itertools.product([False, True], [False, True], [None, 2.0], [1.0, 0.6], [1.0, 0.7])),
)
def test_values_and_gradients_equal_those_of_whole_distributions(
    num_stops, event, biased, softcap, scale, temperature
):
    results = []
    ways = (score_tokens, {"chunk_elements": 5 * V}), (score_by_sweep, {"tile_elements": TILE})
    for way, size in ways:
        hidden, weight, bias = leaves()
        head = Head(weight, bias if biased else None, scale, softcap)
        scores = way(
            hidden,
            head,
            targets(),
            stop_ids=STOPS[:num_stops],
            stop_is_event=event,
            temperature=temperature,
            against=beside(),
            **size,
        )
        values, loss = numbers(scores)
        wanted = [hidden, weight, *([bias] if biased else [])]
        results.append([*values, *torch.autograd.grad(loss, wanted)])
        carries = [v.requires_grad for v in values]
        assert carries == [True] + [False] * 7 + [True] + [False] * 3 + [True]
    same(*results, 1e-11)


def test_gradcheck():
    def scores(hidden, weight, bias):
        found = score_by_sweep(
            hidden,
            Head(weight, bias, 0.6, 2.0),
            targets(),
            stop_ids=STOPS,
            stop_is_event=True,
            temperature=0.7,
            against=beside(),
            tile_elements=TILE,
        )
        teacher, reference = found.others
        return found.logp_N, teacher.comparisons[2], reference.comparisons[0]

    assert torch.autograd.gradcheck(scores, leaves(), fast_mode=True)


@pytest.mark.parametrize("elements", [1, BLOCK, 5 * BLOCK + 1, V, N * V, 2**20])
def test_the_size_of_a_tile_changes_nothing(elements):
    def run(size):
        hidden, weight, bias = leaves()
        arguments = {"stop_ids": STOPS, "stop_is_event": True, "against": beside()}
        scores = score_by_sweep(
            hidden, Head(weight, bias), targets(), tile_elements=size, **arguments
        )
        values, loss = numbers(scores)
        return [*values, *torch.autograd.grad(loss, [hidden, weight, bias])]

    same(run(elements), run(3 * TILE), 1e-12)


def test_a_model_is_at_no_distance_from_itself():
    hidden, weight, bias = leaves(torch.float32)
    head = Head(weight, bias, 1.0, 3.0)
    frozen = Head(weight.detach().clone(), bias.detach().clone(), 1.0, 3.0)
    other = Against(hidden.detach().clone(), frozen, (reverse_kl, forward_kl), 0.7)
    scores = score_by_sweep(
        hidden,
        head,
        targets(),
        stop_ids=STOPS,
        stop_is_event=True,
        temperature=0.7,
        against=[other],
        tile_elements=TILE,
    )
    kl_N, counter_N = scores.others[0].comparisons
    torch.testing.assert_close(kl_N, torch.zeros(N), rtol=0, atol=1e-6)
    torch.testing.assert_close(counter_N, torch.zeros(N), rtol=0, atol=1e-6)
    for value_N in (kl_N, counter_N):
        for grad in torch.autograd.grad(value_N.sum(), [hidden, weight, bias], retain_graph=True):
            torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_extreme_logits_stay_finite(dtype, temperature):
    rows = torch.full((4, V), -1e4, dtype=dtype)
    rows[0, 5], rows[1, 1:3], rows[2, 150] = 1e4, 1e4, 1e4
    hidden, eye = rows.clone().requires_grad_(), torch.eye(V, dtype=dtype).requires_grad_()
    other = Against(
        rows.roll(1, 0), Head(torch.eye(V, dtype=dtype)), (reverse_kl, forward_kl), temperature
    )
    scores = score_by_sweep(
        hidden,
        Head(eye),
        torch.tensor([5, 5, 0, 7]),
        stop_ids=STOPS,
        stop_is_event=True,
        temperature=temperature,
        against=[other],
        tile_elements=2 * BLOCK,
    )
    (beside,) = scores.others
    values = [x for s in (scores, beside) for x in (s.logp_N, s.entropy_N, s.stop_logp_N)]
    assert all(v.isfinite().all() for v in [*values, *beside.comparisons])
    assert (scores.entropy_N >= 0).all()
    torch.testing.assert_close(scores.entropy_N[0].item(), 0.0)
    torch.testing.assert_close(scores.logp_N[0].item(), 0.0)
    torch.testing.assert_close(
        scores.logp_N[1].item(), -2e4 / temperature - torch.log(torch.tensor(2.0)).item()
    )
    (scores.logp_N.sum() + sum(c.sum() for c in beside.comparisons)).backward()
    assert hidden.grad.isfinite().all()
    assert eye.grad.isfinite().all()


@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision_equals_that_of_chunks(mixed):
    """Products in bfloat16, sums in float32: by autocast, and by the type of the weight."""

    def run(way, **size):
        hidden = rand(N, D).float().requires_grad_()
        weight = rand(V, D, seed=1).to(torch.float32 if mixed else torch.bfloat16).requires_grad_()
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=mixed):
            found = way(hidden, Head(weight), targets(), stop_ids=STOPS, stop_is_event=True, **size)
        assert found.logp_N.dtype == torch.float32
        found.logp_N.sum().backward()
        assert (hidden.grad.dtype, weight.grad.dtype) == (torch.float32, weight.dtype)
        return found.logp_N, hidden.grad, weight.grad

    found = run(score_by_sweep, tile_elements=TILE)
    wanted = run(score_tokens, chunk_elements=V * N)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.1)


def test_a_logit_that_is_not_a_number_shows():
    hidden, weight, bias = leaves()
    with torch.no_grad():
        weight[180] = torch.nan
    scores = score_by_sweep(
        hidden,
        Head(weight, bias),
        targets(),
        stop_ids=STOPS,
        stop_is_event=True,
        tile_elements=TILE,
    )
    assert scores.logp_N.isnan().all()


def test_without_gradient_none_is_made():
    hidden, weight, bias = leaves()
    with torch.no_grad():
        quiet = score_by_sweep(
            hidden, Head(weight, bias), targets(), stop_ids=STOPS, stop_is_event=True
        )
    assert not quiet.logp_N.requires_grad
    loud = score_by_sweep(
        hidden, Head(weight.detach()), targets(), stop_ids=STOPS, stop_is_event=True
    )
    loud.logp_N.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("block", [BLOCK, BLOCK_ELSEWHERE, 7])
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("num", [1, 17, 64, V])
def test_the_likeliest_tokens_are_those_of_a_sort(monkeypatch, by_block, num, block):
    hidden, weight, bias = (x.detach() for x in leaves())
    if not by_block:  # as where there is no CPU
        monkeypatch.setattr(likeliest_module, "_block_by_block", likeliest_module._gathered)
        monkeypatch.setattr(likeliest_module, "GATHERED_ROWS", 5)
    head = TiledHead(Against(hidden, Head(weight, bias, 1.0, 3.0), (), 0.7))
    rows = slice(4, N)
    logits = head.tile(rows, slice(0, V)).clone()
    found, ids_RK = likeliest(block_maxima(logits, block), block, num, head, rows)
    wanted, wanted_ids = logits.topk(num, dim=1)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(ids_RK, wanted_ids)


def test_tiles_are_whole_blocks_wherever_they_are():
    assert BLOCK % BLOCK_ELSEWHERE == 0


def test_what_a_sweep_can_compare():
    assert can_sweep((reverse_kl, forward_kl, detached_reverse_kl, agreement))
    assert not can_sweep((reverse_kl, jensen_shannon))
    assert not can_sweep((functools.partial(reverse_kl),))


def test_large_vocabularies_are_swept_and_others_are_not(monkeypatch):
    swept = []
    plain = logprobs.score_by_sweep

    def seen(*arguments, **more):
        swept.append(True)
        return plain(*arguments, **more)

    monkeypatch.setattr(logprobs, "score_by_sweep", seen)
    monkeypatch.setattr(logprobs, "SWEEP_VOCABULARY", V)
    monkeypatch.setattr(logprobs, "SWEEP_ELEMENTS", N * V)
    hidden, weight, bias = leaves()
    rest = {"stop_ids": STOPS, "stop_is_event": True}
    score_tokens(hidden, Head(weight, bias), targets(), **rest)
    assert len(swept) == 1
    score_tokens(hidden[1:], Head(weight, bias), targets()[1:], **rest)
    score_tokens(hidden, Head(weight[1:]), targets().clamp(max=V - 2), **rest)
    odd = Against(hidden.detach(), Head(weight.detach()), (jensen_shannon,))
    score_tokens(hidden, Head(weight, bias), targets(), against=[odd], **rest)
    assert len(swept) == 1
