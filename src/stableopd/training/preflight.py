"""The audit of a run before its first step: a few rollouts, and what both models do at stops."""

from __future__ import annotations

import statistics

import torch

from stableopd.hidden import token_hidden_states
from stableopd.rollout.stops import Finding, StopLogps, audit
from stableopd.training.answer_checks import golden_answers, known_answers
from stableopd.training.batch import collate, micro_batches, rollout_sequences
from stableopd.training.ranks import shared
from stableopd.training.setup import Run
from stableopd.training.terms import score
from stableopd.types import ModelError, Rollout, SamplingSettings, StopReason

__all__ = ["examine"]

NUM_ROLLOUTS = 8
AUDIT_SEED = 104_729


def examine(run: Run) -> list[Finding]:
    """Sample a few rollouts of the untrained student, audit how they stop, and try the grader.

    Args:
        run: A prepared run; nothing of it is changed.

    Returns:
        The findings, in a fixed order.

    Raises:
        ModelError: A log-prob of student or teacher is not finite.
        DataError: math-verify cannot be started.
        TrainingError: Another process was lost.
    """
    with run.ranks.watched():
        return _examine(run)


def _examine(run: Run) -> list[Finding]:
    o, r = run.config.objective, run.config.rollout
    rollouts: list[Rollout] = []
    if o.lambda_policy or o.lambda_divergence or o.beta_reference:
        places = list(range(min(NUM_ROLLOUTS, len(run.train.prompts))))
        settings = SamplingSettings(r.max_new_tokens, r.temperature, r.top_p, r.top_k)
        with run.accelerator.autocast():
            rollouts = run.sampler.sample(run.train.named_ids(places), 1, settings, AUDIT_SEED)
    golden = [s.completion_ids for s in run.train.golden if s is not None]
    stop_logps = _stop_logps(run, rollouts)

    def find() -> list[Finding]:
        findings = audit(
            run.stops,
            run.student.tokenizer,
            run.teacher_tokenizer,
            golden,
            rollouts,
            r.max_new_tokens,
            stop_logps,
        )
        return [*findings, *_grading(run)]

    return run.ranks.on_main(find)


def _grading(run: Run) -> list[Finding]:
    """What the grader makes of right answers and of golden solutions."""
    train, held_out = run.train, run.held_out
    found = [known_answers(train.prompts, train.grader)]
    if held_out is not None and held_out.prompts != train.prompts:
        found.append(known_answers(held_out.prompts, held_out.grader))
    solutions = golden_answers(train.prompts, train.grader, train.thinking)
    if solutions is not None:
        found.append(solutions[0])
    return [finding for finding in found if finding is not None]


@torch.no_grad()
def _stop_logps(run: Run, rollouts: list[Rollout]) -> StopLogps | None:
    """Mean log-prob of the students' stops, as the objective will see them.

    They are few: every process scores all of them, and finds the same.
    """
    players = run.players
    stopped = [r for r in rollouts if r.stop_reason is StopReason.STOP]
    if (players.teacher is None and run.served is None) or not stopped:
        return None
    judged = run.served and run.ranks.spread(run.train.by_teacher(stopped), run.served.judge)
    student: list[float] = []
    teacher: list[float] = []
    budget = run.config.optimizer.micro_batch_tokens
    for group in micro_batches(rollout_sequences(stopped), budget):
        batch = collate(group, players.pad_id, players.stop_ids.device)
        with players.autocast():
            hidden_ND = token_hidden_states(players.student, batch)
            against = [] if players.teacher is None else [players.teacher.against(batch)]
            scores = score(players, hidden_ND, batch, against)
        teacher_N = (
            scores.others[0].logp_N
            if judged is None
            else torch.tensor([x for s in group for x in judged[s.index].logps])
        )
        for role, logp_N in (("student", scores.logp_N), ("teacher", teacher_N)):
            if not bool(torch.isfinite(logp_N).all()):
                told = ModelError(
                    f"the {role} gives log-probs that are not finite on the first rollouts, though "
                    "its weights are; use an earlier checkpoint or another dtype."
                )
                raise shared(told)
        ends = torch.tensor([len(s.completion_ids) for s in group]).cumsum(0) - 1
        student += scores.logp_N.cpu()[ends].tolist()
        teacher += teacher_N.cpu()[ends].tolist()
    return StopLogps(statistics.fmean(student), statistics.fmean(teacher), len(stopped))
