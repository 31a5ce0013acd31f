"""The figures of a run, or of several runs over each other, from their lines of metrics.

Figure 1  length, TruncRate, RepRate and accuracy over steps
Figure 2  mean log-prob by student and teacher, and mean advantage
Figure 3  mean advantage of repetitive and regular tokens, and the share of repetitive ones
Figure 4  the quantities of figures 1 and 2 for several runs beside each other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from stableopd.config import RepetitionConfig
from stableopd.diagnostics.summary import Parameters
from stableopd.report.panels import (
    Panel,
    credit_panels,
    draw_panel,
    dynamics_panels,
    has_evaluations,
    logprob_panels,
    prepare_axes,
)
from stableopd.report.series import Arms
from stableopd.report.themes import LIGHT, Style, Theme, choose_colors, line_style

__all__ = [
    "comparison_figure",
    "credit_figure",
    "dynamics_figure",
    "logprob_figure",
    "save_png",
]


def dynamics_figure(arms: Arms, repetition: RepetitionConfig, theme: Theme = LIGHT) -> Figure:
    """Figure 1: length, TruncRate, RepRate and accuracy over steps.

    Args:
        arms: Lines of metrics of each seed, by the name of the arm; seeds are drawn as a band.
        repetition: What repetition was measured with; shown in the titles.
        theme: Colours.

    Returns:
        A figure of 2 x 2 panels.
    """
    panels = dynamics_panels(arms, _parameters(repetition))
    return _figure(arms, panels, 2, (8.4, 5.4), theme, _evaluation_key(arms))


def logprob_figure(arms: Arms, theme: Theme = LIGHT) -> Figure:
    """Figure 2: mean log-prob of the rollouts' tokens by student and teacher, and the advantage.

    Arguments and result as in `dynamics_figure`; 1 x 2 panels.
    """
    keys: dict[str, Style] = {"student": "solid", "teacher": "dashed"}
    return _figure(arms, logprob_panels(), 2, (8.4, 3.2), theme, keys)


def credit_figure(arms: Arms, repetition: RepetitionConfig, theme: Theme = LIGHT) -> Figure:
    """Figure 3: mean advantage of repetitive and of regular tokens, and the repetitive share.

    Arguments and result as in `dynamics_figure`; 1 x 2 panels.
    """
    keys: dict[str, Style] = {"regular tokens": "solid", "repetitive tokens": "dashed"}
    return _figure(arms, credit_panels(_parameters(repetition)), 2, (8.4, 3.2), theme, keys)


def comparison_figure(arms: Arms, repetition: RepetitionConfig, theme: Theme = LIGHT) -> Figure:
    """Figure 4: the quantities of figures 1 and 2 for several runs, say OPD and StableOPD.

    Arguments and result as in `dynamics_figure`; 2 x 3 panels.
    """
    panels = (*dynamics_panels(arms, _parameters(repetition)), *logprob_panels())
    keys: dict[str, Style] = {**_evaluation_key(arms), "teacher": "dashed"}
    return _figure(arms, panels, 3, (11.4, 5.6), theme, keys)


def save_png(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a figure as PNG on white: a viewer with a dark window would hide the axes else."""
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=dpi, facecolor="white")


def _figure(
    arms: Arms,
    panels: Sequence[Panel],
    columns: int,
    size: tuple[float, float],
    theme: Theme,
    keys: Mapping[str, Style],
) -> Figure:
    """Panels with their titles, and one legend: a colour for each run, a style for each key."""
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(hspace=0.07, wspace=0.04))
    rows = len(panels) // columns
    colors = choose_colors(list(arms))
    for place, panel in enumerate(panels, start=1):
        ax = figure.add_subplot(rows, columns, place)
        prepare_axes(ax, theme)
        ax.set_title(panel.title, loc="left", fontsize=10, color=theme.ink)
        ax.set_ylabel(panel.unit, fontsize=9, color=theme.ink)
        if place > len(panels) - columns:
            ax.set_xlabel("step", color=theme.ink, fontsize=9)
        draw_panel(ax, panel, arms, colors, theme)
    handles = [
        Line2D([], [], color=theme.arms[colors[name]], linewidth=3, label=name) for name in arms
    ]
    handles += [Line2D([], [], color=theme.ink, label=k, **line_style(s)) for k, s in keys.items()]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 6),
        frameon=False,
        fontsize=9.5,
        labelcolor=theme.ink,
    )
    return figure


def _parameters(repetition: RepetitionConfig) -> Parameters:
    """Those of a run of this program, which labels tokens."""
    return Parameters(
        repetition.window_chars, repetition.ratio, repetition.ngram, repetition.min_run, "tokens"
    )


def _evaluation_key(arms: Arms) -> dict[str, Style]:
    return {"held-out problems": "dots"} if has_evaluations(arms) else {}
