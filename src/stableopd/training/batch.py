"""Sequences of a step put into padded micro-batches of a token budget."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from stableopd.hidden import prefix_of
from stableopd.types import Batch, Prefix, Rollout, Sequence

__all__ = ["collate", "micro_batches", "rollout_sequences"]

# Reading prompts once takes two passes instead of one, which pays where it spares this share of the
# padded tokens. A guess, not tuned: a quarter spared took as much off SmolLM2 (docs/log.md).
LEAST_SPARED = 1 / 8


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
    """Split sequences so that little of a padded micro-batch is padding, or a prompt read again.

    Args:
        sequences: Sequences of a step.
        max_tokens: Padded tokens of a micro-batch; one longer sequence makes one of its own.

    Returns:
        Micro-batches, longest sequences first, so that a memory limit shows at the start. Sequences
        of equal length are neighbours, or, where fewer tokens are computed so, those of one prompt.
    """
    by_length = sorted(sequences, key=lambda s: (-len(s), s.is_golden, s.index))
    ways = [_cut(by_length, max_tokens)]
    if len(ways[0]) > 1:
        longest = {s.prompt_ids: len(s) for s in reversed(by_length)}
        by_prompt = sorted(by_length, key=lambda s: (-longest[s.prompt_ids], s.prompt_ids))
        ways.append(_cut(by_prompt, max_tokens))
    return min(ways, key=lambda groups: sum(map(_num_computed, groups)))


def _cut(sequences: Many[Sequence], max_tokens: int) -> list[list[Sequence]]:
    groups: list[list[Sequence]] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence))
        if not groups or longest * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
            longest = len(sequence)
        groups[-1].append(sequence)
    return groups


def _num_whole(sequences: Many[Sequence]) -> int:
    """Padded tokens of whole sequences."""
    return len(sequences) * max(map(len, sequences))


def _num_parted(sequences: Many[Sequence]) -> int:
    """Padded tokens of their prompts, each once, and of their completions."""
    prompts = {s.prompt_ids for s in sequences}
    width = max(len(s.completion_ids) for s in sequences) - 1
    return len(prompts) * max(map(len, prompts)) + len(sequences) * width


def _pays(sequences: Many[Sequence]) -> bool:
    """Whether to read each prompt once. There must be something to read behind it."""
    least = (1 - LEAST_SPARED) * _num_whole(sequences)
    is_behind = max(len(s.completion_ids) for s in sequences) > 1
    return is_behind and _num_parted(sequences) <= least


def _num_computed(sequences: Many[Sequence]) -> int:
    return _num_parted(sequences) if _pays(sequences) else _num_whole(sequences)


def collate(sequences: Many[Sequence], pad_id: int, device: torch.device) -> Batch:
    """Pad a micro-batch on the right and list its completion tokens.

    The labels are chosen by length, never by comparing with the pad id, so a pad id that is also
    a stop id hides no stop label.

    Args:
        sequences: Whole sequences; each has a prompt of one token or more.
        pad_id: Id that fills the rows up.
        device: Where the tensors go.

    Returns:
        The batch, with its prompts parted from the completions where that pays.
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
        _prefix(sequences, pad_id, device) if _pays(sequences) else None,
    )


def _prefix(sequences: Many[Sequence], pad_id: int, device: torch.device) -> Prefix:
    places = {prompt_ids: i for i, prompt_ids in enumerate({s.prompt_ids: 0 for s in sequences})}
    prompt_B = [places[s.prompt_ids] for s in sequences]
    completions = [s.completion_ids for s in sequences]
    return prefix_of(list(places), prompt_B, completions, pad_id, device)
