"""Prompts read once give what whole sequences give: hidden states, gradients, and the choice."""

import dataclasses
import functools
import inspect

import pytest
import torch
from torch.testing import assert_close

from stableopd import hidden
from stableopd.hidden import base_of, prefix_of, reads_prompts_once, token_hidden_states
from stableopd.models import LanguageModel, add_lora
from stableopd.training.batch import collate, micro_batches
from stableopd.training.loading import checkpoint_gradients
from stableopd.types import Sequence
from test_models_logits import ARCHITECTURES
from tiny import CPU, PAD, in_double, make_llama

SHORT, LONG = (3, 4, 5), (9, 8, 7, 6, 5, 4, 3)
# Sliding windows count places, between which the padding of shorter prompts would stand.
SLIDING = {"soft cap", "logit scale 2"}


def sequences():
    """Two prompts of different lengths with completions of different lengths, one golden."""
    completions = [(SHORT, (6, 7, 1)), (LONG, (11, 12, 13, 14, 15, 1)), (SHORT, (8,))]
    completions += [(LONG, (16, 17)), (LONG, (18, 19, 20, 1)), (SHORT, (2, 2, 2, 2))]
    return [Sequence(p, c, i == 4, i) for i, (p, c) in enumerate(completions)]


def both(model, batch):
    """Hidden states and gradients, with prompts read once and with whole sequences."""
    found = []
    for one in (batch, dataclasses.replace(batch, prefix=None)):
        model.zero_grad()
        hidden_ND = token_hidden_states(model, one)
        weight_ND = torch.linspace(-1, 1, hidden_ND.numel()).view_as(hidden_ND)
        (hidden_ND * weight_ND).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([hidden_ND.detach(), *grads])
    return found


def test_hidden_states_and_gradients_to_the_last_digits():
    model = in_double(make_llama())
    batch = collate(sequences(), PAD, CPU)
    assert batch.prefix is not None
    once, whole = both(model, batch)
    assert len(once) == len(whole) > 10
    for a, b in zip(once, whole, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    torch.manual_seed(3)
    # Eager attention with windows gives NaN in float64 (transformers 5.23).
    model = ARCHITECTURES[name]().eval().to(torch.float32 if name in SLIDING else torch.float64)
    assert reads_prompts_once(model) == (name not in SLIDING)
    once, whole = both(model, collate(sequences(), PAD, CPU))
    for a, b in zip(once, whole, strict=True):
        # Some norms are in float32 whatever the weights are.
        assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_the_padding_id_changes_nothing():
    model = in_double(make_llama())
    found = [both(model, collate(sequences(), pad, CPU))[0] for pad in (PAD, 17)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_with_an_adapter():
    torch.manual_seed(0)
    student = LanguageModel("s", in_double(make_llama()), None, None)
    model = add_lora(student, 2, 8, "all-linear").model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    once, whole = both(model, collate(sequences(), PAD, CPU))
    assert len(once) > 10
    for a, b in zip(once, whole, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_under_autocast():
    model = make_llama()
    batch = collate(sequences(), PAD, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reads_prompts_once(model)
        once, whole = both(model, batch)
    assert_close(once[0], whole[0], rtol=0.05, atol=0.05)


def test_a_model_that_counts_positions_in_its_own_way_is_found_out(monkeypatch):
    model = make_llama()
    inner, forward = base_of(model).base_model, type(model.base_model).forward

    @functools.wraps(forward)
    def from_zero(self, *args, **named):
        named.pop("position_ids", None)
        return forward(self, *args, **named)

    assert reads_prompts_once(make_llama())
    # Without the ids it counts places in the cache, the padding of the shorter prompt among them.
    monkeypatch.setattr(type(inner), "forward", from_zero)
    assert not reads_prompts_once(model)


@pytest.mark.parametrize("name", hidden.CACHE_NAMES)
def test_both_names_of_the_cache(monkeypatch, caplog, name):
    model = make_llama()
    backbone = type(model.base_model)
    native, forward = (
        hidden.cache_name(inspect.signature(backbone.forward).parameters),
        backbone.forward,
    )

    def with_cache(self, *args, position_ids=None, cache=None, **named):
        return forward(self, *args, position_ids=position_ids, **{native: cache}, **named)

    def with_past(self, *args, position_ids=None, past_key_values=None, **named):
        return forward(self, *args, position_ids=position_ids, **{native: past_key_values}, **named)

    monkeypatch.setattr(backbone, "forward", with_cache if name == "cache" else with_past)
    assert reads_prompts_once(model)
    once, whole = both(model, collate(sequences(), PAD, CPU))
    assert_close(once[0], whole[0], rtol=1e-4, atol=1e-5)
    assert not caplog.records


def test_a_model_that_could_read_prompts_once_and_does_not_is_named_once(monkeypatch, caplog):
    hidden.tell_slow.cache_clear()
    backbone = type(make_llama().base_model)
    forward = backbone.forward
    monkeypatch.setattr(
        backbone, "forward", lambda self, *args, **named: forward(self, *args, **named)
    )
    for _ in range(2):
        assert not reads_prompts_once(make_llama())
    (told,) = caplog.records
    assert "LlamaForCausalLM" in told.getMessage()
    assert "past_key_values" in told.getMessage()


def test_what_cannot_be_read_so():
    model = make_llama()
    assert reads_prompts_once(model)
    checkpoint_gradients(model)
    assert not reads_prompts_once(model)
    sharded = make_llama()
    hidden.offer_hooked_hidden_states(sharded)
    assert not reads_prompts_once(sharded)
    for one in (model, sharded):
        one.eval()
        once, whole = both(one, collate(sequences(), PAD, CPU))
        assert all(torch.equal(a, b) for a, b in zip(once, whole, strict=True))


def test_tensors_of_a_prefix():
    prefix = prefix_of([SHORT, LONG], [1, 0, 1], [(6, 7, 1), (8,), (9, 10)], 99, CPU)
    assert prefix.prompt_ids_PT.tolist() == [[*SHORT, 99, 99, 99, 99], list(LONG)]
    assert prefix.prompt_mask_PT.tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]
    assert prefix.prompt_B.tolist() == [1, 0, 1]
    # The last token of a completion predicts nothing.
    assert prefix.input_ids_BC.tolist() == [[6, 7], [99, 99], [9, 99]]
    assert prefix.mask_BC.tolist() == [[1, 1], [0, 0], [1, 0]]


def made(*sizes):
    """Sequences of (prompt, length of the prompt, length of the completion)."""
    return [
        Sequence((name, *[5] * (prompt - 1)), (6,) * completion, False, i)
        for i, (name, prompt, completion) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "parted"),
    [
        ([(3, 8, 8)], False),  # alone
        ([(3, 8, 8), (4, 8, 8)], False),  # nothing in common
        ([(3, 8, 8), (3, 8, 8)], True),
        ([(3, 8, 1), (3, 8, 1)], False),  # nothing to read behind the prompt
        # 2 x 64 whole; 4 + 2 x 59 = 122 parted are not an eighth less, 24 + 2 x 39 = 102 are.
        ([(3, 4, 60), (3, 4, 60)], False),
        ([(3, 24, 40), (3, 24, 40)], True),
    ],
)
def test_prompts_are_parted_where_it_pays(sizes, parted):
    assert (collate(made(*sizes), PAD, CPU).prefix is not None) == parted


def places(groups):
    return [[s.index for s in group] for group in groups]


def test_micro_batches_by_length_or_by_prompt():
    # Long completions of very different lengths: neighbours in length stand together.
    ragged = made((3, 4, 100), (4, 4, 10), (3, 4, 10), (4, 4, 100))
    assert places(micro_batches(ragged, 208)) == [[0, 3], [1, 2]]
    # Long prompts with short completions: those of one prompt stand together, the longest first.
    same = made((3, 90, 10), (4, 90, 11), (3, 90, 11), (4, 90, 10))
    assert places(micro_batches(same, 210)) == [[2, 0], [1, 3]]
    # Whatever the order: the budget holds, and nothing is lost.
    for budget in (1, 100, 150, 210, 10**6):
        for some in (ragged, same):
            groups = micro_batches(some, budget)
            assert sorted(s.index for group in groups for s in group) == [0, 1, 2, 3]
            for group in groups:
                assert len(group) == 1 or len(group) * max(map(len, group)) <= budget


def test_golden_solutions_stand_with_the_rollouts_of_their_prompt():
    rollouts = made((3, 90, 10), (4, 90, 10), (3, 90, 10), (4, 90, 10))
    golden = [Sequence(s.prompt_ids, (7,) * 9, True, i) for i, s in enumerate(rollouts[:2])]
    groups = micro_batches([*rollouts, *golden], 300)
    assert [len({s.prompt_ids for s in group}) for group in groups] == [1, 1]
    assert [sum(s.is_golden for s in group) for group in groups] == [1, 1]
