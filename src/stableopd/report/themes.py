"""Colours and line styles of all figures and pages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["DARK", "LIGHT", "Style", "Theme", "choose_colors", "line_style"]


@dataclass(frozen=True)
class Theme:
    """Colours for one kind of page; `arms` are told apart with any kind of colour vision."""

    ink: str
    faint: str
    page: str
    arms: tuple[str, ...]


# Okabe and Ito's colours in the order vermilion, blue, green, purple, orange, grey; the dark
# variants are the same hues, lightened until each has a contrast of 4.5 or more to the page.
LIGHT = Theme(
    ink="#1f2328",
    faint="#d5d9de",
    page="#ffffff",
    arms=("#c84e00", "#0072b2", "#00805e", "#a8578b", "#9a6c00", "#5f6670"),
)
DARK = Theme(
    ink="#e6e8eb",
    faint="#3a4048",
    page="#14171b",
    arms=("#f08a4b", "#56b4e9", "#2fc79b", "#df96c3", "#e6b53c", "#a9b1bb"),
)

# The methods keep their colours in every figure and on every page.
PLACES = {"opd": 0, "stableopd": 1, "sft": 2, "grpo": 3, "gkd": 4}

Style = Literal["solid", "dashed", "dotted", "dots"]

STYLES: dict[Style, dict[str, Any]] = {
    "solid": {"linewidth": 1.7, "solid_capstyle": "round"},
    "dashed": {"linewidth": 1.7, "linestyle": (0, (3.5, 1.5))},
    "dotted": {"linewidth": 1.3, "marker": "o", "markersize": 4.5},
    "dots": {"linestyle": "none", "marker": "o", "markersize": 4.5},
}


def choose_colors(names: Sequence[str]) -> dict[str, int]:
    """A place in `Theme.arms` for each name: a method's own one, else the next free one.

    "OPD", "opd-2" and "opd, steps = 50" are of one method, and the first of them has its colour.
    """
    known: dict[str, int | None] = {}
    for name in names:
        method = re.sub(r"[\W_]+|[\W_\d]+$", "", name.partition(",")[0].lower())
        place = PLACES.get(method)
        known[name] = None if place in known.values() else place
    free = [place for place in range(len(LIGHT.arms)) if place not in known.values()]
    # A single run is blue, unless it has a colour of its own.
    free.sort(key=lambda place: (place != 1, place))
    rest = itertools.cycle(free or range(len(LIGHT.arms)))
    return {name: next(rest) if place is None else place for name, place in known.items()}


def line_style(style: Style) -> dict[str, Any]:
    """What matplotlib needs to draw a line in a style, but for its colour."""
    return dict(STYLES[style])
