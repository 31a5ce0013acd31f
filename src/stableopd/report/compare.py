"""Several runs beside each other: seeds grouped into arms, with intervals, on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.diagnostics.verdict import Diagnosis
from stableopd.report.configs import (
    differences,
    name_by_differences,
    read_settings,
    settings_key,
)
from stableopd.report.estimates import (
    Estimate,
    binomial_estimate,
    normal_estimate,
    seeds_estimate,
)
from stableopd.report.panels import dynamics_panels, has_evaluations, logprob_panels
from stableopd.report.render import (
    Badge,
    Key,
    Picture,
    arm_keys,
    badge_of,
    draw_panels,
    unique_names,
    write_html,
)
from stableopd.report.series import Arms, band_name
from stableopd.report.themes import choose_colors

__all__ = ["Arm", "final_table", "final_values", "group_arms", "write_comparison"]

# Design: steps over which the final numbers of the rollouts are averaged, as in the demo.
FINAL_STEPS = 5

# Column, name in metrics.jsonl, field of `Measures`, form, whether it is a share of rollouts.
FINALS = (
    ("TruncRate", "rollout/truncation_rate", "truncation_rate", ".3f", True),
    ("RepRate", "rollout/repetition_rate", "repetition_rate", ".3f", True),
    ("length", "rollout/mean_length", "mean_length", ",.1f", False),
)
CAUSES = {
    "A": "A, stop-token mismatch",
    "B": "B, repetition",
    "both": "A and B",
    "unclear": "not visible",
}

HELD_OUT, GRADED = "eval/accuracy", "rollout/accuracy"


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
        name: What tells it from the other arms.
        diagnoses: One a seed.
    """

    name: str
    diagnoses: tuple[Diagnosis, ...]


@dataclass(frozen=True)
class _Run:
    """A line of the table of verdicts."""

    arm: str
    name: str
    seed: str
    badge: Badge
    cause: str
    onset: str


def group_arms(diagnoses: Sequence[Diagnosis]) -> tuple[Arm, ...]:
    """Group runs into arms: those whose config.toml differ only in the seed and where they ran.

    Args:
        diagnoses: The runs, in any order.

    Returns:
        The arms in the order in which they first appear, named by the settings that differ
        between them. What has no configuration (a dump) is an arm by itself, with its own name.
    """
    groups: dict[Any, list[Diagnosis]] = {}
    for place, diagnosis in enumerate(diagnoses):
        settings = read_settings(diagnosis.config)
        groups.setdefault(settings_key(settings) if settings else place, []).append(diagnosis)
    first = [read_settings(group[0].config) for group in groups.values()]
    by_settings = iter(name_by_differences([settings for settings in first if settings]))
    names = [
        next(by_settings) if settings else group[0].name
        for settings, group in zip(first, groups.values(), strict=True)
    ]
    return tuple(
        Arm(name, tuple(group))
        for name, group in zip(unique_names(names), groups.values(), strict=True)
    )


def final_values(arms: Sequence[Arm]) -> list[dict[str, Estimate]]:
    """The numbers at the end of each arm, with 95% intervals.

    Rollouts count with the mean of the last 5 steps that have any (all of them where the files
    name no steps), accuracy with the last evaluation. With several seeds the interval is Student's
    t over them. With one it is the normal interval of the evaluation's standard error over its
    problems, and Wilson's over the rollouts of these steps, taken as independent; Wilson's also
    where the seeds are all alike. Where nothing varies at all there is no interval.

    Args:
        arms: What `group_arms` returned.

    Returns:
        For each arm, the estimates by column: "accuracy", "TruncRate", "RepRate", "length".
        Accuracy is of held-out problems where any arm has them, else of rollouts.
    """
    held_out = any(_last(d, HELD_OUT) for arm in arms for d in arm.diagnoses)
    return [_values_of(arm, held_out) for arm in arms]


def final_table(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]], str]:
    """The numbers of `final_values` as text, for a terminal or a page.

    Args:
        arms: What `group_arms` returned.

    Returns:
        The names of the columns, one row an arm, and a caption that says what the numbers are. A
        cell is a number and, in a second line, its interval.
    """
    values = final_values(arms)
    forms = {"accuracy": ".3f"} | {name: form for name, _, _, form, _ in FINALS}
    rows: list[list[str]] = []
    for arm, estimates in zip(arms, values, strict=True):
        collapsed = sum(d.verdict.collapsed for d in arm.diagnoses)
        cells = [_shown(estimates[name], form) for name, form in forms.items()]
        rows.append([arm.name, f"{collapsed} of {len(arm.diagnoses)}", *cells])
    units = dict.fromkeys(d.summary.length_unit for arm in arms for d in arm.diagnoses)
    held_out = any(_last(d, HELD_OUT) for arm in arms for d in arm.diagnoses)
    where = "the last evaluation on held-out problems" if held_out else "the rollouts"
    over = "; ".join(_said(arm.name, e) for arm, e in zip(arms, values, strict=True))
    caption = (
        f"Rollouts: mean of the last {FINAL_STEPS} steps that have any. Accuracy: {where}. Length: "
        f"{' or '.join(units)}. Below each number its 95% interval: {over}. Over seeds it is "
        "Student's t, over problems from the evaluation's standard error, over rollouts (one "
        "seed, or all seeds alike) Wilson's, as if rollouts were independent."
    )
    return ["arm", "collapsed", *forms], rows, caption


def write_comparison(arms: Sequence[Arm], path: str | Path, title: str) -> None:
    """Write the comparison of several arms as a single HTML file without any network address.

    Args:
        arms: What `group_arms` returned.
        path: The file to write, atomically.
        title: The heading.

    Raises:
        RunFolderError: The file cannot be written.
    """
    columns, rows, caption = final_table(arms)
    settings = [read_settings(arm.diagnoses[0].config) for arm in arms]
    write_html(
        "compare.html.jinja",
        path,
        title=title,
        columns=columns,
        rows=rows,
        caption=caption,
        picture_item=_picture(arms),
        runs=[_run(arm, d) for arm in arms for d in arm.diagnoses],
        names=[arm.name for arm in arms],
        differing=differences(settings),
        notes=_notes(arms),
    )


def _values_of(arm: Arm, held_out: bool) -> dict[str, Estimate]:
    made = {"accuracy": _accuracy(arm) if held_out else _over_rollouts(arm, GRADED, "accuracy")}
    for name, key, field, _, is_share in FINALS:
        made[name] = _over_rollouts(arm, key, field, is_share)
    return made


def _accuracy(arm: Arm) -> Estimate:
    lines = [line for d in arm.diagnoses if (line := _last(d, HELD_OUT))]
    if len(lines) != 1:
        values = [float(line[HELD_OUT]) for line in lines]
        return seeds_estimate(values, is_share=True) if values else Estimate()
    error: Any = lines[0].get("eval/accuracy_se")
    return normal_estimate(float(lines[0][HELD_OUT]), float(error) if _is_number(error) else 0.0)


def _over_rollouts(arm: Arm, key: str, field: str, is_share: bool = True) -> Estimate:
    found = [(value, d) for d in arm.diagnoses if math.isfinite(value := _final(d, key, field))]
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


def _shown(estimate: Estimate, form: str) -> str:
    if math.isnan(estimate.value):
        return "–"
    shown = format(estimate.value, form)
    if estimate.interval is None:
        return shown
    low, high = (format(edge, form) for edge in estimate.interval)
    return f"{shown}\n{low}–{high}"


def _said(name: str, estimates: Mapping[str, Estimate]) -> str:
    """What the intervals of an arm are over, as "opd over 4 seeds"."""
    columns: dict[str, list[str]] = {}
    for column, estimate in estimates.items():
        if estimate.method:
            columns.setdefault(estimate.method, []).append(column)
    if not columns:
        return f"{name} none"
    parts = [f"{method} ({', '.join(of)})" for method, of in columns.items()]
    return f"{name} over {' and '.join(parts if len(parts) > 1 else columns)}"


def _picture(arms: Sequence[Arm]) -> Picture:
    lines: Arms = {arm.name: [d.lines for d in arm.diagnoses] for arm in arms}
    colors = choose_colors(list(lines))
    first = arms[0].diagnoses[0].summary
    panels = (*dynamics_panels(lines, first.parameters, first.length_unit), *logprob_panels())
    bands = dict.fromkeys(band_name(len(arm.diagnoses)) for arm in arms)
    keys = [*arm_keys(colors)]
    keys += [Key(f"band: {band}", "ink", "band") for band in bands if band]
    keys += [Key("held-out problems", "ink", "dots")] if has_evaluations(lines) else []
    keys += [Key("teacher", "ink", "dashed")]
    caption = "Figure 4. All arms beside each other"
    if any(bands):
        caption += "; lines are means over the seeds that have the step"
    return Picture(caption, tuple(keys), draw_panels(panels, lines, colors), columns=3)


def _run(arm: Arm, diagnosis: Diagnosis) -> _Run:
    onset = diagnosis.onset
    when = "–" if onset.step is None else f"{onset.step}"
    if onset.interval is not None and onset.interval[0] < onset.interval[1]:
        when += f" [{onset.interval[0]}, {onset.interval[1]}]"
    seed = read_settings(diagnosis.config).get("run.seed", "–")
    cause = CAUSES.get(diagnosis.verdict.cause, "–")
    return _Run(arm.name, diagnosis.name, f"{seed}", badge_of(diagnosis), cause, when)


def _notes(arms: Sequence[Arm]) -> list[str]:
    """What keeps these runs from being compared as they stand."""
    summaries = [d.summary for arm in arms for d in arm.diagnoses]
    notes: list[str] = []
    if len({summary.parameters for summary in summaries}) > 1:
        notes.append(
            "The runs measured repetition with different parameters, so their RepRates cannot be "
            "compared; the figure names those of the first run."
        )
    if len({summary.length_unit for summary in summaries}) > 1:
        notes.append("Some lengths are in tokens and some in characters: do not compare them.")
    for arm in arms:
        seeds = [read_settings(d.config).get("run.seed") for d in arm.diagnoses]
        if len(set(seeds)) < len(seeds):
            notes.append(
                f"{arm.name}: some runs have the same seed, so they do not count as independent: "
                "the interval is too narrow."
            )
        ends = {d.lines[-1]["step"] for d in arm.diagnoses if d.lines}
        if len(ends) > 1:
            notes.append(
                f"{arm.name}: its runs end at different steps ({min(ends)} to {max(ends)}); after "
                "the end of one the mean is over the others."
            )
    return notes
