"""How early and how truly the alarm rings: replays finished runs and compares with their outcome.

A run counts as collapsed if the mean TruncRate of its last 10 steps is above 0.5 and above that of
its first 10; as healed if that holds of some other 10 steps but not of the last; as high if the
first 10 are above 0.9 already; as falling if truncation never rose but the last held-out accuracy
lies 0.15 or more below the best; else as healthy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer

from stableopd.diagnostics.alarm import Alarm, Level, advance
from stableopd.diagnostics.onset import Onset, find_onset
from stableopd.runfolder import RunFolder

TRUNCATION = "rollout/truncation_rate"
ACCURACY = "eval/accuracy"
END = 10
FALL = 0.15

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Ring:
    """When the alarm warned first, when it called a collapse, and what it offered then."""

    warn: int | None
    collapse: int | None
    last_ok: int | None
    reason: str


@dataclass(frozen=True)
class Measured:
    """One run."""

    name: str
    outcome: str
    onset: Onset
    best: tuple[int, float]
    all_metrics: Ring
    truncation_alone: Ring
    rescued: float | None


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished.")],
) -> None:
    """Print a table with a row for each run, and what they come to."""
    found = [measure(RunFolder.open(run).path.name, RunFolder.open(run).metrics()) for run in runs]
    print(table(found))
    print()
    print(summary(found))


def measure(name: str, lines: Sequence[Mapping[str, Any]]) -> Measured:
    """Replay the lines of a run."""
    rollouts = [line for line in lines if TRUNCATION in line]
    onset = find_onset([line["step"] for line in rollouts], [line[TRUNCATION] for line in rollouts])
    evaluated = {line["step"]: line[ACCURACY] for line in lines if ACCURACY in line}
    best = max(evaluated, key=lambda step: evaluated[step])
    rung = replay(lines)
    before = [step for step in evaluated if rung.last_ok is not None and step <= rung.last_ok]
    return Measured(
        name=name,
        outcome=outcome([line[TRUNCATION] for line in rollouts], list(evaluated.values())),
        onset=onset,
        best=(best, evaluated[best]),
        all_metrics=rung,
        truncation_alone=replay([{k: line[k] for k in ("step", TRUNCATION)} for line in rollouts]),
        rescued=evaluated[max(before)] if before else None,
    )


def outcome(truncation: Sequence[float], accuracy: Sequence[float]) -> str:
    """What became of a run, whatever its method was."""
    start, end = fmean(truncation[:END]), fmean(truncation[-END:])
    if start > 0.9:
        return "high"
    if end > 0.5 and end > start:
        return "collapsed"
    highest = max(fmean(truncation[k : k + END]) for k in range(max(len(truncation) - END, 0) + 1))
    if highest > 0.5 and highest > start:
        return "healed"
    return "falling" if accuracy[-1] <= max(accuracy) - FALL else "healthy"


def replay(lines: Sequence[Mapping[str, Any]]) -> Ring:
    """The first WARN and the first COLLAPSE, and `last_ok` at the latter (else at the end)."""
    alarm, warn, collapse, offered, reason = Alarm(), None, None, None, ""
    for line in lines:
        alarm = advance(alarm, line)
        if alarm.level != Level.OK and warn is None:
            warn, reason = alarm.step, alarm.reason
        if alarm.level == Level.COLLAPSE and collapse is None:
            collapse, offered = alarm.step, alarm.last_ok
    return Ring(warn, collapse, offered if collapse is not None else alarm.last_ok, reason)


def table(found: Sequence[Measured]) -> str:
    """One row for each run, as Markdown."""
    heads = ["run", "outcome", "onset", "best accuracy", "WARN", "COLLAPSE"]
    heads += ["last_ok", "accuracy there", "TruncRate alone: WARN", "COLLAPSE", "last_ok"]
    rows = [heads, ["---"] * len(heads)]
    for m in found:
        healthy, alone = m.all_metrics, m.truncation_alone
        cells = [m.name, m.outcome, _cell(m.onset.step), f"{m.best[1]:.2f} at {m.best[0]}"]
        cells += [_cell(healthy.warn), _cell(healthy.collapse), _cell(healthy.last_ok)]
        cells += ["-" if m.rescued is None else f"{m.rescued:.2f}"]
        cells += [_cell(alone.warn), _cell(alone.collapse), _cell(alone.last_ok)]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(found: Sequence[Measured]) -> str:
    """What the runs come to, as a Markdown list."""
    lines: list[str] = []
    for alone in (False, True):
        what = "TruncRate alone" if alone else "All metrics"
        rings = [(m, m.truncation_alone if alone else m.all_metrics) for m in found]
        bad = [(m, ring) for m, ring in rings if m.outcome == "collapsed"]
        caught = [(m, ring) for m, ring in bad if ring.collapse is not None]
        good = [ring for m, ring in rings if m.outcome == "healthy"]
        warned = [ring for ring in good if ring.warn is not None]
        false = [ring for ring in good if ring.collapse is not None]
        lines += [
            f"- {what}: {len(caught)} of {len(bad)} collapses caught; false alarms in "
            f"{len(good)} healthy runs: {len(warned)} WARN, {len(false)} COLLAPSE."
        ]
        timed = [(m, ring) for m, ring in caught if m.onset.step is not None]
        for label, steps in (
            ("WARN after onset", [_since(ring.warn, m.onset.step) for m, ring in timed]),
            ("COLLAPSE after onset", [_since(ring.collapse, m.onset.step) for m, ring in timed]),
            ("WARN after the best accuracy", [_since(r.warn, m.best[0]) for m, r in timed]),
        ):
            if steps:
                lines += [f"  - {label}: median {median(steps):+g} steps, {_span(steps)}."]
    saved = [m for m in found if m.outcome == "collapsed" and m.rescued is not None]
    if saved:
        shares = [(m.rescued or 0.0) / m.best[1] for m in saved]
        lines += [
            f"- Held-out accuracy at the last evaluation not after last_ok: {median(shares):.2f} "
            f"of the best (median of {len(saved)}; least {min(shares):.2f})."
        ]
    for kind in ("healed", "falling", "high"):
        others = [m for m in found if m.outcome == kind]
        warned = [m for m in others if m.all_metrics.warn is not None]
        called = [m for m in others if m.all_metrics.collapse is not None]
        if others:
            lines += [f"- {len(others)} {kind}: {len(warned)} WARN, {len(called)} COLLAPSE."]
    return "\n".join(lines)


def _since(step: int | None, before: int | None) -> int:
    return (step or 0) - (before or 0)


def _span(steps: Sequence[int]) -> str:
    return f"{min(steps):+d} to {max(steps):+d}"


def _cell(step: int | None) -> str:
    return "-" if step is None else str(step)


if __name__ == "__main__":
    app()
