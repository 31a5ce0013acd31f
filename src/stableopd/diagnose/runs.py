"""From a run folder, or the rollout dumps of another framework, to a diagnosis."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stableopd.config import repetition_of
from stableopd.diagnose.notes import about_window, damage, how_truncation
from stableopd.diagnostics.alarm import Alarm, Level, advance, after_rollback
from stableopd.diagnostics.collect import Collector
from stableopd.diagnostics.evidence import Facts
from stableopd.diagnostics.lines import lines_of, onset_of
from stableopd.diagnostics.losses import Losses
from stableopd.diagnostics.overlap import find_agreement
from stableopd.diagnostics.summary import Parameters, Summary
from stableopd.diagnostics.verdict import Diagnosis, judge
from stableopd.integrations.dump_rows import looking_at
from stableopd.integrations.dumps import Dump, open_dump
from stableopd.runfolder import RunFolder
from stableopd.types import DataError, RunFolderError

__all__ = [
    "Reading",
    "ask",
    "diagnose_dump",
    "diagnose_run",
    "is_run_folder",
    "measure",
    "open_paths",
]

OnBytes = Callable[[int], None]

# Re-tokenised text is a little shorter than what was sampled: other splits, no stop token.
RETOKENISED_TOLERANCE = 0.02

# In the line of the step after which a run put an earlier student back.
RESTORED = "alarm/restored_step"


@dataclass(frozen=True)
class Reading:
    """How a dump is to be read.

    Attributes:
        format: A format of `open_dump`; "auto" detects it.
        mapping: Role to column, for files of no known format.
        strict: Whether a damaged line is an error.
        max_new_tokens: The length budget of the run; None where it is not known.
        tokenizer: Text to token ids, for dumps that have only text.
        window_chars: L of RepRate.
        ratio: tau of RepRate.
        ngram: n of the token labels; None takes the default of the unit.
        min_run: Shortest run of repetitive units that counts.
        answer_marker: What stands before a final answer; "" looks for the usual phrases.
    """

    format: str = "auto"
    mapping: Mapping[str, str] | None = None
    strict: bool = False
    max_new_tokens: int | None = None
    tokenizer: Callable[[str], Sequence[int]] | None = None
    window_chars: int = 10_000
    ratio: float = 10.0
    ngram: int | None = None
    min_run: int = 0
    answer_marker: str = ""


def is_run_folder(path: Path) -> bool:
    """Whether a path is the folder of a run of this program."""
    others = ("environment.json", "metrics.jsonl", "rollouts")
    with looking_at(path):
        return (path / "config.toml").is_file() and any((path / name).exists() for name in others)


def diagnose_run(folder: RunFolder, on_bytes: OnBytes | None = None) -> Diagnosis:
    """Diagnose a run of this program from its folder.

    Args:
        folder: The run, finished or not.
        on_bytes: Told of bytes as they are read.

    Returns:
        The diagnosis. Steps whose rollouts were not kept count by their line of metrics.

    Raises:
        RunFolderError: The folder cannot be read.
        DataError: Its rollouts cannot be read.
    """
    table = _config_table(folder)
    repetition = repetition_of(table.get("repetition", {}), str(folder.path / "config.toml"))
    marker = table.get("data", {}).get("answer_marker", "")
    budget = table.get("rollout", {}).get("max_new_tokens")

    def begin() -> Collector:
        return Collector(
            Parameters(
                repetition.window_chars, repetition.ratio, repetition.ngram, repetition.min_run
            ),
            max_new_tokens=budget if isinstance(budget, int) else None,
            answer_marker=marker if isinstance(marker, str) else "",
        )

    notes: list[str] = []
    collector, losses, lines = begin(), Losses(), tuple(folder.metrics())
    if folder.rollout_steps():
        dump = open_dump([folder.path / "rollouts"], format="stableopd")
        collector = _collect(begin, dump, on_bytes)
        # Lines of metrics tell of every step, also of those whose rollouts are lost.
        losses = Losses() if lines else dump.losses
        notes += damage(dump)
    else:
        notes.append("The run kept no rollouts.")
    summary = collector.summary()
    environment = _environment(folder)
    return _diagnosis(
        folder.path.name,
        "run folder",
        summary,
        lines,
        _facts(table, environment, tuple(folder.checkpoints())),
        [*notes, *collector.notes],
        losses,
        config=folder.config_text(),
        environment=json.dumps(environment, indent=2, ensure_ascii=False) if environment else "",
    )


def open_paths(paths: Sequence[Path], reading: Reading) -> Dump:
    """Open the dumps of one run of any framework; nothing but their beginning is read yet.

    Args:
        paths: Files and folders.
        reading: How to read them.

    Returns:
        The dump.

    Raises:
        DataError: Nothing usable is there, or formats are mixed.
    """
    return open_dump(
        paths,
        format=reading.format,
        mapping=reading.mapping,
        strict=reading.strict,
        tokenizer=reading.tokenizer,
    )


def diagnose_dump(dump: Dump, reading: Reading, on_bytes: OnBytes | None = None) -> Diagnosis:
    """Diagnose rollout dumps.

    Args:
        dump: What `open_paths` returned; read to its end here.
        reading: How it was opened.
        on_bytes: Told of bytes as they are read.

    Returns:
        The diagnosis.

    Raises:
        DataError: No rollout is in it, or (strict) a line is damaged.
    """
    summary, notes = measure(dump, reading, on_bytes)
    name = str(dump.files[0]) if dump.num_files == 1 else _common_folder(dump.files)
    name = name or f"{dump.files[0]} and {dump.num_files - 1} more"
    if not summary.overall.num_rollouts:
        raise DataError(
            f"{name}: no rollout could be read ({dump.num_damaged} damaged lines): "
            f"{dump.damaged[0] if dump.damaged else 'the files are empty'}."
        )
    lines = lines_of(summary)
    return _diagnosis(name, dump.format_name, summary, lines, Facts(), notes, dump.losses)


def _common_folder(files: Sequence[Path]) -> str:
    """The folder that all files are in; "" where there is none but the root or here."""
    if len({file.is_absolute() for file in files}) > 1:
        files = [file.absolute() for file in files]
    return os.path.commonpath(files)


def measure(
    dump: Dump, reading: Reading, on_bytes: OnBytes | None = None
) -> tuple[Summary, list[str]]:
    """Measure all rollouts of a dump; arguments as in `diagnose_dump`.

    Returns:
        The measurements, and sentences about what was damaged or assumed.
    """
    retokenised = reading.tokenizer is not None
    parameters = Parameters(reading.window_chars, reading.ratio, min_run=reading.min_run)
    if reading.ngram is not None:
        parameters = dataclasses.replace(parameters, ngram=reading.ngram)

    def begin() -> Collector:
        return Collector(
            parameters,
            max_new_tokens=reading.max_new_tokens,
            tolerance=RETOKENISED_TOLERANCE if retokenised else 0.0,
            answer_marker=reading.answer_marker,
        )

    collector = _collect(begin, dump, on_bytes)
    notes = [*damage(dump), *dump.notes, *collector.notes]
    if retokenised and dump.lengths_are_retokenised:
        notes.append("Lengths were counted by tokenizing the text again: they may be a little off.")
    return collector.summary(), notes


def _collect(begin: Callable[[], Collector], dump: Dump, on_bytes: OnBytes | None) -> Collector:
    """Measure a dump; a second time where a later attempt at some steps takes their place."""
    collector = begin()
    for records in dump.batches(on_bytes):
        collector.add(records)
    if dump.has_earlier_attempts:
        collector = begin()
        for records in dump.batches(last_attempts=True):
            collector.add(records)
    return collector


def _diagnosis(
    name: str,
    source: str,
    summary: Summary,
    lines: Sequence[Mapping[str, Any]],
    facts: Facts,
    notes: Sequence[str],
    losses: Losses,
    config: str = "",
    environment: str = "",
) -> Diagnosis:
    onset = onset_of(lines, "rollout/truncation_rate", summary)
    repetition = onset_of(lines, "rollout/repetitive_share", summary)
    alarm, warned_at, alarmed_at = _replay(lines)
    said = [
        f"On these lines the alarm first says {level} at step {step}."
        for level, step in (("WARN", warned_at), ("COLLAPSE", alarmed_at))
        if step is not None
    ]
    said += [
        f"After step {line['step']} the run put the student of step {line[RESTORED]} back."
        for line in lines
        if line.get(RESTORED) is not None
    ]
    return Diagnosis(
        name=name,
        source=source,
        summary=summary,
        lines=tuple(lines),
        onset=onset,
        repetition_onset=repetition,
        verdict=judge(summary, lines, onset, repetition, facts, alarm, losses),
        notes=tuple(
            note
            for note in (
                *notes,
                *how_truncation(summary),
                *about_window(summary),
                find_agreement(lines).text(),
                *said,
            )
            if note
        ),
        config=config,
        environment=environment,
        warned_at=warned_at,
        alarmed_at=alarmed_at,
        alarm=alarm,
    )


def _replay(lines: Sequence[Mapping[str, Any]]) -> tuple[Alarm, int | None, int | None]:
    """What the alarm would have said: its last state, the first WARN, the first COLLAPSE."""
    alarm, first = Alarm(), dict[Level, int]()
    for line in lines:
        alarm = ask(alarm, line)
        level = Level.COLLAPSE if RESTORED in line else alarm.level
        first.setdefault(level, int(line["step"]))
    return alarm, first.get(Level.WARN), first.get(Level.COLLAPSE)


def ask(alarm: Alarm, line: Mapping[str, Any]) -> Alarm:
    """The alarm after a line of a run, which may itself have answered a collapse by a rollback.

    Args:
        alarm: The state before the line.
        line: A line of metrics.

    Returns:
        The state after it; after a rollback that of the student that was put back.
    """
    alarm = advance(alarm, line)
    restored = line.get(RESTORED)
    return alarm if restored is None else after_rollback(alarm, int(restored))


def _config_table(folder: RunFolder) -> dict[str, dict[str, Any]]:
    # Read without the checks of `config.load`, so that a run of another version can be diagnosed.
    try:
        return folder.config_table()
    except RunFolderError:
        return {}


def _environment(folder: RunFolder) -> dict[str, Any]:
    try:
        return folder.environment()
    except RunFolderError:
        return {}


def _facts(
    table: Mapping[str, Any], environment: Mapping[str, Any], checkpoints: tuple[int, ...]
) -> Facts:
    found = environment.get("stops")
    stops = cast(dict[str, Any], found) if isinstance(found, dict) else {}

    def ids(name: str) -> tuple[int, ...] | None:
        value = stops.get(name)
        if not isinstance(value, list) or not all(type(entry) is int for entry in value):
            return None
        return tuple(cast(list[int], value))

    mode = stops.get("mode") or table.get("objective", {}).get("stop")
    mode = mode if isinstance(mode, str) else None
    return Facts(mode, ids("student_ids"), ids("teacher_ids"), checkpoints)
