"""What a step did, as one line of metrics and one line per rollout."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from stableopd.config import RepetitionConfig
from stableopd.diagnostics.credit import credit
from stableopd.diagnostics.repetition import repetition_rate, repetitive_tokens
from stableopd.diagnostics.truncation import truncation_rate
from stableopd.evaluation import Evaluation
from stableopd.training.step import StepResult
from stableopd.types import Prompt, Rollout, StopReason

__all__ = ["evaluation_metrics", "rollout_rows", "step_metrics"]


def step_metrics(
    result: StepResult,
    rollouts: Many[Rollout],
    correct: Many[bool] | None,
    repetition: RepetitionConfig,
    num_stop_ids: int,
) -> dict[str, float]:
    """The metrics of one step, named as in docs/metrics.md.

    Args:
        result: What the step returned.
        rollouts: The rollouts it trained on; none for `sft`.
        correct: Whether each is correct, where they were graded.
        repetition: What counts as repetition.
        num_stop_ids: How many ids end a rollout; with several, the sampler's log-prob of a stop is
            of one id and the trainer's of the event, and the two cannot be compared.

    Returns:
        Numbers by name; a name without a number in this method is left out.
    """
    line = {f"loss/{name}": value for name, value in result.losses.items()}
    line["grad_norm"] = result.grad_norm
    line |= result.token_means
    if not rollouts:
        return line
    line["rollout/mean_length"] = float(np.mean([len(r.completion_ids) for r in rollouts]))
    line["rollout/truncation_rate"] = truncation_rate([r.stop_reason for r in rollouts])
    line["rollout/repetition_rate"] = repetition_rate(
        [r.completion for r in rollouts], repetition.window_chars, repetition.ratio
    )
    if correct is not None:
        line["rollout/accuracy"] = float(np.mean(correct))
    labels = [
        repetitive_tokens(r.completion_ids, repetition.ngram, repetition.min_run) for r in rollouts
    ]
    line["rollout/repetitive_share"] = float(np.concatenate(labels).mean())
    line |= _credit_metrics(result, labels)
    line |= _logp_metrics(result, rollouts, num_stop_ids)
    return line


def _credit_metrics(result: StepResult, labels: list[Any]) -> dict[str, float]:
    if not any(result.advantages):
        return {}
    found = credit(np.concatenate(result.advantages), np.concatenate(labels))
    return {
        "advantage/mean": float(np.concatenate(result.advantages).mean()),
        "advantage/repetitive_mean": found.repetitive_mean,
        "advantage/regular_mean": found.regular_mean,
        "advantage/repetitive_weight": found.repetitive_weight,
    }


def _logp_metrics(
    result: StepResult, rollouts: Many[Rollout], num_stop_ids: int
) -> dict[str, float]:
    line: dict[str, float] = {}
    if not any(result.student_logps):
        return line
    student = np.concatenate(result.student_logps)
    line["logp/student_mean"] = float(student.mean())
    sampler = np.concatenate([r.sampler_logps for r in rollouts])
    lengths = np.array([len(r.completion_ids) for r in rollouts])
    stopped = np.array([r.stop_reason is StopReason.STOP for r in rollouts])
    ends = (np.cumsum(lengths) - 1)[stopped]
    comparable = np.ones(len(student), dtype=bool)
    if num_stop_ids > 1:
        comparable[ends] = False
    if comparable.any():
        gap = (student - sampler)[comparable]
        # k3 of KL(sampler || trainer): not negative, and zero where the two agree.
        line["mismatch/kl"] = float(np.mean(np.expm1(gap) - gap))
    if len(ends):
        line["stop/student_logp"] = float(student[ends].mean())
    if any(result.teacher_logps):
        teacher = np.concatenate(result.teacher_logps)
        line["logp/teacher_mean"] = float(teacher.mean())
        if len(ends):
            line["stop/teacher_logp"] = float(teacher[ends].mean())
    return line


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """The eval/ metrics of an evaluation, named as in docs/metrics.md.

    Args:
        evaluation: The evaluation.

    Returns:
        Numbers by name.
    """
    line = {
        "eval/accuracy": evaluation.accuracy,
        "eval/truncation_rate": evaluation.truncation_rate,
        "eval/repetition_rate": evaluation.repetition_rate,
        "eval/mean_length": evaluation.mean_length,
    }
    if evaluation.standard_error is not None:
        line["eval/accuracy_se"] = evaluation.standard_error
    return line


def rollout_rows(
    step: int,
    prompts: dict[str, Prompt],
    rollouts: Many[Rollout],
    result: StepResult | None,
    correct: Many[bool] | None,
) -> list[dict[str, Any]]:
    """One line per rollout for rollouts/STEP.jsonl.

    Args:
        step: The step.
        prompts: The prompts by id.
        rollouts: The rollouts.
        result: What the step returned; None where it failed, and the sampler's own log-probs stand
            in for the student's.
        correct: Whether each is correct, where they were graded.

    Returns:
        JSON objects with the keys of docs/metrics.md.
    """
    rows: list[dict[str, Any]] = []
    for i, r in enumerate(rollouts):
        prompt = prompts[r.prompt_id].prompt
        text = prompt if isinstance(prompt, str) else [_message(m) for m in prompt]
        student = r.sampler_logps if result is None else result.student_logps[i]
        row: dict[str, Any] = {
            "step": step,
            "prompt_id": r.prompt_id,
            "prompt": text,
            "completion": r.completion,
            "prompt_ids": list(r.prompt_ids),
            "completion_ids": list(r.completion_ids),
            "stop_reason": str(r.stop_reason),
            "student_logprobs": [round(x, 5) for x in student],
        }
        if result is not None and result.teacher_logps[i]:
            row["teacher_logprobs"] = [round(x, 5) for x in result.teacher_logps[i]]
        if correct is not None:
            row["correct"] = correct[i]
        rows.append(row)
    return rows


def _message(message: Any) -> dict[str, Any]:
    return message.as_dict()
