"""The problems of a run: prompts as token ids, and golden solutions where a term may need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stableopd.config import Config
from stableopd.data.answers import begin_thoughts
from stableopd.data.golden import golden_sequences, num_too_long
from stableopd.data.grading import grader_of
from stableopd.data.prompts import encode_prompts, load_prompts, refuse_long, render, too_long
from stableopd.models import LanguageModel
from stableopd.rollout.stops import StopPlan
from stableopd.types import DataError, Prompt, Rollout, Sequence

if TYPE_CHECKING:
    from stableopd.teacher.server import Item

__all__ = ["Problems", "load_held_out", "load_train"]


# Design: a step that takes each prompt more often than this is a slip of the keys.
MAX_REPEATS = 100


@dataclass(frozen=True)
class Problems:
    """Prompts with their token ids, and the golden solution of each where there is one.

    Attributes:
        prompts: The prompts.
        prompt_ids: Token ids of each.
        golden: The golden solution of each, or None.
        grader: "math" or "exact", and the marker before the answer.
        thinking: Whether each prompt has begun a thought, which the student continues.
    """

    prompts: Many[Prompt]
    prompt_ids: Many[tuple[int, ...]]
    golden: Many[Sequence | None]
    grader: tuple[str, str]
    thinking: Many[bool]

    def named_ids(self, places: Many[int]) -> list[tuple[str, tuple[int, ...]]]:
        """What the sampler takes, for the prompts at some places."""
        return [(self.prompts[i].id, self.prompt_ids[i]) for i in places]

    def named_texts(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every prompt and golden solution, with what a message calls it."""
        for prompt, ids, golden in zip(self.prompts, self.prompt_ids, self.golden, strict=True):
            yield f"prompt {prompt.id}", ids
            if golden is not None:
                yield f"the solution of prompt {prompt.id}", golden.completion_ids

    def by_teacher(self, rollouts: Many[Rollout]) -> list[tuple[str | None, Item]]:
        """What served teachers take: rollouts of these prompts, each with its teacher's name."""
        names = {prompt.id: prompt.teacher for prompt in self.prompts}
        return [(names[r.prompt_id], (r.prompt_ids, r.completion_ids)) for r in rollouts]


def load_train(
    config: Config,
    student: LanguageModel,
    teacher_context: int | None,
    stops: StopPlan,
    needs_golden: bool,
) -> tuple[Problems, list[str]]:
    """Read the problems to train on.

    Args:
        config: The configuration.
        student: The student.
        teacher_context: Longest sequence that the teacher reads; None without a limit.
        stops: Whose label ends a golden solution.
        needs_golden: Whether the golden term is on, or may be turned on by the alarm.

    Returns:
        The problems, and sentences for the user about them.

    Raises:
        DataError: A row cannot be used, or a solution is missing that a term may need.
    """
    data, budget = config.data, config.rollout.max_new_tokens
    prompts = load_prompts(
        data.train,
        data,
        split="train",
        needs_solution=bool(config.objective.lambda_gold),
        needs_answer=config.objective.advantage == "group_reward",
        teachers=config.teacher.by_name,
    )
    if needs_golden:
        _require_solutions(config, prompts)
    prompts, ids, notes = _encode(config, student, teacher_context, prompts, budget)
    notes += _repeated(config, len(prompts))
    golden: Many[Sequence | None] = [None] * len(prompts)
    if needs_golden:
        golden = golden_sequences(
            prompts,
            ids,
            student.tokenizer,
            stops.label_id,
            budget,
            stops.decode_ids,
            _texts(config, student, prompts),
        )
        if left_out := num_too_long(prompts, golden):
            notes.append(
                f"{left_out} of {len(prompts)} golden solutions are longer than "
                f"rollout.max_new_tokens = {budget} and are left out of the golden term."
            )
    return _problems(config, student, data.train, prompts, ids, golden), notes


def _texts(config: Config, student: LanguageModel, prompts: Many[Prompt]) -> list[str]:
    data = config.data
    return [
        render(p, student.tokenizer, data.chat_template, data.chat_template_kwargs)
        if p.solution is not None
        else ""
        for p in prompts
    ]


def _repeated(config: Config, num_prompts: int) -> list[str]:
    """Say that a step takes its prompts several times; refuse what can only be a slip."""
    per_step = config.rollout.prompts_per_step
    told = (
        f"rollout.prompts_per_step = {per_step} is more than the {num_prompts} prompts of "
        f"{config.data.train}"
    )
    if per_step > MAX_REPEATS * num_prompts:
        raise DataError(f"{told}; lower it, to that many at most.")
    return (
        [f"{told}: each step takes some of them several times."] if per_step > num_prompts else []
    )


def load_held_out(
    config: Config, student: LanguageModel, teacher_context: int | None
) -> tuple[Problems, list[str]] | tuple[None, list[str]]:
    """Read the problems of the evaluation; None without one.

    Args:
        config: The configuration.
        student: The student.
        teacher_context: Longest sequence that the teacher reads; None without a limit.

    Returns:
        The problems, without golden solutions; and sentences for the user about them.

    Raises:
        DataError: A row cannot be used.
    """
    if not config.eval.data:
        return None, []
    prompts = load_prompts(
        config.eval.data,
        # The solutions are not read, so their column may be missing.
        dataclasses.replace(config.data, solution=""),
        split="test",
        needs_solution=False,
        needs_answer=True,
        max_rows=config.eval.max_problems,
    )
    budget = config.eval.max_new_tokens or config.rollout.max_new_tokens
    prompts, ids, notes = _encode(config, student, teacher_context, prompts, budget)
    none = [None] * len(prompts)
    return _problems(config, student, config.eval.data, prompts, ids, none), notes


def _problems(
    config: Config,
    student: LanguageModel,
    source: str,
    prompts: Many[Prompt],
    ids: Many[tuple[int, ...]],
    golden: Many[Sequence | None],
) -> Problems:
    grader = grader_of(config.data.grader, config.data.answer_marker, source)
    return Problems(prompts, ids, golden, grader, begin_thoughts(ids, student.tokenizer))


def _encode(
    config: Config,
    student: LanguageModel,
    teacher_context: int | None,
    prompts: Many[Prompt],
    max_new_tokens: int,
) -> tuple[Many[Prompt], list[tuple[int, ...]], list[str]]:
    """Prompts with their token ids, without those that are too long where these are left out."""
    contexts = [context for context in (student.context, teacher_context) if context]
    context, limit = min(contexts, default=None), config.rollout.max_prompt_tokens
    skips = config.data.skip_long
    ids = encode_prompts(
        prompts,
        student.tokenizer,
        config.data.chat_template,
        10**9 if skips else limit,
        None if skips else context,
        max_new_tokens,
        config.data.chat_template_kwargs,
    )
    long = set(too_long(ids, limit, context, max_new_tokens))
    if not long:
        return prompts, ids, []
    kept = [place for place in range(len(prompts)) if place not in long]
    if not kept:
        refuse_long(prompts, ids, limit, context, max_new_tokens)
    told = f"{len(long)} of {len(prompts)} prompts are too long and are left out (data.skip_long)."
    return [prompts[i] for i in kept], [ids[i] for i in kept], [told]


def _require_solutions(config: Config, prompts: Many[Prompt]) -> None:
    """Refuse now what would fail when the alarm turns the golden term on."""
    lacking = next((prompt for prompt in prompts if prompt.solution is None), None)
    if lacking is not None:
        raise DataError(
            f"{config.data.train}: prompt {lacking.id} has no solution in the column "
            f"{config.data.solution!r}, and alarm.action = {config.alarm.action!r} turns the "
            "golden term on, which needs one of every prompt; name the column in data.solution, "
            "or set alarm.action to 'warn' or 'stop'."
        )
