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
    shorten,
)
from stableopd.report.estimates import Estimate
from stableopd.report.finals import FINAL_STEPS, FINALS, Arm, any_held_out, final_values
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
from stableopd.text import shown

__all__ = ["final_table", "group_arms", "write_comparison"]

CAUSES = {
    "A": "A, stop-token mismatch",
    "B": "B, repetition",
    "both": "A and B",
    "unclear": "not visible",
}


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
        between them, or by method and run where these are many. What has no configuration (a
        dump) is an arm by itself, with its own name.
    """
    groups: dict[Any, list[Diagnosis]] = {}
    for place, diagnosis in enumerate(diagnoses):
        settings = read_settings(diagnosis.config)
        groups.setdefault(settings_key(settings) if settings else place, []).append(diagnosis)
    first = [(read_settings(group[0].config), group[0].name) for group in groups.values()]
    known = [(settings, name) for settings, name in first if settings]
    by_settings = iter(name_by_differences([s for s, _ in known], [name for _, name in known]))
    names = [next(by_settings) if settings else name for settings, name in first]
    return tuple(
        Arm(name, tuple(group))
        for name, group in zip(unique_names(names), groups.values(), strict=True)
    )


def final_table(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]], str]:
    """The numbers of `final_values` as text, for a terminal or a page.

    Args:
        arms: What `group_arms` returned.

    Returns:
        The names of the columns, one row an arm, and a caption that says in lines what the numbers
        are and what keeps the arms from being compared. A cell is a number and, in a second line,
        its interval.
    """
    columns, rows, legend = _table(arms)
    return columns, rows, "\n".join([*legend, *(f"Note: {note}" for note in _notes(arms))])


def write_comparison(arms: Sequence[Arm], path: str | Path, title: str) -> None:
    """Write the comparison of several arms as a single HTML file without any network address.

    Args:
        arms: What `group_arms` returned.
        path: The file to write, atomically.
        title: The heading.

    Raises:
        RunFolderError: The file cannot be written.
    """
    columns, rows, legend = _table(arms)
    settings = [read_settings(arm.diagnoses[0].config) for arm in arms]
    write_html(
        "compare.html.jinja",
        path,
        title=title,
        columns=columns,
        rows=rows,
        legend=legend,
        picture_item=_picture(arms),
        runs=[_run(arm, d) for arm in arms for d in arm.diagnoses],
        names=[arm.name for arm in arms],
        differing=[(field, shorten(values)) for field, values in differences(settings)],
        notes=_notes(arms),
    )


def _table(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns and rows of `final_table`, and what the numbers are, a sentence each."""
    values = final_values(arms)
    forms = {"accuracy": ".3f"} | {name: form for name, _, _, form, _ in FINALS}
    rows: list[list[str]] = []
    for arm, estimates in zip(arms, values, strict=True):
        collapsed = sum(d.verdict.collapsed for d in arm.independent)
        cells = [_shown(estimates[name], form) for name, form in forms.items()]
        rows.append([shown(arm.name), f"{collapsed} of {len(arm.independent)}", *cells])
    units = dict.fromkeys(d.summary.length_unit for arm in arms for d in arm.diagnoses)
    held_out, own = "the last evaluation on held-out problems", "of the rollouts of these steps"
    of_rollouts = ", ".join(name for name, *_ in FINALS)
    legend = [
        f"{of_rollouts}: mean over the last {FINAL_STEPS} steps that have rollouts.",
        f"accuracy: {held_out if any_held_out(arms) else own}.",
        f"length: in {' or '.join(units) or 'tokens'}.",
        *_intervals(arms, values),
    ]
    return ["arm", "collapsed", *forms], rows, legend


def _intervals(arms: Sequence[Arm], values: Sequence[Mapping[str, Estimate]]) -> list[str]:
    """What the interval below each number is over, arm by arm, and how it is made."""
    said: dict[str, list[str]] = {}
    for arm, estimates in zip(arms, values, strict=True):
        said.setdefault(_over(estimates), []).append(arm.name)
    methods = {e.method for estimates in values for e in estimates.values()}
    made: list[str] = []
    if any(method.endswith("seeds") for method in methods):
        made.append("Over seeds: Student's t.")
    if "problems" in methods:
        made.append("Over problems: from the evaluation's standard error.")
    if "rollouts" in methods:
        made.append("Over rollouts: Wilson's, as if rollouts were independent of each other.")
    if not made:
        return []
    lines = [f"{'; '.join(names)}: {over}." for over, names in said.items()]
    return ["Below each number is its 95% interval:", *lines, *made]


def _shown(estimate: Estimate, form: str) -> str:
    if math.isnan(estimate.value):
        return "–"
    value = format(estimate.value, form)
    if estimate.interval is None:
        return value
    low, high = (format(edge, form) for edge in estimate.interval)
    return f"{value}\n{low}–{high}"


def _over(estimates: Mapping[str, Estimate]) -> str:
    """What the intervals of an arm are over, as "TruncRate, RepRate over rollouts"."""
    columns: dict[str, list[str]] = {}
    for column, estimate in estimates.items():
        if estimate.method:
            columns.setdefault(estimate.method, []).append(column)
    parts = [f"{', '.join(of)} over {method}" for method, of in columns.items()]
    return "; ".join(parts) or "no interval"


def _picture(arms: Sequence[Arm]) -> Picture:
    lines: Arms = {arm.name: [d.lines for d in arm.independent] for arm in arms}
    colors = choose_colors(list(lines))
    first = arms[0].diagnoses[0].summary
    panels = (*dynamics_panels(lines, first.parameters, first.length_unit), *logprob_panels())
    bands = dict.fromkeys(band_name(len(arm.independent)) for arm in arms)
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
        notes += [_same_seed(arm, runs) for runs in arm.by_seed if len(runs) > 1]
        ends = {d.lines[-1]["step"] for d in arm.independent if d.lines}
        if len(ends) > 1:
            notes.append(
                f"{arm.name}: its runs end at different steps ({min(ends)} to {max(ends)}); after "
                "the end of one the mean is over the others."
            )
    lasts = {
        arm.name: max(d.lines[-1]["step"] for d in arm.independent if d.lines)
        for arm in arms
        if any(d.lines for d in arm.independent)
    }
    if len(set(lasts.values())) > 1:
        steps = ", ".join(f"{name}: step {last}" for name, last in lasts.items())
        notes.append(f"The arms end at different steps, and so do their numbers ({steps}).")
    return notes


def _same_seed(arm: Arm, runs: Sequence[Diagnosis]) -> str:
    seed = read_settings(runs[0].config).get("run.seed")
    which = "without a seed" if seed is None else f"with seed {seed}"
    names = ", ".join(d.name for d in runs)
    return (
        f"{arm.name}: {len(runs)} runs {which} ({names}) are not independent and count as one: "
        f"{runs[0].name}."
    )
