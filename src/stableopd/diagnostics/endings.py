"""How cut-off rollouts end: was there an answer before the loop, was there a marker of the end."""

from __future__ import annotations

import re

from stableopd.diagnostics.loops import Loop, find_loops
from stableopd.diagnostics.units import NGRAM_OF_WORDS, Units, words

__all__ = ["ends_in_loop", "has_answer", "markers_inside", "place_loop"]

_ANSWER = re.compile(r"\\boxed\{|#### |</answer>|final answer is|the answer is", re.IGNORECASE)

# Ends of turns and of texts, and first words of the next turn, of chat templates in use.
_MARKERS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|assistant|>",
    "<|user|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "[/INST]",
    "<eos>",
    "<end_of_turn>",
    "<start_of_turn>",
    "\nHuman:",
    "\nUser:",
    "\nAssistant:",
    "\nuser\n",
    "\nassistant\n",
)


def has_answer(text: str, marker: str = "") -> bool:
    r"""Whether a text holds a final answer.

    Args:
        text: A completion, or its beginning.
        marker: What else begins an answer in this data; "" for nothing.

    Returns:
        True where `\boxed{`, `#### `, `</answer>`, "final answer is", "the answer is" (in upper
        or lower case) or the marker is in it.
    """
    return _ANSWER.search(text) is not None or (bool(marker) and marker in text)


def markers_inside(text: str) -> tuple[str, ...]:
    """Markers of the end of a turn or text, after which the text goes on.

    Args:
        text: A completion.

    Returns:
        Each marker that occurs with more than white space and markers after its first occurrence.
    """
    return tuple(
        marker
        for marker in _MARKERS
        if marker in text and _goes_on(text[text.index(marker) + len(marker) :])
    )


def ends_in_loop(loops: tuple[Loop, ...], num_units: int) -> bool:
    """Whether a rollout's end lies in a loop.

    Args:
        loops: Its loops.
        num_units: Its length in units.

    Returns:
        True where a loop reaches the end but for one unit: a stop token or a word cut in two.
    """
    return any(loop.stop >= num_units - 1 for loop in loops)


def place_loop(
    text: str, loop: Loop, num_units: int, units: Units | None
) -> tuple[int, int] | None:
    """Find the characters of a loop.

    Args:
        text: The completion.
        loop: A loop of its units.
        num_units: Its length in units.
        units: Its units, where they are of the text; None where they are token ids. Then the last
            loop of the text's words stands for the loop, or, where the words have none, a place
            in proportion.

    Returns:
        (start of the first copy, start of the second), in characters; None without text.
    """
    if not text or not num_units:
        return None
    if units is None:
        units = words(text)
        found = find_loops(units.ids, NGRAM_OF_WORDS)
        if not found:
            each = len(text) / num_units
            return int(loop.start * each), int((loop.start + loop.period) * each)
        loop = found[-1]
    return int(units.starts[loop.start]), int(units.starts[loop.start + loop.period])


def _goes_on(rest: str) -> bool:
    if not rest.strip():
        return False
    for marker in _MARKERS:
        rest = rest.replace(marker, " ")
    return bool(rest.strip())
