"""Sequences of a step put into padded micro-batches of a token budget."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from stableopd.types import Batch, Rollout, Sequence

__all__ = ["collate", "micro_batches", "rollout_sequences"]


def rollout_sequences(rollouts: Many[Rollout]) -> list[Sequence]:
    """The rollouts of a step as sequences, numbered in their order.

    Args:
        rollouts: Rollouts of a step.

    Returns:
        One sequence for each; `index` is its place in `rollouts`.
    """
    return [
        Sequence(r.prompt_ids, r.completion_ids, is_golden=False, index=i)
        for i, r in enumerate(rollouts)
    ]


def micro_batches(sequences: Many[Sequence], max_tokens: int) -> list[list[Sequence]]:
    """Split sequences by length, so that little of a padded micro-batch is padding.

    Args:
        sequences: Sequences of one kind.
        max_tokens: Padded tokens of a micro-batch; one longer sequence makes one of its own.

    Returns:
        Micro-batches, longest sequences first, so that a memory limit shows at the start.
    """
    groups: list[list[Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: (-len(s), s.index)):
        if not groups or len(groups[-1][0]) * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(sequence)
    return groups


def collate(sequences: Many[Sequence], pad_id: int, device: torch.device) -> Batch:
    """Pad a micro-batch on the right and list its completion tokens.

    The labels are chosen by length, never by comparing with the pad id, so a pad id that is also
    a stop id hides no stop label.

    Args:
        sequences: Whole sequences; each has a prompt of one token or more.
        pad_id: Id that fills the rows up.
        device: Where the tensors go.

    Returns:
        The batch.
    """
    width = max(len(s) for s in sequences)
    input_ids_BT = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask_BT = torch.zeros((len(sequences), width), dtype=torch.long)
    rows: list[torch.Tensor] = []
    indices: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    for row, s in enumerate(sequences):
        ids = torch.tensor((*s.prompt_ids, *s.completion_ids), dtype=torch.long)
        input_ids_BT[row, : len(ids)] = ids
        attention_mask_BT[row, : len(ids)] = 1
        index_n = torch.arange(len(s.completion_ids))
        rows.append(torch.full_like(index_n, row))
        indices.append(index_n)
        positions.append(index_n + len(s.prompt_ids) - 1)
    row_N, position_N = torch.cat(rows), torch.cat(positions)
    target_N = input_ids_BT[row_N, position_N + 1]
    return Batch(
        tuple(sequences),
        input_ids_BT.to(device),
        attention_mask_BT.to(device),
        row_N.to(device),
        torch.cat(indices).to(device),
        position_N.to(device),
        target_N.to(device),
    )
