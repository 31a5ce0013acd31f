"""The figures of a run, or of several runs over each other, from their lines of metrics.

    Figure 1  length, TruncRate, RepRate and accuracy over steps
    Figure 2  mean log-prob by student and teacher, and mean advantage
    Figure 3  mean advantage of repetitive and regular tokens, and the share of repetitive ones
    Figure 4  the quantities of figures 1 and 2 for several runs beside each other

Drawn without pyplot, so nothing global is touched. SVG has a transparent background; `Theme`
decides whether ink and colours are made for a light page or a dark one.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from stableopd.config import RepetitionConfig

__all__ = [
    "DARK",
    "LIGHT",
    "Runs",
    "Theme",
    "comparison_figure",
    "credit_figure",
    "dynamics_figure",
    "logprob_figure",
    "save_png",
    "svg_data_uri",
]

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


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

SOLID: dict[str, Any] = {"linewidth": 1.7, "solid_capstyle": "round"}
DASHED: dict[str, Any] = {"linewidth": 1.7, "linestyle": (0, (3.5, 1.5))}
DOTTED: dict[str, Any] = {"linewidth": 1.3, "marker": "o", "markersize": 4.5}
DOTS: dict[str, Any] = {**DOTTED, "linestyle": "none"}


def dynamics_figure(
    runs: Runs,
    repetition: RepetitionConfig,
    theme: Theme = LIGHT,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Figure 1: length, TruncRate, RepRate and accuracy over steps.

    Args:
        runs: Lines of metrics by the name of the run.
        repetition: The parameters that RepRate was measured with; shown in its title.
        theme: Colours.
        arms: All names on the page, where `runs` are some of them: they decide the colours.

    Returns:
        A figure of 2 x 2 panels.
    """
    figure, axes = _panels(2, 2, (8.4, 5.4), theme)
    colors = _colors(arms or list(runs), theme)
    _draw_dynamics(axes, runs, colors, repetition)
    _finish(figure, axes, runs, colors, theme, _evaluation_key(runs))
    return figure


def logprob_figure(runs: Runs, theme: Theme = LIGHT, arms: Sequence[str] | None = None) -> Figure:
    """Figure 2: mean log-prob of the rollouts' tokens by student and teacher, and the advantage.

    Arguments and result as in `dynamics_figure`; 1 x 2 panels.
    """
    figure, axes = _panels(1, 2, (8.4, 3.2), theme)
    colors = _colors(arms or list(runs), theme)
    _draw_logprobs(axes, runs, colors)
    _finish(figure, axes, runs, colors, theme, {"student": SOLID, "teacher": DASHED})
    return figure


def credit_figure(
    runs: Runs,
    repetition: RepetitionConfig,
    theme: Theme = LIGHT,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Figure 3: mean advantage of repetitive and of regular tokens, and the repetitive share.

    Arguments and result as in `dynamics_figure`; 1 x 2 panels.
    """
    figure, axes = _panels(1, 2, (8.4, 3.2), theme)
    colors = _colors(arms or list(runs), theme)
    mean, share = axes
    rule = f"n = {repetition.ngram}, min_run = {repetition.min_run}"
    _draw(mean, runs, "advantage/regular_mean", colors)
    _draw(mean, runs, "advantage/repetitive_mean", colors, DASHED)
    _label(mean, "Mean advantage by class of token", "nats per token")
    _draw(share, runs, "rollout/repetitive_share", colors)
    _label(share, f"Repetitive tokens ({rule})", "share of tokens", rate=True)
    keys = {"regular tokens": SOLID, "repetitive tokens": DASHED}
    _finish(figure, axes, runs, colors, theme, keys)
    return figure


def comparison_figure(runs: Runs, repetition: RepetitionConfig, theme: Theme = LIGHT) -> Figure:
    """Figure 4: the quantities of figures 1 and 2 for several runs, say OPD and StableOPD.

    Arguments and result as in `dynamics_figure`; 2 x 3 panels.
    """
    figure, axes = _panels(2, 3, (11.4, 5.6), theme)
    colors = _colors(list(runs), theme)
    _draw_dynamics(axes[:4], runs, colors, repetition)
    _draw_logprobs(axes[4:], runs, colors)
    keys = {**_evaluation_key(runs), "teacher": DASHED}
    _finish(figure, axes, runs, colors, theme, keys)
    return figure


def save_png(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure as PNG on white: a viewer with a dark window would hide the axes else."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=dpi, facecolor="white")


def svg_data_uri(figure: Figure) -> str:
    """A figure as SVG in a `data:` address, the same bytes for the same numbers."""
    FigureCanvasSVG(figure)
    target = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "stableopd"}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(target.getvalue()).decode("ascii")


def _draw_dynamics(
    axes: Sequence[Axes], runs: Runs, colors: Mapping[str, str], repetition: RepetitionConfig
) -> None:
    length, truncation, repeated, accuracy = axes
    _draw(length, runs, "rollout/mean_length", colors)
    _label(length, "Length of rollouts", "tokens", bottom=0.0)
    _draw(truncation, runs, "rollout/truncation_rate", colors)
    _draw(truncation, runs, "eval/truncation_rate", colors, DOTS)
    _label(truncation, "TruncRate (cut off by the budget)", "share of rollouts", rate=True)
    _draw(repeated, runs, "rollout/repetition_rate", colors)
    parameters = f"L = {repetition.window_chars:,} characters, τ = {repetition.ratio:g}"
    _label(repeated, f"RepRate ({parameters})", "share of rollouts", rate=True)
    held_out = _has(runs, "eval/accuracy")
    if held_out:
        _draw(accuracy, runs, "eval/accuracy", colors, DOTTED)
    else:
        _draw(accuracy, runs, "rollout/accuracy", colors)
    where = "held-out problems" if held_out else "rollouts"
    _label(accuracy, f"Accuracy ({where})", "share correct", bottom=0.0)


def _draw_logprobs(axes: Sequence[Axes], runs: Runs, colors: Mapping[str, str]) -> None:
    logp, advantage = axes
    _draw(logp, runs, "logp/student_mean", colors)
    _draw(logp, runs, "logp/teacher_mean", colors, DASHED)
    _label(logp, "Mean log-prob of the student's tokens", "nats per token")
    _draw(advantage, runs, "advantage/mean", colors)
    _label(advantage, "Mean advantage", "nats per token")


def _panels(
    rows: int, columns: int, size: tuple[float, float], theme: Theme
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(hspace=0.07, wspace=0.04))
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_facecolor("none")
        ax.grid(color=theme.faint, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(theme.faint)
        ax.tick_params(colors=theme.ink, labelsize=9, length=0)
    for ax in axes[-columns:]:
        ax.set_xlabel("step", color=theme.ink, fontsize=9)
    return figure, axes


def _colors(names: Sequence[str], theme: Theme) -> dict[str, str]:
    """A colour per run: a method's own one, else the next that no method on the page has."""
    known = {n: PLACES.get("".join(c for c in n.lower() if c.isalnum())) for n in names}
    taken = {place for place in known.values() if place is not None}
    free = [place for place in range(len(theme.arms)) if place not in taken]
    # A single run is blue, unless it has a colour of its own.
    free.sort(key=lambda place: (place != 1, place))
    rest = itertools.cycle(free or range(len(theme.arms)))
    return {n: theme.arms[next(rest) if place is None else place] for n, place in known.items()}


def _draw(
    ax: Axes,
    runs: Runs,
    key: str,
    colors: Mapping[str, str],
    style: Mapping[str, Any] = SOLID,
) -> None:
    for name, lines in runs.items():
        points = [(line["step"], _value(line, key)) for line in lines if key in line]
        if any(not math.isnan(value) for _, value in points):
            ax.plot(*zip(*points, strict=True), color=colors[name], **style)


def _label(
    ax: Axes, title: str, unit: str, rate: bool = False, bottom: float | None = None
) -> None:
    ink = ax.xaxis.get_tick_params()["labelcolor"]
    ax.set_title(title, loc="left", fontsize=10, color=ink)
    ax.set_ylabel(unit, fontsize=9, color=ink)
    if not ax.lines:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=ink, alpha=0.6)
        ax.set_xticks([])
        ax.set_yticks([])
    elif rate:
        ax.set_ylim(-0.03, 1.03)
    elif bottom is not None:
        ax.set_ylim(bottom=bottom)


def _finish(
    figure: Figure,
    axes: Sequence[Axes],
    runs: Runs,
    colors: Mapping[str, str],
    theme: Theme,
    keys: Mapping[str, dict[str, Any]],
) -> None:
    """One legend for the figure: a colour for each run, a style for each kind of line."""
    steps = [line["step"] for lines in runs.values() for line in lines]
    for ax in axes:
        if ax.lines and steps and max(steps) > min(steps):
            margin = 0.012 * (max(steps) - min(steps))
            ax.set_xlim(min(steps) - margin, max(steps) + margin)
            ax.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    handles = [Line2D([], [], color=colors[name], linewidth=3, label=name) for name in runs]
    handles += [Line2D([], [], color=theme.ink, label=k, **style) for k, style in keys.items()]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=9.5,
        labelcolor=theme.ink,
    )


def _evaluation_key(runs: Runs) -> dict[str, dict[str, Any]]:
    measured = any(_has(runs, key) for key in ("eval/accuracy", "eval/truncation_rate"))
    return {"held-out problems": DOTS} if measured else {}


def _has(runs: Runs, key: str) -> bool:
    return any(not math.isnan(_value(line, key)) for lines in runs.values() for line in lines)


def _value(line: Mapping[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if isinstance(value, int | float) else math.nan
