"""What the alarm has seen of a run, what was done about it, and what is to be done next; pure.

After each step the loop asks (`ask`). The answer follows from the lines of metrics and the events
so far, which are in the run folder: `replay` makes it again when a run is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stableopd.config import STABILISERS, AlarmConfig, Config, ObjectiveConfig
from stableopd.config_checks import RAISING
from stableopd.diagnostics.alarm import Alarm, Level, advance, after_rollback

__all__ = ["Event", "Guard", "ask", "replay", "spared"]

LEVELS = {Level.OK: 0, Level.WARN: 1, Level.COLLAPSE: 2}


@dataclass(frozen=True, slots=True)
class Event:
    """A line of `events.jsonl`: the alarm spoke, or acted, after a step.

    Attributes:
        step: The step.
        level: The alarm's level then: "ok", "warn" or "collapse".
        reason: Why, with the numbers; "" for "ok".
        action: What was done: "none" (all is well again), "warn", "stop", "rollback" or
            "strengthen".
        restored_step: Step of the student that a rollback put back, 0 for the initial one; else
            None.
        lambda_gold: Weight of the golden term from the next step on.
        beta_reference: Weight of the reference term from the next step on.
    """

    step: int
    level: str
    reason: str
    action: str
    restored_step: int | None
    lambda_gold: float
    beta_reference: float


@dataclass(frozen=True, slots=True)
class Guard:
    """The alarm of a run between two steps.

    Attributes:
        objective: The objective with the weights in force.
        alarm: What the alarm knows.
        answer: What was done about the collapse that lasts; "" where there is none, or nothing.
        num_actions: How often the weights were raised.
        rollbacks: Of each rollback the step that was restored and the one after which it was.
    """

    objective: ObjectiveConfig
    alarm: Alarm = field(default_factory=Alarm)
    answer: str = ""
    num_actions: int = 0
    rollbacks: tuple[tuple[int, int], ...] = ()


def ask(
    guard: Guard, line: Mapping[str, Any], config: Config, checkpoints: Iterable[int]
) -> tuple[Guard, Event | None, dict[str, int]]:
    """Show the alarm a line of metrics, and decide what is to be done about it.

    Args:
        guard: The state before the line.
        line: The line of a step, evaluation and all.
        config: The configuration; with alarm.action = "none" nothing is asked.
        checkpoints: The steps whose checkpoints are there.

    Returns:
        The state after it, the event if there is one, and what the line is to say of it.
    """
    if config.alarm.action == "none":
        return guard, None, {}
    seen = _see(guard, line)
    marks = {"alarm/level": LEVELS[seen.alarm.level]}
    action = _action(guard, seen, config.alarm)
    if not action:
        return seen, None, marks
    restored = None
    if action == "rollback":
        usable = _usable(seen, checkpoints, config.run.save_every)
        restored = _newest(usable, seen.alarm.last_ok or 0)
        marks["alarm/restored_step"] = restored
    reason = seen.alarm.reason
    if action == "stop" and config.alarm.action in RAISING:
        reason += f"; the alarm has acted {seen.num_actions} times (alarm.max_actions)"
    weights = {name: getattr(seen.objective, name) for name in STABILISERS}
    if action in RAISING:
        weights = {
            name: config.alarm.factor * weight if weight else STABILISERS[name]
            for name, weight in weights.items()
        }
    event = Event(line["step"], str(seen.alarm.level), reason, action, restored, **weights)
    return _after(seen, event), event, marks


def replay(
    objective: ObjectiveConfig,
    lines: Iterable[Mapping[str, Any]],
    events: Iterable[Mapping[str, Any]],
) -> Guard:
    """The state after the lines and events of a run folder.

    Args:
        objective: The objective of the configuration, presets filled in.
        lines: Lines of metrics, in order.
        events: Lines of events, at most one to a step.

    Returns:
        What `ask` gave after the last of these lines.
    """
    guard = Guard(objective)
    # A line of another version may hold more.
    names = [f.name for f in dataclasses.fields(Event)]
    by_step = {row["step"]: Event(**{name: row[name] for name in names}) for row in events}
    for line in lines:
        guard = _see(guard, line)
        if line["step"] in by_step:
            guard = _after(guard, by_step[line["step"]])
    return guard


def spared(guard: Guard, checkpoints: Iterable[int], config: Config) -> set[int]:
    """The checkpoints that a rollback may need, now or once a later step has proved healthy.

    Args:
        guard: The state.
        checkpoints: The steps whose checkpoints are there.
        config: The configuration.

    Returns:
        Steps; none before the alarm has called a step healthy, or where it is not asked.
    """
    last_ok, best = guard.alarm.last_ok, guard.alarm.history.best_evaluation
    if config.alarm.action == "none" or last_ok is None:
        return set()
    usable = _usable(guard, checkpoints, config.run.save_every)
    # Where accuracy falls, the alarm takes all back that it said since the best evaluation.
    safe = min(last_ok, best.step) if best else last_ok
    if config.alarm.action != "rollback":
        # One to go back to by hand, or with --resume --set alarm.action=rollback.
        return {_newest(usable, safe)}
    later = min((step for step in usable if step > last_ok), default=0)
    return {_newest(usable, last_ok), _newest(usable, safe), later}


def _usable(guard: Guard, checkpoints: Iterable[int], every: int) -> list[int]:
    """The checkpoints that may be gone back to, if their steps are healthy."""
    # An interrupt saves, too. Such a checkpoint is passed over, so that a run does not depend on
    # whether it was interrupted; and so are those of a student that a rollback replaced.
    return [
        step
        for step in checkpoints
        if step % every == 0 and not any(old < step < new for old, new in guard.rollbacks)
    ]


def _newest(steps: Iterable[int], last: int) -> int:
    """The last of the steps up to a last one; 0, the initial student, where there is none."""
    return max((step for step in steps if step <= last), default=0)


def _see(guard: Guard, line: Mapping[str, Any]) -> Guard:
    alarm = advance(guard.alarm, line)
    answer = guard.answer if alarm.level == Level.COLLAPSE else ""
    return dataclasses.replace(guard, alarm=alarm, answer=answer)


def _action(before: Guard, seen: Guard, settings: AlarmConfig) -> str:
    """What is to be done: the name of an action; "" for nothing, "none" for saying so."""
    level, wanted = seen.alarm.level, settings.action
    is_used_up = wanted in RAISING and seen.num_actions >= settings.max_actions
    if level == Level.COLLAPSE:
        if not seen.answer:
            return "stop" if is_used_up else wanted
        # The user has seen it and now asks for more, with --resume.
        was_only_told = seen.answer in ("warn", "stop")
        return wanted if was_only_told and wanted in RAISING and not is_used_up else ""
    if level == before.alarm.level:
        return ""
    return "warn" if level == Level.WARN else "none"


def _after(seen: Guard, event: Event) -> Guard:
    """The state once an event is dealt with."""
    weights = {name: getattr(event, name) for name in STABILISERS}
    after = dataclasses.replace(
        seen,
        objective=dataclasses.replace(seen.objective, **weights),
        answer=event.action if event.level == Level.COLLAPSE else "",
        num_actions=seen.num_actions + (event.action in RAISING),
    )
    if event.restored_step is None:
        return after
    return dataclasses.replace(
        after,
        alarm=after_rollback(seen.alarm, event.restored_step),
        answer="",
        rollbacks=(*seen.rollbacks, (event.restored_step, event.step)),
    )
