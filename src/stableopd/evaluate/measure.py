"""Answers to problems, their grades, and what they say together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stableopd.data.answers import opens_thought
from stableopd.data.grading import judge
from stableopd.data.prompts import render
from stableopd.diagnostics.repetition import repetition_flags
from stableopd.evaluate.settings import Settings
from stableopd.evaluation import pass_at_k
from stableopd.report.estimates import Estimate, binomial_estimate, seeds_estimate
from stableopd.rollout.sampler import TransformersSampler
from stableopd.types import Prompt, Rollout, SamplingSettings, StopReason

__all__ = ["answer", "num_together", "summarise"]

Row = Mapping[str, Any]


def num_together(settings: Settings) -> int:
    """Problems that are answered by one call of the sampler, and are written together."""
    return max(1, settings.batch_size // settings.num_samples)


def answer(
    sampler: TransformersSampler,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[tuple[int, ...]],
    settings: Settings,
    budget: int,
    grader: tuple[str, str],
    seed_text: str,
) -> list[dict[str, Any]]:
    """Answer some problems and grade the answers.

    Args:
        sampler: Writes the completions.
        prompts: Problems with answers.
        prompt_ids: Their token ids.
        settings: How many completions, how they are sampled and measured.
        budget: Longest completion, tokens.
        grader: "math" or "exact", and the marker before the answer.
        seed_text: Draws follow from it alone.

    Returns:
        One row of numbers and texts for each problem.

    Raises:
        DataError: math-verify cannot be started.
    """
    k = settings.num_samples
    drawn = sampler.sample(
        [(prompt.id, ids) for prompt, ids in zip(prompts, prompt_ids, strict=True)],
        k,
        SamplingSettings(budget, settings.temperature, settings.top_p),
        # Text as a seed is hashed in full, so neighbouring problems are unrelated.
        random.Random(seed_text).getrandbits(32),
    )
    template, kwargs = settings.chat_template, settings.chat_template_kwargs
    texts = [render(prompt, sampler.tokenizer, template, kwargs) for prompt in prompts]
    answers = (drawn[n : n + k] for n in range(0, len(drawn), k))
    return [
        _row(prompt, text, own, settings, grader)
        for prompt, text, own in zip(prompts, texts, answers, strict=True)
    ]


def _row(
    prompt: Prompt,
    text: str,
    rollouts: Sequence[Rollout],
    settings: Settings,
    grader: tuple[str, str],
) -> dict[str, Any]:
    assert prompt.answer is not None
    completions = [rollout.completion for rollout in rollouts]
    is_thinking = opens_thought(text)
    grades = [
        judge(c, prompt.answer, *grader, settings.time_limit, is_thinking) for c in completions
    ]
    flags = repetition_flags(completions, settings.window_chars, settings.ratio)
    return {
        "id": prompt.id,
        "prompt": text,
        "answer": prompt.answer,
        "num_correct": sum(grade.is_right for grade in grades),
        "correct": [grade.is_right for grade in grades],
        "num_timeouts": sum(grade.is_late for grade in grades),
        "lengths": [len(rollout.completion_ids) for rollout in rollouts],
        "stop_reasons": [str(rollout.stop_reason) for rollout in rollouts],
        "repetitive": [bool(flag) for flag in flags],
        "completions": completions,
    }


def summarise(rows: Sequence[Row], num_samples: int) -> dict[str, Any]:
    """What the rows of a data set say, with intervals over its problems.

    Args:
        rows: One for each problem, at least one.
        num_samples: k, completions of each.

    Returns:
        `accuracy` (avg@k), `pass_at` (k' = 1, 2, 4, ... and k; unbiased, arXiv 2107.03374),
        `truncation_rate`, `repetition_rate`, `mean_length` in tokens, each as mean, low and high of
        the 95% interval; and counts.
    """
    sizes = [2**n for n in range(num_samples.bit_length()) if 2**n < num_samples] + [num_samples]

    def share(value: Callable[[Row], float]) -> dict[str, float | None]:
        return _spread([value(row) for row in rows], True)

    return {
        "num_problems": len(rows),
        "num_samples": num_samples,
        "accuracy": share(lambda row: row["num_correct"] / num_samples),
        "pass_at": {
            str(k): share(lambda row, k=k: pass_at_k(num_samples, row["num_correct"], k))
            for k in sizes
        },
        "truncation_rate": share(
            lambda row: row["stop_reasons"].count(str(StopReason.LENGTH)) / num_samples
        ),
        "repetition_rate": share(lambda row: sum(row["repetitive"]) / num_samples),
        "mean_length": _spread([math.fsum(row["lengths"]) / num_samples for row in rows], False),
        "num_timeouts": sum(row["num_timeouts"] for row in rows),
    }


def _spread(values: Sequence[float], is_share: bool) -> dict[str, float | None]:
    """Mean and Student's t interval over problems.

    Where all problems agree that they are at 0 or 1, t says nothing: Wilson's interval, each
    problem counted once, whatever the number of its completions.
    """
    found: Estimate = seeds_estimate(values, is_share, "problems")
    if found.interval is None and is_share and found.value in (0.0, 1.0):
        found = binomial_estimate(found.value, len(values))
    low, high = found.interval or (None, None)
    return {"mean": found.value, "low": low, "high": high}
