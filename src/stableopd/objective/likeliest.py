"""The likeliest tokens of each position, found without a sort over the vocabulary."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from stableopd.objective.tiles import TiledHead

__all__ = ["BLOCK", "BLOCK_ELSEWHERE", "block_maxima", "block_size", "likeliest"]

# Columns of which the largest logit alone is kept. On a CPU 64 and 256 take longer (docs/log.md).
# Elsewhere the weights of the chosen blocks are copied for each position, and fewer are better.
BLOCK = 128
BLOCK_ELSEWHERE = 16
# Positions at a time for which weights are gathered.
GATHERED_ROWS = 64


def block_size(device: torch.device) -> int:
    """Columns of a block.

    Args:
        device: Where the logits are.

    Returns:
        Its size; that of a CPU is a multiple of the others'.
    """
    return BLOCK if device.type == "cpu" else BLOCK_ELSEWHERE


def block_maxima(z_RC: Tensor, block: int) -> Tensor:
    """The largest of each block of columns.

    Args:
        z_RC: Logits, (R, C).
        block: Columns of a block.

    Returns:
        (R, C / block), rounded up; the last block may be short.
    """
    ragged = -z_RC.shape[1] % block
    whole_RC = torch.nn.functional.pad(z_RC, (0, ragged), value=-math.inf) if ragged else z_RC
    return whole_RC.view(len(z_RC), -1, block).amax(-1)


def likeliest(
    best_RB: Tensor, block: int, num: int, head: TiledHead, rows: slice
) -> tuple[Tensor, Tensor]:
    """The largest logits of some positions, exactly: they lie in the blocks with the best maxima.

    Args:
        best_RB: The largest logit of each block of columns, (R, B).
        block: Columns of a block.
        num: How many; cut to the vocabulary.
        head: Computes the logits of those blocks again.
        rows: The positions among those of the head.

    Returns:
        Logits in falling order and their ids, (R, num) each.
    """
    num = min(num, head.num_tokens)
    block_RK = best_RB.topk(min(num, best_RB.shape[1]), dim=1, sorted=False).indices
    logits_of = _block_by_block if best_RB.device.type == "cpu" else _gathered
    top_RK, place_RK = logits_of(block_RK, block, head, rows).topk(num, dim=1)
    return top_RK, block_RK.gather(1, place_RK // block) * block + place_RK % block


def _block_by_block(block_RK: Tensor, block: int, head: TiledHead, rows: slice) -> Tensor:
    """Logits of some blocks of each position: one product for each block, of all who chose it.

    Each row of the weight is read once, where gathering would copy it for every position. Behind
    the vocabulary stands -inf.
    """
    chosen = block_RK.flatten()
    order, counts = chosen.argsort(), cast(list[int], cast(Any, chosen.bincount()).tolist())
    members = (order // block_RK.shape[1] + rows.start).split(counts)
    # In buffers: new memory of this size breaks a CPU's heap into pieces.
    z_PC = head.buffer("chosen", (chosen.numel(), block)).fill_(-math.inf)
    start = 0
    for place, member_P in enumerate(members):
        if member_P.numel():
            columns = slice(place * block, min((place + 1) * block, head.num_tokens))
            width, end = columns.stop - columns.start, start + member_P.numel()
            z_PC[start:end, :width] = head.tile(member_P, columns)
            start = end
    back_PC = head.buffer("in order", tuple(z_PC.shape))
    back_PC[order] = z_PC
    return back_PC.view(len(block_RK), -1)


def _gathered(block_RK: Tensor, block: int, head: TiledHead, rows: slice) -> Tensor:
    """The same by a copy of the weights: few calls."""
    parts: list[Tensor] = []
    columns_C = torch.arange(block, device=block_RK.device)
    for start in range(0, len(block_RK), GATHERED_ROWS):
        ids_rK = block_RK[start : start + GATHERED_ROWS, :, None] * block + columns_C
        ids_rK = ids_rK.flatten(1)
        some = slice(rows.start + start, rows.start + start + len(ids_rK))
        z_rK = head.at(some, ids_rK.clamp(max=head.num_tokens - 1))
        parts.append(z_rK.masked_fill(ids_rK >= head.num_tokens, -math.inf))
    return torch.cat(parts)
