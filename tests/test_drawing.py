"""Drawing a token from logits, against dense formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from stableopd.rollout.drawing import BLOCK, draw, greedy, wide_dtype

SIZES = (1, 12, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 5 * BLOCK + 77)
LAST = 1 - 2**-53  # the largest uniform number below 1


def uniform(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand(rows, dtype=torch.float64, generator=generator, device="cpu")
    return made.to(torch.get_default_device())


def dense(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """The first token whose cumulative probability exceeds the uniform number."""
    sum_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    return (sum_BV <= uniform_B[:, None] * sum_BV[:, -1:]).sum(-1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("num_tokens", SIZES)
def test_float64_draws_are_those_of_the_dense_inverse(num_tokens, temperature):
    torch.manual_seed(num_tokens)
    logits_BV, uniform_B = 3 * torch.randn(200, num_tokens, dtype=torch.float64), uniform(200)
    token_B, logp_B = draw(logits_BV, uniform_B, temperature)
    assert torch.equal(token_B, dense(logits_BV, uniform_B, temperature))
    expected_BV = (logits_BV / temperature).log_softmax(-1)
    torch.testing.assert_close(logp_B, expected_BV.gather(1, token_B[:, None])[:, 0])


@pytest.mark.parametrize("layout", ["rows", "columns", "slice"])
@pytest.mark.parametrize("num_tokens", SIZES)
def test_float32_draws_differ_by_rounding_alone(num_tokens, layout):
    torch.manual_seed(num_tokens)
    logits_BV, uniform_B = 3 * torch.randn(200, num_tokens + 5), uniform(200)
    logits_BV = logits_BV[:, :-5] if layout == "slice" else logits_BV[:, :-5].contiguous()
    if layout == "columns":
        logits_BV = logits_BV.T.contiguous().T
    kept_BV = logits_BV.clone()
    token_B, logp_B = draw(logits_BV, uniform_B, 0.8)
    assert torch.equal(logits_BV, kept_BV)
    assert logp_B.dtype == torch.float32
    prob_BV = (logits_BV.double() / 0.8).softmax(-1)
    above_B = prob_BV.cumsum(-1).gather(1, token_B[:, None])[:, 0]
    prob_B = prob_BV.gather(1, token_B[:, None])[:, 0]
    assert (above_B - prob_B - uniform_B).max() < 1e-6
    assert (uniform_B - above_B).max() < 1e-6
    torch.testing.assert_close(logp_B.double(), prob_B.log(), atol=2e-5, rtol=1e-6)


def test_counts_follow_the_distribution():
    logits_V, total = torch.tensor([0.0, 1.0, -2.0, 0.5, -math.inf, 2.0, -1.0]), 20_000
    token_B, _ = draw(logits_V.expand(total, -1), uniform(total), 1.5)
    counts_V = torch.bincount(token_B, minlength=7).double()
    expected_V = total * (logits_V.double() / 1.5).softmax(-1)
    assert counts_V[4] == 0
    possible = expected_V > 0
    statistic = ((counts_V - expected_V)[possible] ** 2 / expected_V[possible]).sum()
    assert statistic < 25.7  # chi-square with 5 degrees of freedom exceeds it with p = 1e-4


@pytest.mark.parametrize("value", [-math.inf, -200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_without_probability_is_never_drawn(dtype, value):
    # Runs of impossible tokens at the ends of the vocabulary and around the ends of blocks.
    num_tokens = 4 * BLOCK + 9
    ends = {place + shift for place in range(0, num_tokens + 1, BLOCK) for shift in (-2, -1, 0, 1)}
    possible = [i for i in range(num_tokens) if i not in ends and not BLOCK < i < 2 * BLOCK]
    possible = [i for i in possible if i < 4 * BLOCK]
    torch.manual_seed(0)
    logits_BV = torch.full((1000, num_tokens), value if dtype == torch.float32 else value * 5)
    logits_BV = logits_BV.to(dtype)
    logits_BV[:, possible] = torch.randn(1000, len(possible), dtype=dtype)
    # Numbers at 0, at 1, and at the very ends of blocks and tokens.
    sum_BV = logits_BV.double().softmax(-1).cumsum(-1)
    at_end_B = sum_BV[torch.arange(1000), torch.randint(num_tokens, (1000,))]
    for uniform_B in (
        torch.zeros(1000, dtype=torch.float64),
        torch.full((1000,), LAST, dtype=torch.float64),
        at_end_B.clamp(max=LAST),
        sum_BV[:, 3 * BLOCK - 1].clamp(max=LAST),
        uniform(1000),
    ):
        token_B, logp_B = draw(logits_BV, uniform_B)
        assert set(token_B.tolist()) <= set(possible)
        assert torch.isfinite(logp_B).all()
    first_B, _ = draw(logits_BV, torch.zeros(1000, dtype=torch.float64))
    last_B, _ = draw(logits_BV, torch.full((1000,), LAST, dtype=torch.float64))
    assert set(first_B.tolist()) == {possible[0]}
    assert max(last_B.tolist()) == possible[-1]


def test_one_possible_token_is_certain():
    logits_BV = torch.full((3, 2 * BLOCK + 5), -math.inf)
    logits_BV[[0, 1, 2], [0, BLOCK, 2 * BLOCK + 4]] = 7.0
    for number in (0.0, 0.5, LAST):
        token_B, logp_B = draw(logits_BV, torch.full((3,), number, dtype=torch.float64))
        assert token_B.tolist() == [0, BLOCK, 2 * BLOCK + 4]
        assert logp_B.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_logits_that_are_not_finite_give_nan(bad):
    logits_BV = torch.randn(2, BLOCK + 3)
    logits_BV[0, 5] = bad or 0.0
    if bad is None:
        logits_BV[0] = -math.inf
    for token_B, logp_B in (draw(logits_BV, uniform(2)), greedy(logits_BV)):
        assert ((token_B >= 0) & (token_B < BLOCK + 3)).all()
        assert logp_B.isnan().tolist() == [True, False]


def test_large_logits_do_not_overflow():
    logits_BV = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    token_B, logp_B = draw(logits_BV, torch.zeros(1, dtype=torch.float64))
    assert token_B.item() == 0
    assert logp_B.item() == pytest.approx(-math.log1p(math.exp(-1)), abs=1e-6)


def test_the_likeliest_token_and_its_log_prob():
    torch.manual_seed(0)
    logits_BV = torch.randn(9, 700)
    token_B, logp_B = greedy(logits_BV)
    assert torch.equal(token_B, logits_BV.argmax(-1))
    torch.testing.assert_close(logp_B, logits_BV.log_softmax(-1).amax(-1))


def test_mps_has_no_float64():
    assert wide_dtype(torch.device("mps")) == torch.float32
    assert wide_dtype(torch.device("cpu")) == torch.float64
