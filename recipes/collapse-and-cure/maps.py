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
AXES = ("loops", "strength", "own_loops", "budget", "rate")


def read_cells(output: Path) -> list[Result]:
    """The results of all cells that are finished, of those that are asked for today."""
    files = [cell.file(output) for cell in phase.cells()]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def map_figure(results: Sequence[Result]) -> Figure:
    """P(collapse) over the teacher's loops and the student's strength, OPD and StableOPD.

    Args:
        results: All cells.

    Returns:
        A figure of two panels; in each cell "collapsed of seeds".
    """
    rows = phase.STRENGTHS
    labels = [_label(results, row) for row in rows]
    figure = Figure(figsize=(9.2, 4.2), layout=ConstrainedLayoutEngine(wspace=0.04))
    for place, method in enumerate(TITLES, start=1):
        ax = figure.add_subplot(1, 2, place)
        _draw(ax, _grid(results, method), rows, labels if place == 1 else [""] * len(rows))
        ax.set_title(TITLES[method], loc="left", fontsize=11)
        ax.set_xlabel("share of repeated documents in the teacher's pretraining", fontsize=9)
        if place == 1:
            title = "student: clean pretraining steps (accuracy at the start)"
            ax.set_ylabel(title, fontsize=9)
    return figure


def _label(results: Sequence[Result], row: str) -> str:
    """A value of the vertical axis, with the accuracy from which its students start."""
    starts = [r["accuracy_start"] for r in results if r["strength"] == row]
    return f"{row} ({fmean(starts):.2f})" if starts else row


def _of(results: Sequence[Result], method: str, *free: str) -> list[Result]:
    """The cells of a method in which all axes but the free ones are as shipped."""
    plain = vars(phase.Cell())
    fixed = [axis for axis in AXES if axis not in free]
    return [r for r in results if r["method"] == method and all(r[k] == plain[k] for k in fixed)]


def _grid(results: Sequence[Result], method: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(collapsed, seeds) of each place of the map: (strength, loops)."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for result in _of(results, method, "strength", "loops"):
        key = result["strength"], result["loops"]
        num, total = found.get(key, (0, 0))
        found[key] = (num + result["is_collapsed"], total + 1)
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


def slice_table(results: Sequence[Result], axis: str, values: Sequence[float | str]) -> str:
    """Along the student's own loops, the budget or the rate, with the shipped models."""
    names = {"own_loops": "own loops", "budget": "budget (tokens)", "rate": "learning rate"}
    head = [names[axis], "accuracy at the start", "steps"]
    for title in TITLES.values():
        head += [f"{title}: collapsed", "at step", "accuracy at the end of the others"]
    rows: list[list[str]] = []
    for value in values:
        here = {m: [r for r in _of(results, m, axis) if r[axis] == value] for m in TITLES}
        every = [r for cells in here.values() for r in cells]
        starts = [r["accuracy_start"] for r in every]
        row = [f"{float(value):g}", f"{fmean(starts):.2f}" if starts else "-"]
        row.append(str(every[0]["steps"]) if every else "-")
        for cells in here.values():
            ends = [str(len(r["truncation_rate"])) for r in cells if r["is_collapsed"]]
            row += [f"{len(ends)} of {len(cells)}", ", ".join(ends) or "-", _end(cells)]
        rows.append(row)
    return markdown(head, rows)


def _end(cells: Sequence[Result]) -> str:
    """Mean accuracy at the end of those that did not collapse."""
    known = [r["accuracy_end"] for r in cells if not r["is_collapsed"]]
    return f"{fmean(known):.2f}" if known else "-"


def strength_table(results: Sequence[Result]) -> str:
    """What the cells of the map gain: accuracy at the start, and at the end without collapse."""
    head = ["clean pretraining steps", "accuracy at the start"]
    head += [f"OPD, teacher {float(loops):g}" for loops in phase.LOOPS]
    lines: list[list[str]] = []
    for row in phase.STRENGTHS:
        here = [r for r in _of(results, "opd", "strength", "loops") if r["strength"] == row]
        starts = [r["accuracy_start"] for r in here]
        cells = [row, f"{fmean(starts):.2f}" if starts else "-"]
        for loops in phase.LOOPS:
            of_teacher = [r for r in here if r["loops"] == loops]
            collapses = bool(of_teacher) and all(r["is_collapsed"] for r in of_teacher)
            cells.append("collapse" if collapses else _end(of_teacher))
        lines.append(cells)
    return markdown(head, lines)


def teacher_table(output: Path, measure: Callable[[Path], list[float]]) -> str:
    """Probability of a further copy after 0, 1, 2, ... copies, for each teacher.

    Args:
        output: Where the models lie.
        measure: `further_copies`, or what gives the same for a model folder.
    """
    # Measured once, so that the page can be made again without the models.
    file = output / "confidence.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    for loops in phase.LOOPS:
        if loops not in known:
            known[loops] = measure(_folder(phase.Cell(loops).models["teacher.model"], output))
    file.write_text(json.dumps(known) + "\n")
    words = [f"after {n} copies" if n != 1 else "after 1 copy" for n in COPIES]
    head = ["share of repeated documents", *words]
    rows: list[list[str]] = []
    for loops in phase.LOOPS:
        rows.append([f"{float(loops):g}", *(f"{p:.4f}" for p in known[loops])])
    return markdown(head, rows)


def _folder(name: str, output: Path) -> Path:
    from stableopd import embedded

    return embedded.path("teacher") if name == "embedded" else output / "models" / name
