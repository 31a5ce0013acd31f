"""A diagnosis for the terminal, and as one JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from stableopd.diagnostics.overlap import find_agreement
from stableopd.diagnostics.summary import Measures, Summary, WorstRollout
from stableopd.diagnostics.verdict import Diagnosis
from stableopd.terminal import table
from stableopd.text import shown

__all__ = ["as_json", "show"]

# Rows of the table of steps: enough to see a trend, few enough for one screen.
SHOWN_STEPS = 8

COLORS = {"healthy": "green", "too little data": "yellow"}


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print a diagnosis: the verdict first, then the numbers that it rests on.

    Args:
        diagnosis: What was found.
        console: Where to.
    """
    verdict, summary = diagnosis.verdict, diagnosis.summary
    num_rollouts = summary.overall.num_rollouts
    what = "1 rollout" if num_rollouts == 1 else f"{num_rollouts:,} rollouts"
    if summary.by_step:
        steps = [entry.step for entry in summary.by_step]
        count = "1 step" if len(steps) == 1 else f"{len(steps)} steps"
        what += f" of {count} ({steps[0]} to {steps[-1]})" if len(steps) > 1 else f" of {count}"
    _sentence(console, Text(f"{diagnosis.name}: {what}, read as {diagnosis.source}."))
    made = table(*_steps_table(summary))
    made.caption = _legend(summary)
    console.print(made)
    color = COLORS.get(verdict.cause, "red")
    _sentence(console, Text(verdict.headline, style=f"bold {color}"))
    if verdict.cause != "too little data":
        _sentence(console, Text(f"Confidence: {verdict.confidence}."))
    _list(console, "Evidence", verdict.evidence)
    _list(console, "What to do", verdict.advice)
    _list(console, "Notes", diagnosis.notes)


def _list(console: Console, title: str, sentences: Sequence[str]) -> None:
    if sentences:
        console.print(Text(title, style="bold"))
        for sentence in sentences:
            _sentence(console, Text(f"- {sentence}"))


def _sentence(console: Console, text: Text) -> None:
    text.plain = shown(text.plain)
    # In a file or a pipe a sentence stays one line, so that it can be searched.
    console.print(text, soft_wrap=not console.is_terminal)


def _steps_table(summary: Summary) -> tuple[list[str], list[list[object]], str]:
    """Columns, rows and title: some steps spread over the run, then all of them."""
    columns = ["step", "length", "TruncRate", "RepRate", "repetitive"]
    measured = [entry.measures for entry in summary.by_step]
    optional = {"accuracy": "accuracy", "score": "score", "advantage": "advantage"}
    optional = {
        name: field
        for name, field in optional.items()
        if any(math.isfinite(getattr(m, field)) for m in (*measured, summary.overall))
    }

    def row(name: str, m: Measures) -> list[object]:
        cells: list[object] = [name, f"{m.mean_length:.1f}"]
        cells += [m.truncation_rate, m.repetition_rate, m.repetitive_share]
        return cells + [getattr(m, field) for field in optional.values()]

    places = np.unique(np.linspace(0, len(measured) - 1, SHOWN_STEPS).round().astype(int))
    rows = [
        row(str(summary.by_step[place].step), measured[place])
        for place in (places if len(measured) > 1 else [])
    ]
    rows.append(row("all", summary.overall))
    return [*columns, *optional], rows, ""


def _legend(summary: Summary) -> str:
    p, unit = summary.parameters, summary.parameters.unit
    return (
        f"length: mean, in {summary.length_unit}. TruncRate: share cut off. RepRate: L = "
        f"{p.window_chars:,} characters, tau = {p.ratio:g}. repetitive: share of {unit} whose "
        f"n-gram stood before (n = {p.ngram}, min_run = {p.min_run})."
    )


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """A diagnosis as one JSON object with stable keys.

    Args:
        diagnosis: What was found.

    Returns:
        The overall measurements by their names in `Measures`, and beside them `verdict` (the
        cause), `collapsed`, `confidence`, `headline`, `evidence`, `advice`, `onset`,
        `repetition_onset`, `agreement`, `alarm`, `by_step`, `by_prompt`, `histogram`,
        `positions`, `worst`, and what was read. Numbers that do not exist are null.
    """
    verdict, summary = diagnosis.verdict, diagnosis.summary
    made: dict[str, Any] = {
        "name": diagnosis.name,
        "format": diagnosis.source,
        "verdict": verdict.cause,
        "collapsed": verdict.collapsed,
        "confidence": verdict.confidence,
        "headline": verdict.headline,
        "evidence": verdict.evidence,
        "advice": verdict.advice,
        "notes": diagnosis.notes,
        "onset": dataclasses.asdict(diagnosis.onset),
        "repetition_onset": dataclasses.asdict(diagnosis.repetition_onset),
        "agreement": dataclasses.asdict(find_agreement(diagnosis.lines)),
        "alarm": {
            "level": str(diagnosis.alarm.level),
            "reason": diagnosis.alarm.reason,
            "warned_at": diagnosis.warned_at,
            "alarmed_at": diagnosis.alarmed_at,
        },
        **dataclasses.asdict(summary.overall),
        "num_steps": len(summary.by_step),
        "num_prompts": summary.num_prompts,
        "length_unit": summary.length_unit,
        "truncation_source": summary.truncation_source,
        "budget": summary.budget,
        "parameters": dataclasses.asdict(summary.parameters),
        "truncated": dataclasses.asdict(summary.truncated),
        "answered_before_loop": summary.answered_before_loop,
        "marker_share": summary.marker_share,
        "markers": summary.markers,
        "by_step": [
            {"step": entry.step, **dataclasses.asdict(entry.measures)} for entry in summary.by_step
        ],
        "by_prompt": [dataclasses.asdict(entry) for entry in summary.by_prompt],
        "histogram": _arrays(summary.histogram),
        "positions": _arrays(summary.positions),
        "worst": [_worst(worst) for worst in summary.worst],
        "metrics": list(diagnosis.lines),
    }
    return _plain(made)


def _arrays(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _worst(worst: WorstRollout) -> dict[str, Any]:
    # The text is in the file that is named; a page shows it.
    left_out = {"prompt", "completion", "gap", "spans"}
    return {k: v for k, v in dataclasses.asdict(worst).items() if k not in left_out}


def _plain(value: Any) -> Any:
    """Arrays and tuples as lists, numbers that are not finite as None."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
