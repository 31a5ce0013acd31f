"""The panels that figures and pages are made of: what each shows, and how one is drawn.

Drawn without pyplot, so nothing global is touched. A `Theme` decides whether ink and colours are
made for a light page or a dark one; backgrounds are transparent.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stableopd.diagnostics.summary import Parameters
from stableopd.report.series import Arms, read_series
from stableopd.report.themes import LIGHT, Style, Theme, line_style

__all__ = [
    "Curve",
    "Mark",
    "Panel",
    "blank_panel",
    "credit_panels",
    "draw_panel",
    "dynamics_panels",
    "has_evaluations",
    "logprob_panels",
    "panel_figure",
    "prepare_axes",
    "say_nothing_measured",
    "svg_data_uri",
]


# Inches of a panel of its own, and of the room around its axes: left, right, bottom, top.
PANEL_SIZE = (4.4, 2.45)
MARGINS = (0.62, 0.12, 0.42, 0.2)

# The browser sets the text: DejaVu Sans is what matplotlib measured with, Verdana is as wide, and
# the others are narrower, so that nothing that fits here overlaps there.
FONTS = ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]


@dataclass(frozen=True)
class Curve:
    """One line per arm: a name of docs/metrics.md, and how it is drawn."""

    key: str
    style: Style = "solid"


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: What is shown, with the parameters it was measured with.
        unit: Of the vertical axis.
        curves: The lines, for each arm.
        scale: "rate" goes from 0 to 1, "share" from 0 to what is there, but at least to 0.25,
            "zero" begins at 0, "free" fits the numbers.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: Literal["rate", "share", "zero", "free"] = "free"


@dataclass(frozen=True)
class Mark:
    """Steps to mark in every panel: an onset with its interval, and rollbacks."""

    step: int | None
    interval: tuple[int, int] | None
    rollbacks: tuple[int, ...] = ()


def dynamics_panels(
    arms: Arms, parameters: Parameters, length_unit: str = "tokens"
) -> tuple[Panel, ...]:
    """The four panels of figure 1: length, TruncRate, RepRate and accuracy over steps."""
    held_out = _has(arms, "eval/accuracy")
    accuracy = Curve("eval/accuracy", "dotted") if held_out else Curve("rollout/accuracy")
    where = "held-out problems" if held_out else "rollouts"
    measured = f"L = {parameters.window_chars:,} characters, τ = {parameters.ratio:g}"
    return (
        Panel("Length of rollouts", length_unit, (Curve("rollout/mean_length"),), "zero"),
        Panel(
            "TruncRate (cut off by the budget)",
            "share of rollouts",
            (Curve("rollout/truncation_rate"), Curve("eval/truncation_rate", "dots")),
            "rate",
        ),
        Panel(
            f"RepRate ({measured})",
            "share of rollouts",
            (Curve("rollout/repetition_rate"),),
            "rate",
        ),
        Panel(f"Accuracy ({where})", "share correct", (accuracy,), "share"),
    )


def logprob_panels() -> tuple[Panel, ...]:
    """The two panels of figure 2: mean log-prob by student and teacher, and the advantage."""
    logps = (Curve("logp/student_mean"), Curve("logp/teacher_mean", "dashed"))
    return (
        Panel("Mean log-prob of the student's tokens", "nats per token", logps),
        Panel("Mean advantage", "nats per token", (Curve("advantage/mean"),)),
    )


def credit_panels(parameters: Parameters) -> tuple[Panel, ...]:
    """The two panels of figure 3: mean advantage by class of token, and the repetitive share."""
    rule = f"n = {parameters.ngram}, min_run = {parameters.min_run}"
    means = (
        Curve("advantage/regular_mean"),
        Curve("advantage/repetitive_mean", "dashed"),
    )
    return (
        Panel("Mean advantage by class of token", "nats per token", means),
        Panel(
            f"Repetitive {parameters.unit} ({rule})",
            f"share of {parameters.unit}",
            (Curve("rollout/repetitive_share"),),
            "rate",
        ),
    )


def has_evaluations(arms: Arms) -> bool:
    """Whether any panel of figure 1 has points of held-out problems."""
    return _has(arms, "eval/accuracy") or _has(arms, "eval/truncation_rate")


def panel_figure(
    panel: Panel,
    arms: Arms,
    colors: Mapping[str, int],
    theme: Theme = LIGHT,
    mark: Mark | None = None,
) -> Figure:
    """Draw a panel as a figure of its own, without title and legend, which pages have as text.

    Args:
        panel: What to draw.
        arms: Lines of metrics of each seed of each arm.
        colors: `choose_colors` of all arms on the page.
        theme: Colours.
        mark: A step to mark.

    Returns:
        The figure.
    """
    figure, ax = blank_panel(theme, "step")
    draw_panel(ax, panel, arms, colors, theme, mark)
    return figure


def blank_panel(theme: Theme, x_label: str) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, in the size and look of all panels."""
    (width, height), (left, right, bottom, top) = PANEL_SIZE, MARGINS
    figure = Figure(figsize=PANEL_SIZE)
    ax = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )
    prepare_axes(ax, theme)
    ax.set_xlabel(x_label, color=theme.ink, fontsize=9)
    return figure, ax


def prepare_axes(ax: Axes, theme: Theme) -> None:
    """Give axes the look of all panels."""
    ax.set_facecolor("none")
    ax.grid(color=theme.faint, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(theme.faint)
    ax.tick_params(colors=theme.ink, labelsize=9, length=0)
    ax.yaxis.get_offset_text().set_color(theme.ink)


def draw_panel(
    ax: Axes,
    panel: Panel,
    arms: Arms,
    colors: Mapping[str, int],
    theme: Theme,
    mark: Mark | None = None,
) -> None:
    """Draw the curves of a panel; arguments as in `panel_figure`."""
    drawn = [
        _draw(ax, curve, seeds, theme.arms[colors[name]], panel.scale)
        for curve in panel.curves
        for name, seeds in arms.items()
    ]
    if not any(drawn):
        say_nothing_measured(ax, theme)
        return
    _set_scale(ax, panel.scale)
    _set_steps(ax, arms)
    if mark is not None:
        if mark.interval is not None and mark.interval[0] < mark.interval[1]:
            ax.axvspan(*mark.interval, color=theme.ink, alpha=0.12, linewidth=0, zorder=0.5)
        if mark.step is not None:
            dots = (0, (1, 1.5))
            ax.axvline(mark.step, color=theme.ink, linewidth=0.9, linestyle=dots, zorder=1.5)
        for step in mark.rollbacks:
            ax.axvline(step, color=theme.ink, linewidth=0.8, linestyle=(0, (5, 3)), zorder=1.5)


def say_nothing_measured(ax: Axes, theme: Theme) -> None:
    """Write into empty axes that what they are for was not measured."""
    ax.text(
        0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=theme.ink, alpha=0.7
    )
    ax.set_xticks([])
    ax.set_yticks([])


def svg_data_uri(figure: Figure) -> str:
    """A figure as SVG in a `data:` address, the same bytes for the same numbers."""
    FigureCanvasSVG(figure)
    target = io.BytesIO()
    settings: dict[Any, Any] = {
        "svg.hashsalt": "stableopd",
        "svg.fonttype": "none",
        "font.sans-serif": FONTS,
    }
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context(settings):
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    # A thousandth of a point is far below a pixel; matplotlib writes six digits.
    text = re.sub(r"(\.\d{3})\d+", r"\1", target.getvalue().decode("utf-8"))
    encoded = base64.b64encode(text.encode("utf-8")).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"


def _draw(ax: Axes, curve: Curve, seeds: Sequence[Any], color: str, scale: str) -> bool:
    series = read_series(seeds, curve.key)
    if series is None:
        return False
    style = line_style(curve.style)
    if len(series.steps) == 1:
        style["marker"] = "o"  # a line through one point is not to be seen
    ax.plot(series.steps, series.mean, color=color, **style)
    if series.num_seeds > 1:
        low, high = series.low, series.high
        if scale in ("rate", "share"):
            low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
        if curve.style == "dots":
            ax.vlines(series.steps, low, high, color=color, alpha=0.4, linewidth=3)
        else:
            ax.fill_between(series.steps, low, high, color=color, alpha=0.2, linewidth=0)
    return True


def _set_scale(ax: Axes, scale: str) -> None:
    top = ax.get_ylim()[1]
    if scale == "rate":
        ax.set_ylim(-0.03, 1.03)
    elif scale == "share":
        # An accuracy of .004 on an axis of its own would look like a success.
        ax.set_ylim(-0.0075, min(max(top, 0.25), 1.03))
    elif scale == "zero":
        ax.set_ylim(bottom=0.0)
    else:
        _keep_lines_large(ax)


def _keep_lines_large(ax: Axes) -> None:
    """Cut bands off that are far wider than the lines: a few seeds can know a mean very badly."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    values = values[np.isfinite(values)]
    low, high = ax.get_ylim()
    room = 0.5 * (values.max() - values.min())
    if room > 0:
        ax.set_ylim(max(low, values.min() - room), min(high, values.max() + room))


def _set_steps(ax: Axes, arms: Arms) -> None:
    steps = [line["step"] for seeds in arms.values() for lines in seeds for line in lines]
    margin = 0.012 * (max(steps) - min(steps))
    if margin > 0:
        ax.set_xlim(min(steps) - margin, max(steps) + margin)
    else:
        ax.set_xlim(min(steps) - 1, max(steps) + 1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def _has(arms: Arms, key: str) -> bool:
    lines = (line.get(key) for seeds in arms.values() for run in seeds for line in run)
    return any(isinstance(value, int | float) and math.isfinite(value) for value in lines)
