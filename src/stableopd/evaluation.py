"""Accuracy, truncation, repetition and length on held-out problems."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stableopd.config import RepetitionConfig
from stableopd.data.grading import grade
from stableopd.diagnostics.repetition import repetition_rate
from stableopd.types import DataError, Prompt, Rollout, SamplingSettings, StopReason

__all__ = ["Evaluation", "EvaluationRow", "evaluate", "pass_at_k"]


class _Sampler(Protocol):
    """What `evaluate` needs of a sampler."""

    def sample(
        self,
        prompts: Sequence[tuple[str, tuple[int, ...]]],
        num_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[Rollout]: ...


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One problem: its id, and how many of its completions are right."""

    id: str
    num_correct: int


@dataclass(frozen=True)
class Evaluation:
    """What came out of an evaluation. Shares are between 0 and 1.

    Attributes:
        num_problems: Problems.
        num_samples: Completions of each problem.
        accuracy: avg@k with k = num_samples: share of right completions.
        standard_error: Of the accuracy, from its spread over problems; None for one problem.
        pass_at_k: Entry k - 1 is pass@k, for k from 1 to num_samples. The first is the accuracy,
            the last the share of problems that were solved at least once.
        truncation_rate: Share of completions that were cut off.
        repetition_rate: Share of completions whose end repeats itself.
        mean_length: Mean length of a completion with its stop, in tokens.
        rows: The problems, in their order.
    """

    num_problems: int
    num_samples: int
    accuracy: float
    standard_error: float | None
    pass_at_k: tuple[float, ...]
    truncation_rate: float
    repetition_rate: float
    mean_length: float
    rows: tuple[EvaluationRow, ...]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k completions is right.

    1 - C(n - c, k) / C(n, k), with n completions of which c are right.

    Args:
        num_samples: n, at least k.
        num_correct: c, from 0 to n.
        k: Completions that are allowed, at least 1.

    Returns:
        A probability. (arXiv 2107.03374.)
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluate(
    sampler: _Sampler,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[tuple[int, ...]],
    *,
    num_samples: int,
    settings: SamplingSettings,
    seed: int,
    grader: str,
    marker: str,
    repetition: RepetitionConfig,
    thinking: Sequence[bool] = (),
) -> Evaluation:
    """Let the student answer problems, grade the answers, and measure the texts.

    Args:
        sampler: Writes the completions.
        prompts: The problems; each has an answer.
        prompt_ids: Their token ids.
        num_samples: Completions of each problem.
        settings: Length budget in tokens, temperature, top-p and top-k.
        seed: Seed of the sampler.
        grader: "exact" or "math", see `stableopd.data.grading.grade`.
        marker: What stands before the answer, for "exact".
        repetition: Window in characters and compression ratio of the repetition rate.
        thinking: For each prompt, whether it has begun a thought; () where none has.

    Returns:
        The measurements, in shares and tokens.

    Raises:
        DataError: There is no problem, or one has no answer.
    """
    answers = _answers(prompts)
    pairs = [(prompt.id, ids) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
    rollouts = sampler.sample(pairs, num_samples, settings, seed)
    rows: list[EvaluationRow] = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        own = rollouts[number * num_samples : (number + 1) * num_samples]
        in_thought = bool(thinking) and thinking[number]
        right = sum(grade(r.completion, answer, grader, marker, in_thought) for r in own)
        rows.append(EvaluationRow(prompt.id, right))
    shares = [row.num_correct / num_samples for row in rows]
    return Evaluation(
        num_problems=len(rows),
        num_samples=num_samples,
        accuracy=statistics.fmean(shares),
        standard_error=(
            statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None
        ),
        pass_at_k=tuple(
            statistics.fmean(pass_at_k(num_samples, row.num_correct, k) for row in rows)
            for k in range(1, num_samples + 1)
        ),
        truncation_rate=statistics.fmean(r.stop_reason is StopReason.LENGTH for r in rollouts),
        repetition_rate=repetition_rate(
            [r.completion for r in rollouts], repetition.window_chars, repetition.ratio
        ),
        mean_length=statistics.fmean(len(r.completion_ids) for r in rollouts),
        rows=tuple(rows),
    )


def _answers(prompts: Sequence[Prompt]) -> list[str]:
    if not prompts:
        raise DataError("there is no problem to evaluate on; give eval.data at least one.")
    answers: list[str] = []
    for prompt in prompts:
        if prompt.answer is None:
            raise DataError(
                f"prompt {prompt.id}: no answer to grade with; name its column in data.answer."
            )
        answers.append(prompt.answer)
    return answers
