"""Figures of what a run's rollouts look like taken together: their lengths, and place by place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from stableopd.diagnostics.summary import Positions, Summary
from stableopd.report.panels import blank_panel, say_nothing_measured
from stableopd.report.series import thin
from stableopd.report.themes import Style, Theme, line_style

__all__ = [
    "MIN_UNITS",
    "Profile",
    "advantage_figure",
    "length_figure",
    "read_profiles",
    "repetition_figure",
]

# Design: a mean over fewer units of a place is mostly noise, and would set the scale.
MIN_UNITS = 20

PROFILE_STYLES: tuple[Style, ...] = ("solid", "dashed")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """Means by position, over the rollouts of some steps; nan where there is too little.

    Attributes:
        name: Which steps.
        positions: (P,) beginning of each bin, in units from the start of the completion.
        advantage: (P,) mean advantage, in nats per token.
        repetitive: (P,) share of the units that are repetitive.
    """

    name: str
    positions: Array
    advantage: Array
    repetitive: Array


def read_profiles(positions: Positions, onset: int | None) -> tuple[Profile, ...]:
    """Means by position, before and from the onset on where there is one.

    Args:
        positions: Sums by step and position.
        onset: The step of the onset; None for one profile of all rollouts.

    Returns:
        One profile or two, in order of time; none without rollouts.
    """
    if not positions.num_tokens.any():
        return ()
    everything = np.ones(len(positions.steps), dtype=np.bool_)
    parts = {"all rollouts": everything}
    if onset is not None:
        known = positions.steps >= 0
        parts = {
            f"before step {onset}": known & (positions.steps < onset),
            f"from step {onset} on": known & (positions.steps >= onset),
        }
    return tuple(
        _profile(name, positions, rows)
        for name, rows in parts.items()
        if positions.num_tokens[rows].any()
    )


def length_figure(summary: Summary, theme: Theme) -> Figure:
    """Rollouts by length, those that were cut off hatched, and the budget as a line.

    Args:
        summary: Measurements of the rollouts.
        theme: Colours.

    Returns:
        A figure of one panel.
    """
    figure, ax = blank_panel(theme, f"length ({summary.length_unit})")
    histogram = summary.histogram
    if not histogram.counts.any():
        say_nothing_measured(ax, theme)
        return figure
    starts, widths = histogram.edges[:-1], np.diff(histogram.edges)
    whole = histogram.counts - histogram.truncated
    bar = {"align": "edge", "edgecolor": theme.page, "linewidth": 0.3}
    ax.bar(starts, whole, widths, color=theme.arms[1], **bar)
    if histogram.truncated.any():
        bar |= {"bottom": whole, "hatch": "////"}  # in the colour of the edge
        ax.bar(starts, histogram.truncated, widths, color=theme.arms[0], **bar)
    if summary.budget is not None:
        ax.axvline(summary.budget, color=theme.ink, linewidth=1, linestyle=(0, (4, 2)), zorder=3)
    ax.set_ylim(0, 1.12 * histogram.counts.max())
    ax.set_xlim(left=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    return figure


def advantage_figure(profiles: Sequence[Profile], unit: str, theme: Theme) -> Figure:
    """Mean advantage by position in the rollout.

    Args:
        profiles: What `read_profiles` returned.
        unit: Of the positions.
        theme: Colours.

    Returns:
        A figure of one panel, which says "not measured" where nothing is.
    """
    return _draw([(p.positions, p.advantage) for p in profiles], unit, theme, is_share=False)


def repetition_figure(profiles: Sequence[Profile], unit: str, theme: Theme) -> Figure:
    """Share of repetitive units by position; arguments and result as in `advantage_figure`."""
    return _draw([(p.positions, p.repetitive) for p in profiles], unit, theme, is_share=True)


def _profile(name: str, positions: Positions, rows: NDArray[np.bool_]) -> Profile:
    units = positions.num_tokens[rows].sum(axis=0)
    scored = positions.num_scored[rows].sum(axis=0)
    return Profile(
        name=name,
        positions=np.arange(len(units), dtype=np.float64) * positions.width,
        advantage=_ratio(positions.advantage[rows].sum(axis=0), scored),
        repetitive=_ratio(positions.num_repetitive[rows].sum(axis=0).astype(np.float64), units),
    )


def _ratio(sums: Array, counts: NDArray[np.int64]) -> Array:
    # Where no place has that many, the few that there are are shown.
    enough = max(1, min(MIN_UNITS, int(counts.max(initial=0))))
    return np.where(counts >= enough, sums / np.maximum(counts, 1), math.nan)


def _draw(lines: Sequence[tuple[Array, Array]], unit: str, theme: Theme, is_share: bool) -> Figure:
    figure, ax = blank_panel(theme, f"position in the rollout ({unit})")
    measured = False
    # Blue and vermilion, before and after; a single line is blue.
    for (x, y), color, style in zip(lines, (1, 0), PROFILE_STYLES, strict=False):
        if np.isfinite(y).any():
            measured = True
            kept = thin((y,))
            ax.plot(x[kept], y[kept], color=theme.arms[color], **line_style(style))
    if not measured:
        say_nothing_measured(ax, theme)
    elif is_share:
        ax.set_ylim(-0.03, 1.03)
    return figure
