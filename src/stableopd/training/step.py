"""One optimizer step: score the tokens, sum the terms, and update the student.

Which terms there are is decided by their weights in the configuration; a term whose weight is 0
is not computed. Each micro-batch adds its share of a mean over the whole step, so the split into
micro-batches changes nothing but memory, and neither does the split into processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from stableopd.config import ObjectiveConfig
from stableopd.training.batch import micro_batches, rollout_sequences
from stableopd.training.devices import clock
from stableopd.training.ranks import ALONE, Ranks, shared
from stableopd.training.sharding import whole
from stableopd.training.terms import Players, Tally, Work, merged, terms_of
from stableopd.types import Sequence, TrainingError

__all__ = ["StepResult", "step"]


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all processes. Per-token values are in the order of the rollouts.

    Attributes:
        losses: Weighted total and unweighted terms, of the last update of the batch.
        grad_norm: Norm of the gradient before clipping, of the last update.
        student_logps: Log-probs of the rollouts' tokens under the student that drew them.
        teacher_logps: The same under the teacher; empty lists without one.
        advantages: Advantages as the policy term used them; empty lists without that term.
        token_means: Means over all rollout tokens of what else was scored, by metric name.
        score_s: Seconds in the teacher's and the reference's forward passes.
        update_s: All other seconds of the step.
    """

    losses: dict[str, float]
    grad_norm: float
    student_logps: tuple[list[float], ...]
    teacher_logps: tuple[list[float], ...]
    advantages: tuple[list[float], ...]
    token_means: dict[str, float]
    score_s: float
    update_s: float


def step(
    players: Players,
    optimizer: torch.optim.Optimizer,
    work: Work,
    *,
    micro_batch_tokens: int,
    grad_clip: float,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Train the student on one batch of rollouts and golden solutions.

    Args:
        players: The models.
        optimizer: Holds the student's trainable parameters.
        work: The batch, and the weights and switches of the terms.
        micro_batch_tokens: Padded tokens of one forward and backward pass.
        grad_clip: Largest norm of the gradient.
        ranks: The processes, all of which call this with the same batch.

    Returns:
        Losses, norm of the gradient, and what was scored for each token.

    Raises:
        TrainingError: A loss, a gradient or a log-prob is not finite; the student is unchanged by
            the update in which that was seen.
    """
    device = players.stop_ids.device
    start = clock(device)
    objective = work.objective
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    old_logps: list[list[float]] | None = None
    first, tally, grad_norm, score_s = Tally(), Tally(), math.nan, 0.0
    for _ in range(objective.updates_per_batch):
        tally = Tally()
        for one in _passes(work, micro_batch_tokens, ranks):
            _backward(players, work, tally, old_logps, one)
        tally = merged(ranks.gather(tally))
        ranks.sum_gradients(parameters)
        grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, grad_clip)))
        _require_finite(tally, grad_norm)
        score_s += tally.score_s
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if old_logps is None:
            first, old_logps = tally, tally.per_rollout.get("student")
    tally.losses["total"] = sum(
        weight * tally.losses.get(name, 0.0) for name, weight in _weights(objective).items()
    )
    empty: list[list[float]] = [[] for _ in work.rollouts]
    return StepResult(
        losses=tally.losses,
        grad_norm=grad_norm,
        student_logps=tuple(first.per_rollout.get("student", empty)),
        teacher_logps=tuple(first.per_rollout.get("teacher", empty)),
        advantages=tuple(first.per_rollout.get("advantage", empty)),
        token_means={k: v / max(1, first.num_tokens) for k, v in first.sums.items()},
        score_s=score_s,
        update_s=clock(device) - start - score_s,
    )


def _weights(objective: ObjectiveConfig) -> dict[str, float]:
    # As a reward the reference term is in the policy term already.
    beta = 0.0 if objective.reference_kl == "k1" else objective.beta_reference or 0.0
    return {
        "opd": objective.lambda_policy or 0.0,
        "golden": objective.lambda_gold or 0.0,
        "reference_kl": beta,
        "divergence": objective.lambda_divergence or 0.0,
    }


def _require_finite(tally: Tally, grad_norm: float) -> None:
    """Raise in every process alike: the tally and the norm are those of all of them."""
    if tally.fault:
        raise shared(TrainingError(tally.fault))
    for name, value in tally.losses.items():
        if not math.isfinite(value):
            raise shared(TrainingError(f"loss/{name} is {value}; this update was not made."))
    if not math.isfinite(grad_norm):
        raise shared(
            TrainingError(f"the norm of the gradient is {grad_norm}; this update was not made.")
        )


@dataclass(frozen=True)
class _Pass:
    """A micro-batch, and whether it counts or only keeps step with the other processes."""

    sequences: list[Sequence]
    counts: bool = True


def _passes(work: Work, budget: int, ranks: Ranks) -> list[_Pass]:
    """This process's share of a step in micro-batches; with shards, as many as every process makes.

    A golden solution stands with the rollouts of its prompt, so that the prompt is read once. Where
    weights are sharded it does not: each pass calls the same models in every process.
    """
    rollouts = rollout_sequences(work.rollouts)
    golden = list(work.golden) if work.objective.lambda_gold else []
    passes: list[_Pass] = []
    for sequences in (rollouts, golden) if ranks.shards else (rollouts + golden,):
        groups = micro_batches(ranks.share(sequences), budget)
        passes += [_Pass(group) for group in groups]
        num_idle = ranks.num_idle(len(groups))
        if num_idle:
            passes += [_Pass([min(sequences, key=len)], counts=False)] * num_idle
    return passes


def _backward(
    players: Players, work: Work, tally: Tally, old_logps: list[list[float]] | None, one: _Pass
) -> None:
    weights = _weights(work.objective)
    record = tally if one.counts else Tally()
    terms = terms_of(players, work, record, one.sequences, old_logps)
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    for name, value in terms.items():
        record.add_loss(name, value)
    if total.requires_grad:
        (total if one.counts else 0.0 * total).backward()
