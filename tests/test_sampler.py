"""The sampler against plain greedy decoding, its stops, its order, and what it leaves alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache

import sampler_parts
from sampler_parts import RAGGED, LetterTokenizer, V, dense_logps, make, next_probs, tiny_llama
from stableopd import hidden
from stableopd.rollout import decoding
from stableopd.rollout.sampler import TransformersSampler
from stableopd.types import DataError, ModelError, SamplingSettings, StopReason, TrainingError

model, early_leave = sampler_parts.model, sampler_parts.early_leave  # fixtures


@contextmanager
def widths_of(model: PreTrainedModel) -> Iterator[list[int]]:
    """Collects how many rows each forward pass has."""
    widths: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield widths
    handle.remove()


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


@pytest.mark.parametrize(("waste", "room"), [(0, 1), (0.25, 64), (math.inf, 5)])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_greedy_agrees_token_by_token(monkeypatch, waste, room, seed):
    monkeypatch.setattr(decoding, "WASTE", waste)
    monkeypatch.setattr(decoding, "ROOM", room)
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


@pytest.mark.usefixtures("early_leave")
def test_greedy_with_a_sliding_window_goes_through_the_cache_of_the_window():
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
    with widths_of(model) as widths:
        rollouts = make(model, (2, 9)).sample(prompts, 1, SamplingSettings(16, 0.0), seed=0)
    assert widths[-1] < widths[0] == len(prompts)
    for (_, prompt), rollout in zip(prompts, rollouts, strict=True):
        assert rollout.completion_ids == greedy(model, prompt, (2, 9), 16)
        assert rollout.sampler_logps == pytest.approx(dense_logps(model, rollout, V), abs=1e-4)
    assert len({len(r.completion_ids) for r in rollouts}) > 2


@pytest.mark.parametrize("waste", [0, 0.25, 2])
def test_rows_that_stopped_leave_the_batch(monkeypatch, model, waste):
    monkeypatch.setattr(decoding, "WASTE", waste)
    with widths_of(model) as widths:
        rollouts = make(model, (2, 9)).sample(RAGGED, 8, SamplingSettings(30, 1.5), seed=1)
    lengths = [len(r.completion_ids) for r in rollouts]
    assert min(lengths) < max(lengths)
    # The prompts are read once; then step t computes the rows that were there when, last, the
    # tokens computed in vain reached the share of those that went on.
    expected, there, wasted = [len(RAGGED)], 24, 0
    for step in range(1, max(lengths)):
        going = sum(length > step for length in lengths)
        wasted += there - going
        if going < there and wasted >= waste * going:
            there, wasted = going, 0
        expected.append(there)
    assert widths == expected


def test_no_rollout_depends_on_which_rows_have_left(monkeypatch, model):
    settings, found = SamplingSettings(30, 1.5), []
    for waste in (0, 1, math.inf):
        monkeypatch.setattr(decoding, "WASTE", waste)
        found.append(make(model, (2, 9)).sample(RAGGED, 8, settings, seed=1))
    for other in found[1:]:
        assert [r.completion_ids for r in other] == [r.completion_ids for r in found[0]]


def test_drawn_tokens_are_looked_at_rarely_where_a_look_waits(monkeypatch, model):
    settings = SamplingSettings(21, 1.5)
    expected = make(model, (2, 9)).sample(RAGGED, 8, settings, seed=1)
    # A device that is no CPU is not at hand; its rhythm is.
    monkeypatch.setattr(decoding, "LOOK_EVERY", {"cpu": 8})
    looks: list[int] = []
    read = decoding._read
    monkeypatch.setattr(
        decoding, "_read", lambda new, *rest: (looks.append(len(new)), read(new, *rest))
    )
    with widths_of(model) as widths:
        rollouts = make(model, (2, 9)).sample(RAGGED, 8, settings, seed=1)
    assert looks == [8, 8, 5]
    assert widths[7] == 24 > widths[8]
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected]


def test_an_unselectable_cache_keeps_its_rows(monkeypatch, model):
    settings = SamplingSettings(9, 1.5)
    with_rows_dropped = make(model, (2, 9)).sample(RAGGED, 2, settings, seed=0)
    monkeypatch.setattr(decoding, "SELECTABLE_LAYERS", ())
    with widths_of(model) as widths:
        rollouts = make(model, (2, 9)).sample(RAGGED, 2, settings, seed=0)
    assert set(widths) == {6}
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in with_rows_dropped]


def test_a_cache_that_should_be_selectable_and_is_not_is_told_once(monkeypatch, caplog, model):
    class Odd(DynamicCache):
        pass

    hidden.tell_slow.cache_clear()
    monkeypatch.setattr(transformers.generation.utils, "DynamicCache", Odd)
    for seed in range(2):
        make(model, (2, 9)).sample(RAGGED, 2, SamplingSettings(9, 1.5), seed=seed)
    (told,) = caplog.records
    assert "LlamaForCausalLM" in told.getMessage()
    assert "Odd" in told.getMessage()


def test_a_model_without_keys_and_values_is_sampled(caplog):
    torch.manual_seed(1)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2)
    )
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(12)
    prompts = (("a", (5, 3, 7)), ("b", (6, 1, 4)))
    rollouts = make(model, (2, 9, 4)).sample(prompts, 3, SamplingSettings(12, 8.0), seed=0)
    assert not [told for told in caplog.records if told.name == "stableopd"]
    assert len({len(r.completion_ids) for r in rollouts}) > 1
    for rollout in rollouts:
        assert rollout.sampler_logps == pytest.approx(dense_logps(model, rollout, V), abs=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_of_few_rows_is_the_models_own(model, bias):
    model.lm_head = torch.nn.Linear(32, V, bias=bias)
    for rows in (1, 2, 5, 8, 9):
        hidden_B1D = torch.randn(rows, 1, 32)
        expected = model.lm_head(hidden_B1D)
        with decoding._few_row_head(model):
            assert "forward" in vars(model.lm_head)
            torch.testing.assert_close(model.lm_head(hidden_B1D), expected)
        assert "forward" not in vars(model.lm_head)
    model.lm_head.forward = model.lm_head.forward  # another library's
    with decoding._few_row_head(model):
        assert model.lm_head.forward.__func__ is torch.nn.Linear.forward


def test_logits_that_are_not_finite_are_an_error(model):
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(TrainingError, match="not finite"):
            make(model).sample(RAGGED, 2, SamplingSettings(5, temperature), seed=0)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.usefixtures("early_leave")
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
    expected = make(model, (2, 9)).sample(RAGGED, 2, settings, seed=0)
    with widths_of(model) as widths:
        rollouts = make(model, (2, 9), batch_size=batch_size).sample(RAGGED, 2, settings, seed=0)
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
        without = make(model, (2, 9)).sample(RAGGED, 3, SamplingSettings(10), seed=2)
        assert [r.completion_ids for r in without] == [r.completion_ids for r in before]
        # Not bit by bit: peft's own forward may reach another kernel, which rounds differently.
        for rollout, first in zip(without, before, strict=True):
            assert rollout.sampler_logps == pytest.approx(first.sampler_logps, abs=1e-5)


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(DataError, match="'empty' has no token"):
        make(model).sample((("empty", ()),), 1, SamplingSettings(4), seed=0)


@pytest.mark.parametrize("stops", [(), (V,), (2, -1)])
def test_impossible_stop_ids_are_refused(model, stops):
    with pytest.raises(ModelError, match="stop ids"):
        make(model, stops)
