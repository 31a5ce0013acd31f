"""The decoding loop: transformers prepares, computes and caches; rows share, and leave early.

This is a decoding method for transformers' `generate(custom_generate=...)`, which makes the cache
and the inputs of whatever model it is. Beside drawing (`drawing.py`) the loop differs from
transformers' own in four things:

- a prompt is read once for all of its rollouts, and its cache copied;
- rows that have stopped leave the batch, as soon as computing on costs more than copying the cache;
- keys and values of a token are written into room that the cache has, where transformers'
  concatenates, which copies the whole cache for each token;
- on a CPU the output head of a few rows multiplies with the large matrix on the left.

What is left out: free places in the batch are not filled with waiting prompts.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from stableopd.hidden import cache_name, tell_slow
from stableopd.rollout.drawing import wide_dtype
from stableopd.types import TrainingError

__all__ = ["Pick", "complete"]

# (logits of the next token (B, V), a uniform number for each row (B,)) -> tokens (B,), log-probs.
Pick = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Layers whose whole state `batch_select_indices` selects. Subclasses may hold more (a linear
# attention state beside the keys and values) that it leaves untouched, so the type must be exact.
SELECTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)

# Rows leave when the tokens computed in vain reach this share of the rows that go on: copying a
# row's cache costs about that much of computing one more token for it.
WASTE = 0.25

# Tokens between two looks at what was drawn, by the type of the device: a look waits for it.
LOOK_EVERY = {"cpu": 1}
LOOK_EVERY_ELSEWHERE = 8

# Tokens of room that the cache gets at a time.
ROOM = 64

# Numbers of rows for which the head has the large matrix on the left.
FEW_ROWS = range(2, 9)


def complete(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    copies: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pick: Pick,
) -> list[tuple[list[int], list[float]]]:
    """Complete prompts as one batch.

    Args:
        model: A causal language model of transformers, or a PEFT model around one, without dropout.
        prompts: Token ids of the prompts.
        copies: For each row the place of its prompt in `prompts`.
        max_new_tokens: Length budget.
        stop_ids: Ids that end a row.
        pick: Chooses a token for each row.

    Returns:
        For each row the tokens, up to and with the first stop, and their log-probs.
    """
    found: list[tuple[list[int], list[float]]] = []

    def decoding_method(model: Any, input_ids: Tensor, **arguments: Any) -> Tensor:
        for name in ("logits_processor", "stopping_criteria", "generation_config"):
            del arguments[name]
        arguments = {k: v for k, v in arguments.items() if k not in ("synced_gpus", "streamer")}
        with _few_row_head(model):
            found.extend(
                _loop(model, input_ids, arguments, list(copies), max_new_tokens, stop_ids, pick)
            )
        return input_ids

    ids_BT, mask_BT = _left_padded(prompts, stop_ids[0], model.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        # Never read: a row's end is its first stop token, and padding is masked by length.
        pad_token_id=stop_ids[0],
    )
    model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        generation_config=config,
        custom_generate=decoding_method,
        # Where weights are sharded, the default waits for other processes.
        synced_gpus=False,
    )
    return found


def _loop(
    model: Any,
    ids_BT: Tensor,
    arguments: dict[str, Any],
    copies: list[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pick: Pick,
) -> list[tuple[list[int], list[float]]]:
    """Read the prompts, then token by token; `arguments` are those of the model's forward."""
    drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in copies]
    device, stops = ids_BT.device, frozenset(stop_ids)
    copy_B = torch.tensor(copies, device=device)
    cache: Any = arguments.get(cache_name(arguments))
    can_select = _can_select(cache)
    if not can_select:
        ids_BT, arguments = _select(ids_BT, arguments, copy_B)
    logits_BV, arguments = _forward(model, ids_BT, arguments, None)
    if can_select:
        ids_BT, arguments = _select(ids_BT, arguments, copy_B, cache)
        logits_BV = logits_BV[copy_B]
        _make_room(cache)
    elif _can_select(DynamicCache(config=model.config)):
        _tell_why(model, arguments)
    row_B, rows, ended = torch.arange(len(copies), device=device), list(range(len(copies))), set()
    look_every, wasted = LOOK_EVERY.get(device.type, LOOK_EVERY_ELSEWHERE), 0
    unread: list[tuple[Tensor, Tensor]] = []
    for step in range(1, max_new_tokens + 1):
        # One number for each row of the call, so that no draw depends on which rows have left.
        uniform_B = torch.rand(len(copies), dtype=wide_dtype(device), device=device)[row_B]
        unread.append(pick(logits_BV, uniform_B))
        token_B = unread[-1][0]
        ids_BT = torch.cat([ids_BT, token_B[:, None]], dim=1)
        if step == max_new_tokens or len(unread) == look_every:
            _read(unread, rows, drawn, ended, stops)
            wasted += sum(row in ended for row in rows) * len(unread)
            unread = []
            going = [place for place, row in enumerate(rows) if row not in ended]
            if not going or step == max_new_tokens:
                return drawn
            if can_select and len(going) < len(rows) and wasted >= WASTE * len(going):
                keep_B = torch.tensor(going, device=device)
                ids_BT, arguments = _select(ids_BT, arguments, keep_B, cache)
                row_B = row_B[keep_B]
                rows, wasted = [rows[place] for place in going], 0
        logits_BV, arguments = _forward(model, ids_BT, arguments, 1)
    return drawn


def _forward(
    model: Any, ids_BT: Tensor, arguments: dict[str, Any], length: int | None
) -> tuple[Tensor, dict[str, Any]]:
    """Logits of the next token, and the arguments of the pass after this one."""
    inputs = model.prepare_inputs_for_generation(
        ids_BT, next_sequence_length=length, is_first_iteration=length is None, **arguments
    )
    outputs = model(**inputs, return_dict=True)
    return outputs.logits[:, -1], model._update_model_kwargs_for_generation(outputs, arguments)


def _read(
    unread: list[tuple[Tensor, Tensor]],
    rows: list[int],
    drawn: list[tuple[list[int], list[float]]],
    ended: set[int],
    stops: frozenset[int],
) -> None:
    """Fetch drawn tokens from the device, and note them and the rows that have ended."""
    tokens = torch.stack([token_B for token_B, _ in unread], dim=1).tolist()
    logps = torch.stack([logp_B for _, logp_B in unread], dim=1).tolist()
    for row, row_tokens, row_logps in zip(rows, tokens, logps, strict=True):
        if not all(map(math.isfinite, row_logps)):
            raise TrainingError(
                "the student's logits are not finite (NaN or infinity), so that it cannot write; "
                "lower optimizer.learning_rate, or choose another student.dtype."
            )
        for token, logp in zip(row_tokens, row_logps, strict=True):
            if row in ended:
                break
            drawn[row][0].append(token)
            drawn[row][1].append(logp)
            if token in stops:
                ended.add(row)


def _left_padded(
    prompts: Sequence[tuple[int, ...]], filler: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask; the filler is masked, so that any valid id does."""
    width = max(map(len, prompts))
    ids = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _can_select(cache: Any) -> bool:
    """Whether rows can be taken out of this cache, and copied."""
    return type(cache) is DynamicCache and all(
        type(layer) in SELECTABLE_LAYERS for layer in cache.layers
    )


def _tell_why(model: Any, arguments: dict[str, Any]) -> None:
    """Warn of a model with an ordinary cache, whose rows cannot be selected."""
    for name, cache in arguments.items():
        if isinstance(cache, Cache):
            cost = "each rollout reads its own prompt and keeps its row, which takes longer"
            reason = f"transformers' generate passes a {type(cache).__name__} as {name}"
            tell_slow(type(model).__name__, cost, reason)


def _select(
    ids_BT: Tensor, arguments: dict[str, Any], place_B: Tensor, filled: DynamicCache | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Rows of ids and arguments, and of a filled cache; positions are (B, T) or (3, B, T)."""
    num_rows = len(ids_BT)
    if filled is not None:
        filled.batch_select_indices(place_B)
    return ids_BT[place_B], {
        key: value.index_select(-2, place_B)
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[-2] == num_rows
        else value
        for key, value in arguments.items()
    }


class _RoomyLayer(DynamicLayer):
    """Keys and values at the front of larger tensors, into which the next ones are written."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_initialized = True
        self._hold(layer.keys, layer.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        old = self.keys.shape[-2]
        new = old + key_states.shape[-2]
        if new > self.wide_keys.shape[-2]:
            self._hold(self.keys, self.values, key_states.shape[-2])
        self.wide_keys[:, :, old:new] = key_states
        self.wide_values[:, :, old:new] = value_states
        self.keys, self.values = self.wide_keys[:, :, :new], self.wide_values[:, :, :new]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.keys.shape[-2]
        self.wide_keys, self.wide_values = self.wide_keys[indices], self.wide_values[indices]
        self.keys, self.values = self.wide_keys[:, :, :length], self.wide_values[:, :, :length]

    def _hold(self, keys: Tensor, values: Tensor, least: int = 0) -> None:
        self.wide_keys, self.wide_values = _widened(keys, least), _widened(values, least)
        length = keys.shape[-2]
        self.keys, self.values = self.wide_keys[:, :, :length], self.wide_values[:, :, :length]


def _widened(states_BHTD: Tensor, least: int) -> Tensor:
    batch, heads, length, width = states_BHTD.shape
    wide = states_BHTD.new_empty(batch, heads, length + max(ROOM, least), width)
    wide[:, :, :length] = states_BHTD
    return wide


def _make_room(cache: DynamicCache) -> None:
    """Give the full-attention layers room; those with a window are short and stay."""
    cache.layers = [
        _RoomyLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer
        for layer in cache.layers
    ]


@contextmanager
def _few_row_head(model: Any) -> Iterator[None]:
    """On a CPU, the model's own output head multiplies W h^T inside where the rows are few.

    BLAS libraries take half the time for it that they take for h W^T (measured for 2 to 8 rows).
    """
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and "forward" not in vars(head)  # others may have put one
    if not is_plain or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32:
        yield
        return

    def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
        hidden_BD = hidden.flatten(0, -2)
        if len(hidden_BD) not in FEW_ROWS or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(hidden, self.weight, self.bias)
        logits_BV = torch.mm(self.weight, hidden_BD.T).T.contiguous()
        if self.bias is not None:
            logits_BV += self.bias
        return logits_BV.unflatten(0, hidden.shape[:-1])

    head.forward = types.MethodType(forward, head)
    try:
        yield
    finally:
        del head.forward
