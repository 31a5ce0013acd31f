"""From TRL's padded tensors to our batches and records."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stableopd.types import Batch, Record, Scores, StopReason

__all__ = ["evaluating", "records_of", "right_padded"]


def right_padded(inputs: Mapping[str, Tensor], name: str) -> Batch:
    """Prompts, which TRL pads on the left, with completions of a kind, padded on the right.

    So positions count from each prompt's first token, as in generation, for models with absolute
    positions too. The sequences are known only by their tensors.

    Args:
        inputs: TRL's tensors `prompt_ids` and `prompt_mask`, (B, P), and those of the completions.
        name: "completion" or "golden", before `_ids` and `_mask`, (B, C).

    Returns:
        The batch; rows without a completion have no token in it.
    """
    prompt_mask_BT, mask_BT = inputs["prompt_mask"], inputs[f"{name}_mask"]
    ids_BT = torch.cat([inputs["prompt_ids"], inputs[f"{name}_ids"]], dim=1)
    labels_BT = torch.cat([torch.zeros_like(prompt_mask_BT), mask_BT], dim=1)
    real_BT = torch.cat([prompt_mask_BT, mask_BT], dim=1)
    width = int(real_BT.sum(1).max())
    order_BT = real_BT.argsort(dim=1, descending=True, stable=True)[:, :width]
    ids_BT, labels_BT, real_BT = (x.gather(1, order_BT) for x in (ids_BT, labels_BT, real_BT))
    row_N, place_N = labels_BT.nonzero(as_tuple=True)
    index_N = place_N - prompt_mask_BT.sum(1)[row_N]
    return Batch((), ids_BT, real_BT, row_N, index_N, place_N - 1, ids_BT[row_N, place_N])


def records_of(
    inputs: Mapping[str, Tensor], tokenizer: Any, stop_ids: Collection[int], scores: Scores | None
) -> list[Record]:
    """The rollouts of a micro-batch.

    Args:
        inputs: TRL's tensors `completion_ids` and `completion_mask`, (B, C).
        tokenizer: The student's tokenizer.
        stop_ids: Ids that end a rollout.
        scores: What the student and, first of the others, the teacher say of these tokens, by row;
            None where they were not scored.

    Returns:
        A record for each row.
    """
    masks_BT = inputs["completion_mask"].bool()
    rows = [
        ids_T[mask_T].cpu()
        for ids_T, mask_T in zip(inputs["completion_ids"], masks_BT, strict=True)
    ]
    texts: Sequence[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    logps: list[list[Any]] = [[None] * len(rows)] * 2
    if scores is not None:
        logps = [
            [part.numpy() for part in logp_N.detach().double().cpu().split([len(r) for r in rows])]
            for logp_N in (scores.logp_N, scores.others[0].logp_N)
        ]
    return [
        Record(
            source="TRL",
            line=place,
            completion=text,
            completion_ids=row.numpy(),
            num_tokens=len(row),
            stop_reason=StopReason.STOP
            if len(row) and int(row[-1]) in stop_ids
            else StopReason.LENGTH,
            student_logps=student,
            teacher_logps=teacher,
        )
        for place, (row, text, student, teacher) in enumerate(
            zip(rows, texts, *logps, strict=True), start=1
        )
    ]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Turn dropout off, and afterwards as it was.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
