"""A model, a tokenizer and exact probabilities that the tests of the sampler share."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stableopd.rollout import decoding
from stableopd.rollout.sampler import TransformersSampler
from stableopd.types import Rollout

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
def early_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave the batch as soon as they have stopped; the cache's room is used up often."""
    monkeypatch.setattr(decoding, "WASTE", 0)
    monkeypatch.setattr(decoding, "ROOM", 3)


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
