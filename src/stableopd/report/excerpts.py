"""The text of a rollout in pieces, so that a page can mark what repeats and where it begins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stableopd.diagnostics.summary import WorstRollout

__all__ = ["Piece", "cut_pieces", "make_visible"]

# Characters that have no shape, that end a page or a line early, that turn the direction of the
# text around, or that UTF-8 cannot hold (lone surrogates).
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff\ufeff\ufffe\uffff\U000e0000-\U000e007f]"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a completion.

    Attributes:
        kind: "regular" or "repetitive" text, or a place between them: "gap" (something was left
            out here) or "loop" (the last loop begins here).
        text: The text; of a place "".
        num_characters: How many characters were left out at a gap.
    """

    kind: Literal["regular", "repetitive", "gap", "loop"]
    text: str = ""
    num_characters: int = 0


def cut_pieces(worst: WorstRollout) -> tuple[Piece, ...]:
    """Cut a completion where repetitive stretches, the gap and the last loop begin and end.

    Args:
        worst: The rollout; its spans may touch or overlap, and may lie in any order.

    Returns:
        The pieces, in order. The texts of all of them together are the completion.
    """
    size = len(worst.completion)
    gap = None if worst.gap is None else min(max(worst.gap[0], 0), size)
    loop = None if worst.loop_start is None else min(max(worst.loop_start, 0), size)
    spans = [(max(start, 0), min(stop, size)) for start, stop in sorted(worst.spans)]
    edges = {0, size} | {edge for span in spans for edge in span}
    edges |= {place for place in (gap, loop) if place is not None}
    pieces: list[Piece] = []
    places = sorted(edge for edge in edges if 0 <= edge <= size)
    reach = 0  # how far the spans that began so far go
    following = iter([*spans, (size + 1, size + 1)])
    span = next(following)
    for place, end in zip(places, [*places[1:], size], strict=True):
        while span[0] <= place:
            reach = max(reach, span[1])
            span = next(following)
        if gap == place and worst.gap is not None:
            pieces.append(Piece("gap", num_characters=worst.gap[1]))
        if loop == place:
            pieces.append(Piece("loop"))
        if end > place:
            kind = "repetitive" if reach > place else "regular"
            pieces.append(Piece(kind, worst.completion[place:end]))
    return tuple(pieces)


def make_visible(text: str) -> str:
    """Replace characters that cannot be seen, or that act on the text around them.

    Args:
        text: Any text.

    Returns:
        The text with their code points, as ⟨U+202E⟩; tabs and line feeds stay.
    """
    return HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
