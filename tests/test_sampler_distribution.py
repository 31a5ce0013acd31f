"""The sampler against exact distributions and dense recomputation."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import sampler_parts
from sampler_parts import RAGGED, V, dense_logps, make, next_probs, tiny_llama
from stableopd.rollout import decoding
from stableopd.types import SamplingSettings

model, early_leave = sampler_parts.model, sampler_parts.early_leave  # fixtures


def chi_square(counts: Counter, probs: dict, total: int) -> tuple[float, int]:
    """Statistic and degrees of freedom; cells expected fewer than 5 times are pooled."""
    statistic, cells, rest_seen, rest_expected = 0.0, 0, 0, 0.0
    for key, p in probs.items():
        if total * p < 5:
            rest_seen, rest_expected = rest_seen + counts[key], rest_expected + total * p
        else:
            statistic += (counts[key] - total * p) ** 2 / (total * p)
            cells += 1
    if rest_expected > 0:
        statistic += (rest_seen - rest_expected) ** 2 / max(rest_expected, 1e-9)
        cells += 1
    return statistic, cells - 1


def critical(df: int) -> float:
    """Upper 1e-4 point of chi-square by Wilson and Hilferty's cube; 3.719 is the normal's."""
    return df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize("df", [10, 30, 144])
def test_critical_value_against_the_exact_tail(df):
    # P(chi2_df > x) for even df is the Poisson tail exp(-x/2) sum_{k < df/2} (x/2)^k / k!.
    half = critical(df) / 2
    terms = [math.exp(-half + k * math.log(half) - math.lgamma(k + 1)) for k in range(df // 2)]
    assert sum(terms) == pytest.approx(1e-4, rel=0.15)


def pair_probs(model: PreTrainedModel, prompt: tuple[int, ...], stops: tuple[int, ...]) -> dict:
    """Exact probabilities of the first two tokens; a stop is alone."""
    first_V = next_probs(model, prompt)
    probs = {}
    for a in range(V):
        if a in stops:
            probs[(a,)] = first_V[a].item()
            continue
        second_V = next_probs(model, (*prompt, a))
        probs |= {(a, b): (first_V[a] * second_V[b]).item() for b in range(V)}
    return probs


@pytest.mark.parametrize("waste", [math.inf, 0])
def test_first_two_tokens_follow_the_exact_distribution(monkeypatch, waste):
    # Flatter than elsewhere, so that most of the 12 x 12 pairs are expected often enough; with
    # no waste allowed the second draw comes after rows have left the batch.
    monkeypatch.setattr(decoding, "WASTE", waste)
    model, total, stops = tiny_llama(sharpness=5.0), 6000, (2, 4)
    # The short prompt is padded on the left by the long one.
    prompts = (("short", (6,)), ("long", (5, 3, 7, 7, 4)))
    rollouts = make(model, stops).sample(prompts, total, SamplingSettings(2), seed=11)
    for prompt_id, prompt in prompts:
        mine = [r for r in rollouts if r.prompt_id == prompt_id]
        counts = Counter(r.completion_ids for r in mine)
        probs = pair_probs(model, prompt, stops)
        assert set(counts) <= set(probs)
        statistic, df = chi_square(counts, probs, total)
        assert df > 25
        assert statistic < critical(df)


def test_the_models_own_generation_config_changes_nothing(model):
    prompts, settings = RAGGED, SamplingSettings(12, temperature=0.9)
    plain = make(model).sample(prompts, 4, settings, seed=3)
    loud = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        min_p=0.2,
        typical_p=0.5,
        repetition_penalty=1.1,
        no_repeat_ngram_size=2,
        suppress_tokens=[3, 5],
        bad_words_ids=[[7]],
        min_new_tokens=6,
        forced_eos_token_id=9,
        sequence_bias={(4,): 9.0},
        max_length=3,
        eos_token_id=[8, 9],
        pad_token_id=5,
        num_beams=1,
        stop_strings=["f"],
        cache_implementation="static",
        return_dict_in_generate=False,
    )
    model.generation_config = loud
    rollouts = make(model).sample(prompts, 4, settings, seed=3)
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in plain]
    assert model.generation_config is loud
    assert loud.top_p == 0.8
    for rollout in rollouts:
        assert rollout.sampler_logps == pytest.approx(dense_logps(model, rollout, V), abs=1e-4)


def test_a_penalised_model_is_sampled_from_its_plain_distribution():
    model, total, stops = tiny_llama(sharpness=5.0), 4000, (2,)
    model.generation_config = GenerationConfig(
        do_sample=True, top_p=0.8, repetition_penalty=1.1, temperature=0.7
    )
    rollouts = make(model, stops).sample((("p", (6, 3)),), total, SamplingSettings(2), seed=4)
    statistic, df = chi_square(
        Counter(r.completion_ids for r in rollouts), pair_probs(model, (6, 3), stops), total
    )
    assert statistic < critical(df)


def test_nothing_is_cut_to_the_top_fifty_by_default():
    # transformers' own default is top_k = 50, which a vocabulary of 12 cannot show.
    model = tiny_llama(sharpness=1.0, vocab_size=80)  # nearly uniform, without ties
    rollouts = make(model, num_tokens=80).sample((("p", (6,)),), 2000, SamplingSettings(1), seed=0)
    assert {token for r in rollouts for token in r.completion_ids} == set(range(80))
    probs_V = next_probs(model, (6,), 80)
    assert 0.005 < probs_V.min() < probs_V.max() < 0.03
    assert rollouts[0].sampler_logps[0] == pytest.approx(
        probs_V[rollouts[0].completion_ids[0]].log().item(), abs=1e-5
    )


SETTINGS = [
    SamplingSettings(10),
    SamplingSettings(10, temperature=0.6),
    SamplingSettings(10, temperature=1.7, top_k=4),
    SamplingSettings(10, temperature=1.3, top_p=0.8),
    SamplingSettings(10, temperature=1.5, top_p=0.7, top_k=5),
    SamplingSettings(10, temperature=0.0),
    SamplingSettings(10, temperature=0.0, top_p=0.5, top_k=2),
]


@pytest.mark.parametrize("num_tokens", [V, 9])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.usefixtures("early_leave")
def test_sampler_logps_equal_the_dense_recomputation(model, settings, num_tokens):
    rollouts = make(model, num_tokens=num_tokens).sample(RAGGED, 5, settings, seed=8)
    for rollout in rollouts:
        assert len(rollout.sampler_logps) == len(rollout.completion_ids)
        assert max(rollout.completion_ids) < num_tokens
        expected = dense_logps(model, rollout, num_tokens)
        assert rollout.sampler_logps == pytest.approx(expected, abs=1e-4)


def test_half_precision_logits_still_give_float32_log_probs(model):
    rollouts = make(model.to(torch.bfloat16)).sample(RAGGED, 2, SamplingSettings(6), seed=8)
    for rollout in rollouts:
        # bfloat16 kernels differ between cached and full passes by far more than float32 rounding.
        assert rollout.sampler_logps == pytest.approx(dense_logps(model, rollout, V), abs=0.3)
        assert all(logp <= 0 for logp in rollout.sampler_logps)
    assert any(logp != float(torch.tensor(logp).bfloat16()) for logp in rollout.sampler_logps)


def test_padded_vocabulary_is_never_drawn(model):
    with torch.no_grad():
        model.lm_head.weight[9:] = model.lm_head.weight[int(next_probs(model, (6,)).argmax())]
        model.lm_head.weight[9:] *= 1.5  # the likeliest tokens are those that may not be drawn
    assert next_probs(model, (6,))[9:].sum() > 0.5
    for temperature in (0.0, 1.0, 5.0):
        settings = SamplingSettings(6, temperature=temperature, top_k=3)
        rollouts = make(model, num_tokens=9).sample((("p", (6,)),), 100, settings, seed=0)
        assert max(token for r in rollouts for token in r.completion_ids) < 9
