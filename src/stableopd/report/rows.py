"""The prompts and rollouts that a page shows, in its words."""

from __future__ import annotations

from dataclasses import dataclass

from stableopd.diagnostics.summary import PromptMeasures, Summary, WorstRollout
from stableopd.report.excerpts import Piece, cut_pieces
from stableopd.report.render import number
from stableopd.types import StopReason

__all__ = ["PromptRow", "WorstRow", "describe_prompts", "describe_worst"]

NUM_PROMPTS = 10
NUM_WORST = 10
PROMPT_CHARACTERS = 200

ENDINGS = {StopReason.LENGTH: "cut off", StopReason.STOP: "stopped", None: "unknown"}
GRADES = {True: "correct", False: "wrong", None: "not graded"}


@dataclass(frozen=True)
class WorstRow:
    """A rollout to look at, in the words of the page."""

    step: str
    length: str
    ending: str
    grade: str
    repetitive: str
    loop: str
    prompt: str
    pieces: tuple[Piece, ...]
    place: str


@dataclass(frozen=True)
class PromptRow:
    """A prompt that goes wrong often, in the words of the page."""

    prompt: str
    num_rollouts: str
    length: str
    truncation: str
    repetition: str


def describe_worst(summary: Summary) -> list[WorstRow]:
    """The ten most repetitive rollouts of a summary, the worst first."""
    return [_worst(entry, summary) for entry in summary.worst[:NUM_WORST]]


def describe_prompts(summary: Summary) -> list[PromptRow]:
    """The ten prompts that go wrong most often, as far as they do go wrong."""
    return [_prompt(entry) for entry in summary.by_prompt[:NUM_PROMPTS] if _is_bad(entry)]


def _is_bad(entry: PromptMeasures) -> bool:
    return entry.truncation_rate > 0 or entry.repetition_rate > 0


def _prompt(entry: PromptMeasures) -> PromptRow:
    shown = " ".join(entry.prompt.split()) or entry.prompt_id
    return PromptRow(
        prompt=shown if len(shown) <= PROMPT_CHARACTERS else f"{shown[:PROMPT_CHARACTERS]}…",
        num_rollouts=f"{entry.num_rollouts:,}",
        length=number(entry.mean_length, ",.1f"),
        truncation=number(entry.truncation_rate, ".2f"),
        repetition=number(entry.repetition_rate, ".2f"),
    )


def _worst(entry: WorstRollout, summary: Summary) -> WorstRow:
    unit = summary.parameters.unit
    unit = unit.removesuffix("s") if entry.loop_period == 1 else unit
    loop = "none"
    if entry.loop_start is not None:
        loop = f"{entry.loop_period:,} {unit} × {entry.loop_copies:.1f}"
        left_out = entry.gap[1] if entry.gap and entry.loop_start >= entry.gap[0] else 0
        loop += f", from character {entry.loop_start + left_out:,}"
    share, reason = entry.repetitive_share, entry.stop_reason
    if reason is None and summary.budget is not None and entry.length >= summary.budget:
        reason = StopReason.LENGTH  # as the summary counts it
    return WorstRow(
        step="–" if entry.step is None else f"{entry.step}",
        length=f"{entry.length:,}",
        ending=ENDINGS[reason],
        grade=GRADES[entry.correct],
        repetitive="none" if share == 0 else f"{share:.0%}",
        loop=loop,
        prompt=entry.prompt,
        pieces=cut_pieces(entry),
        place=f"{entry.source}, line {entry.line}",
    )
