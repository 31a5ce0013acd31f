"""The numbers at the end of the runs of an arm, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableopd.diagnostics.verdict import Diagnosis
from stableopd.report.configs import read_settings
from stableopd.report.estimates import (
    Estimate,
    binomial_estimate,
    normal_estimate,
    seeds_estimate,
)

__all__ = ["Arm", "any_held_out", "final_values"]

# Design: steps over which the final numbers of the rollouts are averaged, as in the demo.
FINAL_STEPS = 5

# Column, name in metrics.jsonl, field of `Measures`, form, whether it is a share of rollouts.
FINALS = (
    ("TruncRate", "rollout/truncation_rate", "truncation_rate", ".3f", True),
    ("RepRate", "rollout/repetition_rate", "repetition_rate", ".3f", True),
    ("length", "rollout/mean_length", "mean_length", ",.1f", False),
)

HELD_OUT, GRADED = "eval/accuracy", "rollout/accuracy"


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
        name: What tells it from the other arms.
        diagnoses: Its runs. Two of one seed are the same experiment twice.
    """

    name: str
    diagnoses: tuple[Diagnosis, ...]

    @property
    def by_seed(self) -> tuple[tuple[Diagnosis, ...], ...]:
        """The runs of each seed: first the one that got farthest, which counts."""
        groups: dict[Any, list[Diagnosis]] = {}
        for diagnosis in self.diagnoses:
            seed = read_settings(diagnosis.config).get("run.seed")
            groups.setdefault(seed, []).append(diagnosis)
        return tuple(tuple(sorted(g, key=_end, reverse=True)) for g in groups.values())

    @property
    def independent(self) -> tuple[Diagnosis, ...]:
        """One run a seed: what means, bands and intervals are over."""
        return tuple(runs[0] for runs in self.by_seed)


def final_values(arms: Sequence[Arm]) -> list[dict[str, Estimate]]:
    """The numbers at the end of each arm, with 95% intervals.

    Rollouts count with the mean of the last 5 steps that have any (all of them where the files
    name no steps), accuracy with the last evaluation. Of runs with the same seed one counts, the
    one that got farthest. With several seeds the interval is Student's
    t over them. With one it is the normal interval of the evaluation's standard error over its
    problems, and Wilson's over the rollouts of these steps, taken as independent; Wilson's also
    where the seeds are all alike. Where nothing varies at all there is no interval.

    Args:
        arms: What `group_arms` returned.

    Returns:
        For each arm, the estimates by column: "accuracy", "TruncRate", "RepRate", "length".
        Accuracy is of held-out problems where any arm has them, else of rollouts.
    """
    held_out = any_held_out(arms)
    return [_values_of(arm, held_out) for arm in arms]


def any_held_out(arms: Sequence[Arm]) -> bool:
    """Whether any run was evaluated on held-out problems."""
    return any(_last(d, HELD_OUT) for arm in arms for d in arm.independent)


def _values_of(arm: Arm, held_out: bool) -> dict[str, Estimate]:
    made = {"accuracy": _accuracy(arm) if held_out else _over_rollouts(arm, GRADED, "accuracy")}
    for name, key, field, _, is_share in FINALS:
        made[name] = _over_rollouts(arm, key, field, is_share)
    return made


def _accuracy(arm: Arm) -> Estimate:
    lines = [line for d in arm.independent if (line := _last(d, HELD_OUT))]
    if len(lines) != 1:
        values = [float(line[HELD_OUT]) for line in lines]
        return seeds_estimate(values, is_share=True) if values else Estimate()
    error: Any = lines[0].get("eval/accuracy_se")
    return normal_estimate(float(lines[0][HELD_OUT]), float(error) if _is_number(error) else 0.0)


def _over_rollouts(arm: Arm, key: str, field: str, is_share: bool = True) -> Estimate:
    found = [(value, d) for d in arm.independent if math.isfinite(value := _final(d, key, field))]
    if not found:
        return Estimate()
    estimate = seeds_estimate([value for value, _ in found], is_share)
    if estimate.interval is not None or not is_share:
        return estimate
    return binomial_estimate(estimate.value, sum(_num_rollouts(d) for _, d in found))


def _final_lines(diagnosis: Diagnosis) -> list[Mapping[str, Any]]:
    """The last lines that have numbers of rollouts."""
    keys = [key for _, key, _, _, _ in FINALS]
    lines = [line for line in diagnosis.lines if any(_is_number(line.get(key)) for key in keys)]
    return lines[-FINAL_STEPS:]


def _final(diagnosis: Diagnosis, key: str, field: str) -> float:
    lines = _final_lines(diagnosis)
    if not lines:
        return getattr(diagnosis.summary.overall, field)
    values = [float(line[key]) for line in lines if _is_number(line.get(key))]
    return math.fsum(values) / len(values) if values else math.nan


def _num_rollouts(diagnosis: Diagnosis) -> int:
    """Rollouts of the final lines, as far as they were kept."""
    steps = {line["step"] for line in _final_lines(diagnosis)}
    if not steps:
        return diagnosis.summary.overall.num_rollouts
    return sum(e.measures.num_rollouts for e in diagnosis.summary.by_step if e.step in steps)


def _last(diagnosis: Diagnosis, key: str) -> Mapping[str, Any] | None:
    lines = [line for line in diagnosis.lines if _is_number(line.get(key))]
    return lines[-1] if lines else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _end(diagnosis: Diagnosis) -> int:
    return int(diagnosis.lines[-1]["step"]) if diagnosis.lines else -1
