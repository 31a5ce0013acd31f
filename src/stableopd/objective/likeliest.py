"""The likeliest tokens of each position, found without a sort over the vocabulary."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from stableopd.objective.tiles import TiledHead

__all__ = ["BLOCK", "block_maxima", "likeliest"]

# Columns of which the largest logit alone is kept (64 and 256 take longer, by a third on a CPU).
BLOCK = 128
# Positions at a time for which weights are gathered, where that is how it is done.
GATHERED_ROWS = 16


def block_maxima(z_RC: Tensor) -> Tensor:
    """The largest of each block of columns.

    Args:
        z_RC: Logits, (R, C).

    Returns:
        (R, C / BLOCK), rounded up; the last block may be short.
    """
    ragged = -z_RC.shape[1] % BLOCK
    whole_RC = torch.nn.functional.pad(z_RC, (0, ragged), value=-math.inf) if ragged else z_RC
    return whole_RC.view(len(z_RC), -1, BLOCK).amax(-1)


def likeliest(best_RB: Tensor, num: int, head: TiledHead, rows: slice) -> tuple[Tensor, Tensor]:
    """The largest logits of some positions, exactly: they lie in the blocks with the best maxima.

    Args:
        best_RB: The largest logit of each block of columns, (R, B).
        num: How many; cut to the vocabulary.
        head: Computes the logits of those blocks again.
        rows: The positions among those of the head.

    Returns:
        Logits in falling order and their ids, (R, num) each.
    """
    num = min(num, head.num_tokens)
    block_RK = best_RB.topk(min(num, best_RB.shape[1]), dim=1, sorted=False).indices
    ids_RKC = block_RK[:, :, None] * BLOCK + torch.arange(BLOCK, device=best_RB.device)
    ids_RK = ids_RKC.flatten(1)
    by_block = best_RB.device.type == "cpu"
    z_RK = _block_by_block(block_RK, head, rows) if by_block else _gathered(ids_RK, head, rows)
    top_RK, place_RK = z_RK.masked_fill(ids_RK >= head.num_tokens, -math.inf).topk(num, dim=1)
    return top_RK, ids_RK.gather(1, place_RK)


def _block_by_block(block_RK: Tensor, head: TiledHead, rows: slice) -> Tensor:
    """Logits of some blocks of each position: one product for each block, of all who chose it.

    Each row of the weight is read once, where gathering would copy it for every position.
    """
    chosen = block_RK.flatten()
    order, counts = chosen.argsort(), cast(list[int], cast(Any, chosen.bincount()).tolist())
    members = (order // block_RK.shape[1] + rows.start).split(counts)
    z_PC = head.hidden_ND.new_full((chosen.numel(), BLOCK), -math.inf, dtype=head.tile_type)
    start = 0
    for block, member_P in enumerate(members):
        if member_P.numel():
            columns = slice(block * BLOCK, min((block + 1) * BLOCK, head.num_tokens))
            width, end = columns.stop - columns.start, start + member_P.numel()
            z_PC[start:end, :width] = head.tile(member_P, columns)
            start = end
    back_PC = torch.empty_like(z_PC)
    back_PC[order] = z_PC
    return back_PC.view(len(block_RK), -1)


def _gathered(ids_RK: Tensor, head: TiledHead, rows: slice) -> Tensor:
    """Logits of some columns of each position, by a copy of their weights: few calls."""
    parts: list[Tensor] = []
    for start in range(0, len(ids_RK), GATHERED_ROWS):
        ids_rK = ids_RK[start : start + GATHERED_ROWS].clamp(max=head.num_tokens - 1)
        some = slice(rows.start + start, rows.start + start + len(ids_rK))
        parts.append(head.at(some, ids_rK))
    return torch.cat(parts)
