"""Prompts and golden solutions against budget and context."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

from stableopd.config import Config
from stableopd.data.answers import begin_thoughts
from stableopd.data.golden import encode_golden
from stableopd.data.grading import grader_of, judge
from stableopd.doctor.patient import MAX_ROWS, Check, Patient
from stableopd.rollout.stops import Finding, StopPlan
from stableopd.training.answer_checks import golden_answers, known_answers
from stableopd.types import DataError, Prompt, Rollout, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "contexts",
    "encode_solutions",
    "grading",
    "prompt_lengths",
    "solutions",
    "teacher_answers",
]


LOST_SHARE = 0.5  # untuned: of a few answers, more than an accident


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
    if numbers["num_too_long"] and patient.config.data.skip_long:
        told = f"{message}; {numbers['num_too_long']} exceed {limit} and are left out of training."
        found = Finding("OK", "prompts", told)
    elif numbers["num_too_long"]:
        found = Finding(
            "FAIL",
            "prompts",
            f"{message}; {numbers['num_too_long']} exceed rollout.max_prompt_tokens = {limit}.",
            f"raise rollout.max_prompt_tokens to {max(lengths)}, or set data.skip_long = true.",
        )
    else:
        found = Finding("OK", "prompts", f"{message}; {limit} are allowed.")
    return Check((found,), numbers)


def contexts(
    lengths: Many[int],
    budget: int,
    has_budget: bool,
    student: int | None,
    teacher: int | None,
    skips: bool = False,
) -> tuple[Check, int | None]:
    """Whether every prompt and a whole completion fit into both models.

    Args:
        lengths: Tokens of each prompt.
        budget: `rollout.max_new_tokens`.
        has_budget: Whether the user chose it.
        student: Context of the student in tokens; None where its config does not say.
        teacher: The same of the teacher.
        skips: Whether prompts that are too long are left out of training.

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
    if skips:
        told = f"{message} They are left out of training."
        return Check((Finding("OK", "context", told),), numbers), shortest
    level = "FAIL" if has_budget else "WARN"
    return Check((Finding(level, "context", message, fix),), numbers), shortest


def encode_solutions(
    prompts: Many[Prompt], tokenizer: object, plan: StopPlan, texts: Many[str] = ()
) -> tuple[list[tuple[int, tuple[int, ...]]], list[str]]:
    """Golden solutions as completions with their stop, and why others cannot be used.

    Args:
        prompts: Prompts.
        tokenizer: The student's tokenizer.
        plan: Which ids stop, and which of them is appended.
        texts: The prompts as the student reads them; () where they are not known.

    Returns:
        Pairs of a prompt's place and its solution's ids; and a sentence for each that is refused.
    """
    encoded: list[tuple[int, tuple[int, ...]]] = []
    refused: list[str] = []
    for place, prompt in enumerate(prompts):
        if prompt.solution is None:
            continue
        try:
            text = texts[place] if texts else ""
            ids = encode_golden(prompt, tokenizer, plan.label_id, plan.decode_ids, text)  # pyright: ignore[reportArgumentType]
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


def grading(patient: Patient) -> list[Check]:
    """What the grader makes of right answers and of golden solutions.

    Args:
        patient: Prompts and settings.

    Returns:
        The checks that `train` makes, too; none where no prompt has an answer.
    """
    prompts = patient.prompts
    grader, thinking = _grader(patient), begin_thoughts(patient.prompt_ids, _tokenizer(patient))
    checks: list[Check] = []
    if (known := known_answers(prompts, grader)) is not None:
        checks.append(Check((known,)))
    if (solutions := golden_answers(prompts, grader, thinking)) is not None:
        checks.append(Check((solutions[0],), solutions[1]))
    return checks


def teacher_answers(patient: Patient, places: Many[int], rollouts: Many[Rollout]) -> Check:
    """Whether the teacher's own answers are right, and in a form that the grader can read.

    Args:
        patient: Prompts and settings.
        places: The prompts that it answered.
        rollouts: Its answer to each.

    Returns:
        WARN where the grader finds no answer in many of them; nothing without right answers.
    """
    grader, thinking = _grader(patient), begin_thoughts(patient.prompt_ids, _tokenizer(patient))
    grades = [
        judge(r.completion, answer, *grader, is_thinking=thinking[i])
        for i, r in zip(places, rollouts, strict=True)
        if (answer := patient.prompts[i].answer)
    ]
    if not grades:
        return Check()
    right, lost = sum(g.is_right for g in grades), sum(not g.is_found for g in grades)
    numbers = {"num_graded": len(grades), "num_right": right, "num_without_answer": lost}
    message = (
        f"{right} of {len(grades)} answers of the teacher are graded correct; in {lost} the "
        f"grader ({grader[0]}) finds no answer"
    )
    if lost < LOST_SHARE * len(grades):
        return Check((Finding("OK", "teacher answers", f"{message}."),), numbers)
    num_cut = sum(r.stop_reason is StopReason.LENGTH for r in rollouts)
    message += f" ({num_cut} of its {len(rollouts)} completions are cut off)"
    fix = "raise rollout.max_new_tokens if they are cut off, else check data.grader and "
    fix += "data.answer_marker, or ask for the form of the answer in the prompts."
    return Check((Finding("WARN", "teacher answers", f"{message}.", fix),), numbers)


def _grader(patient: Patient) -> tuple[str, str]:
    data = patient.config.data
    return grader_of(data.grader, data.answer_marker, data.train)


def _tokenizer(patient: Patient) -> PreTrainedTokenizerBase:
    return patient.student.tokenizer
