"""Continuing a run: its folder, its newest checkpoint, and what the alarm has seen and done."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableopd import config as configuration
from stableopd.config import Config
from stableopd.runfolder import RunFolder
from stableopd.runfolder.manifest import require_intact
from stableopd.training.guard import Guard, replay
from stableopd.types import ConfigError, RunFolderError

__all__ = ["Past", "find_past", "flat", "schedule_steps"]

# What --resume may change at will: where things are, how long to wait, what the alarm does.
FREE = ("run.output", "alarm.action", "teacher.url", "teacher.by_name", "teacher.api_key_env")
FREE += ("teacher.max_in_flight", "teacher.timeout_s", "teacher.patience_s")
FREE += ("rollout.url", "rollout.api_key_env", "rollout.weights_dir")
FREE += ("rollout.tolerance", "rollout.timeout_s", "rollout.patience_s")
FREE += ("optimizer.schedule_steps",)  # what follows from it is told before the first step


@dataclass(frozen=True)
class Past:
    """What there is of a run before it begins or goes on.

    Attributes:
        folder: The run folder; of a new run it is not made yet.
        checkpoint: The newest checkpoint; None where the run starts with the initial student.
        guard: The alarm at that checkpoint.
        environment: What the run wrote down when it began; empty for a new run.
        schedule_steps: Steps of the learning rate's schedule so far; None for a new run.
        last_rate: Learning rate of the last step; None without one.
        notes: Sentences for the user.
    """

    folder: RunFolder
    checkpoint: Path | None
    guard: Guard
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    schedule_steps: int | None = None
    last_rate: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def student_stop_ids(self) -> tuple[int, ...] | None:
        """The ids that the initial student stops with; a checkpoint names those in force."""
        ids = (self.environment.get("stops") or {}).get("student_ids")
        return tuple(ids) if ids else None


def find_past(config: Config, resume: bool, is_main: bool = True) -> Past:
    """Look for what to go on from; nothing is written but a lock on the folder of a resumed run.

    Args:
        config: The configuration.
        resume: Whether the folder `run.output` holds this run already.
        is_main: Whether this process is the one that writes: it locks the folder and reads each
            file of the checkpoint for damage.

    Returns:
        What was found.

    Raises:
        RunFolderError: A new run finds the folder taken; a resumed one finds no run, another
            process at work, or a file that is not what was written.
        ConfigError: The folder's run has other settings.
    """
    new = Guard(config.objective)
    if not resume:
        return Past(RunFolder.claim(Path(config.run.output)), None, new)
    folder = RunFolder.open(config.run.output)
    notes = [folder.lock()] if is_main else []
    before = configuration.parse(folder.config_table(), source=str(folder.path / "config.toml"))
    _require_same_config(config, before, folder)
    environment = folder.environment() if folder.has_environment() else {}
    past = Past(folder, None, new, environment, schedule_steps(before))
    checkpoints = folder.checkpoints()
    if not checkpoints:
        return dataclasses.replace(past, notes=tuple(filter(None, notes)))
    step, path = checkpoints[-1], folder.checkpoint_path(checkpoints[-1])
    if is_main and not require_intact(path, step):
        notes.append(
            f"{path} has no manifest, as those of earlier versions: whether its files are what was "
            "written is not known."
        )
    lines, events = (
        [row for row in rows if row["step"] <= step] for rows in (folder.metrics(), folder.events())
    )
    _require_lines(folder, lines, step)
    return dataclasses.replace(
        past,
        checkpoint=path,
        guard=replay(config.objective, lines, events),
        last_rate=lines[-1].get("learning_rate"),
        notes=tuple(filter(None, notes)),
    )


def _require_lines(folder: RunFolder, lines: Sequence[Mapping[str, Any]], step: int) -> None:
    """Refuse metrics that do not have each step up to the checkpoint's, once and in order."""
    found = [line["step"] for line in lines]
    start = 0 if found[:1] == [0] else 1  # of the evaluation before the first step
    for place, wanted in enumerate(range(start, step + 1)):
        if found[place : place + 1] != [wanted]:
            break
    else:
        if len(found) == step + 1 - start:
            return
        wanted = step + 1
    raise RunFolderError(
        f"{folder.path / 'metrics.jsonl'}: a line of step {wanted} is missing or not in its place, "
        f"but there is a checkpoint of step {step}; restore the file, or remove the checkpoints "
        f"after step {max(0, wanted - 1)} to go on from an earlier one."
    )


def schedule_steps(config: Config) -> int:
    """Over how many steps the learning rate is scheduled.

    Args:
        config: The configuration.

    Returns:
        `optimizer.schedule_steps`, or without it the steps of the run.
    """
    return config.optimizer.schedule_steps or config.run.steps


def flat(config: Config) -> dict[str, Any]:
    """The fields of a configuration that are set, by "section.field".

    Args:
        config: The configuration.

    Returns:
        Numbers, texts and lists of texts.
    """
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
        if value is not None
    }


def _require_same_config(config: Config, before: Config, folder: RunFolder) -> None:
    """Refuse to go on with other settings, but for more steps and what is free."""
    old, new = flat(before), flat(config)
    for settings in (old, new):  # "auto" with a marker is "exact", which was the default
        if settings.get("data.answer_marker") and settings["data.grader"] == "auto":
            settings["data.grader"] = "exact"
    for name in sorted(old | new):
        mine, theirs = new.get(name), old.get(name)
        # A served teacher may move, but not into this process.
        if name in FREE and (name != "teacher.url" or bool(mine) == bool(theirs)):
            continue
        if name == "run.steps":
            if new[name] < old[name]:
                raise ConfigError(
                    f"--resume: run.steps may only grow: it is {mine}, but the run in "
                    f"{folder.path} has {theirs}; give at least as many, or another run.output for "
                    "a new run."
                )
            continue
        if mine != theirs:
            raise ConfigError(
                f"--resume: {name} is {mine!r}, but the run in {folder.path} has {theirs!r}; use "
                "its settings, or another run.output for a new run."
            )
