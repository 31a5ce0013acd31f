"""One HTML page about one or more runs, made from their folders and needing nothing else."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from stableopd.config import RepetitionConfig
from stableopd.diagnostics.repetition import repetitive_tokens
from stableopd.report import figures
from stableopd.report.figures import DARK, LIGHT, Runs, Theme
from stableopd.runfolder import RunFolder, write_atomically

__all__ = ["write_page"]

WORST_ROLLOUTS = 3
SHOWN_CHARACTERS = 3000

HEADLINE = (
    ("Accuracy, held-out", "eval/accuracy", ".3f"),
    ("Accuracy, rollouts", "rollout/accuracy", ".3f"),
    ("Truncation, held-out", "eval/truncation_rate", ".3f"),
    ("Truncation, rollouts", "rollout/truncation_rate", ".3f"),
    ("Repetition, rollouts", "rollout/repetition_rate", ".3f"),
    ("Length, rollouts (tokens)", "rollout/mean_length", ".1f"),
    ("Speed (tokens/s)", "tokens_per_s", ".0f"),
)

GRADES = {True: "correct", False: "wrong", None: "not graded"}


@dataclass(frozen=True)
class _Picture:
    """A figure for light pages and for dark ones, as `data:` addresses."""

    title: str
    light: str
    dark: str
    wide: bool = False


@dataclass(frozen=True)
class _Worst:
    """A rollout to look at: its texts, and how much of it is repetitive."""

    prompt: str
    completion: str
    tokens: int
    repetitive: int
    stop_reason: str
    correct: str


@dataclass(frozen=True)
class _Section:
    """All that the page says of one run."""

    name: str
    pictures: list[_Picture]
    rollout_step: int | None
    worst: list[_Worst]
    config: str
    environment: str


def write_page(runs: Sequence[tuple[str, RunFolder]], path: str | Path, title: str) -> None:
    """Write the report of one or more runs as a single HTML file without any network address.

    Args:
        runs: Name and folder of each run, in the order shown.
        path: The file to write, atomically.
        title: The heading.

    Raises:
        RunFolderError: A folder cannot be read, or the file cannot be written.
    """
    lines = {name: folder.metrics() for name, folder in runs}
    parameters = [_repetition(folder) for _, folder in runs]
    sections = [
        _section(name, folder, lines, repetition)
        for (name, folder), repetition in zip(runs, parameters, strict=True)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        title=title,
        names=list(lines),
        headline=_headline(lines),
        comparison=_comparison(lines, parameters[0]) if len(runs) > 1 else None,
        parameters_differ=len(set(parameters)) > 1,
        sections=sections,
    )
    write_atomically(Path(path), page)


def _section(name: str, folder: RunFolder, lines: Runs, repetition: RepetitionConfig) -> _Section:
    run, arms = {name: lines[name]}, list(lines)
    steps = folder.rollout_steps()
    return _Section(
        name=name,
        pictures=[
            _picture(
                "Figure 1. Length, truncation, repetition and accuracy over steps",
                lambda theme: figures.dynamics_figure(run, repetition, theme, arms),
            ),
            _picture(
                "Figure 2. Log-prob by student and teacher, and their difference, the advantage",
                lambda theme: figures.logprob_figure(run, theme, arms),
            ),
            _picture(
                "Figure 3. The advantage of repetitive and regular tokens; a token is repetitive "
                f"when the {repetition.ngram}-gram that ends at it occurred before",
                lambda theme: figures.credit_figure(run, repetition, theme, arms),
            ),
        ],
        rollout_step=steps[-1] if steps else None,
        worst=_worst(folder.rollouts(steps[-1]), repetition) if steps else [],
        config=folder.config_text(),
        environment=json.dumps(folder.environment(), indent=2, ensure_ascii=False),
    )


def _comparison(lines: Runs, repetition: RepetitionConfig) -> _Picture:
    return _picture(
        "Figure 4. All runs beside each other",
        lambda theme: figures.comparison_figure(lines, repetition, theme),
        wide=True,
    )


def _picture(title: str, draw: Callable[[Theme], Figure], wide: bool = False) -> _Picture:
    light, dark = (figures.svg_data_uri(draw(theme)) for theme in (LIGHT, DARK))
    return _Picture(title, light, dark, wide)


def _repetition(folder: RunFolder) -> RepetitionConfig:
    """The parameters that the run measured repetition with.

    Read from the one section that is needed, so that a page can be made of a run whose
    configuration a newer version would refuse elsewhere.
    """
    try:
        table = tomllib.loads(folder.config_text()).get("repetition", {})
    except tomllib.TOMLDecodeError:
        table = {}
    known = {k: v for k, v in table.items() if k in RepetitionConfig.__dataclass_fields__}
    return RepetitionConfig(**known)


def _headline(lines: Runs) -> list[tuple[str, list[tuple[str, str]]]]:
    """A row per quantity that any run measured: its first and its last value in each run."""
    rows: list[tuple[str, list[tuple[str, str]]]] = []
    for label, key, form in HEADLINE:
        cells: list[tuple[str, str]] = []
        for run in lines.values():
            values = [line[key] for line in run if isinstance(line.get(key), int | float)]
            shown = (format(values[0], form), format(values[-1], form)) if values else ("-", "-")
            cells.append(shown)
        if any(cell != ("-", "-") for cell in cells):
            rows.append((label, cells))
    return rows


def _worst(rows: Sequence[Mapping[str, Any]], repetition: RepetitionConfig) -> list[_Worst]:
    """The rollouts with the most repetitive tokens, the longest first among equals."""
    counted: list[tuple[int, Mapping[str, Any]]] = []
    for row in rows:
        labels = repetitive_tokens(row["completion_ids"], repetition.ngram, repetition.min_run)
        counted.append((int(labels.sum()), row))
    counted.sort(key=lambda pair: (pair[0], len(pair[1]["completion_ids"])), reverse=True)
    return [
        _Worst(
            prompt=_shorten(_text(row["prompt"])),
            completion=_shorten(row["completion"]),
            tokens=len(row["completion_ids"]),
            repetitive=repetitive,
            stop_reason="cut off by the budget" if row["stop_reason"] == "length" else "stopped",
            correct=GRADES[row.get("correct")],
        )
        for repetitive, row in counted[:WORST_ROLLOUTS]
    ]


def _text(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _shorten(text: str) -> str:
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[... {left_out:,} characters left out ...]\n{text[-half:]}"
