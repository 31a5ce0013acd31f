"""What a person sees in the terminal while a run goes on: a live view, or plain lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stableopd.text import shown

__all__ = ["LiveView", "alarm_message", "stop_message", "table"]

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
SIDE_BY_SIDE = 44  # columns that a panel needs
PLAIN_INTERVAL_S = 10.0
RECENT_STEPS = 20  # the ETA follows the speed of these

_Series = list[tuple[int, float]]  # (step, value), in order


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> Table:
    """Make a table of text and numbers, to be printed on a console.

    Args:
        columns: Headings.
        rows: One cell per column; numbers are set to the right, floats with three decimals,
            None and nan as "-". Text is shown without markup; its lines stay lines.
        title: Shown above; "" for none.

    Returns:
        The table.
    """
    made = Table(title=Text(title, style="bold") if title else None, title_justify="left")
    for place, name in enumerate(columns):
        numbers = any(isinstance(row[place], int | float) for row in rows)
        made.add_column(Text(shown(name)), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def alarm_message(event: Mapping[str, Any]) -> str:
    """What to tell of an event of the alarm.

    Args:
        event: A line of `events.jsonl`.

    Returns:
        A sentence or two.
    """
    step, action, restored = event["step"], event["action"], event["restored_step"]
    if action == "none":
        return f"Step {step}: the alarm sees nothing suspicious any more."
    said = f"Step {step}: {event['level'].upper()}: {event['reason']}."
    weights = (
        f"objective.lambda_gold is now {event['lambda_gold']:g} and objective.beta_reference "
        f"{event['beta_reference']:g}."
    )
    if action == "rollback":
        student = f"student of step {restored}" if restored else "initial student"
        return f"{said} The {student} is put back; {weights}"
    if action == "strengthen":
        return f"{said} The run goes on; {weights}"
    if action == "stop":
        return f"{said} The run is saved and stops."
    is_collapse = event["level"] == "collapse"
    return f"{said} The run goes on, as alarm.action only warns." if is_collapse else said


def stop_message(event: Mapping[str, Any], num_steps: int, action: str) -> str:
    """What to tell at the end of a run that the alarm stopped.

    Args:
        event: The line of `events.jsonl` with the action "stop".
        num_steps: The last step of the run.
        action: `alarm.action` of the run.

    Returns:
        Why it stopped and how to go on.
    """
    said = f"The alarm stopped the run after step {event['step']} of {num_steps}."
    if event["step"] >= num_steps:
        return said
    said += " Go on all the same with the same command and --resume"
    if action == "stop":
        said += (
            "; with --set alarm.action=rollback added, the newest healthy checkpoint (the initial "
            "student, where there is none) is put back and the stabilisers are turned on"
        )
    return f"{said}."


class LiveView:
    """Progress of one or more arms; use it as a context manager.

    On a terminal each arm has a panel with a progress bar, its speed and four sparklines; arms
    stand side by side where there is room. Elsewhere, and where TERM is dumb, plain lines are
    printed: for the first and last step, each evaluation, and every ten seconds.

    Args:
        title: What runs; shown above.
        num_steps: The last step of every arm.
        arms: Names of the arms.
        console: Where to; None for standard output.
        clock: Seconds, increasing.
    """

    def __init__(
        self,
        title: str,
        num_steps: int,
        arms: Sequence[str],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._console = console or Console()
        self._clock = clock
        self._arms = {name: _Arm(name, num_steps) for name in arms}
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        else:
            self._plain(self._title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, arm: str, line: Mapping[str, Any]) -> None:
        """Show a line of metrics.

        Args:
            arm: One of the names given at the start.
            line: What went into `metrics.jsonl`: "step" and whatever was measured.
        """
        state = self._arms[arm]
        state.add(line, self._clock())
        if self._live is None and state.is_due(line, self._clock()):
            name = f"{arm}  " if len(self._arms) > 1 else ""
            self._plain(name + state.plain_line())

    def message(self, text: str) -> None:
        """Print a line of text, above the panels where there are any."""
        self._plain(text)

    def _plain(self, text: str) -> None:
        # soft_wrap: a log line stays one line, whatever width is assumed.
        self._console.print(Text(shown(text)), soft_wrap=self._live is None)

    def _render(self) -> RenderableType:
        arms = self._arms.values()
        # One scale of length for all arms, or they could not be compared by eye.
        longest = max((value for arm in arms for _, value in list(arm.length)), default=1.0)
        panels = [arm.panel(longest or 1.0) for arm in arms]
        if self._console.width < SIDE_BY_SIDE * len(panels) or len(panels) == 1:
            return Group(Text(self._title, style="bold"), *panels)
        grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
        for _ in panels:
            grid.add_column(ratio=1)
        grid.add_row(*panels)
        return Group(Text(self._title, style="bold"), grid)


@dataclass
class _Arm:
    """One arm's history: a value per step and quantity, and when recent steps came."""

    name: str
    num_steps: int
    step: int | None = None
    speed: float = math.nan
    length: _Series = field(default_factory=list[tuple[int, float]])
    truncation: _Series = field(default_factory=list[tuple[int, float]])
    repetition: _Series = field(default_factory=list[tuple[int, float]])
    evaluated: _Series = field(default_factory=list[tuple[int, float]])
    graded: _Series = field(default_factory=list[tuple[int, float]])
    times: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    printed_at: float = -math.inf

    def add(self, line: Mapping[str, Any], now: float) -> None:
        self.step = int(line["step"])
        self.speed = _number(line, "tokens_per_s")
        self.times = [*self.times[-RECENT_STEPS:], (now, self.step)]
        for series, key in (
            (self.length, "rollout/mean_length"),
            (self.truncation, "rollout/truncation_rate"),
            (self.repetition, "rollout/repetition_rate"),
            (self.evaluated, "eval/accuracy"),
            (self.graded, "rollout/accuracy"),
        ):
            if not math.isnan(value := _number(line, key)):
                series.append((self.step, value))

    @property
    def accuracy(self) -> _Series:
        """Of held-out problems where there are evaluations, else of the rollouts; never mixed."""
        return self.evaluated or self.graded

    def is_due(self, line: Mapping[str, Any], now: float) -> bool:
        """Whether a plain line is worth printing now."""
        event = self.step == self.num_steps or any(str(key).startswith("eval/") for key in line)
        if event or now - self.printed_at >= PLAIN_INTERVAL_S:
            self.printed_at = now
            return True
        return False

    def eta(self) -> str:
        """Time to the last step at the speed of recent steps."""
        if self.step is not None and self.step >= self.num_steps:
            return "0:00"
        if len(self.times) < 2 or self.times[-1][1] <= self.times[0][1]:
            return "-"
        (start, first), (end, last) = self.times[0], self.times[-1]
        return _duration((end - start) / (last - first) * (self.num_steps - last))

    def plain_line(self) -> str:
        return (
            f"step {self.step}/{self.num_steps}  length {_last(self.length, '.1f')}  "
            f"truncation {_last(self.truncation, '.2f')}  "
            f"repetition {_last(self.repetition, '.2f')}  "
            f"accuracy {_last(self.accuracy, '.2f')}  {_speed(self.speed)}  ETA {self.eta()}"
        )

    def panel(self, longest: float) -> Panel:
        grid = Table.grid(expand=True, padding=(0, 1, 0, 0))
        grid.add_column(no_wrap=True, min_width=12)
        grid.add_column(ratio=1, no_wrap=True)
        grid.add_column(justify="right", no_wrap=True, min_width=8)
        step = self.step or 0
        bar = ProgressBar(total=self.num_steps, completed=step)
        grid.add_row(f"step {step}/{self.num_steps}", bar, f"ETA {self.eta()}")
        for name, series, style, top, form in (
            ("length", self.length, "cyan", longest, ".1f"),
            ("truncation", self.truncation, "red", 1.0, ".2f"),
            ("repetition", self.repetition, "magenta", 1.0, ".2f"),
            ("accuracy", self.accuracy, "green", 1.0, ".2f"),
        ):
            line = _Sparkline(list(series), style, top, self.num_steps, step)
            grid.add_row(name, line, _last(series, form))
        return Panel(
            grid,
            title=Text(self.name, style="bold"),
            title_align="left",
            subtitle=_speed(self.speed),
            subtitle_align="right",
            padding=(0, 1),
        )


@dataclass
class _Sparkline:
    """A row of blocks from 0 to `top`; its cells are the steps from 0 to `num_steps`.

    So all rows of a panel line up with the progress bar, however seldom one is measured.
    """

    series: _Series
    style: str
    top: float
    num_steps: int
    step: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = ASCII_BLOCKS if options.ascii_only else BLOCKS
        shown = ""
        for value in _cells(self.series, self.num_steps, self.step, options.max_width):
            share = min(max(value / self.top, 0.0), 1.0)
            shown += " " if math.isnan(value) else blocks[round(share * (len(blocks) - 1))]
        yield Text(shown, style=self.style, no_wrap=True)


def _cells(series: _Series, num_steps: int, step: int, width: int) -> list[float]:
    """The mean of each cell's steps; the cell before where it has none; nan before the first."""
    found: dict[int, list[float]] = {}
    for at, value in series:
        found.setdefault(min(at * width // max(num_steps, 1), width - 1), []).append(value)
    cells: list[float] = []
    for cell in range(min(step * width // max(num_steps, 1) + 1, width)):
        values = found.get(cell)
        previous = cells[-1] if cells else math.nan
        cells.append(sum(values) / len(values) if values else previous)
    return cells


def _number(line: Mapping[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _last(series: _Series, form: str) -> str:
    return format(series[-1][1], form) if series else "-"


def _speed(tokens_per_s: float) -> str:
    if math.isnan(tokens_per_s):
        return "- tok/s"
    if tokens_per_s >= 1000:
        return f"{tokens_per_s / 1000:.1f}k tok/s"
    return f"{tokens_per_s:.0f} tok/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return "\n".join(shown(line) for line in str(value).split("\n"))
