"""Before anything is graded: does the grader understand the right answers and golden solutions?"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stableopd.data.answers import last_box
from stableopd.data.grading import grade
from stableopd.rollout.stops import Finding
from stableopd.text import quoted
from stableopd.types import Prompt

__all__ = ["Failing", "failing_answers", "golden_answers", "known_answers"]

MAX_GRADED = 64  # golden solutions; the grader for mathematics asks another process about each
RIGHT_SHARE = 0.9  # design: a tenth of wrong golden solutions is more than a few outliers
SECONDS = 30.0  # design: right answers are graded against themselves for no longer than this
MAX_NAMED = 3

_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,5})?")
# What may stand before the answers instead, where a grader calls most golden solutions wrong.
OTHER_GRADERS = (("math", ""), ("exact", "####"))


@dataclass(frozen=True)
class Failing:
    """Right answers that the grader does not call right.

    Attributes:
        num_graded: Answers that were looked at.
        num_answers: Answers that there are.
        failing: The prompts whose answers fail.
    """

    num_graded: int
    num_answers: int
    failing: tuple[Prompt, ...]

    def __str__(self) -> str:
        """A sentence about those that fail, without an end."""
        named = ", ".join(f"{quoted(p.answer or '')} of {p.id}" for p in self.failing[:MAX_NAMED])
        more = ", ..." if len(self.failing) > MAX_NAMED else ""
        return (
            f"{len(self.failing)} of {self.num_graded} right answers are graded wrong against "
            f"themselves ({named}{more}): no completion can be right there"
        )


def failing_answers(
    prompts: Sequence[Prompt], grader: tuple[str, str], seconds: float = SECONDS
) -> Failing:
    """Grade every right answer against itself.

    Args:
        prompts: The problems; those without an answer are left out.
        grader: "math" or "exact", and the marker before the answer.
        seconds: After this long the answers that are left are not looked at.

    Returns:
        Those that fail.

    Raises:
        DataError: math-verify cannot be started.
    """
    answered = [prompt for prompt in prompts if prompt.answer]
    failing: list[Prompt] = []
    known: dict[str, bool] = {}
    end, num_graded = time.monotonic() + seconds, 0
    for prompt in answered:
        answer = prompt.answer or ""
        if answer not in known:
            if time.monotonic() > end:
                break
            known[answer] = _is_itself(answer, *grader)
        num_graded += 1
        if not known[answer]:
            failing.append(prompt)
    return Failing(num_graded, len(answered), tuple(failing))


def _is_itself(answer: str, grader: str, marker: str) -> bool:
    if grader == "math" and _PLAIN_NUMBER.fullmatch(answer):
        return True  # tested once and for all, and most of what there is
    said = marker + answer
    if grader == "math":
        said = answer if last_box(answer) else f"\\boxed{{{answer}}}"
    return grade(said, answer, grader, marker)


def known_answers(prompts: Sequence[Prompt], grader: tuple[str, str]) -> Finding | None:
    """Whether the grader calls right answers right.

    Args:
        prompts: The problems.
        grader: "math" or "exact", and the marker before the answer.

    Returns:
        WARN where it does not for some, which are named; None where there is no answer.

    Raises:
        DataError: math-verify cannot be started.
    """
    found = failing_answers(prompts, grader)
    if not found.num_answers:
        return None
    name, few = "right answers", ""
    if found.num_graded < found.num_answers:
        few = f" ({found.num_answers - found.num_graded} more were not looked at)"
    if found.failing:
        fix = "write these answers as the grader reads them, or leave their rows out."
        return Finding("WARN", name, f"{found}{few}.", fix)
    message = f"{found.num_graded} right answers are graded right against themselves{few}."
    return Finding("OK", name, message)


def golden_answers(
    prompts: Sequence[Prompt], grader: tuple[str, str], thinking: Sequence[bool] = ()
) -> tuple[Finding, dict[str, float]] | None:
    """Whether golden solutions are graded correct, as rollouts will be graded.

    Args:
        prompts: Prompts; the first `MAX_GRADED` with a solution and an answer are graded.
        grader: "math" or "exact", and the marker before the answer.
        thinking: For each prompt, whether it has begun a thought; () where none has.

    Returns:
        WARN where many are not: the grader or its marker is wrong, or solutions were cut off
        before the answer; and the numbers. None where no prompt has both.

    Raises:
        DataError: math-verify cannot be started.
    """
    begun = thinking or [False] * len(prompts)
    both = [
        (p.solution, p.answer, is_begun)
        for p, is_begun in zip(prompts, begun, strict=True)
        if p.solution and p.answer
    ][:MAX_GRADED]
    if not both:
        return None

    def num_right(grader: tuple[str, str]) -> int:
        return sum(grade(s, a, *grader, is_begun) for s, a, is_begun in both)

    name, right = "golden answers", num_right(grader)
    share = right / len(both)
    numbers = {"num_graded": len(both), "right_share": share}
    message = f"{right} of {len(both)} golden solutions are graded correct"
    if share >= RIGHT_SHARE:
        return Finding("OK", name, f"{message}."), numbers
    message += f" by {_named(grader)}: rollouts will be graded wrong, too"
    others = {other: num_right(other) for other in OTHER_GRADERS if other != grader}
    best = max(others, key=lambda other: others[other])
    if others[best] / len(both) >= RIGHT_SHARE:
        fix = f"set {_named(best)}, which calls {others[best]} of them correct."
    else:
        fix = "check data.grader, data.answer_marker, data.answer and the ends of the solutions."
    return Finding("WARN", name, f"{message}.", fix), numbers


def _named(grader: tuple[str, str]) -> str:
    name, marker = grader
    told = f'data.grader = "{name}"'
    return f'{told} with data.answer_marker = "{marker}"' if name == "exact" else told
