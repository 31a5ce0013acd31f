"""Measurements as lines of metrics, one a step, and the onsets that such lines show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stableopd.diagnostics.onset import Onset, find_onset
from stableopd.diagnostics.summary import Summary

__all__ = ["lines_of", "onset_of"]

# The names of docs/metrics.md for what rollouts alone tell.
METRICS = {
    "rollout/mean_length": "mean_length",
    "rollout/truncation_rate": "truncation_rate",
    "rollout/repetition_rate": "repetition_rate",
    "rollout/repetitive_share": "repetitive_share",
    "rollout/accuracy": "accuracy",
    "advantage/mean": "advantage",
    "advantage/repetitive_mean": "repetitive_advantage",
    "advantage/regular_mean": "regular_advantage",
    "advantage/repetitive_weight": "repetitive_weight",
    "logp/student_mean": "student_logp",
    "logp/teacher_mean": "teacher_logp",
    "stop/student_logp": "student_stop_logp",
    "stop/teacher_logp": "teacher_stop_logp",
}


def lines_of(summary: Summary) -> tuple[dict[str, Any], ...]:
    """One mapping a step with the names of docs/metrics.md, of what the rollouts tell.

    Args:
        summary: Measurements by step.

    Returns:
        The lines in order; a name without a number is left out.
    """
    lines: list[dict[str, Any]] = []
    for entry in summary.by_step:
        values = {name: getattr(entry.measures, field) for name, field in METRICS.items()}
        lines.append({"step": entry.step} | {k: v for k, v in values.items() if math.isfinite(v)})
    return tuple(lines)


def onset_of(lines: Sequence[Mapping[str, Any]], metric: str, summary: Summary) -> Onset:
    """When a rate in the lines of a run changed phase.

    Args:
        lines: One mapping a step with the names of docs/metrics.md.
        metric: The rate's name; lines without it are passed over.
        summary: Says how many rollouts a step has; its median stands in where it does not.

    Returns:
        As `find_onset`.
    """
    counts = {entry.step: entry.measures.num_rollouts for entry in summary.by_step}
    known = [line for line in lines if isinstance(line.get(metric), int | float)]
    steps = [int(line["step"]) for line in known]
    typical = float(np.median(list(counts.values()))) if counts else None
    sizes = None if typical is None else [counts.get(step, typical) for step in steps]
    return find_onset(steps, [float(line[metric]) for line in known], sizes)
