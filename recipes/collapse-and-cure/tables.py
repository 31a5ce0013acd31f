"""The tables of docs/results.md, as Markdown, from the outcomes of the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

import experiments
from outcomes import Outcome, spread

__all__ = [
    "cure_table",
    "main_table",
    "markdown",
    "rate_table",
    "recovery_table",
    "stop_table",
    "sweep_table",
]

Arms = Mapping[str, Sequence[Outcome]]

TITLES = {
    "sft": "SFT (golden term alone)",
    "grpo": "GRPO (graded answers, no teacher)",
    "gkd": "GKD (exact reverse KL)",
    "opd": "OPD",
    "opd-kl-0.01": "OPD + KL 0.01",
    "opd-kl-0.1": "OPD + KL 0.1",
    "opd-golden": "OPD + golden 1.0",
    "stable_opd": "StableOPD (golden 1.0, KL 0.01)",
    "opd-event": 'OPD, `stop = "event"`',
    "opd-golden-unstopped": "OPD + golden, its stop label masked",
    "stable_opd-unstopped": "StableOPD, golden stop label masked",
    "clip-5": '`advantage = "clip"`, c = 5 (default)',
    "clip-1": '`advantage = "clip"`, c = 1',
    "soft_log": '`advantage = "soft_log"`',
    "tanh": '`advantage = "tanh"`, c = 1',
    "power": '`advantage = "power"`, a = 1',
    "floor": '`advantage = "floor"`, l = 0.01',
    "first-28": "`first_n = 28` (the longest golden solution)",
    "first-14": "`first_n = 14`",
    "prefix-0.5": "`prefix_gain = 0.5`",
    "masked": "`mask_truncated = true`",
    "baseline-kl": '`baseline = "kl"`',
    "gkd-top-4": "GKD on the teacher's 4 likeliest tokens (`top_k = 4`)",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and percentile-bootstrap interval over seeds: "0.951 [0.947, 0.956]"."""
    found = spread(values)
    if found is None:
        return "-"
    if len(found.values) == 1:
        return format(found.mean, form)
    low, high = found.bootstrap
    return f"{found.mean:{form}} [{low:{form}}, {high:{form}}]"


def main_table(arms: Arms, start: Mapping[str, float]) -> str:
    """The paper's comparison: all numbers over seeds, the start above."""
    head = ["", "seeds", "final accuracy (avg@8 = pass@1)", "pass@8", "best (avg@4)", "TruncRate"]
    head += ["RepRate", "length", "TruncRate of rollouts", "CPU s"]
    rows = [["start", "-", *(_start(start)), "-", "-"]] if start else []
    for name, runs in arms.items():
        if not runs:
            continue
        rows.append(
            [
                TITLES[name],
                str(len(runs)),
                interval([run.final_accuracy for run in runs]),
                interval([run.final.get("pass_at_8", math.nan) for run in runs]),
                interval([run.best_accuracy for run in runs], ".2f"),
                interval([_held_out(run, "truncation_rate") for run in runs], ".2f"),
                interval([_held_out(run, "repetition_rate") for run in runs], ".2f"),
                interval([_held_out(run, "mean_length") for run in runs], ".0f"),
                interval([run.end("rollout/truncation_rate") for run in runs], ".2f"),
                _seconds(runs),
            ]
        )
    return markdown(head, rows)


def _start(final: Mapping[str, float]) -> list[str]:
    shares = [f"{final[key]:.3f}" for key in ("accuracy", "pass_at_8")]
    rest = [f"{final[key]:.2f}" for key in ("truncation_rate", "repetition_rate")]
    return [*shares, "-", *rest, f"{final['mean_length']:.0f}"]


def _held_out(run: Outcome, name: str) -> float:
    return run.final.get(name, math.nan)


def _seconds(runs: Sequence[Outcome]) -> str:
    known = [run.cpu_s for run in runs if math.isfinite(run.cpu_s)]
    return f"{median(known):.0f}" if known else "-"


def cure_table(in_a: Arms, in_b: Arms) -> str:
    """One answer a row: what it prevents, and what it costs."""
    head = ["", "prevents", "A: collapsed", "A: accuracy", "B: collapsed", "B: accuracy"]
    head += ["B: best", "B: CPU s"]
    rows: list[list[str]] = []
    for name in experiments.CURES:
        a, b = in_a.get(name, ()), in_b.get(name, ())
        if not a and not b:
            continue
        cells = [TITLES[name], prevents(a, b if name != "opd-event" else in_b.get("opd", ()))]
        cells += [_collapsed(a), _mean(a, lambda run: run.last_accuracy)]
        if name == "opd-event":
            cells += ["as OPD", "as OPD", "as OPD", "as OPD"]
        else:
            cells += [_collapsed(b), _mean(b, lambda run: run.last_accuracy)]
            cells += [_mean(b, lambda run: run.best_accuracy), _seconds(b)]
        rows.append(cells)
    return markdown(head, rows)


def prevents(a: Sequence[Outcome], b: Sequence[Outcome]) -> str:
    """A, B, both or neither; "part of" where some seeds collapse and others do not."""
    words: list[str] = []
    for cause, runs in (("A", a), ("B", b)):
        num = sum(run.collapsed for run in runs)
        if runs and num == 0:
            words.append(cause)
        elif runs and num < len(runs):
            words.append(f"{cause} in part")
    return "both" if words == ["A", "B"] else " and ".join(words) or "neither"


def _collapsed(runs: Sequence[Outcome]) -> str:
    return f"{sum(run.collapsed for run in runs)} of {len(runs)}" if runs else "-"


def _mean(runs: Sequence[Outcome], value: Callable[[Outcome], float]) -> str:
    return interval([value(run) for run in runs], ".2f")


def stop_table(rows: Sequence[tuple[str, str, str, str, Sequence[Outcome]]]) -> str:
    """Both causes by both ways to score a stop.

    Args:
        rows: Stop ids, teacher, scoring and method, with the runs.
    """
    head = ["stop ids", "teacher", "`stop`", "method", "collapsed", "first above .5 (steps)"]
    head += ["TruncRate at the end", "accuracy at the end"]
    cells: list[list[str]] = []
    for *words, runs in rows:
        if runs:
            first = [step for run in runs if (step := first_above(run)) is not None]
            cells.append(
                [
                    *words,
                    _collapsed(runs),
                    ", ".join(map(str, first)) or "-",
                    _mean(runs, lambda run: run.end("rollout/truncation_rate")),
                    _mean(runs, lambda run: run.last_accuracy),
                ]
            )
    return markdown(head, cells)


def first_above(run: Outcome) -> int | None:
    """The first step at which more than half of the rollouts are cut off."""
    rates = run.series("rollout/truncation_rate")
    return next((step for step, rate in rates if rate > 0.5), None)


def sweep_table(arms: Arms) -> str:
    """Final accuracy for lambda_gold (down) and beta_reference (across); collapses in brackets."""
    head = ["lambda_gold \\ beta_reference", *(f"{beta:g}" for beta in experiments.BETAS)]
    rows: list[list[str]] = []
    for gold in experiments.LAMBDAS:
        cells = [f"{gold:g}"]
        for beta in experiments.BETAS:
            runs = arms.get(experiments.sweep_name(gold, beta), ())
            cells.append(_sweep_cell(runs))
        rows.append(cells)
    return markdown(head, rows)


def _sweep_cell(runs: Sequence[Outcome]) -> str:
    if not runs:
        return "-"
    accuracy = [run.last_accuracy for run in runs]
    num = sum(run.collapsed for run in runs)
    told = f" ({num} of {len(runs)} collapse)" if num else ""
    between = f" [{min(accuracy):.3f}, {max(accuracy):.3f}]" if len(runs) > 1 else ""
    return f"{fmean(accuracy):.3f}{between}{told}"


def rate_table(arms: Arms) -> str:
    """Learning rate, and clip with four updates a batch."""
    head = ["", "steps", "collapsed", "first above .5 (steps)", "final accuracy", "best"]
    rows: list[list[str]] = []
    for name, runs in arms.items():
        if runs:
            first = [step for run in runs if (step := first_above(run)) is not None]
            rows.append(
                [
                    _rate_title(name),
                    str(runs[0].lines[-1]["step"]),
                    _collapsed(runs),
                    ", ".join(map(str, first)) or "-",
                    _mean(runs, lambda run: run.last_accuracy),
                    _mean(runs, lambda run: run.best_accuracy),
                ]
            )
    return markdown(head, rows)


def _rate_title(name: str) -> str:
    method, _, rest = name.partition("-")
    title = {"opd": "OPD", "stable_opd": "StableOPD"}[method]
    if rest.startswith("rate-"):
        return f"{title}, learning rate {rest.removeprefix('rate-')}"
    if rest.startswith("four-clip-"):
        return f"{title}, four updates a batch, clip {rest.removeprefix('four-clip-')}"
    return f"{title}, learning rate 3e-4, one update"


def recovery_table(runs: Sequence[Outcome]) -> str:
    """OPD that goes on for 300 steps, seed by seed."""
    head = ["seed", "jump", "TruncRate after it: lowest of a step", "mean of the last 50"]
    head += ["accuracy: best, last"]
    rows: list[list[str]] = []
    for run in runs:
        rates = run.series("rollout/truncation_rate")
        jump = run.jump
        later = [rate for step, rate in rates if jump and step > jump[1] + 10]
        rows.append(
            [
                str(run.seed),
                f"{jump[0]} to {jump[1]}" if jump else "none",
                f"{min(later):.2f}" if later else "-",
                f"{fmean([rate for _, rate in rates][-50:]):.2f}",
                f"{run.best_accuracy:.2f}, {run.accuracies[-1][1]:.2f}",
            ]
        )
    return markdown(head, rows)
