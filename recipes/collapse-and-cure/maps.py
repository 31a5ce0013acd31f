"""Where OPD collapses: maps and slices of many small cells, and how sure the teachers are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import phase
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tables import markdown

__all__ = ["map_figure", "read_cells", "slice_table", "strength_table", "teacher_table"]

Result = Mapping[str, Any]

TITLES = {"opd": "OPD", "stable_opd": "StableOPD"}
COLORS = "YlOrRd"
COPIES = (0, 1, 2, 3, 6)


def read_cells(output: Path) -> list[Result]:
    """The results of all cells that are finished, of those that are asked for today."""
    files = [cell.file(output) for cell in phase.cells()]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def map_figure(results: Sequence[Result], axis: str, title: str) -> Figure:
    """P(collapse) over the teacher's loops and one property of the student, OPD and StableOPD.

    Args:
        results: All cells.
        axis: "strength" or "own_loops": the vertical axis.
        title: What the vertical axis is.

    Returns:
        A figure of two panels; in each cell "collapsed of seeds".
    """
    rows = phase.STRENGTHS if axis == "strength" else phase.OWN_LOOPS
    labels = [_label(results, axis, row) for row in rows]
    figure = Figure(figsize=(9.2, 4.2), layout=ConstrainedLayoutEngine(wspace=0.04))
    for place, method in enumerate(TITLES, start=1):
        ax = figure.add_subplot(1, 2, place)
        _draw(ax, _grid(results, axis, method), rows, labels if place == 1 else [""] * len(rows))
        ax.set_title(TITLES[method], loc="left", fontsize=11)
        ax.set_xlabel("share of repeated documents in the teacher's pretraining", fontsize=9)
        if place == 1:
            ax.set_ylabel(title, fontsize=9)
    return figure


def _label(results: Sequence[Result], axis: str, row: str) -> str:
    """A value of the vertical axis, with the accuracy from which its students start."""
    starts = [r["accuracy_start"] for r in results if r[axis] == row]
    if axis != "strength" or not starts:
        return row
    return f"{row} ({fmean(starts):.2f})"


def cell_key(result: Result, axis: str) -> tuple[str, str]:
    """The place of a cell on a map: (row, column)."""
    return str(result[axis]), str(result["loops"])


def _grid(
    results: Sequence[Result], axis: str, method: str
) -> dict[tuple[str, str], tuple[int, int]]:
    """(collapsed, seeds) of each place of a map: all else is as shipped."""
    plain = vars(phase.Cell())
    fixed = [k for k in ("strength", "own_loops", "budget", "rate") if k != axis]
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for result in results:
        if result["method"] == method and all(result[k] == plain[k] for k in fixed):
            num, total = found.get(cell_key(result, axis), (0, 0))
            found[cell_key(result, axis)] = (num + result["is_collapsed"], total + 1)
    return found


def _draw(
    ax: Axes,
    found: Mapping[tuple[str, str], tuple[int, int]],
    rows: Sequence[str],
    labels: Sequence[str],
) -> None:
    shares = np.full((len(rows), len(phase.LOOPS)), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(phase.LOOPS):
            num, total = found.get((row, column), (0, 0))
            if total:
                shares[i, j] = num / total
                color = "white" if num / total > 0.6 else "black"
                text = f"{num}/{total}"
                ax.text(j, i, text, ha="center", va="center", fontsize=10, color=color)
    ax.imshow(shares, cmap=COLORS, vmin=0, vmax=1.15, origin="lower", aspect="auto")
    for edge in range(1, max(shares.shape)):
        ax.axvline(edge - 0.5, color="white", linewidth=2)
        ax.axhline(edge - 0.5, color="white", linewidth=2)
    ax.set_xlim(-0.5, len(phase.LOOPS) - 0.5)
    ax.set_ylim(-0.5, len(rows) - 0.5)
    ax.set_xticks(range(len(phase.LOOPS)), [f"{float(x):g}" for x in phase.LOOPS], fontsize=9)
    ax.set_yticks(range(len(rows)), labels, fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def slice_table(results: Sequence[Result], axis: str, values: Sequence[float]) -> str:
    """Along the budget or the rate, with the shipped models."""
    plain = vars(phase.Cell())
    fixed = [k for k in ("loops", "strength", "own_loops", "budget", "rate") if k != axis]
    name = {"budget": "budget (tokens)", "rate": "learning rate"}[axis]
    head = [name, "steps"]
    head += [f"{t}: {what}" for t in TITLES.values() for what in ("collapsed", "at step")]
    rows: list[list[str]] = []
    for value in values:
        cells = [f"{value:g}"]
        for method in TITLES:
            here = [r for r in results if r["method"] == method and r[axis] == value]
            here = [r for r in here if all(r[k] == plain[k] for k in fixed)]
            if len(cells) == 1:
                cells.append(str(here[0]["steps"]) if here else "-")
            ends = [str(len(r["truncation_rate"])) for r in here if r["is_collapsed"]]
            cells += [f"{len(ends)} of {len(here)}", ", ".join(ends) or "-"]
        rows.append(cells)
    return markdown(head, rows)


def strength_table(results: Sequence[Result], axis: str) -> str:
    """What the cells of a map gain: accuracy at the start, and at the end where none collapsed."""
    rows = phase.STRENGTHS if axis == "strength" else phase.OWN_LOOPS
    name = {"strength": "clean pretraining steps", "own_loops": "own loops"}[axis]
    head = [name, "accuracy at the start"]
    head += [f"OPD, teacher {float(loops):g}" for loops in phase.LOOPS]
    plain = vars(phase.Cell())
    fixed = [k for k in ("strength", "own_loops", "budget", "rate") if k != axis]
    lines: list[list[str]] = []
    for row in rows:
        here = [r for r in results if r["method"] == "opd" and r[axis] == row]
        here = [r for r in here if all(r[k] == plain[k] for k in fixed)]
        starts = [r["accuracy_start"] for r in here]
        cells = [row, f"{fmean(starts):.2f}" if starts else "-"]
        for loops in phase.LOOPS:
            ends = [r["accuracy_end"] for r in here if r["loops"] == loops]
            known = [end for end in ends if end is not None]
            cells.append(f"{fmean(known):.2f}" if known else "collapse" if ends else "-")
        lines.append(cells)
    return markdown(head, lines)


def teacher_table(output: Path, measure: Callable[[Path], list[float]]) -> str:
    """Probability of a further copy after 0, 1, 2, ... copies, for each teacher.

    Args:
        output: Where the models lie.
        measure: `further_copies`, or what gives the same for a model folder.
    """
    words = [f"after {n} copies" if n != 1 else "after 1 copy" for n in COPIES]
    head = ["share of repeated documents", *words]
    rows: list[list[str]] = []
    for loops in phase.LOOPS:
        name = phase.Cell(loops).models["teacher.model"]
        cells = [f"{float(loops):g}"]
        rows.append(cells + [f"{p:.4f}" for p in measure(_folder(name, output))])
    return markdown(head, rows)


def _folder(name: str, output: Path) -> Path:
    from stableopd import embedded

    return embedded.path("teacher") if name == "embedded" else output / "models" / name
