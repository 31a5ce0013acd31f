"""One HTML page about one or more runs: the verdict first, then what it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stableopd.diagnostics.onset import Onset
from stableopd.diagnostics.summary import Parameters, Summary
from stableopd.diagnostics.verdict import Diagnosis, Verdict
from stableopd.report import distributions
from stableopd.report.panels import (
    Mark,
    credit_panels,
    dynamics_panels,
    has_evaluations,
    logprob_panels,
)
from stableopd.report.render import (
    Badge,
    Key,
    Picture,
    arm_keys,
    badge_of,
    draw_image,
    draw_panels,
    number,
    unique_names,
    write_html,
)
from stableopd.report.rows import PromptRow, WorstRow, describe_prompts, describe_worst
from stableopd.report.series import Arms
from stableopd.report.themes import choose_colors

__all__ = ["write_page"]


# Label, name in metrics.jsonl, field of `Measures`, form. {unit}s are filled in.
NUMBERS = (
    ("Accuracy, held-out", "eval/accuracy", "", ".3f"),
    ("Accuracy, rollouts", "rollout/accuracy", "accuracy", ".3f"),
    ("TruncRate, held-out", "eval/truncation_rate", "", ".3f"),
    ("TruncRate, rollouts", "rollout/truncation_rate", "truncation_rate", ".3f"),
    ("RepRate, rollouts", "rollout/repetition_rate", "repetition_rate", ".3f"),
    ("Repetitive {unit}", "rollout/repetitive_share", "repetitive_share", ".3f"),
    ("Mean length ({length_unit})", "rollout/mean_length", "mean_length", ",.1f"),
    ("Speed (tokens/s)", "tokens_per_s", "", ",.0f"),
)

MAX_STEPS_SAID = 5  # design: more make a legend of their own


@dataclass(frozen=True)
class _Number:
    """A quantity at the first step and at the last; `first` is "" where there is only one."""

    label: str
    first: str
    last: str


@dataclass(frozen=True)
class _Section:
    """All that the page says of one run."""

    name: str
    source: str
    badge: Badge
    verdict: Verdict
    onset: str
    numbers: list[_Number]
    has_steps: bool
    pictures: list[Picture]
    num_prompts: int
    prompts: list[PromptRow]
    worst: list[WorstRow]
    nothing_repeats: bool
    notes: tuple[str, ...]
    config: str
    environment: str
    summary: Summary
    parameters: Parameters


def write_page(diagnoses: Sequence[Diagnosis], path: str | Path, title: str) -> None:
    """Write the report of one or more runs as a single HTML file without any network address.

    Args:
        diagnoses: What is known of each run, in the order shown.
        path: The file to write, atomically.
        title: The heading.

    Raises:
        RunFolderError: The file cannot be written.
    """
    names = unique_names([diagnosis.name for diagnosis in diagnoses])
    colors = choose_colors(names)
    sections = [
        _section(name, diagnosis, colors) for name, diagnosis in zip(names, diagnoses, strict=True)
    ]
    parameters = {diagnosis.summary.parameters for diagnosis in diagnoses}
    write_html(
        "page.html.jinja",
        path,
        title=title,
        sections=sections,
        table=_table(sections) if len(sections) > 1 else (),
        comparison=_comparison(names, diagnoses, colors) if len(diagnoses) > 1 else None,
        parameters_differ=len(parameters) > 1,
    )


def _section(name: str, diagnosis: Diagnosis, colors: dict[str, int]) -> _Section:
    summary = diagnosis.summary
    lines = [line for line in diagnosis.lines if "step" in line]
    has_steps = len({line["step"] for line in lines}) > 1
    arms: Arms = {name: [lines]}
    pictures = _over_steps(diagnosis, arms, colors) if has_steps else []
    return _Section(
        name=name,
        source=diagnosis.source,
        badge=badge_of(diagnosis),
        verdict=diagnosis.verdict,
        onset=_when(diagnosis.onset),
        numbers=_numbers(diagnosis),
        has_steps=has_steps,
        pictures=[*pictures, *_over_rollouts(diagnosis)],
        num_prompts=summary.num_prompts,
        prompts=describe_prompts(summary),
        worst=describe_worst(summary),
        nothing_repeats=all(entry.repetitive_share == 0 for entry in summary.worst),
        notes=diagnosis.notes,
        config=diagnosis.config,
        environment=diagnosis.environment,
        summary=summary,
        parameters=summary.parameters,
    )


def _comparison(
    names: Sequence[str], diagnoses: Sequence[Diagnosis], colors: dict[str, int]
) -> Picture:
    arms: Arms = {n: [d.lines] for n, d in zip(names, diagnoses, strict=True)}
    first = diagnoses[0].summary
    panels = (*dynamics_panels(arms, first.parameters, first.length_unit), *logprob_panels())
    return Picture(
        "Figure 4. All runs beside each other",
        (*arm_keys(colors), *_evaluation_key(arms), Key("teacher", "ink", "dashed")),
        draw_panels(panels, arms, colors),
        columns=3,
    )


def _over_steps(diagnosis: Diagnosis, arms: Arms, colors: dict[str, int]) -> list[Picture]:
    """Figures 1 to 3, with the onset marked."""
    summary = diagnosis.summary
    parameters, unit = summary.parameters, summary.parameters.unit
    mark, mark_keys = _mark(diagnosis)
    color = f"a{next(iter(colors[name] for name in arms))}"

    def keys(*names: str) -> tuple[Key, ...]:
        shapes = ("line", "dashed")
        return tuple(Key(n, color, s) for n, s in zip(names, shapes, strict=False)) + mark_keys

    dynamics = dynamics_panels(arms, parameters, summary.length_unit)
    pictures = [
        Picture(
            "Figure 1. Length, truncation, repetition and accuracy over steps",
            (Key("rollouts", color, "line"), *_evaluation_key(arms), *mark_keys),
            draw_panels(dynamics, arms, colors, mark),
        ),
        Picture(
            "Figure 2. Log-prob by student and teacher, and their difference, the advantage",
            keys("student", "teacher"),
            draw_panels(logprob_panels(), arms, colors, mark),
        ),
        Picture(
            f"Figure 3. The advantage of repetitive and of regular {unit}, and the share of "
            "repetitive ones",
            keys(f"regular {unit}", f"repetitive {unit}"),
            draw_panels(credit_panels(parameters), arms, colors, mark),
        ),
    ]
    return [_fold(picture) for picture in pictures]


def _fold(picture: Picture) -> Picture:
    """A figure in which nothing was measured is its caption alone."""
    if any(image.measured for image in picture.images):
        return picture
    return Picture(f"{picture.caption}: not measured", (), ())


def _mark(diagnosis: Diagnosis) -> tuple[Mark | None, tuple[Key, ...]]:
    """The steps to mark: where truncation changed phase, else repetition; and rollbacks."""
    step, interval, keys = None, None, list[Key]()
    for what, onset in (
        ("truncation", diagnosis.onset),
        ("repetition", diagnosis.repetition_onset),
    ):
        if onset.step is not None:
            step, interval = onset.step, onset.interval
            keys.append(Key(f"onset of {what}, step {step}", "ink", "mark"))
            if interval is not None and interval[0] < interval[1]:
                keys.append(Key(f"its 95% interval, {interval[0]} to {interval[1]}", "ink", "band"))
            break
    rollbacks = _rollbacks(diagnosis)
    if rollbacks:
        keys.append(Key(f"rolled back after {_say_steps(rollbacks)}", "ink", "budget"))
    if step is None and not rollbacks:
        return None, ()
    return Mark(step, interval, rollbacks), tuple(keys)


def _rollbacks(diagnosis: Diagnosis) -> tuple[int, ...]:
    """Steps after which the run put an earlier student back."""
    lines = [line for line in diagnosis.lines if line.get("alarm/restored_step") is not None]
    return tuple(line["step"] for line in lines)


def _say_steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) > MAX_STEPS_SAID:
        few = ", ".join(map(str, steps[: MAX_STEPS_SAID - 1]))
        return f"steps {few} and {len(steps) - MAX_STEPS_SAID + 1} more"
    return f"steps {', '.join(map(str, steps[:-1]))} and {steps[-1]}"


def _over_rollouts(diagnosis: Diagnosis) -> list[Picture]:
    """The length histogram and the figures by position."""
    summary, unit = diagnosis.summary, diagnosis.summary.parameters.unit
    if not summary.overall.num_rollouts:
        return []
    profiles = distributions.read_profiles(summary.positions, diagnosis.onset.step)
    keys = [Key("ended by itself", "a1", "fill")]
    if summary.truncation_source == "unknown":
        keys = [Key("rollouts", "a1", "fill")]
    if summary.histogram.truncated.any():
        keys.append(Key("cut off", "a0", "hatch"))
    if summary.budget is not None:
        keys.append(Key(f"budget, {summary.budget:,} {summary.length_unit}", "ink", "budget"))
    lines = ("line", "dashed") if len(profiles) > 1 else ("line",)
    return [
        Picture(
            "Lengths of all rollouts",
            tuple(keys),
            (
                draw_image(
                    "Rollouts by length",
                    "number of rollouts",
                    _describe_lengths(summary),
                    lambda theme: distributions.length_figure(summary, theme),
                ),
            ),
        ),
        Picture(
            "By position in the rollout, from its first to its last; places with fewer than "
            f"{distributions.MIN_UNITS} {unit} are left out",
            tuple(
                Key(profile.name, color, shape)
                for profile, color, shape in zip(profiles, ("a1", "a0"), lines, strict=False)
            ),
            (
                draw_image(
                    "Mean advantage by position",
                    "nats per token",
                    f"Mean advantage by position, {_extent(profiles, 'advantage')}.",
                    lambda theme: distributions.advantage_figure(profiles, unit, theme),
                ),
                draw_image(
                    f"Repetitive {unit} by position",
                    f"share of {unit}",
                    f"Repetitive share by position, {_extent(profiles, 'repetitive')}.",
                    lambda theme: distributions.repetition_figure(profiles, unit, theme),
                ),
            ),
        ),
    ]


def _describe_lengths(summary: Summary) -> str:
    overall = summary.overall
    lengths = (overall.median_length, overall.p90_length, overall.max_length)
    median, p90, longest = (number(length, ",.0f") for length in lengths)
    return (
        f"Histogram of lengths in {summary.length_unit}: median {median}, 90% up to {p90}, "
        f"longest {longest}."
    )


def _extent(profiles: Sequence[distributions.Profile], field: str) -> str:
    said: list[str] = []
    for profile in profiles:
        values = getattr(profile, field)
        known = values[np.isfinite(values)]
        if len(known):
            said.append(f"{profile.name} from {known.min():.3g} to {known.max():.3g}")
    return "; ".join(said) or "not measured"


def _evaluation_key(arms: Arms) -> tuple[Key, ...]:
    return (Key("held-out problems", "ink", "dots"),) if has_evaluations(arms) else ()


def _when(onset: Onset) -> str:
    """The onset as a phrase; "" without one."""
    if onset.step is None:
        return ""
    what = {"rise": "Onset", "healed": "Rise that healed", "fall": "Fall"}.get(onset.kind, "Onset")
    said = f"{what}: step {onset.step}"
    if onset.interval is not None and onset.interval[0] < onset.interval[1]:
        said += f" (95% interval {onset.interval[0]} to {onset.interval[1]})"
    rounded = round(onset.width)
    width = "within one step" if rounded <= 1 else f"over {rounded} steps"
    return (
        f"{said}, {width}, TruncRate {number(onset.before, '.2f')} to {number(onset.after, '.2f')}"
    )


def _numbers(diagnosis: Diagnosis) -> list[_Number]:
    """What was measured at the first step and at the last, and how much was read."""
    summary = diagnosis.summary
    made: list[_Number] = []
    for label, key, field, form in NUMBERS:
        name = label.format(unit=summary.parameters.unit, length_unit=summary.length_unit)
        given = [line.get(key) for line in diagnosis.lines]
        values = [v for v in given if isinstance(v, int | float) and math.isfinite(v)]
        overall = getattr(summary.overall, field) if field else math.nan
        if len(values) > 1:
            made.append(_Number(name, format(values[0], form), format(values[-1], form)))
        elif values or math.isfinite(overall):
            made.append(_Number(name, "", format(values[0] if values else overall, form)))
    if summary.overall.num_rollouts:
        made.append(_Number("Rollouts read", "", f"{summary.overall.num_rollouts:,}"))
    steps = sorted({line["step"] for line in diagnosis.lines if line.get("step", 0) > 0})
    if steps:
        many = len(steps) > 1
        made.append(_Number("Steps", f"{steps[0]}" if many else "", f"{steps[-1]}"))
    if rollbacks := _rollbacks(diagnosis):
        made.append(_Number("Rolled back after", "", _say_steps(rollbacks)))
    return made


def _table(sections: Sequence[_Section]) -> list[tuple[str, list[_Number]]]:
    """The numbers of all runs beside each other, a row for each that any of them has."""
    labels = dict.fromkeys(entry.label for section in sections for entry in section.numbers)
    known = [{entry.label: entry for entry in section.numbers} for section in sections]
    return [(label, [run.get(label, _Number(label, "", "–")) for run in known]) for label in labels]
