"""The alarm: a pure state machine over the metrics of a run, one line after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from stableopd.diagnostics.memory import History, baseline_rows, forget, now_rows, number, remember
from stableopd.diagnostics.signs import Sign, collapse, find_signs, is_back

__all__ = ["Alarm", "Level", "advance", "after_rollback"]

CONFIRM = 5  # design: a step is `last_ok` when neither it nor the 5 after it showed anything
BACK = 10  # design: a collapse is over when truncation has been near its baseline for 10 steps


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    COLLAPSE = "collapse"


@dataclass(frozen=True, slots=True)
class Alarm:
    """What the alarm knows after a step; `Alarm()` is the state before the first.

    Attributes:
        level: The level after the last line.
        reason: Why, as a sentence with the numbers; "" while OK.
        step: Step of the last line; None before the first.
        last_ok: Last step up to which nothing was suspicious; None before the first. A student
            of this step or an earlier one is healthy, as far as the alarm can tell.
        history: What it remembers of the lines.
        num_quiet: Lines in sequence without any sign.
        num_back: Lines in sequence with truncation near its baseline.
    """

    level: Level = Level.OK
    reason: str = ""
    step: int | None = None
    last_ok: int | None = None
    history: History = field(default_factory=History)
    num_quiet: int = 0
    num_back: int = 0


def advance(alarm: Alarm, line: Mapping[str, Any]) -> Alarm:
    """Take one line of metrics and return the state after it.

    The last 5 lines (15 where these are too noisy, 3 while there are fewer than 10) are held
    against a baseline: the first 10 lines or, for truncation and repetition, the 15 lines with the
    lowest mean so far, whichever is lower. What is looked at, and from where on it is suspicious
    and warns, is in `signs.py`; docs/diagnose.md has the table.

    COLLAPSE: of the share that stopped at the baseline, 0.4 or less is left (0.5 if accuracy has
    fallen or repetition risen, too), and truncation is not on its way back; or accuracy has halved
    while the share of repetitive tokens rose by 0.1. It stays until truncation has been within 0.1
    of its baseline for 10 lines.
    WARN: at least one sign is above its upper threshold. It stays until 5 lines show no sign.

    A line of an earlier step than the last one means that the run went back, as after a rollback.

    Args:
        alarm: The state before the line.
        line: Metrics by the names of docs/metrics.md. Any may be missing, null or nan. Without
            `step` it is the one after the last.

    Returns:
        The state after it: the same for the same lines, whatever else happens.
    """
    given = number(line, "step")
    step = int(given) if given is not None else 1 + (alarm.step or 0)
    if alarm.step is not None and step < alarm.step:
        alarm = after_rollback(alarm, step - 1)
    history, has_rollouts = remember(alarm.history, step, line)
    signs = find_signs(history)
    num_quiet = 0 if signs else alarm.num_quiet + has_rollouts
    alarm = replace(
        alarm,
        step=step,
        last_ok=_last_ok(alarm, history, signs, num_quiet),
        history=_with_start(history, signs),
        num_quiet=num_quiet,
        num_back=alarm.num_back + 1 if is_back(history) else 0,
    )
    if alarm.level == Level.COLLAPSE and alarm.num_back < BACK:
        return alarm
    if why := collapse(history, signs):
        others = [sign.text for sign in signs if sign.warns and sign.name != why.name]
        return replace(alarm, level=Level.COLLAPSE, reason="; ".join([why.text, *others]))
    if warnings := [sign.text for sign in signs if sign.warns]:
        return replace(alarm, level=Level.WARN, reason="; ".join(warnings))
    if alarm.level != Level.OK and num_quiet < CONFIRM:
        still = "; ".join(sign.text for sign in signs)
        return replace(alarm, level=Level.WARN, reason=still or alarm.reason)
    return replace(alarm, level=Level.OK, reason="")


def after_rollback(alarm: Alarm, step: int) -> Alarm:
    """The state with which to go on after a return to an earlier student.

    What a healthy run looks like (its start, its lowest truncation, its best accuracy) stays
    known; the judgement and the lines that it was made from are forgotten.

    Args:
        alarm: The state when the return was decided.
        step: The step that was returned to; the next line is that of step + 1.

    Returns:
        A state of level OK.
    """
    last_ok = None if alarm.last_ok is None else min(alarm.last_ok, step)
    return Alarm(step=step, last_ok=last_ok, history=forget(alarm.history, step))


def _last_ok(alarm: Alarm, history: History, signs: Sequence[Sign], num_quiet: int) -> int | None:
    best = history.best_evaluation
    if best and any(sign.name == "evaluation" and sign.warns for sign in signs):
        # Between two evaluations nothing else may have shown.
        return None if alarm.last_ok is None else min(alarm.last_ok, best.step)
    if alarm.level == Level.OK and num_quiet > CONFIRM and len(history.recent) > CONFIRM:
        return history.recent[-1 - CONFIRM].step
    return alarm.last_ok


def _with_start(history: History, signs: Sequence[Sign]) -> History:
    """What is suspicious against the first lines is no part of the start."""
    late = [sign for sign in signs if sign.warns and sign.name not in ("high", "mismatch")]
    before = baseline_rows(history, now_rows(history))
    if late and before and len(before) < len(history.start):
        return replace(history, start=before, start_complete=True)
    return history
