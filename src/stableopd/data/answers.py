r"""Where the answer stands in what a model wrote: after its thought, in its last box.

Texts only; what they mean as mathematics is found in `grading.py`. Every search is linear in the
length of the text, so that a completion that loops costs no more than another of its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "THOUGHTS",
    "after_thought",
    "begin_thoughts",
    "date_in",
    "final_text",
    "is_letter",
    "last_box",
    "letter_in",
    "letter_of",
    "opens_thought",
    "plain_math",
]

# How models write that they think, and that they are done.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
)
THOUGHT_TOKENS = 16  # the longest of these marks and white space after it has fewer

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(\{)|\\.|[{}]", re.DOTALL)
# What joins two boxes to one set of answers: a comma, an "and" or an "or", and nothing else.
_SPACE = r"(?:\s|\$|\\[()\[\] ,;!]|\\q?quad\b)*"
_WORD = r"(?:and|or|\\(?:text|mathrm)\{\s*(?:and|or)\s*\})"
_JOINT = re.compile(rf"{_SPACE}(?:[,;]{_SPACE}{_WORD}?|{_WORD}){_SPACE}")

_DATE = r"(?<![\d.])(?:\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4})(?![\d])"
_SCIENTIFIC = re.compile(r"(?<![\w.\\}])([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.]\w|\w)")
# Decimals are compared in this many digits: what has more of them is left as it is written.
DECIMAL_DIGITS = 15
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;!](?=\d{3}(?!\d))")

_FONTS = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|bf|rm)\b")
_LETTER = re.compile(r"\s*\(?\s*([A-Z])\s*(?:[).:]|$)")
_SAID_LETTER = re.compile(
    r"\b(?i:answer|choice|option)(?:\s+(?i:is))?\s*:?[\s*_$]*(?:\\(?:text|mathrm)\{)?"
    r"(?:\(([A-Z])\)|([A-Z])(?=[\s*_$}]*(?:[.,;:)!?]|\n|\Z)))"
)
_LETTER_END = re.compile(r"(?:^[\s_$(]*|\*\*\(?)([A-Z])[\s*_$).]*$")
_SAID = re.compile(r"(?i:\banswer(?:\s+is)?)\s*:?[ \t]*([^\n]*)")


def opens_thought(prompt: str) -> bool:
    """Whether a prompt, as the model reads it, ends in a thought that the model is to continue.

    Args:
        prompt: The rendered prompt, or its end.

    Returns:
        True where the last thing in it is the mark that begins a thought.
    """
    return prompt.rstrip().endswith(tuple(opened for opened, _ in THOUGHTS))


def begin_thoughts(
    prompt_ids: Sequence[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Which prompts end in a thought that the model is to continue.

    Args:
        prompt_ids: Token ids of the prompts.
        tokenizer: Their tokenizer.

    Returns:
        For each prompt, whether `opens_thought`.
    """
    ends = [ids[-THOUGHT_TOKENS:] for ids in prompt_ids]
    said = {end: opens_thought(str(tokenizer.decode(list(end)))) for end in set(ends)}
    return [said[end] for end in ends]


def after_thought(completion: str, is_thinking: bool = False) -> str:
    """What a model says after it has thought.

    Args:
        completion: The completion.
        is_thinking: Whether the prompt has begun a thought already, see `opens_thought`.

    Returns:
        The text after the last thought; all of it where there is none, and "" where the last
        thought does not end.
    """
    for opened, closed in THOUGHTS:
        _, ended, rest = completion.rpartition(closed)
        if ended:
            completion, is_thinking = rest, False
        if opened in completion:
            return ""
    return "" if is_thinking else completion


def last_box(text: str) -> tuple[str, ...]:
    r"""What the last \boxed{} holds.

    Boxes that only a comma, an "and" or an "or" joins are one set of answers. A box that is empty
    or does not end is none.

    Args:
        text: Any text.

    Returns:
        The content of the last box, or of all that are joined with it, in order; () without one.
    """
    boxes: list[tuple[int, int, int]] = []  # begin, begin of the content, its end
    stack: list[tuple[int, int] | None] = []
    for found in _BRACES.finditer(text):
        if found[1] or found[0] == "{":
            stack.append((found.start(), found.end()) if found[1] else None)
        elif found[0] == "}" and stack and (opened := stack.pop()):
            while boxes and boxes[-1][0] > opened[0]:
                boxes.pop()  # it stands inside this one
            boxes.append((*opened, found.start()))
    boxes = [box for box in boxes if text[box[1] : box[2]].strip()]
    first = len(boxes) - 1
    while first > 0 and _JOINT.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    return tuple(text[begin:end] for _, begin, end in boxes[first:]) if boxes else ()


def plain_math(text: str) -> str:
    r"""A formula or number without what math-verify misreads.

    The sign of a dollar that is escaped is dropped, 32{,}348 and 32\,348 become 32,348 and 32348,
    and 1e5 becomes 100000 (1.5e-3 the fraction 3/2000, as a decimal would be rounded).

    Args:
        text: LaTeX, or text with numbers in it.

    Returns:
        The same as math-verify reads it.
    """
    text = _THIN_SPACE.sub("", text.replace("\\$", "").replace("{,}", ","))
    return _SCIENTIFIC.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    if "." in found[1] and int(found[2]) >= DECIMAL_DIGITS:
        return f"{found[1]} \\times 10^{{{int(found[2])}}}"
    value = Fraction(found[1]) * Fraction(10) ** int(found[2])
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def date_in(text: str, is_all: bool = False) -> tuple[int, ...] | None:
    """The last date in digits, such as 2025-03-01 or 1/3/2025.

    Args:
        text: Any text.
        is_all: Whether the date must be all of the text.

    Returns:
        Its numbers in their order, or None without one.
    """
    text = _bare(text) if is_all else text
    if is_all and not re.fullmatch(_DATE, text):
        return None
    found = None
    for found in re.finditer(_DATE, text):  # noqa: B007 (the last one is kept)
        pass
    return None if found is None else tuple(map(int, re.split(r"[-/.]", found[0])))


def letter_of(text: str) -> str | None:
    """The choice that an answer such as C, (C) or C) 42 names, where it is one."""
    found = _LETTER.match(re.sub(r"[{}$*\\]", " ", _FONTS.sub("", text)))
    return found[1] if found else None


def is_letter(text: str) -> bool:
    """Whether a right answer is the letter of a choice and nothing else."""
    return bool(re.fullmatch(r"\(?\s*[A-Z]\s*\)?\.?", _bare(text)))


def letter_in(text: str) -> str | None:
    """The choice that a text names last: "the answer is (C).", "Option C", or C as its last line.

    Args:
        text: A completion without a box.

    Returns:
        The letter, or None without one.
    """
    found = None
    for found in _SAID_LETTER.finditer(text):  # noqa: B007 (the last one is kept)
        pass
    if found is not None:
        return found[1] or found[2]
    lines = text.strip().splitlines()
    line = _LETTER_END.search(lines[-1]) if lines else None
    return line[1] if line else None


def final_text(text: str) -> str:
    r"""Text in which a formula that follows "the answer is" without delimiters has got them.

    Without them math-verify reads the 1 of "the answer is 1 - \sqrt{2}" for all of it.

    Args:
        text: A completion without a box.

    Returns:
        The formula between dollars, or the text as it is where none stands there.
    """
    found = None
    for found in _SAID.finditer(text):  # noqa: B007 (the last one is kept)
        pass
    if found is None:
        return text
    said = re.split(r"\.(?:\s|\Z)", found[1], maxsplit=1)[0].strip()
    words = re.search(r"[A-Za-z]{3,}", re.sub(r"\\[A-Za-z]+", "", said))
    delimited = any(mark in said for mark in ("$", "\\(", "\\["))
    is_formula = re.search(r"\\[A-Za-z]", said) and not words and not delimited
    return f"${said}$" if is_formula else text


def _bare(text: str) -> str:
    return re.sub(r"[{}$\\]", "", _FONTS.sub("", text)).strip()
