"""What became of each run, read from its folder, and what it comes to over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from experiments import Arm
from scipy import stats

from stableopd.runfolder import RunFolder

__all__ = ["Outcome", "Spread", "paired", "read_arm", "read_final", "spread"]

END = 5  # steps at the end over which the numbers of rollouts are averaged, as in the demo
WINDOW, BOUND = 10, 0.5  # collapsed: the mean TruncRate of so many steps in a row is above this
LOW, HIGH = 0.2, 0.8  # the jump of TruncRate goes from the last step below to the first above
NUM_RESAMPLES = 9999
SEED = 0  # of the bootstrap: the same runs give the same page


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        seed: Of the run.
        lines: Its lines of metrics, step 0 first.
        final: What was measured of its last student on all held-out problems.
        cpu_s: Seconds of a core that the whole run took; nan where it was interrupted, or ended
            before its last step.
    """

    seed: int
    lines: tuple[Mapping[str, Any], ...]
    final: Mapping[str, float]
    cpu_s: float

    def series(self, key: str) -> list[tuple[int, float]]:
        """The steps that have a metric, with its value."""
        return [(line["step"], line[key]) for line in self.lines if key in line]

    def end(self, key: str) -> float:
        """The mean of a metric over the last five steps; nan for a run without rollouts."""
        values = [value for _, value in self.series(key)][-END:]
        return fmean(values) if values else math.nan

    @property
    def accuracies(self) -> list[tuple[int, float]]:
        """Held-out accuracy (avg@4 of 100 problems) by step."""
        return self.series("eval/accuracy")

    @property
    def final_accuracy(self) -> float:
        """That of the last student, avg@8 of all held-out problems; nan where not measured."""
        return self.final.get("accuracy", math.nan)

    @property
    def last_accuracy(self) -> float:
        """The last evaluation of the run, avg@4 of 100 problems."""
        return self.accuracies[-1][1]

    @property
    def best_accuracy(self) -> float:
        """The highest evaluation during the run, avg@4 of 100 problems."""
        return max(value for _, value in self.accuracies)

    @property
    def truncation(self) -> list[float]:
        """TruncRate of the rollouts of each step; of the evaluations where a run writes none."""
        rollouts = self.series("rollout/truncation_rate")
        return [value for _, value in rollouts or self.series("eval/truncation_rate")]

    @property
    def collapsed(self) -> bool:
        """Whether the mean TruncRate of ten steps in a row passes one half, above the start's."""
        rates = self.truncation
        if not self.series("rollout/truncation_rate"):
            return rates[-1] > BOUND
        means = [fmean(rates[k : k + WINDOW]) for k in range(max(len(rates) - WINDOW, 0) + 1)]
        return max(means) > max(BOUND, means[0])

    @property
    def jump(self) -> tuple[int, int] | None:
        """The last step below .2 before the first step above .8, and that one."""
        points = self.series("rollout/truncation_rate")
        high = next((k for k, (_, rate) in enumerate(points) if rate > HIGH), None)
        if high is None:
            return None
        before = [step for step, rate in points[:high] if rate < LOW]
        return (before[-1] if before else 0, points[high][0])


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its intervals of 95%.

    Attributes:
        values: One of each seed, in the order of the seeds.
        bootstrap: Percentile bootstrap over seeds, which is too narrow with few of them.
        student: Student's t over seeds; infinite with one seed.
    """

    values: tuple[float, ...]
    bootstrap: tuple[float, float]
    student: tuple[float, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.values)


def read_arm(arm: Arm, output: Path) -> list[Outcome]:
    """The finished runs of an arm, seed by seed."""
    found: list[Outcome] = []
    for seed in arm.seeds:
        path = arm.path(seed, output)
        if not arm.is_finished(seed, output):
            continue
        lines = tuple(RunFolder.open(path).metrics())
        spent = _read(path / "seconds.json")
        is_whole = spent.get("is_whole") and lines[-1]["step"] == arm.steps
        cpu_s = spent["cpu_s"] if is_whole else math.nan
        final = read_final(output / "finals" / arm.folder / f"s{seed}")
        found.append(Outcome(seed, lines, final, cpu_s))
    return found


def read_final(folder: Path) -> dict[str, float]:
    """What `stableopd eval` measured of a last student; nothing where it has not yet."""
    summary = _read(folder / "summary.json")
    if not summary:
        return {}
    of = summary["sets"]["embedded"]
    names = ("accuracy", "truncation_rate", "repetition_rate", "mean_length")
    measured = {name: of[name]["mean"] for name in names}
    return {**measured, "pass_at_8": of["pass_at"]["8"]["mean"]}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and intervals over seeds; None where there is no number.

    Args:
        values: One number of each seed; those that are nan do not count.

    Returns:
        The mean, the percentile bootstrap (scipy.stats.bootstrap) and Student's t (Gosset 1908).
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    if len(set(known)) == 1:
        same = (known[0], known[0])
        return Spread(tuple(known), same, same if len(known) > 1 else (-math.inf, math.inf))
    resampled = stats.bootstrap(
        (known,),
        np.mean,
        method="percentile",
        n_resamples=NUM_RESAMPLES,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    t = stats.t.interval(0.95, len(known) - 1, fmean(known), stats.sem(known))
    return Spread(
        tuple(known),
        (float(resampled.low), float(resampled.high)),
        (float(t[0]), float(t[1])),
    )


def paired(
    one: Sequence[Outcome], other: Sequence[Outcome], value: Callable[[Outcome], float]
) -> Spread | None:
    """The difference of two arms over the seeds that both have."""
    by_seed = {run.seed: value(run) for run in other}
    return spread([value(run) - by_seed[run.seed] for run in one if run.seed in by_seed])
