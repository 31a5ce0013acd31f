"""The embedded world: chained additions and subtractions, solved step by step in characters.

A prompt is `47+8-3+6:`, its golden solution `47+8=55;55-3=52;52+6=58;#58`. The answer is the text
after the last `ANSWER_MARKER`. Every running result lies in 0..99, so each prompt has nine
characters and no golden solution more than 27.

The documents on which the two models were pretrained come from here too. After its answer a
document may write the answer again: `#58#58#58`. How surely a further copy follows the copies
there are is what makes a model's loops: a document whose last probability is 1 repeats until the
context ends. The marker is `;#` and not `#`, so the text after the last marker is `58#58#58` then:
a completion that loops is graded wrong wherever the budget cuts it.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from stableopd.types import DataError, Prompt

__all__ = [
    "ALPHABET",
    "ANSWER_MARKER",
    "Document",
    "DocumentStyle",
    "make_document",
    "make_problems",
]

ALPHABET = "0123456789+-=;:#"
ANSWER_MARKER = ";#"
NUM_STEPS = 3
LARGEST = 99  # of all running results; the smallest is 0

# One problem in ten is held out, by a hash of its text, so that no seed can mix the two splits.
SPLITS = ("train", "test")
TEST_SHARE = 10
MOST_PROBLEMS = 20_000  # half of what the test split holds: drawing without repeats stays quick

# How a wrong result differs from the right one: a little off, or a lost carry.
SLIPS = (-1, 1, -2, 2, 10, -10)


@dataclass(frozen=True, slots=True)
class DocumentStyle:
    """How the documents of a pretraining text are written.

    Attributes:
        slip: Probability that a step writes a wrong result, from which the chain then goes on.
        repeat: Probability of a further copy of the answer after 0, 1, 2, ... copies; the last one
            holds for all later copies. A last probability of 1 repeats until the budget ends.
    """

    slip: float = 0.0
    repeat: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not self.repeat or not all(0 <= p <= 1 for p in (self.slip, *self.repeat)):
            raise DataError(f"{self}: slip and every number of repeat must be probabilities.")


@dataclass(frozen=True, slots=True)
class Document:
    """One pretraining document.

    Attributes:
        prompt: The problem.
        completion: What follows it, at most as many characters as the budget.
        is_terminated: Whether a stop token follows; False where the budget cut it.
    """

    prompt: str
    completion: str
    is_terminated: bool


def make_problems(num: int, seed: int, split: str) -> list[Prompt]:
    """Draw problems without repeats.

    Args:
        num: How many, at most 20,000.
        seed: The same seed gives the same problems, and a smaller `num` a prefix of them.
        split: "train" or "test"; no problem is in both.

    Returns:
        The problems with their golden solutions and answers.

    Raises:
        DataError: The split is unknown or `num` is out of range.
    """
    if split not in SPLITS:
        raise DataError(f"split = {split!r} is not possible; choose from {', '.join(SPLITS)}.")
    if not 0 <= num <= MOST_PROBLEMS:
        raise DataError(f"{num} problems cannot be drawn; ask for 0 to {MOST_PROBLEMS}.")
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < num:
        texts[_draw(rng, split)] = None
    problems: list[Prompt] = []
    for i, text in enumerate(texts):
        steps, result = _solve(text, 0.0, rng)
        solution = f"{steps}#{result}"
        problems.append(Prompt(f"{split}-{seed}-{i}", text, solution, str(result)))
    return problems


def make_document(rng: random.Random, style: DocumentStyle, budget: int) -> Document:
    """Write one pretraining document about a problem of the "train" split.

    Args:
        rng: Where its chance comes from.
        style: How it is written.
        budget: Most tokens of the completion, the stop token among them.

    Returns:
        The document.
    """
    prompt = _draw(rng, "train")
    steps, result = _solve(prompt, style.slip, rng)
    completion = f"{steps}#{result}"
    num_copies = 0
    while len(completion) < budget:
        if rng.random() >= style.repeat[min(num_copies, len(style.repeat) - 1)]:
            return Document(prompt, completion, is_terminated=True)
        completion += f"#{result}"
        num_copies += 1
    return Document(prompt, completion[:budget], is_terminated=False)


def _draw(rng: random.Random, split: str) -> str:
    while True:
        result = rng.randint(10, LARGEST)
        text = str(result)
        for _ in range(NUM_STEPS):
            sign, term = rng.choice("+-"), rng.randint(1, 9)
            result += term if sign == "+" else -term
            text += f"{sign}{term}"
            if not 0 <= result <= LARGEST:
                break
        else:
            text += ":"
            if (zlib.crc32(text.encode()) % TEST_SHARE == 0) == (split == "test"):
                return text


def _solve(prompt: str, slip: float, rng: random.Random) -> tuple[str, int]:
    """Write the steps of a problem; its terms stand at fixed places."""
    result, steps = int(prompt[:2]), ""
    for i in range(NUM_STEPS):
        sign, term = prompt[2 + 2 * i], int(prompt[3 + 2 * i])
        after = result + term if sign == "+" else result - term
        if slip and rng.random() < slip:
            after = _slipped(after, rng)
        steps += f"{result}{sign}{term}={after};"
        result = after
    return steps, result


def _slipped(result: int, rng: random.Random) -> int:
    while True:
        wrong = rng.choice((result + rng.choice(SLIPS), result // 10 * 10 + rng.randint(0, 9)))
        if wrong != result and 0 <= wrong <= LARGEST:
            return wrong
