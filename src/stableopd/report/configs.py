"""What tells runs apart: the fields of their configurations that differ."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from stableopd.config import PRESETS
from stableopd.text import without_folders

__all__ = ["differences", "name_by_differences", "read_settings", "settings_key", "shorten"]

METHOD = "objective.method"

# Runs that differ in these alone are seeds of one arm.
OF_A_SEED = {"run.seed", "run.output", "run.device", "run.trackers"}

# Design: more do not fit into a legend or the first column of a table.
MAX_PARTS, NAME_CHARACTERS = 3, 56
RUN_CHARACTERS, VALUE_CHARACTERS = 28, 40

Settings = Mapping[str, Any]


def read_settings(config: str) -> dict[str, Any]:
    """Read a config.toml into "section.key" to value; empty for "" and for what is not TOML."""
    try:
        table = tomllib.loads(config)
    except tomllib.TOMLDecodeError:
        return {}
    return {
        f"{section}.{key}": value
        for section, values in table.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def settings_key(settings: Settings) -> tuple[tuple[str, str], ...]:
    """What is equal for two runs exactly if they are seeds of one arm."""
    return tuple(sorted((k, repr(v)) for k, v in settings.items() if k not in OF_A_SEED))


def differences(settings: Sequence[Settings]) -> list[tuple[str, list[str]]]:
    """The fields in which arms differ, with the value of each arm.

    Args:
        settings: Those of one run of each arm; an empty one (a dump) differs from none.

    Returns:
        Field and values as text, "–" where an arm does not have it; in the order of config.toml.
    """
    known = [entry for entry in settings if entry]
    fields = dict.fromkeys(k for entry in known for k in entry if k not in OF_A_SEED)
    return [
        (field, [_shown(entry, field) for entry in settings])
        for field in fields
        if len({_shown(entry, field) for entry in known}) > 1
    ]


def name_by_differences(settings: Sequence[Settings], runs: Sequence[str]) -> list[str]:
    """Name arms by what differs between them: "opd", or "stable_opd, lambda_gold = 0.1".

    The method comes first. What it presets is left out, where the value is the preset's. Where
    more than three settings differ, those of the objective alone if they tell the arms apart;
    else the method and the run, as "opd (long)".

    Args:
        settings: Those of one run of each arm, none of them empty.
        runs: The name of that run.

    Returns:
        One name for each, all different where the settings are and the runs' names.
    """
    fields = [field for field, _ in differences(settings)]
    for chosen in (fields, [f for f in fields if f.startswith("objective.")]):
        parts = _parts(settings, chosen)
        names = [", ".join(p) for p in parts]
        fits = all(len(p) <= MAX_PARTS for p in parts)
        fits = fits and all(len(name) <= NAME_CHARACTERS for name in names)
        if len(settings) > 1 and fits and all(names) and len({*names}) == len(names):
            return names
    methods = [str(entry.get(METHOD, "run")) for entry in settings]
    if len(settings) == 1:  # nothing differs
        return methods
    return [
        method if method == run else f"{method} ({_end(run, RUN_CHARACTERS - len(method) - 3)})"
        for method, run in zip(methods, runs, strict=True)
    ]


def shorten(values: Sequence[str]) -> list[str]:
    """The ends of long values (paths are told apart there), as short as they stay different."""
    short = [_end(value, VALUE_CHARACTERS) for value in map(without_folders, values)]
    if len({*short}) == len({*values}):
        return short
    # Files of one name in several folders: from where the folders part.
    try:
        common = len(os.path.commonpath(values).rstrip("/"))
    except ValueError:  # relative paths among absolute ones
        common = 0
    return [f"…{value[common:]}" if common else value for value in values]


def _parts(settings: Sequence[Settings], fields: Sequence[str]) -> list[list[str]]:
    """What the name of each arm would say of these fields."""
    keys = [field.partition(".")[2] for entry in settings for field in {*entry}]
    sections = {key: {f for e in settings for f in e if f.endswith(f".{key}")} for key in keys}
    made: list[list[str]] = []
    for entry in settings:
        method = entry.get(METHOD)
        preset = PRESETS.get(method, {}) if METHOD in fields and isinstance(method, str) else {}
        parts = [f"{method}"] if METHOD in fields else []
        for field in fields:
            key = field.partition(".")[2]
            is_preset = field.startswith("objective.") and preset.get(key) == entry.get(field)
            if field != METHOD and not (key in preset and is_preset):
                short = key if len(sections[key]) == 1 else field
                parts.append(f"{short} = {_shown(entry, field)}")
        made.append(parts)
    return made


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _shown(settings: Settings, field: str) -> str:
    value = settings.get(field)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value != "" else '""'
