"""Scoring the tokens of a few sequences with both models, and choosing the prompts for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from stableopd.data.prompts import prompts_of_step
from stableopd.doctor.patient import Patient
from stableopd.hidden import token_hidden_states
from stableopd.models import head_of
from stableopd.objective.divergence import reverse_kl, top_k_overlap
from stableopd.objective.logprobs import score_tokens
from stableopd.teacher.local import FrozenModel
from stableopd.training.batch import collate, micro_batches
from stableopd.types import ModelError, Scores, Sequence

__all__ = ["TokenScores", "choose_prompts", "overlap_k", "score_sequences"]

# 2604.13016 logs the overlap of the 16 likeliest tokens; of a tiny vocabulary no more than a
# quarter is taken, or any two models would overlap.
OVERLAP_K = 16


@dataclass(frozen=True)
class TokenScores:
    """What both models say of the tokens of one sequence, each (T,) in nats.

    Attributes:
        student: Log-prob of each token under the student.
        student_entropy: Entropy of the student there.
        teacher: Log-prob under the teacher; empty without one, as are the next three.
        teacher_entropy: Entropy of the teacher there.
        kl: KL(student || teacher) there, exact over the vocabulary.
        overlap: Share of the teacher's likeliest tokens that are among the student's.
    """

    student: NDArray[np.float64]
    student_entropy: NDArray[np.float64]
    teacher: NDArray[np.float64]
    teacher_entropy: NDArray[np.float64]
    kl: NDArray[np.float64]
    overlap: NDArray[np.float64]


def overlap_k(num_tokens: int) -> int:
    """Size of the top-k sets for a vocabulary: 16, or a quarter of a smaller one."""
    return min(OVERLAP_K, max(1, num_tokens // 4))


@torch.no_grad()
def score_sequences(
    patient: Patient,
    sequences: Many[Sequence],
    stop_ids: Many[int],
    is_event: bool,
    num_tokens: int,
    has_teacher: bool = True,
) -> list[TokenScores]:
    """Score the completions of sequences with both models, at the temperatures of the training.

    Args:
        patient: The models.
        sequences: Sequences; their `index` is not read.
        stop_ids: Ids that end a completion, at least one.
        is_event: Whether a stop is scored as one event over `stop_ids`, or by its own id.
        num_tokens: Ids that both models share.
        has_teacher: False leaves the teacher out, as where its ids mean something else.

    Returns:
        Scores of each sequence, in their order.

    Raises:
        ModelError: A log-prob is not finite.
    """
    config = patient.config
    teacher = None
    if patient.teacher is not None and has_teacher:
        teacher = FrozenModel(
            patient.teacher.model, num_tokens, config.teacher.temperature, patient.autocast
        )
    head = head_of(patient.student.model).restricted_to(num_tokens)
    stops = torch.tensor(list(stop_ids), device=patient.device)
    pad_id = int(stops[0])
    overlap = functools.partial(top_k_overlap, k=overlap_k(num_tokens))
    numbered = [
        Sequence(s.prompt_ids, s.completion_ids, s.is_golden, i) for i, s in enumerate(sequences)
    ]
    found: dict[int, TokenScores] = {}
    for group in micro_batches(numbered, config.optimizer.micro_batch_tokens):
        batch = collate(group, pad_id, patient.device)
        against = [] if teacher is None else [teacher.against(batch, reverse_kl, overlap)]
        with patient.autocast():
            scores = score_tokens(
                token_hidden_states(patient.student.model, batch),
                head,
                batch.target_N,
                stop_ids=stops,
                stop_is_event=is_event,
                temperature=config.rollout.temperature,
                against=against,
            )
        for sequence, told in zip(group, _by_sequence(scores, group), strict=True):
            found[sequence.index] = told
    return [found[i] for i in range(len(numbered))]


def _by_sequence(scores: Scores, group: Many[Sequence]) -> list[TokenScores]:
    """The columns of a micro-batch, cut into its sequences."""
    columns = [scores.logp_N, scores.entropy_N]
    for other in scores.others:
        columns += [other.logp_N, other.entropy_N, *other.comparisons]
    _require_finite(columns)
    lengths = [len(s.completion_ids) for s in group]
    split = [c.double().cpu().split(lengths) for c in columns]
    missing = [np.empty(0)] * (6 - len(columns))
    return [
        TokenScores(*(column[row].numpy() for column in split), *missing)
        for row in range(len(group))
    ]


def _require_finite(columns: Many[torch.Tensor]) -> None:
    for role, column in zip(("student", "student", "teacher"), columns, strict=False):
        if not bool(torch.isfinite(column).all()):
            raise ModelError(
                f"the {role} gives log-probs that are not finite, though its weights are; use an "
                "earlier checkpoint or another dtype."
            )


def choose_prompts(patient: Patient, context: int | None) -> tuple[list[int], int]:
    """On which prompts completions are sampled, and how long these may be.

    Prompts that leave room for the whole budget come first, in the order of the first epoch.

    Args:
        patient: Prompts and settings.
        context: The shorter context of the models; None where there is no limit.

    Returns:
        Places of the prompts, and the length budget in tokens: less than the configured one, and
        perhaps 0, where no chosen prompt leaves room for it.
    """
    budget, count = patient.config.rollout.max_new_tokens, len(patient.prompts)
    order = prompts_of_step(0, count, count, patient.config.run.seed)
    limit = math.inf if context is None else context
    order.sort(key=lambda i: max(0, len(patient.prompt_ids[i]) + budget - limit))
    chosen = order[: patient.settings.num_prompts]
    longest = max(len(patient.prompt_ids[i]) for i in chosen)
    return chosen, int(max(0, min(budget, limit - longest)))
