"""Whether a teacher can teach its student: how far the two agree, at first and at last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableopd.diagnostics.memory import number

__all__ = ["Agreement", "find_agreement"]

# Design: lines of metrics that are averaged at either end.
EDGE_LINES = 5

METRICS = {"ratio": "overlap/ratio", "advantage": "overlap/advantage", "entropy_gap": "entropy/gap"}


@dataclass(frozen=True, slots=True)
class Agreement:
    """(first, last) means over five steps each; nan where a run did not measure it.

    Attributes:
        ratio: Overlap of the top-k sets of student and teacher, from 0 to 1.
        advantage: Advantage on the overlap, in nats.
        entropy_gap: Mean difference of the entropies, in nats.
    """

    ratio: tuple[float, float]
    advantage: tuple[float, float]
    entropy_gap: tuple[float, float]

    def text(self) -> str:
        """The same as a sentence; "" where nothing was measured."""
        said = [
            f"{name} {first:{form}} at first and {last:{form}} at last"
            for name, (first, last), form in (
                ("overlap of the top-k sets", self.ratio, ".2f"),
                ("advantage on it (nats)", self.advantage, "+.3f"),
                ("gap of the entropies (nats)", self.entropy_gap, ".3f"),
            )
            if not math.isnan(first)
        ]
        return f"Student and teacher: {', '.join(said)} (2604.13016)." if said else ""


def find_agreement(lines: Sequence[Mapping[str, Any]]) -> Agreement:
    """Compare the first steps with the last.

    Args:
        lines: One mapping a step with the names of docs/metrics.md.

    Returns:
        The two ends of each curve. A successful distillation raises the overlap and brings the
        other two towards 0 (arXiv 2604.13016).
    """
    return Agreement(**{field: _ends(lines, name) for field, name in METRICS.items()})


def _ends(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    values = [value for line in lines if (value := number(line, name)) is not None]
    if not values:
        return math.nan, math.nan
    first, last = values[:EDGE_LINES], values[-EDGE_LINES:]
    return math.fsum(first) / len(first), math.fsum(last) / len(last)
