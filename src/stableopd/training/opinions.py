"""What the teacher says of a micro-batch: from its hidden states here, or as its server said it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stableopd.config import ObjectiveConfig
from stableopd.objective import divergence
from stableopd.objective.heads import Against, Support
from stableopd.types import Batch, Scores

if TYPE_CHECKING:
    from stableopd.teacher.server import Judged
    from stableopd.training.terms import Players, Work

__all__ = ["Opinion", "opinion", "teacher_against"]

# Size of the top-k sets whose agreement is logged (2604.13016 uses 16).
OVERLAP_K = 16

DIVERGENCES = {
    "reverse_kl": divergence.reverse_kl,
    "forward_kl": divergence.forward_kl,
    "jensen_shannon": divergence.jensen_shannon,
}


@dataclass(frozen=True)
class Opinion:
    """What the teacher says of the N tokens of a micro-batch.

    Attributes:
        logp_N: Its log-probs of the tokens.
        divergence_N: The divergence of `gkd` at each of them; None without that term.
        whole: What needs its distribution over the vocabulary; None where it is served.
    """

    logp_N: Tensor
    divergence_N: Tensor | None
    whole: Scores | None


def teacher_against(players: Players, work: Work, batch: Batch) -> list[Against]:
    """What of the teacher is to be scored beside the student.

    Args:
        players: The models.
        work: The step's batch.
        batch: A micro-batch of it.

    Returns:
        One other model, or none where the teacher's log-probs are all that is needed of it.
    """
    objective = work.objective
    if players.teacher is not None:
        return [players.teacher.against(batch, *_teacher_compares(objective))]
    if work.judged is not None and objective.lambda_divergence:
        return [_known(work.judged, batch, players.num_tokens, objective)]
    return []


def opinion(
    players: Players, work: Work, batch: Batch, others: Iterator[Scores], like_N: Tensor
) -> Opinion | None:
    """What the teacher says, wherever it is.

    Args:
        players: The models.
        work: The step's batch.
        batch: A micro-batch of it.
        others: What was scored beside the student; the teacher's part is taken from it.
        like_N: A tensor of the type and on the device of the log-probs, (N,).

    Returns:
        Its opinion, without gradient but in the divergence; None without a teacher.
    """
    if players.teacher is not None:
        whole = next(others)
        return Opinion(whole.logp_N, whole.comparisons[-1], whole)
    if work.judged is None:
        return None
    logp_N = like_N.new_tensor([x for s in batch.sequences for x in work.judged[s.index].logps])
    divergence_N = next(others).comparisons[0] if work.objective.lambda_divergence else None
    return Opinion(logp_N, divergence_N, None)


def _known(
    judged: Many[Judged], batch: Batch, num_tokens: int, objective: ObjectiveConfig
) -> Against:
    """A served teacher's likeliest tokens at a batch's positions, for the divergence on them."""
    own = [judged[s.index] for s in batch.sequences]
    known = [
        torch.cat([torch.from_numpy(rows).float() for rows in parts if rows is not None])
        for parts in ([one.top_ids for one in own], [one.top_logps for one in own])
    ]
    return Against(
        torch.cat(known, dim=-1).to(batch.target_N.device),
        Support(num_tokens),
        (_divergence_of(objective),),
    )


def _divergence_of(objective: ObjectiveConfig) -> Callable[[Tensor, Tensor], Tensor]:
    chosen = DIVERGENCES[objective.divergence]
    if objective.top_k:
        return functools.partial(divergence.on_top_k, chosen, k=objective.top_k)
    return chosen


def _teacher_compares(objective: ObjectiveConfig) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Agreement of the top-k sets; the baseline's KL if asked for; last, gkd's divergence."""
    compares: list[Callable[[Tensor, Tensor], Tensor]] = [
        functools.partial(divergence.top_k_agreement, k=OVERLAP_K)
    ]
    if objective.baseline == "kl":
        compares.append(divergence.detached_reverse_kl)
    if objective.lambda_divergence:
        compares.append(_divergence_of(objective))
    return compares
