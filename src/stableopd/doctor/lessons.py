"""Prompts and golden solutions against budget and context."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Many

from stableopd.config import Config, DataConfig
from stableopd.data.golden import encode_golden
from stableopd.data.grading import grade
from stableopd.doctor.patient import MAX_ROWS, Check, Patient
from stableopd.rollout.stops import Finding, StopPlan
from stableopd.types import DataError, Prompt

__all__ = ["contexts", "encode_solutions", "golden_answers", "prompt_lengths", "solutions"]

MAX_GRADED = 64  # the grader for mathematics asks another process about each
RIGHT_SHARE = 0.9  # design: a tenth of wrong golden solutions is more than a few outliers


def prompt_lengths(patient: Patient) -> Check:
    """How long the prompts are, against `rollout.max_prompt_tokens`.

    Args:
        patient: Models and prompts.

    Returns:
        FAIL where one is too long, which `train` refuses; WARN where there are no data.
    """
    lengths = [len(ids) for ids in patient.prompt_ids]
    limit = patient.config.rollout.max_prompt_tokens
    numbers = {
        "num_prompts": len(lengths),
        "mean_tokens": statistics.fmean(lengths),
        "max_tokens": max(lengths),
        "num_too_long": sum(n > limit for n in lengths),
    }
    message = (
        f"{len(lengths)} prompts of {statistics.fmean(lengths):.0f} tokens on average and "
        f"{max(lengths)} at most"
    )
    if not patient.has_data:
        found = Finding(
            "WARN",
            "prompts",
            f"without data, {len(lengths)} built-in prompts stand in: what rollouts show is a "
            "rough guess.",
            "give --data FILE.",
        )
        return Check((found,), numbers)
    if len(lengths) == MAX_ROWS:
        message = f"the first {message}"
    if numbers["num_too_long"]:
        found = Finding(
            "FAIL",
            "prompts",
            f"{message}; {numbers['num_too_long']} exceed rollout.max_prompt_tokens = {limit}.",
            f"raise rollout.max_prompt_tokens to {max(lengths)}, or leave these prompts out.",
        )
    else:
        found = Finding("OK", "prompts", f"{message}; {limit} are allowed.")
    return Check((found,), numbers)


def contexts(
    lengths: Many[int], budget: int, has_budget: bool, student: int | None, teacher: int | None
) -> tuple[Check, int | None]:
    """Whether every prompt and a whole completion fit into both models.

    Args:
        lengths: Tokens of each prompt.
        budget: `rollout.max_new_tokens`.
        has_budget: Whether the user chose it.
        student: Context of the student in tokens; None where its config does not say.
        teacher: The same of the teacher.

    Returns:
        FAIL where they do not fit, which `train` refuses, WARN where the budget is the default;
        and the shorter context.
    """
    sizes = {"student": student, "teacher": teacher}
    known = {role: size for role, size in sizes.items() if size is not None}
    longest = max(lengths)
    numbers = {f"{role}_context": size for role, size in known.items()}
    numbers |= {"needed": longest + budget}
    if not known:
        found = Finding("OK", "context", "neither model's config names a longest sequence.")
        return Check((found,), numbers), None
    shortest = min(known.values())
    over = sum(n + budget > shortest for n in lengths)
    numbers["num_too_long"] = over
    named = " and ".join(f"the {role} reads {size:,} tokens" for role, size in known.items())
    message = f"{named}; the longest prompt and its completion need {longest + budget:,}"
    if not over:
        return Check((Finding("OK", "context", f"{message}."),), numbers), shortest
    fix = "leave the long prompts out."
    if longest < shortest:
        fix = f"set rollout.max_new_tokens to {shortest - longest} or less, or {fix}"
    message = f"{message}: {over} of {len(lengths)} prompts leave too little room."
    level = "FAIL" if has_budget else "WARN"
    return Check((Finding(level, "context", message, fix),), numbers), shortest


def encode_solutions(
    prompts: Many[Prompt], tokenizer: object, plan: StopPlan
) -> tuple[list[tuple[int, tuple[int, ...]]], list[str]]:
    """Golden solutions as completions with their stop, and why others cannot be used.

    Args:
        prompts: Prompts.
        tokenizer: The student's tokenizer.
        plan: Which ids stop, and which of them is appended.

    Returns:
        Pairs of a prompt's place and its solution's ids; and a sentence for each that is refused.
    """
    encoded: list[tuple[int, tuple[int, ...]]] = []
    refused: list[str] = []
    for place, prompt in enumerate(prompts):
        if prompt.solution is None:
            continue
        try:
            ids = encode_golden(prompt, tokenizer, plan.label_id, plan.decode_ids)  # pyright: ignore[reportArgumentType]
            encoded.append((place, ids))
        except DataError as error:
            refused.append(str(error))
    return encoded, refused


def solutions(
    prompts: Many[Prompt],
    encoded: Many[tuple[int, tuple[int, ...]]],
    refused: Many[str],
    config: Config,
    is_given: bool,
) -> Check:
    """How many prompts have a golden solution that can be used and fits the budget.

    Args:
        prompts: All prompts.
        encoded: What `encode_solutions` made of them.
        refused: The solutions that it refused.
        config: The configuration.
        is_given: Whether the user gave one; where not, a missing solution stops no run.

    Returns:
        FAIL where `train` would refuse the data, WARN where it would without a golden term.
    """
    budget = config.rollout.max_new_tokens
    lengths = [len(ids) for _, ids in encoded]
    missing = sum(p.solution is None for p in prompts)
    fits = sum(n <= budget for n in lengths)
    numbers: dict[str, float] = {
        "num_prompts": len(prompts),
        "num_missing": missing,
        "num_refused": len(refused),
        "num_fitting": fits,
        "fitting_share": fits / len(prompts),
    }
    if lengths:
        numbers |= {"mean_tokens": statistics.fmean(lengths), "max_tokens": max(lengths)}
    name, is_needed = "golden solutions", bool(config.objective.lambda_gold)
    level = "FAIL" if is_given and is_needed else "WARN"
    if refused:
        more = f" ({len(refused)} solutions like it)" if len(refused) > 1 else ""
        return Check((Finding(level, name, refused[0] + more, "correct the data."),), numbers)
    message = f"{missing} of {len(prompts)} prompts have no golden solution"
    if missing and is_needed:
        fix = 'name their column in data.solution, or use objective.method = "opd".'
        why = "the golden term of stable_opd and sft needs them"
        return Check((Finding(level, name, f"{message}; {why}.", fix),), numbers)
    if missing == len(prompts):
        return Check((Finding("OK", name, "there are none, and none is needed."),), numbers)
    message = (
        f"{len(prompts) - missing} of {len(prompts)} prompts have one; {fits} fit into {budget} "
        f"tokens ({fits / len(prompts):.0%} of the prompts), mean {numbers['mean_tokens']:.0f}"
    )
    return Check((Finding("OK", name, f"{message}."),), numbers)


def golden_answers(prompts: Many[Prompt], data: DataConfig) -> Check:
    """Whether golden solutions are graded correct, as rollouts will be graded.

    Args:
        prompts: Prompts; the first `MAX_GRADED` with a solution and an answer are graded.
        data: Grader and marker.

    Returns:
        WARN where many are not: the marker is wrong, or solutions were cut off before the answer.
        Nothing where no prompt has both.
    """
    both = [(p.solution, p.answer) for p in prompts if p.solution and p.answer][:MAX_GRADED]
    if not both:
        return Check()
    right = sum(grade(s, a, data.grader, data.answer_marker) for s, a in both)
    share = right / len(both)
    message = f"{right} of {len(both)} golden solutions are graded correct"
    numbers = {"num_graded": len(both), "right_share": share}
    if share >= RIGHT_SHARE:
        return Check((Finding("OK", "golden answers", f"{message}."),), numbers)
    return Check(
        (
            Finding(
                "WARN",
                "golden answers",
                f"{message}: rollouts will be graded wrong too, or solutions were cut off.",
                "check data.grader, data.answer_marker and the ends of the solutions.",
            ),
        ),
        numbers,
    )
