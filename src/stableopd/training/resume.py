"""Going on with a run: its folder, its newest checkpoint, and what the alarm has seen and done."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd import config as configuration
from stableopd.config import Config
from stableopd.runfolder import RunFolder
from stableopd.training.guard import Guard, replay
from stableopd.types import ConfigError

__all__ = ["Past", "find_past", "flat"]

# What --resume may change at will: where things are, how long to wait, what the alarm does.
FREE = ("run.output", "alarm.action", "teacher.url", "teacher.by_name", "teacher.api_key_env")
FREE += ("teacher.max_in_flight", "teacher.timeout_s", "teacher.patience_s")
FREE += ("rollout.url", "rollout.api_key_env", "rollout.weights_dir")
FREE += ("rollout.tolerance", "rollout.timeout_s", "rollout.patience_s")


@dataclass(frozen=True)
class Past:
    """What there is of a run before it begins or goes on.

    Attributes:
        folder: The run folder; of a new run it is not made yet.
        checkpoint: The newest checkpoint; None where the run starts with the initial student.
        guard: The alarm at that checkpoint.
    """

    folder: RunFolder
    checkpoint: Path | None
    guard: Guard


def find_past(config: Config, resume: bool) -> Past:
    """Look for what to go on from; nothing is written.

    Args:
        config: The configuration.
        resume: Whether the folder `run.output` holds this run already.

    Returns:
        What was found.

    Raises:
        RunFolderError: A new run finds the folder taken, or a resumed one finds no run.
        ConfigError: The folder's run has other settings.
    """
    new = Guard(config.objective)
    if not resume:
        return Past(RunFolder.claim(Path(config.run.output)), None, new)
    folder = RunFolder.open(config.run.output)
    _require_same_config(config, folder)
    checkpoints = folder.checkpoints()
    if not checkpoints:
        return Past(folder, None, new)
    step = checkpoints[-1]
    lines, events = (
        [row for row in rows if row["step"] <= step] for rows in (folder.metrics(), folder.events())
    )
    return Past(folder, folder.checkpoint_path(step), replay(config.objective, lines, events))


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


def _require_same_config(config: Config, folder: RunFolder) -> None:
    """Refuse to go on with other settings, but for more steps and what is free."""
    before = configuration.parse(
        tomllib.loads(folder.config_text()), source=str(folder.path / "config.toml")
    )
    old, new = flat(before), flat(config)
    for settings in (old, new):  # "auto" with a marker is "exact", which was the default
        if settings.get("data.answer_marker") and settings["data.grader"] == "auto":
            settings["data.grader"] = "exact"
    for name in sorted(old | new):
        mine, theirs = new.get(name), old.get(name)
        # A served teacher may move, but not into this process.
        if name in FREE and (name != "teacher.url" or bool(mine) == bool(theirs)):
            continue
        # Steps may be added.
        if mine != theirs and not (name == "run.steps" and new[name] >= old[name]):
            raise ConfigError(
                f"--resume: {name} is {mine!r}, but the run in {folder.path} has {theirs!r}; use "
                "its settings, or another run.output for a new run."
            )
