"""What the files of a run folder may hold: one check for each kind, and one error.

A file may have been cut, edited, or written by another version. What is read from it is used as
numbers, so that each value is looked at here, once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any, cast

from stableopd.text import one_line
from stableopd.types import RunFolderError

__all__ = ["as_config", "as_environment", "as_event", "as_metrics", "require_step"]

# More than any run makes; a float holds every such number.
MAX_NUMBER = 2**53

# Fields of a line of events.jsonl, and what each may be.
EVENT: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "level": (str,),
    "reason": (str,),
    "action": (str,),
    "restored_step": (int, type(None)),
    "lambda_gold": (int, float, type(None)),
    "beta_reference": (int, float, type(None)),
}

# Fields of "stops" in environment.json that are lists of token ids.
STOP_IDS = ("student_ids", "teacher_ids", "event_ids")


def require_step(row: Mapping[str, Any], where: str) -> None:
    """Refuse a line that does not say of which step it is.

    Args:
        row: The line.
        where: File and line, for the message.

    Raises:
        RunFolderError: Its "step" is no whole number from 0 on.
    """
    step = row.get("step")
    if type(step) is not int or not 0 <= step < MAX_NUMBER:
        raise RunFolderError(f"{where}: 'step' is {_shown(step)}, not a step; restore it.")


def as_metrics(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A line of metrics.jsonl: a step, and numbers or null by name.

    Args:
        row: The JSON object.
        where: File and line, for the message.

    Returns:
        The same object.

    Raises:
        RunFolderError: A value is something else.
    """
    require_step(row, where)
    for name, value in row.items():
        if not _is_number(value) and value is not None:
            raise RunFolderError(f"{where}: {name!r} is {_shown(value)}, not a number; restore it.")
    return row


def as_event(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A line of events.jsonl; arguments, result and errors as of `as_metrics`."""
    require_step(row, where)
    for name, kinds in EVENT.items():
        value = row.get(name)
        is_large = isinstance(value, int) and not _is_number(value)
        if name not in row or type(value) not in kinds or is_large:
            raise RunFolderError(
                f"{where}: {name!r} is {_shown(value)}, which no event of a run has; restore it."
            )
    return row


def as_environment(found: dict[str, Any], where: str) -> dict[str, Any]:
    """The object of environment.json; arguments, result and errors as of `as_metrics`."""
    stops = found.get("stops")
    if stops is not None and not isinstance(stops, dict):
        raise RunFolderError(f"{where}: 'stops' is {_shown(stops)}, not an object; restore it.")
    for name in STOP_IDS:
        ids: Any = cast(dict[str, Any], stops or {}).get(name)
        if ids is not None and not _are_ids(ids):
            raise RunFolderError(
                f"{where}: 'stops.{name}' is {_shown(ids)}, not a list of token ids; restore it."
            )
    inputs: Any = found.get("inputs")
    is_told = isinstance(inputs, dict) and all(
        isinstance(v, str) for v in cast(dict[str, Any], inputs).values()
    )
    if inputs is not None and not is_told:
        raise RunFolderError(f"{where}: 'inputs' is {_shown(inputs)}, not texts; restore it.")
    return found


def as_config(text: str, where: str) -> dict[str, dict[str, Any]]:
    """The tables of a config.toml, unchecked, as a run of another version may have written it.

    Args:
        text: TOML.
        where: The file, for the message.

    Returns:
        The tables by name; what stands outside of one is left out.

    Raises:
        RunFolderError: It is not TOML.
    """
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers too long, too many brackets
        reason = one_line(error)
        raise RunFolderError(f"{where}: not valid TOML: {reason}; restore it.") from None
    return {k: cast(dict[str, Any], v) for k, v in found.items() if isinstance(v, dict)}


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) <= MAX_NUMBER
    return isinstance(value, float)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(x) is int and 0 <= x < MAX_NUMBER for x in cast(list[Any], value)
    )


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) <= MAX_NUMBER else "too large"
    return text if len(text) <= 60 else f"{text[:60]}..."
