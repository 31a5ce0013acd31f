"""The terms of one micro-batch: models scored side by side, advantages, unweighted means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stableopd.config import ObjectiveConfig
from stableopd.hidden import token_hidden_states
from stableopd.models import head_of
from stableopd.objective import advantage, divergence, loss
from stableopd.objective.heads import Against, Head
from stableopd.objective.logprobs import score_tokens
from stableopd.teacher.local import FrozenModel
from stableopd.training.batch import collate
from stableopd.training.devices import clock
from stableopd.training.opinions import Opinion, opinion, teacher_against
from stableopd.types import Batch, Rollout, Scores, Sequence, StopReason, TrainingError

if TYPE_CHECKING:
    from stableopd.teacher.server import Judged

__all__ = ["Players", "Tally", "Work", "merged", "score", "terms_of"]


@dataclass(frozen=True)
class Players:
    """The models of a run and what they agree on.

    Attributes:
        student: The model that is trained.
        num_tokens: Size of the vocabulary that all of them share.
        teacher: Scores the student's tokens in this process; None for methods without one, and
            where it is served, as what it says is then in the `Work`.
        reference: The student as it was at the start; None where no term can need it. It is not
            scored while objective.beta_reference is 0.
        stop_ids: Ids that end a completion, (E,).
        stop_is_event: Whether stopping is scored as one event.
        temperature: Temperature of the student's distribution.
        pad_id: Fills padded rows up.
        autocast: Opens the mixed-precision context.
    """

    student: Any
    num_tokens: int
    teacher: FrozenModel | None
    reference: FrozenModel | None
    stop_ids: Tensor
    stop_is_event: bool
    temperature: float
    pad_id: int
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def head(self) -> Head:
        """The student's head over the shared vocabulary."""
        return head_of(self.student).restricted_to(self.num_tokens)


@dataclass
class Tally:
    """What the micro-batches of one update add up to.

    `fault` says what makes the update impossible. It is raised once all processes have made their
    passes: one that stopped half-way would leave the others waiting.
    """

    losses: dict[str, float] = field(default_factory=dict)
    per_rollout: dict[str, list[list[float]]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    score_s: float = 0.0
    fault: str = ""

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's share of a term's mean."""
        self.losses[name] = self.losses.get(name, 0.0) + value.item()

    def add_tokens(self, name: str, batch: Batch, value_N: Tensor, num_rollouts: int) -> None:
        """Keep a value of every token, sorted by rollout."""
        lists = self.per_rollout.setdefault(name, [[] for _ in range(num_rollouts)])
        parts = (
            value_N.detach().float().cpu().split([len(s.completion_ids) for s in batch.sequences])
        )
        for sequence, part in zip(batch.sequences, parts, strict=True):
            lists[sequence.index] = part.tolist()

    def add_sum(self, name: str, value_N: Tensor) -> None:
        """Add up a value over tokens."""
        self.sums[name] = (
            self.sums.get(name, 0.0) + value_N.detach().float().cpu().double().sum().item()
        )


def merged(tallies: Many[Tally]) -> Tally:
    """What the shares of all processes in one update add up to.

    Args:
        tallies: One of each process; no two hold the same rollout.

    Returns:
        The tally of the whole update.
    """
    if len(tallies) == 1:
        return tallies[0]
    whole = Tally()
    for tally in tallies:
        for name, value in tally.losses.items():
            whole.losses[name] = whole.losses.get(name, 0.0) + value
        for name, value in tally.sums.items():
            whole.sums[name] = whole.sums.get(name, 0.0) + value
        for name, lists in tally.per_rollout.items():
            found = whole.per_rollout.setdefault(name, [[] for _ in lists])
            whole.per_rollout[name] = [new or old for new, old in zip(lists, found, strict=True)]
        whole.num_tokens += tally.num_tokens
        whole.score_s = max(whole.score_s, tally.score_s)
        whole.fault = whole.fault or tally.fault
    return whole


@dataclass(frozen=True)
class Work:
    """A step's batch, with all that must be counted over its micro-batches.

    It is the whole batch in every process, of which each scores its share.

    Attributes:
        objective: Weights and switches of the terms, presets filled in.
        rollouts: Rollouts of this step, those of one prompt next to each other.
        golden: Golden solutions of the same prompts.
        rewards: Advantage of each rollout from `group_reward`; None for the log-ratio forms.
        max_length: The length that the aggregation "constant" divides by.
        judged: What a served teacher says of each rollout; None without one.
    """

    objective: ObjectiveConfig
    rollouts: Many[Rollout]
    golden: Many[Sequence]
    rewards: Tensor | None
    max_length: int
    judged: Many[Judged] | None = None

    def num_policy_tokens(self, rollout: Rollout) -> int:
        """Tokens of a rollout that the policy term counts."""
        if self.objective.mask_truncated and rollout.stop_reason is StopReason.LENGTH:
            return 0
        length = len(rollout.completion_ids)
        return min(length, self.objective.first_n) if self.objective.first_n else length

    def denominator(self, term: str) -> float:
        """What the sum of a term over the whole step is divided by."""
        if term == "golden":
            dropped = 0 if self.objective.golden_stop_label else 1
            counted = [len(s.completion_ids) - dropped for s in self.golden]
        elif term == "policy":
            counted = [self.num_policy_tokens(r) for r in self.rollouts]
        else:
            counted = [len(r.completion_ids) for r in self.rollouts]
        return loss.denominator(counted, self.objective.aggregation, self.max_length)

    def mean(self, term: str, value_N: Tensor, mask_N: Tensor, row_N: Tensor) -> Tensor:
        """A micro-batch's share of a term's mean over the step."""
        return loss.masked_mean(
            value_N, mask_N, row_N, self.objective.aggregation, self.denominator(term)
        )


def score(players: Players, hidden_ND: Tensor, batch: Batch, against: Many[Against] = ()) -> Scores:
    """Score the completion tokens of a micro-batch with the student, and others beside it.

    Args:
        players: The models.
        hidden_ND: The student's hidden states at those tokens, (N, D); carries gradient.
        batch: The micro-batch.
        against: Other models at the same tokens.

    Returns:
        As `score_tokens`.
    """
    return score_tokens(
        hidden_ND,
        players.head(),
        batch.target_N,
        stop_ids=players.stop_ids,
        stop_is_event=players.stop_is_event,
        temperature=players.temperature,
        against=against,
    )


def terms_of(
    players: Players,
    work: Work,
    tally: Tally,
    sequences: Many[Sequence],
    old_logps: list[list[float]] | None,
) -> dict[str, Tensor]:
    """The unweighted terms of a micro-batch; the student reads all of it in one pass.

    Args:
        players: The models.
        work: The step's batch.
        tally: Takes a record of what was scored.
        sequences: A micro-batch of the step: rollouts, golden solutions, or both.
        old_logps: Log-probs of every rollout under the student that drew it; None in the first
            update of a batch, where that is the student itself.

    Returns:
        Shares of the means over the step, scalars by name; carry gradient to the student.
    """
    rollouts = [s for s in sequences if not s.is_golden]
    golden = [s for s in sequences if s.is_golden]
    device = players.stop_ids.device
    batch, against = None, []
    if rollouts:
        batch = collate(rollouts, players.pad_id, device)
        start = clock(device)
        against = _others(players, work, batch)
        tally.score_s += clock(device) - start
    whole = collate([*rollouts, *golden], players.pad_id, device)
    num_tokens = sum(len(s.completion_ids) for s in rollouts)
    terms: dict[str, Tensor] = {}
    with players.autocast():
        hidden_ND = token_hidden_states(players.student, whole)
    if batch is not None:
        with players.autocast():
            scores = score(players, hidden_ND[:num_tokens], batch, against)
        terms |= _rollout_terms(players, work, tally, batch, scores, old_logps)
    if golden:
        batch = collate(golden, players.pad_id, device)
        with players.autocast():
            scores = score(players, hidden_ND[num_tokens:], batch)
        terms["golden"] = _golden_term(work, batch, scores)
    return terms


def _others(players: Players, work: Work, batch: Batch) -> list[Against]:
    """What is scored beside the student: teacher first, then the reference if it is needed."""
    objective, against = work.objective, teacher_against(players, work, batch)
    if players.reference is not None and objective.beta_reference:
        compares = (divergence.reverse_kl,) if objective.reference_kl == "exact" else ()
        against.append(players.reference.against(batch, *compares))
    return against


def _rollout_terms(
    players: Players,
    work: Work,
    tally: Tally,
    batch: Batch,
    scores: Scores,
    old_logps: list[list[float]] | None,
) -> dict[str, Tensor]:
    objective, count = work.objective, len(work.rollouts)
    others = iter(scores.others)
    teacher = opinion(players, work, batch, others, scores.logp_N)
    reference = next(others, None)
    old_N = scores.logp_N.detach()
    if old_logps is not None:
        old_N = old_N.new_tensor([x for s in batch.sequences for x in old_logps[s.index]])
    _record(tally, batch, scores, teacher, count)

    terms: dict[str, Tensor] = {}
    everywhere_N = torch.ones_like(batch.index_N, dtype=torch.bool)
    if objective.lambda_policy:
        advantage_N = _advantage(work, batch, old_N, teacher, reference)
        tally.add_tokens("advantage", batch, advantage_N, count)
        weight_N = advantage.prefix_weights(advantage_N, batch.row_N, objective.prefix_gain)
        value_N = loss.policy_gradient(scores.logp_N, old_N, weight_N * advantage_N, objective.clip)
        counted = [work.num_policy_tokens(work.rollouts[s.index]) for s in batch.sequences]
        mask_N = batch.index_N < batch.index_N.new_tensor(counted)[batch.row_N]
        terms["opd"] = work.mean("policy", value_N, mask_N, batch.row_N)
    if reference is not None:
        value_N = _reference_value(objective.reference_kl, scores.logp_N, reference)
        terms["reference_kl"] = work.mean("reference", value_N, everywhere_N, batch.row_N)
    if objective.lambda_divergence and teacher is not None:
        assert teacher.divergence_N is not None
        terms["divergence"] = work.mean(
            "divergence", teacher.divergence_N, everywhere_N, batch.row_N
        )
    return terms


def _golden_term(work: Work, batch: Batch, scores: Scores) -> Tensor:
    """The golden cross entropy, in nats."""
    mask_N = torch.ones_like(batch.index_N, dtype=torch.bool)
    if not work.objective.golden_stop_label:
        lengths_B = batch.index_N.new_tensor([len(s.completion_ids) for s in batch.sequences])
        mask_N = batch.index_N < lengths_B[batch.row_N] - 1
    value_N = loss.golden_cross_entropy(scores.logp_N)
    return work.mean("golden", value_N, mask_N, batch.row_N)


def _reference_value(kind: str, logp_N: Tensor, reference: Scores) -> Tensor:
    if kind == "exact":
        return reference.comparisons[0]
    estimator = {"k1": divergence.k1, "k2": divergence.k2, "k3": divergence.k3}[kind]
    return estimator(logp_N, reference.logp_N)


def _advantage(
    work: Work, batch: Batch, old_N: Tensor, teacher: Opinion | None, reference: Scores | None
) -> Tensor:
    """The advantage of each token, with the control variate and the k1 reward folded in."""
    objective = work.objective
    if work.rewards is not None:
        places = torch.tensor([s.index for s in batch.sequences])
        advantage_N = work.rewards[places].to(old_N)[batch.row_N]
    elif teacher is not None:
        advantage_N = advantage.shaped(
            objective.advantage or "log_ratio",
            teacher.logp_N,
            old_N,
            objective.advantage_parameter,
        )
        if objective.baseline == "kl" and teacher.whole is not None:
            advantage_N = advantage_N + teacher.whole.comparisons[1]
    else:
        raise TrainingError("the policy term has neither a teacher nor rewards.")
    if reference is not None and objective.reference_kl == "k1":
        per_policy = (objective.beta_reference or 0.0) / (objective.lambda_policy or 1.0)
        advantage_N = advantage_N - per_policy * divergence.k1(old_N, reference.logp_N).detach()
    return advantage_N


def _record(
    tally: Tally, batch: Batch, scores: Scores, teacher: Opinion | None, num_rollouts: int
) -> None:
    tally.num_tokens += batch.target_N.numel()
    tally.add_tokens("student", batch, scores.logp_N, num_rollouts)
    tally.add_sum("entropy/student", scores.entropy_N)
    if teacher is not None:
        if not bool(torch.isfinite(teacher.logp_N).all()):
            tally.fault = "the teacher gave a log-prob that is not finite; check its weights."
        tally.add_tokens("teacher", batch, teacher.logp_N, num_rollouts)
    if teacher is not None and teacher.whole is not None:
        whole = teacher.whole
        tally.add_sum("entropy/teacher", whole.entropy_N)
        tally.add_sum("entropy/gap", (whole.entropy_N - scores.entropy_N).abs())
        tally.add_sum("overlap/ratio", whole.comparisons[0][:, 0])
        tally.add_sum("overlap/advantage", whole.comparisons[0][:, 1])
