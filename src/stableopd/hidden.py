"""Hidden states of a model at the tokens of a batch, with every prompt read once.

Several completions of a batch follow the same prompt: the rollouts of one problem and its golden
solution. Where the model has keys and values that can be copied, the prompt is read by itself, and
its keys and values stand before each of its completions; gradient flows back through the copies.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from stableopd.types import Batch, Prefix

__all__ = [
    "HOOKED",
    "base_of",
    "cache_name",
    "hidden_states",
    "offer_hooked_hidden_states",
    "prefix_of",
    "reads_prompts_once",
    "tell_slow",
    "token_hidden_states",
]

log = logging.getLogger("stableopd")

# What models call their keys and values: from transformers 5.24 on, and before. Wrappers of other
# libraries may keep the former name.
CACHE_NAMES = ("cache", "past_key_values")

# Name of the method through which a sharded model gives its hidden states: weights are gathered by
# hooks on the whole model, which a call of its backbone alone would pass by.
HOOKED = "hooked_hidden_states"

# What the probe of a model found; it depends on the model's class and configuration alone.
_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

# The two ways may differ by rounding alone. A key that is missing or stands at another position
# makes differences of the size of the hidden states.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
TOLERANCE_HALF = 0.05


def hidden_states(model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Last hidden states, after the final norm and before the output head.

    Args:
        model: A transformers model, or a PEFT model around one.
        input_ids_BT: Token ids, padded on the right.
        attention_mask_BT: 1 at real tokens, 0 at padding.

    Returns:
        Hidden states, (B, T, D); carry gradient to the model where gradients are on.
    """
    inner = base_of(model)
    if hasattr(inner, HOOKED):
        return getattr(inner, HOOKED)(input_ids_BT, attention_mask_BT)
    return _last_hidden_states(inner, input_ids_BT, attention_mask_BT)


def base_of(model: Any) -> Any:
    """The transformers model itself, without PEFT's around it.

    Args:
        model: A transformers model, or a PEFT model around one.

    Returns:
        The transformers model; the adapter's layers are in it.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def offer_hooked_hidden_states(inner: Any) -> None:
    """Give a model a method for its hidden states, which whoever shards it can put hooks around.

    Args:
        inner: A transformers model; `hidden_states` goes through the method `HOOKED` from now on.
    """
    setattr(inner, HOOKED, types.MethodType(_last_hidden_states, inner))


def _last_hidden_states(inner: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    return inner.base_model(
        input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False
    ).last_hidden_state


def cache_name(names: Iterable[str]) -> str:
    """The name under which keys and values are passed.

    Args:
        names: Arguments of a call or of a function.

    Returns:
        The first of the names that models use, or "" where none is there.
    """
    return next((name for name in CACHE_NAMES if name in names), "")


@functools.cache
def tell_slow(kind: str, cost: str, reason: str) -> None:
    """Say once that a fast path is off for a model that it is made for.

    Args:
        kind: Name of the model's class.
        cost: What is slower.
        reason: Why.
    """
    log.warning("%s: %s, because %s.", kind, cost, reason)


def token_hidden_states(model: Any, batch: Batch) -> Tensor:
    """The hidden states that predict the completion tokens of a batch.

    Args:
        model: A transformers model, or a PEFT model around one.
        batch: A padded micro-batch. Where it has a `prefix` and the model allows it, each prompt
            is read once.

    Returns:
        Hidden states, (N, D); carry gradient to the model where gradients are on.
    """
    if batch.prefix is not None and reads_prompts_once(model):
        hidden_BCD = _behind_prompts(base_of(model), batch.prefix)
        return hidden_BCD[batch.row_N, batch.index_N]
    hidden_BTD = hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT)
    return hidden_BTD[batch.row_N, batch.position_N]


def prefix_of(
    prompts: Sequence[tuple[int, ...]],
    prompt_B: Sequence[int],
    completions: Sequence[tuple[int, ...]],
    pad_id: int,
    device: torch.device,
) -> Prefix:
    """Prompts and completions as tensors, each padded on the right.

    Args:
        prompts: Token ids of each prompt, one or more.
        prompt_B: For each completion the place of its prompt.
        completions: Token ids of each completion.
        pad_id: Id that fills the rows up.
        device: Where the tensors go.

    Returns:
        What `token_hidden_states` reads in the place of whole sequences.
    """
    prompt_ids_PT, prompt_mask_PT = _padded(prompts, pad_id)
    input_ids_BC, mask_BC = _padded([ids[:-1] for ids in completions], pad_id)
    tensors = (prompt_ids_PT, prompt_mask_PT, torch.tensor(prompt_B), input_ids_BC, mask_BC)
    return Prefix(*(x.to(device) for x in tensors))


def _padded(rows: Sequence[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids, and a mask that is 1 at real tokens."""
    width = max(map(len, rows))
    ids = [[*row, *[pad_id] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def reads_prompts_once(model: Any) -> bool:
    """Whether completions may be read behind the copied keys and values of their prompts.

    Models with sliding windows or recurrent states are left out, sharded ones too (their weights
    would be gathered twice), and those that drop what they computed to compute it again. Of all
    others both ways are compared once, on a few tokens; where they differ, a warning says so.

    Args:
        model: A transformers model, or a PEFT model around one, without dropout.

    Returns:
        True where both ways give the same hidden states.
    """
    inner = base_of(model)
    if hasattr(inner, HOOKED) or _checkpoints(inner):
        return False
    if inner not in _found:
        reason = _obstacle(inner) if _has_plain_cache(inner) else None
        if reason:
            cost = "a prompt is read again for each of its completions, which takes longer"
            tell_slow(type(inner).__name__, cost, reason)
        _found[inner] = reason == ""
    return _found[inner]


def _checkpoints(inner: Any) -> bool:
    """Whether layers drop what they computed; its name from transformers 5.23 on, and before."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return next((getattr(inner, name) for name in names if hasattr(type(inner), name)), False)


def _has_plain_cache(inner: Any) -> bool:
    layers = DynamicCache(config=inner.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _obstacle(inner: Any) -> str:
    """Why a model with keys and values cannot read on behind them; "" where it can."""
    arguments = inspect.signature(inner.base_model.forward).parameters
    if not cache_name(arguments):
        return f"it takes no argument {' or '.join(CACHE_NAMES)}"
    if "position_ids" not in arguments:
        return "it takes no argument position_ids"
    return "" if _agrees(inner) else "its hidden states are then others"


@torch.no_grad()
def _agrees(inner: Any) -> bool:
    """Compare both ways on two prompts of different lengths with three completions."""
    prompts, completions = ((1, 2, 3), (4,)), ((5, 6, 7), (1, 6), (3, 2, 1, 6))
    prompt_B, device = (0, 0, 1), inner.device
    found_BCD = _behind_prompts(inner, prefix_of(prompts, prompt_B, completions, 0, device))
    dtype = found_BCD.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    tolerance = TOLERANCE.get(dtype, TOLERANCE_HALF)
    for row, place in enumerate(prompt_B):
        ids_1T = torch.tensor([[*prompts[place], *completions[row]]], device=device)
        whole_TD = _last_hidden_states(inner, ids_1T, torch.ones_like(ids_1T))[0]
        start, count = len(prompts[place]) - 1, len(completions[row])
        expected = whole_TD[start : start + count].float()
        difference = (found_BCD[row, :count].float() - expected).abs().max()
        if not bool(difference <= tolerance * expected.abs().max()):
            return False
    return True


def _behind_prompts(inner: Any, prefix: Prefix) -> Tensor:
    """Hidden states that predict each completion's tokens, (B, C, D)."""
    cache, prompt_B = DynamicCache(config=inner.config), prefix.prompt_B
    passed = {cache_name(inspect.signature(inner.base_model.forward).parameters): cache}
    prompts = inner.base_model(
        input_ids=prefix.prompt_ids_PT,
        attention_mask=prefix.prompt_mask_PT,
        use_cache=True,
        **passed,
    )
    cache.batch_select_indices(prompt_B)
    length_B = prefix.prompt_mask_PT.sum(1)[prompt_B]
    first_BD = prompts.last_hidden_state[prompt_B, length_B - 1]
    steps_C = torch.arange(prefix.input_ids_BC.shape[1], device=prompt_B.device)
    rest = inner.base_model(
        input_ids=prefix.input_ids_BC,
        # Prompts are padded on the right: the gap before shorter ones is masked.
        attention_mask=torch.cat([prefix.prompt_mask_PT[prompt_B], prefix.mask_BC], dim=1),
        position_ids=length_B[:, None] + steps_C,
        use_cache=True,
        **passed,
    )
    return torch.cat([first_BD[:, None], rest.last_hidden_state], dim=1)
