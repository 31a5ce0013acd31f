"""The verdict: whether a run collapsed, and which of the two causes it was.

    A  stop-token mismatch: from the first step on the teacher gives the student's stops a log-prob
       that is several nats lower, so that the student unlearns to stop (arXiv 2609.20511)
    B  repetition: repeated text is easy for both models, its tokens carry the less negative
       advantage, and they take over the update (arXiv 2604.08527)

The rules are stated at the constants below and in docs/diagnose.md. Every one of them shows in the
evidence with its numbers, so that a reader can disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stableopd.diagnostics.alarm import Alarm, Level
from stableopd.diagnostics.evidence import (
    MARKER_SHARE,
    Clues,
    Facts,
    ends_repetitive,
    find_clues,
    say,
)
from stableopd.diagnostics.losses import Losses, hidden_by, weaken
from stableopd.diagnostics.onset import Onset
from stableopd.diagnostics.summary import Summary

__all__ = ["Diagnosis", "Verdict", "judge"]

# Design: with fewer rollouts a rate of one half is known to no better than +-0.25.
MIN_ROLLOUTS = 16

# Design: a collapse cuts off most rollouts. The paper's stable phase has TruncRate .23 and .5 at a
# constant level and its collapse ends above .95, so that the level alone says little below .9,
# and a rise to .6 says enough.
COLLAPSED_AFTER_RISE, COLLAPSED_LEVEL = 0.6, 0.9

Sign = Literal["truncation", "repetition", "alarm"]
Cause = Literal["A", "B", "both", "unclear", "healthy", "too little data"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What happened, and why it is thought so.

    Attributes:
        cause: "A" (stop-token mismatch), "B" (repetition), "both", "unclear" (a collapse whose
            cause the files do not show), "healthy", or "too little data".
        collapsed: Whether a collapse was found.
        confidence: "high", "medium" or "low".
        headline: One sentence.
        evidence: What speaks for it and against it, one sentence each.
        advice: What to do, one sentence each, the first first.
    """

    cause: Cause
    collapsed: bool
    confidence: Literal["high", "medium", "low"]
    headline: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that is known about one run.

    Attributes:
        name: What to call it.
        source: What was read, as "run folder" or "TRL (parquet)".
        summary: Measurements of its rollouts.
        lines: One mapping a step with the names of docs/metrics.md: those of metrics.jsonl where
            the run has one, else made from the rollouts.
        onset: When truncation changed phase.
        repetition_onset: When the share of repetitive units did.
        verdict: The verdict.
        notes: How truncation was decided, damaged lines, what is missing.
        config: The run's config.toml; "" where there is none.
        environment: The run's environment.json; "" where there is none.
        warned_at: Step of the first WARN of the alarm on these lines; None without one.
        alarmed_at: Step of its first COLLAPSE; None without one.
        alarm: Its state after the last line.
    """

    name: str
    source: str
    summary: Summary
    lines: tuple[Mapping[str, Any], ...]
    onset: Onset
    repetition_onset: Onset
    verdict: Verdict
    notes: tuple[str, ...]
    config: str = ""
    environment: str = ""
    warned_at: int | None = None
    alarmed_at: int | None = None
    alarm: Alarm = field(default_factory=Alarm)


def judge(
    summary: Summary,
    lines: Sequence[Mapping[str, Any]],
    onset: Onset,
    repetition_onset: Onset,
    facts: Facts | None = None,
    alarm: Alarm | None = None,
    losses: Losses | None = None,
) -> Verdict:
    """Say whether a run collapsed, of which cause, and on what evidence.

    Args:
        summary: Measurements of its rollouts.
        lines: One mapping a step with the names of docs/metrics.md.
        onset: Of the truncation rate.
        repetition_onset: Of the share of repetitive units.
        facts: What the run's own files say about stops.
        alarm: State of the alarm after these lines: its early signs are told of a healthy run.
        losses: What of the rollouts could not be read.

    Returns:
        The verdict. A collapse is TruncRate that rose to 0.6 or more and stayed, or that is 0.9 or
        more throughout; where cut-offs are unknown or guessed from lengths, also repetition that
        rose to 0.5 and stayed; and whatever the alarm calls a collapse at the last step. Where
        none is found and one may be in what was lost, the verdict is "too little data".
    """
    num_rollouts, alarm = summary.overall.num_rollouts, alarm or Alarm()
    losses = losses or Losses()
    if num_rollouts < MIN_ROLLOUTS:
        count = "1 rollout" if num_rollouts == 1 else f"{num_rollouts or 'No'} rollouts"
        return _too_little(f"{count}: too few to judge")
    if summary.overall.max_length == 0:
        return _too_little(f"All {num_rollouts:,} completions are empty: nothing to judge")
    facts = facts or Facts()
    clues = find_clues(summary, lines, onset, repetition_onset, facts)
    sign = _sign(summary, onset, repetition_onset, clues, alarm)
    evidence = say(summary, clues, onset, repetition_onset, facts, bool(sign))
    is_never_right = _is_never_right(summary, lines)
    if is_never_right:
        evidence = (*evidence, "No answer was graded correct in any of these steps.")
    if not sign:
        if hidden := hidden_by(losses):
            return _too_much_lost(hidden, evidence)
        found = _healthy(summary, onset, evidence, clues, alarm, is_never_right)
        return replace(found, confidence=weaken(found.confidence, losses))
    if sign == "alarm":
        evidence = (*evidence, f"At the last step the alarm says collapse: {alarm.reason}.")
    cause, confidence = _cause(clues)
    if sign != "truncation" or summary.truncation_source == "pile-up":
        confidence = "low" if confidence == "low" else "medium"
    headline = _headline(sign, cause, onset, repetition_onset)
    advice = _advice(cause, onset, repetition_onset, alarm, facts.checkpoints)
    return Verdict(cause, True, weaken(confidence, losses), headline, evidence, advice)


def _too_little(what: str) -> Verdict:
    return Verdict(
        "too little data",
        False,
        "high",
        f"{what}; {MIN_ROLLOUTS} or more with text are needed.",
        (),
        ("Give the dumps of more steps.",),
    )


def _too_much_lost(why: str, evidence: tuple[str, ...]) -> Verdict:
    return Verdict(
        "too little data",
        False,
        "low",
        f"No collapse in what could be read, but {why}: too little to judge.",
        evidence,
        ("Restore what is damaged; the notes name it. Or diagnose the steps before it by name.",),
    )


def _sign(
    summary: Summary, onset: Onset, repetition_onset: Onset, clues: Clues, alarm: Alarm
) -> Sign | None:
    """What a collapse shows in; None without one."""
    if _is_truncated(onset, clues.truncation):
        return "truncation"
    # Lengths in a file may pile up by chance: they do not outvote what the texts show.
    if math.isnan(clues.truncation) or summary.truncation_source == "pile-up":
        looping = summary.overall.loop_share >= COLLAPSED_LEVEL
        if looping or ends_repetitive(repetition_onset):
            return "repetition"
    return "alarm" if alarm.level is Level.COLLAPSE else None


def _is_truncated(onset: Onset, rate: float) -> bool:
    if onset.kind == "rise":
        return onset.end >= COLLAPSED_AFTER_RISE
    if onset.kind in ("healed", "fall"):
        return onset.end >= COLLAPSED_LEVEL
    return rate >= COLLAPSED_LEVEL


def _cause(clues: Clues) -> tuple[Cause, Literal["high", "medium", "low"]]:
    """The cause, and how sure that is."""
    measured = not math.isnan(clues.first_gap)
    if clues.forbids_stops:
        # A student that no longer stops goes on and repeats itself: that is A's symptom.
        # Repetition that rose while the student still stopped is a cause of its own.
        is_driver = clues.repeats and clues.repeats_first is True and not clues.unlearnt_first
        return ("both", "medium") if is_driver else ("A", "high")
    if not measured and clues.marker_share >= MARKER_SHARE:
        return ("A", "medium" if not clues.repeats else "low")
    if clues.repeats:
        return ("B", "high" if measured else "medium")
    return ("unclear", "low")


def _is_never_right(summary: Summary, lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether answers were graded, and not one of them was correct."""
    names = ("rollout/accuracy", "eval/accuracy")
    told = [line[name] for line in lines for name in names if name in line]
    numbers = [x for x in (*told, summary.overall.accuracy) if isinstance(x, int | float)]
    known = [x for x in numbers if not math.isnan(x)]
    return bool(known) and max(known) == 0


def _healthy(
    summary: Summary,
    onset: Onset,
    evidence: tuple[str, ...],
    clues: Clues,
    alarm: Alarm,
    is_never_right: bool,
) -> Verdict:
    unknown = math.isnan(clues.truncation)
    advice: list[str] = []
    headline = "No collapse."
    if onset.kind == "rise":
        headline = f"No collapse, but truncation rose to {onset.end:.2f}: watch this run."
        advice.append("Go on with the alarm on, and diagnose again later.")
    elif onset.kind == "healed":
        headline = "No collapse: truncation rose and came back."
    elif not unknown and (not summary.by_step or onset.kind == "too short"):
        headline = "No collapse in these rollouts; too few steps to see a trend."
    elif alarm.level is not Level.OK:
        headline = "No collapse yet, but there are early signs of one."
        evidence = (*evidence, f"At the last step the alarm says {alarm.level}: {alarm.reason}.")
        advice.append('Go on with alarm.action = "rollback", or start over with stable_opd.')
    if clues.forbids_stops:
        headline = "No collapse yet, but the teacher forbids the student's stops (cause A)."
        advice.append(_STOP_AS_EVENT)
    if is_never_right:
        headline += " But not one answer was graded correct."
        advice.append(_TRY_THE_GRADER)
    if unknown:
        headline += " Truncation is not known."
        advice.append("Say how long rollouts may be: --max-new-tokens, with --tokenizer for text.")
    level = "medium" if unknown or advice or onset.kind == "too short" else "high"
    return Verdict("healthy", False, level, headline, evidence, tuple(advice))


def _headline(sign: Sign, cause: Cause, onset: Onset, repetition_onset: Onset) -> str:
    rises = [found for found in (onset, repetition_onset) if found.kind == "rise"]
    if sign == "truncation" and onset.kind != "rise" and cause == "unclear":
        return _NEVER_STOPPED
    turn = onset if sign == "truncation" or not rises else rises[0]
    when = f"from step {turn.step} on" if turn.kind == "rise" else "in all of these steps"
    if turn.kind == "too short":
        when = "in these rollouts"
    if sign == "alarm":
        when = f"under way from step {turn.step} on" if turn.kind == "rise" else "under way"
    what = {
        "truncation": "Truncation collapse",
        "repetition": "Collapse into repetition",
        "alarm": "Collapse",
    }[sign]
    why = {
        "A": "cause A, stop-token mismatch",
        "B": "cause B, repetition",
        "both": "both causes, stop-token mismatch and repetition",
    }.get(cause, "the cause is not visible in these files")
    return f"{what} {when}: {why}."


_NEVER_STOPPED = (
    "Nearly all rollouts are cut off from the first step on, and they do not repeat themselves: "
    "the budget may be too short."
)
_STOP_AS_EVENT = (
    'Score stops as one event (objective.stop = "event"), or give both models the same stop ids; '
    "check with `stableopd doctor`."
)
_TRY_THE_GRADER = (
    "Check data.grader and data.answer_marker: `stableopd doctor` grades the golden solutions and "
    "the teacher's own answers."
)
_STABILISE = (
    "Train with golden solutions in each batch and a KL to the initial student: "
    'method = "stable_opd".'
)


def _advice(
    cause: Cause,
    onset: Onset,
    repetition_onset: Onset,
    alarm: Alarm,
    checkpoints: tuple[int, ...] | None,
) -> tuple[str, ...]:
    cures = {
        "A": (_STOP_AS_EVENT,),
        "B": (_STABILISE,),
        "both": (_STOP_AS_EVENT, _STABILISE),
    }.get(
        cause,
        (
            "Run `stableopd doctor` on the two models: it tells whether their stops agree.",
            "Look at the worst rollouts: is the budget simply too short for these problems?",
        ),
    )
    rises = [found.interval for found in (onset, repetition_onset) if found.kind == "rise"]
    healthy = [interval[0] - 1 for interval in rises if interval is not None]
    if not healthy:
        return cures
    # The student can be ill before either rises: the alarm looks at accuracy, too.
    last = max(0, min(healthy if alarm.last_ok is None else [*healthy, alarm.last_ok]))
    return (*cures, _way_back(last, checkpoints))


def _way_back(last: int, checkpoints: tuple[int, ...] | None) -> str:
    """Which student to go back to, of those up to a last healthy step that were kept."""
    if checkpoints is None:
        return f"Go back to a checkpoint of step {last} or earlier: this seldom heals."
    kept = [step for step in checkpoints if step <= last]
    if kept:
        return f"Go back to the checkpoint of step {kept[-1]}: this seldom heals."
    return (
        "Start again from the initial student: this seldom heals, and no checkpoint of step "
        f"{last} or earlier was kept (run.save_every, run.keep_checkpoints)."
    )
