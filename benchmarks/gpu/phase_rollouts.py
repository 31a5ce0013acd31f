"""Rollouts of a Qwen3-0.6B with random weights, and those of `generate`: tokens/s, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import pairs
from common import Clock, Memory
from meter import Setting, free, why
from plan import BUDGETS, PER_PROMPT, PROMPT_TOKENS, PROMPTS
from stableopd.rollout.sampler import TransformersSampler
from stableopd.types import SamplingSettings

GREEDY_TOKENS = 16


class _NoText:
    """Stands for the tokenizer: the text of a rollout is no part of what is compared."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return ""


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    shape = setting.choose(pairs.QWEN3[0], pairs.TINY)
    model = pairs.qwen3(shape, 0).to(setting.device)
    draw_from = torch.Generator().manual_seed(0)
    size = (PROMPTS, setting.choose(PROMPT_TOKENS, 4))
    prompt_ids_PT = torch.randint(pairs.FIRST, shape.vocabulary, size, generator=draw_from)
    writers = {"ours": _ours(model, prompt_ids_PT), "generate": _theirs(model, prompt_ids_PT)}
    greedy = {
        name: write(setting.choose(GREEDY_TOKENS, 4), False) for name, write in writers.items()
    }
    same = [one == two for one, two in zip(*greedy.values(), strict=True)]
    yield {"side": "both", "same_greedy": sum(same) / len(same), "tokens": GREEDY_TOKENS}
    for budget in setting.choose(BUDGETS, (8, 12)):
        for name, write in writers.items():
            row = {"side": name, "budget": budget, "sequences": PROMPTS * PER_PROMPT}
            row |= _timed(setting, write, budget)
            free(setting.device)
            yield row


def _timed(setting: Setting, write: Callable[..., Any], budget: int) -> dict[str, Any]:
    try:
        memory, start = Memory(setting.device), Clock.now(setting.device)
        rows = write(budget, True)
        seconds = Clock.now(setting.device).since(start)["wall_s"]
    except Exception as error:
        return {"error_text": why(error)}
    tokens = sum(map(len, rows))
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "mean_length": tokens / len(rows),
        "memory_mb": memory.grown()["memory_mb"],
    }


def _ours(model: Any, prompt_ids_PT: torch.Tensor) -> Callable[..., list[list[int]]]:
    tokenizer: Any = _NoText()
    sampler = TransformersSampler(model, tokenizer, (pairs.STOP,), model.config.vocab_size)
    prompts = [(str(i), tuple(ids)) for i, ids in enumerate(prompt_ids_PT.tolist())]

    def write(num_tokens: int, drawn: bool) -> list[list[int]]:
        settings = SamplingSettings(num_tokens, temperature=1.0 if drawn else 0.0)
        rollouts = sampler.sample(prompts, PER_PROMPT, settings, 0)
        return [list(r.completion_ids) for r in rollouts]

    return write


def _theirs(model: Any, prompt_ids_PT: torch.Tensor) -> Callable[..., list[list[int]]]:
    ids_BT = prompt_ids_PT.repeat_interleave(PER_PROMPT, 0).to(model.device)

    def write(num_tokens: int, drawn: bool) -> list[list[int]]:
        chosen = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        whole_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=num_tokens,
            eos_token_id=pairs.STOP,
            pad_token_id=pairs.PAD,
            **(chosen if drawn else {"do_sample": False}),
        )
        rows = whole_BT[:, ids_BT.shape[1] :].tolist()
        return [row[: row.index(pairs.STOP) + 1] if pairs.STOP in row else row for row in rows]

    return write


def summary(rows: list[dict[str, Any]]) -> str:
    """What to print of the rows."""
    told = [
        f"{row['side']} {row['tokens_per_s']:,.0f} tokens/s at {row['budget']}"
        for row in rows
        if "tokens_per_s" in row
    ]
    return ", ".join(told)
