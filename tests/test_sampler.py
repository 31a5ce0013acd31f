"""The sampler against exact distributions, dense recomputation and plain greedy decoding."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from stableopd.rollout import sampler as sampler_module
from stableopd.rollout.sampler import TransformersSampler
from stableopd.types import DataError, ModelError, Rollout, SamplingSettings, StopReason

V = 12
RAGGED = (("long", (5, 3, 7, 7, 4, 9, 3)), ("one", (6,)), ("mid", (8, 1, 4)))


class LetterTokenizer:
    """Ids as letters; id 1 is special, id 2 is a stop that the tokenizer does not call special."""

    def __init__(self, pad_token_id: int | None = None) -> None:
        self.pad_token_id = pad_token_id

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + i) for i in ids if not (skip_special_tokens and i == 1))


def tiny_llama(seed: int = 0, sharpness: float = 12.0, vocab_size: int = V) -> LlamaForCausalLM:
    """A random model whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_dropout=0.5,  # shows when a training flag is forgotten
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def make(model: PreTrainedModel, stop_ids: tuple[int, ...] = (2,), **options: int):
    num_tokens = options.pop("num_tokens", V)
    return TransformersSampler(model, LetterTokenizer(), stop_ids, num_tokens, **options)  # type: ignore[arg-type]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "SEGMENT_TOKENS", 3)


@torch.no_grad()
def next_probs(model: PreTrainedModel, ids: tuple[int, ...], num_tokens: int = V) -> torch.Tensor:
    """Exact next-token distribution after unpadded ids, in float64."""
    logits_V = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].double()
    return logits_V[:num_tokens].softmax(0)


def truncate(probs_V: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k, then the smallest set of likeliest tokens that reaches top-p, by plain loops."""
    order = sorted(range(len(probs_V)), key=lambda i: -probs_V[i].item())
    if top_k:
        order = order[:top_k]
    total = sum(probs_V[i].item() for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += probs_V[i].item() / total
        if mass >= top_p:
            break
    out_V = torch.zeros_like(probs_V)
    out_V[kept] = probs_V[kept]
    return out_V / out_V.sum()


@torch.no_grad()
def dense_logps(model: PreTrainedModel, rollout: Rollout, num_tokens: int) -> list[float]:
    """Log-probs of the completion from one forward pass over the unpadded sequence, no cache."""
    ids = rollout.prompt_ids + rollout.completion_ids
    logits_TV = model.eval()(input_ids=torch.tensor([ids])).logits[0].double()
    temperature = rollout.settings.temperature or 1.0
    result = []
    for t, token in enumerate(rollout.completion_ids, start=len(rollout.prompt_ids) - 1):
        probs_V = (logits_TV[t, :num_tokens] / temperature).softmax(0)
        if rollout.settings.temperature:
            probs_V = truncate(probs_V, rollout.settings.top_k, rollout.settings.top_p)
        result.append(probs_V[token].log().item())
    return result


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompt: tuple[int, ...], stops: tuple[int, ...], budget: int
) -> tuple[int, ...]:
    """Greedy decoding by full forward passes over one unpadded sequence."""
    ids = list(prompt)
    for _ in range(budget):
        ids.append(int(next_probs(model, tuple(ids)).argmax()))
        if ids[-1] in stops:
            break
    return tuple(ids[len(prompt) :])


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


@pytest.mark.parametrize("segment", [32, 1])
def test_first_two_tokens_follow_the_exact_distribution(monkeypatch, segment):
    # Flatter than elsewhere, so that most of the 12 x 12 pairs are expected often enough; with
    # segments of one token the second draw comes after rows have left the batch.
    monkeypatch.setattr(sampler_module, "SEGMENT_TOKENS", segment)
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
@pytest.mark.usefixtures("short_segments")
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


@pytest.mark.parametrize("segment", [1, 3, 32])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_greedy_agrees_token_by_token(monkeypatch, segment, seed):
    monkeypatch.setattr(sampler_module, "SEGMENT_TOKENS", segment)
    model, stops = tiny_llama(seed), (2, 9, 11)
    prompts = [*RAGGED, *((f"one{i}", (i,)) for i in range(V))]
    rollouts = make(model, stops).sample(prompts, 1, SamplingSettings(20, 0.0), seed=0)
    reasons = {r.stop_reason for r in rollouts}
    lengths = {len(r.completion_ids) for r in rollouts}
    for (_, prompt), rollout in zip(prompts, rollouts, strict=True):
        assert rollout.completion_ids == greedy(model, prompt, stops, 20)
        plain = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
            max_new_tokens=20, do_sample=False,
            eos_token_id=list(stops), pad_token_id=0,
        )  # fmt: skip
        assert rollout.completion_ids == tuple(plain[0, len(prompt) :].tolist())
    assert len(lengths) > 2, "the case is not ragged"
    assert StopReason.STOP in reasons


def test_greedy_with_a_sliding_window_goes_through_the_cache_of_the_window(monkeypatch):
    monkeypatch.setattr(sampler_module, "SEGMENT_TOKENS", 4)
    torch.manual_seed(3)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=6,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(12)
    prompts = [*RAGGED, *((f"one{i}", (i,)) for i in range(V))]
    sampler = make(model, (2, 9))
    rollouts = sampler.sample(prompts, 1, SamplingSettings(16, 0.0), seed=0)
    assert sampler._drops_rows is True
    for (_, prompt), rollout in zip(prompts, rollouts, strict=True):
        assert rollout.completion_ids == greedy(model, prompt, (2, 9), 16)
        assert rollout.sampler_logps == pytest.approx(dense_logps(model, rollout, V), abs=1e-4)
    assert len({len(r.completion_ids) for r in rollouts}) > 2


def test_rows_that_stopped_leave_the_batch(monkeypatch, model):
    monkeypatch.setattr(sampler_module, "SEGMENT_TOKENS", 2)
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rollouts = make(model, (2, 9)).sample(RAGGED, 8, SamplingSettings(30, 1.5), seed=1)
    handle.remove()
    lengths = sorted(len(r.completion_ids) for r in rollouts)
    assert lengths[0] < lengths[-1]
    probe, *rest = widths
    # Step t of the run is step t of a segment that began with every row not done before it.
    steps = range(lengths[-1])
    alive = [sum(length > step - step % 2 for length in lengths) for step in steps]
    assert probe == 1
    assert rest == alive


def test_an_unselectable_cache_falls_back_to_plain_generation(monkeypatch, model):
    with_rows_dropped = make(model, (2, 9)).sample(RAGGED, 2, SamplingSettings(9, 0.0), seed=0)
    monkeypatch.setattr(sampler_module, "SEGMENT_TOKENS", 2)
    monkeypatch.setattr(sampler_module, "SELECTABLE_LAYERS", ())
    calls: list[int] = []
    original = TransformersSampler._generate

    def counted(self, *args):
        calls.append(args[3])
        return original(self, *args)

    monkeypatch.setattr(TransformersSampler, "_generate", counted)
    rollouts = make(model, (2, 9)).sample(RAGGED, 2, SamplingSettings(9, 0.0), seed=0)
    assert calls == [1, 9]  # the probe, then everything at once
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in with_rows_dropped]


@pytest.mark.usefixtures("short_segments")
def test_stop_or_length(model):
    for stops in [(2,), (2, 9), (0, 5, 2)]:
        rollouts = make(model, stops).sample(RAGGED, 20, SamplingSettings(8, 1.5), seed=5)
        reasons = Counter(r.stop_reason for r in rollouts)
        assert len(reasons) == 2
        for rollout in rollouts:
            assert not set(rollout.completion_ids[:-1]) & set(stops)
            if rollout.stop_reason is StopReason.STOP:
                assert rollout.completion_ids[-1] in stops
            else:
                assert rollout.completion_ids[-1] not in stops
                assert len(rollout.completion_ids) == 8


def test_a_stop_as_the_last_token_of_the_budget_is_a_stop(model):
    stop = int(next_probs(model, (6,)).argmax())
    (rollout,) = make(model, (stop,)).sample((("p", (6,)),), 1, SamplingSettings(1, 0.0), seed=0)
    assert rollout.completion_ids == (stop,)
    assert rollout.stop_reason is StopReason.STOP


@pytest.mark.parametrize("pad", [None, 0, 2, 9])
def test_the_pad_id_cuts_nothing(model, pad):
    # The prompts hold the pad and stop ids, and id 0 is an ordinary token of completions.
    prompts = (("a", (2, 9, 0, 5)), ("b", (0,)), ("c", (9, 9)))
    settings = SamplingSettings(12, 1.5)
    expected = make(model, (2, 9)).sample(prompts, 6, settings, seed=7)
    model.generation_config.pad_token_id = pad
    model.config.pad_token_id = pad
    rollouts = TransformersSampler(model, LetterTokenizer(pad), (2, 9), V).sample(  # type: ignore[arg-type]
        prompts, 6, settings, seed=7
    )
    assert rollouts == expected
    assert any(0 in r.completion_ids for r in rollouts)
    for rollout in rollouts:
        assert rollout.sampler_logps == pytest.approx(dense_logps(model, rollout, V), abs=1e-4)


def test_order_and_fields(model):
    settings = SamplingSettings(5)
    rollouts = make(model).sample(RAGGED, 3, settings, seed=1)
    assert [r.prompt_id for r in rollouts] == ["long"] * 3 + ["one"] * 3 + ["mid"] * 3
    by_id = dict(RAGGED)
    for rollout in rollouts:
        assert rollout.prompt_ids == by_id[rollout.prompt_id]
        assert rollout.settings is settings
    assert len({r.completion_ids for r in rollouts[:3]}) > 1
    assert make(model).sample((), 3, settings, seed=1) == []


def test_text_has_neither_the_stop_nor_special_tokens(model):
    rollouts = make(model).sample(RAGGED, 30, SamplingSettings(8, 2.0), seed=1)
    assert any(1 in r.completion_ids for r in rollouts)
    for rollout in rollouts:
        letters = "".join(chr(97 + i) for i in rollout.completion_ids if i not in (1, 2))
        assert rollout.completion == letters


def test_the_seed_decides_and_the_process_notices_nothing(model):
    settings = SamplingSettings(8, 1.5)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = make(model).sample(RAGGED, 4, settings, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    torch.rand(5)
    assert make(model).sample(RAGGED, 4, settings, seed=5) == first
    assert make(model).sample(RAGGED, 4, settings, seed=6) != first


def test_random_state_comes_back_after_an_error(model):
    before = torch.get_rng_state()
    config, model.forward = model.generation_config, None  # type: ignore[assignment]
    model.train()
    with pytest.raises(TypeError):
        make(model).sample(RAGGED, 1, SamplingSettings(4), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generation_config is config


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_batch_size_changes_no_greedy_rollout(model, batch_size):
    settings = SamplingSettings(9, 0.0)
    widths: list[int] = []
    expected = make(model, (2, 9)).sample(RAGGED, 2, settings, seed=0)
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    rollouts = make(model, (2, 9), batch_size=batch_size).sample(RAGGED, 2, settings, seed=0)
    handle.remove()
    assert max(widths) == min(batch_size, 6)
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected]
    for one, other in itertools.pairwise(rollouts):
        if one.prompt_id == other.prompt_id:
            assert one.completion_ids == other.completion_ids


# transformers 5.23 renames the method; releases before it know this name alone.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is:FutureWarning")
def test_training_flags_checkpointing_and_use_cache_are_left_alone(model):
    settings = SamplingSettings(8)
    expected = make(model).sample(RAGGED, 2, settings, seed=2)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    assert make(model).sample(RAGGED, 2, settings, seed=2) == expected
    assert [module.training for module in model.modules()] == flags
    assert model.config.use_cache is False
    assert model.model.layers[0].gradient_checkpointing
    assert torch.is_grad_enabled()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


# PEFT 0.21 reads a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_is_sampled_with_its_adapter():
    peft = pytest.importorskip("peft")
    base = tiny_llama()
    base.generation_config = GenerationConfig(do_sample=True, top_p=0.3, repetition_penalty=1.4)
    before = make(base, (2, 9)).sample(RAGGED, 3, SamplingSettings(10), seed=2)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    model.train()
    rollouts = make(model, (2, 9)).sample(RAGGED, 3, SamplingSettings(10), seed=2)
    assert [r.completion_ids for r in rollouts] != [r.completion_ids for r in before]
    assert model.training
    assert base.generation_config.top_p == 0.3
    for rollout in rollouts:
        assert rollout.sampler_logps == pytest.approx(dense_logps(model, rollout, V), abs=1e-4)
    with model.disable_adapter():
        assert make(model, (2, 9)).sample(RAGGED, 3, SamplingSettings(10), seed=2) == before


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(DataError, match="'empty' has no token"):
        make(model).sample((("empty", ()),), 1, SamplingSettings(4), seed=0)


@pytest.mark.parametrize("stops", [(), (V,), (2, -1)])
def test_impossible_stop_ids_are_refused(model, stops):
    with pytest.raises(ModelError, match="stop ids"):
        make(model, stops)
