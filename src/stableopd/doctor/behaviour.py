"""What both models do on a few prompts: how they stop and repeat, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray

from stableopd.config import RepetitionConfig
from stableopd.diagnostics.repetition import repetition_rate, repetitive_tokens
from stableopd.diagnostics.truncation import truncation_rate
from stableopd.doctor.patient import Check
from stableopd.doctor.scoring import TokenScores, overlap_k
from stableopd.rollout.stops import HIGH_TRUNCATION, STOP_GAP_NATS, Finding, StopLogps, StopPlan
from stableopd.types import Rollout, StopReason

__all__ = [
    "alignment",
    "golden_ends",
    "mean_stop_logps",
    "repetition",
    "scaled_repetition",
    "stop_scoring",
    "teacher_rollouts",
]

# Untuned: below, and this far apart, the two models seldom consider the same tokens. The overlap
# alone says little where both are sure of one token, and the others are noise.
LOW_OVERLAP, HIGH_KL_NATS = 0.5, 0.5

# Untuned: shares of a few rollouts that are more than an accident.
HIGH_REPETITION, HIGH_REPETITIVE_SHARE = 0.25, 0.5

# RepRate's tau grows with its window L from the demo's pair to the paper's, as a power of L.
DEMO_PAIR, PAPER_PAIR = (64, 3.0), (10_000, 10.0)
WINDOW_SHARE = 2 / 3  # of the characters that fit into the budget, as in the demo


def mean_stop_logps(rollouts: Many[Rollout], scores: Many[TokenScores]) -> StopLogps | None:
    """Mean log-probs of both models at the ends of rollouts that stopped.

    Args:
        rollouts: Rollouts.
        scores: Their scores, with a teacher's.

    Returns:
        The means in nats; None where no teacher scored, or no rollout stopped.
    """
    stopped = [s for r, s in zip(rollouts, scores, strict=True) if r.stop_reason == StopReason.STOP]
    if not stopped or not len(stopped[0].teacher):
        return None
    return StopLogps(
        float(np.mean([s.student[-1] for s in stopped])),
        float(np.mean([s.teacher[-1] for s in stopped])),
        len(stopped),
    )


def stop_scoring(plan: StopPlan, as_event: StopLogps, by_token: StopLogps, is_given: bool) -> Check:
    """Both ways to score the student's stops, beside each other.

    Args:
        plan: How a run would end rollouts and score their ends.
        as_event: The stop as one event over the ids of both models.
        by_token: Each stop by its own id.
        is_given: Whether the user's configuration says how stops are scored.

    Returns:
        WARN where scoring by token forbids what the event allows, and this may be done; no
        finding where there is one stop id.
    """
    numbers = {
        "count": as_event.count,
        "student_event": as_event.student_mean,
        "teacher_event": as_event.teacher_mean,
        "student_token": by_token.student_mean,
        "teacher_token": by_token.teacher_mean,
    }
    message = (
        f"mean log-prob at {as_event.count} stops, student and teacher: as one event "
        f"{as_event.student_mean:.2f} and {as_event.teacher_mean:.2f}, by the stop's own id "
        f"{by_token.student_mean:.2f} and {by_token.teacher_mean:.2f} nats"
    )
    gap = (by_token.student_mean - by_token.teacher_mean) - (
        as_event.student_mean - as_event.teacher_mean
    )
    numbers["token_gap"] = gap
    if gap <= STOP_GAP_NATS:
        # With one stop id the two are the same, and the audit's line says it.
        differ = len({*plan.student_ids, *(plan.teacher_ids or ())}) > 1
        found = (Finding("OK", "stop scoring", f"{message}."),) if differ else ()
        return Check(found, numbers)
    if plan.mode == "event" and is_given:
        message += "; the event is what this configuration scores"
        return Check((Finding("OK", "stop scoring", f"{message}."),), numbers)
    message += ": token by token the teacher forbids what it wants itself, with another id"
    fix = 'score stops as one event: objective.stop = "event" (the default here).'
    return Check((Finding("WARN", "stop scoring", f"{message}.", fix),), numbers)


def golden_ends(scores: Many[TokenScores]) -> Check:
    """Whether golden solutions end where the models would end.

    Args:
        scores: Scores of golden solutions, their stop as the last token.

    Returns:
        WARN where the teacher (without one, the student) would not stop there: solutions that
        were cut off, or a form that it does not know.
    """
    student = float(np.mean([s.student[-1] for s in scores]))
    numbers = {
        "count": len(scores),
        "student_stop_logp": student,
        "student_logp": float(np.mean(np.concatenate([s.student for s in scores]))),
    }
    said = f"the student stops with log-prob {student:.2f}"
    judge, value = "student", student
    if len(scores[0].teacher):
        judge, value = "teacher", float(np.mean([s.teacher[-1] for s in scores]))
        numbers["teacher_stop_logp"] = value
        numbers["teacher_logp"] = float(np.mean(np.concatenate([s.teacher for s in scores])))
        said += f", the teacher with {value:.2f}"
    message = f"at the ends of {len(scores)} golden solutions {said} (mean, nats)"
    if value >= -STOP_GAP_NATS:
        return Check((Finding("OK", "golden ends", f"{message}."),), numbers)
    message += f": to the {judge} they look unfinished"
    fix = "look at the ends of the solutions: were they cut off, or does a closing phrase lack?"
    return Check((Finding("WARN", "golden ends", f"{message}.", fix),), numbers)


def scaled_repetition(
    settings: RepetitionConfig, chars_per_token: float, max_new_tokens: int
) -> RepetitionConfig:
    """RepRate's window and ratio, fitted to a budget in which the configured window is too long.

    L = 2/3 of the characters that fit into the budget; tau = 3 (L / 64)^0.238, so that L = 64 has
    the demo's 3 and L = 10,000 the paper's 10.

    Args:
        settings: The configured ones.
        chars_per_token: Mean characters of a token.
        max_new_tokens: Length budget in tokens.

    Returns:
        The configured ones where some rollout can be longer than their window, else fitted ones.
    """
    room = chars_per_token * max_new_tokens
    if settings.window_chars < room:
        return settings
    window = max(8, round(WINDOW_SHARE * room))
    (low, low_ratio), (high, high_ratio) = DEMO_PAIR, PAPER_PAIR
    power = math.log(high_ratio / low_ratio) / math.log(high / low)
    ratio = max(low_ratio, round(low_ratio * (window / low) ** power, 1))
    return RepetitionConfig(window, ratio, settings.ngram, settings.min_run)


def repetition(
    rollouts: Many[Rollout], settings: RepetitionConfig, max_new_tokens: int
) -> tuple[Check, RepetitionConfig]:
    """How repetitive the student's rollouts are, and whether RepRate can see it in a run.

    Args:
        rollouts: Rollouts of the untrained student, at least one.
        settings: The configured window, ratio and n-gram.
        max_new_tokens: Length budget in tokens.

    Returns:
        WARN where many repeat, and where the configured window is longer than any rollout; and
        the window and ratio that were used.
    """
    per_token = sum(len(r.completion) for r in rollouts) / sum(
        len(r.completion_ids) for r in rollouts
    )
    used = scaled_repetition(settings, per_token, max_new_tokens)
    numbers = _rollout_numbers(rollouts, used) | {
        "window_chars": used.window_chars,
        "ratio": used.ratio,
        "chars_per_token": per_token,
    }
    rate, share = numbers["repetition_rate"], numbers["repetitive_share"]
    message = (
        f"{rate:.0%} of {len(rollouts)} rollouts of the untrained student repeat themselves "
        f"(RepRate, L = {used.window_chars}, tau = {used.ratio:g}), {share:.0%} of their tokens do"
    )
    if rate >= HIGH_REPETITION or share >= HIGH_REPETITIVE_SHARE:
        fix = 'use objective.method = "stable_opd", or fine-tune on golden solutions first ("sft").'
        findings = [Finding("WARN", "repetition", f"{message}.", fix)]
    else:
        findings = [Finding("OK", "repetition", f"{message}.")]
    if used != settings:
        findings.append(
            Finding(
                "WARN",
                "RepRate window",
                f"{max_new_tokens} tokens hold about {per_token * max_new_tokens:.0f} characters: "
                f"with L = {settings.window_chars} RepRate would be 0 whatever happens.",
                f"set [repetition] window_chars = {used.window_chars}, ratio = {used.ratio:g}.",
            )
        )
    return Check(tuple(findings), numbers), used


def teacher_rollouts(
    teacher: Many[Rollout], student: Many[Rollout], used: RepetitionConfig, max_new_tokens: int
) -> Check:
    """Whether the teacher itself stops within the budget and does not repeat.

    Args:
        teacher: Its rollouts of the same prompts.
        student: The student's.
        used: Window and ratio of RepRate.
        max_new_tokens: Length budget in tokens.

    Returns:
        WARN where it is cut off or repeats often.
    """
    numbers = _rollout_numbers(teacher, used)
    mine = float(np.mean([len(r.completion_ids) for r in student]))
    cut, rate = numbers["truncation_rate"], numbers["repetition_rate"]
    message = (
        f"of {len(teacher)} rollouts of the teacher {cut:.0%} are cut off at {max_new_tokens} "
        f"tokens and {rate:.0%} repeat; mean length {numbers['mean_length']:.0f}, the student's "
        f"{mine:.0f}"
    )
    if cut >= HIGH_TRUNCATION:
        fix = "raise rollout.max_new_tokens, or use a teacher that writes shorter answers."
        message += ": who learns from it learns not to end"
    elif rate >= HIGH_REPETITION:
        fix = 'use another teacher, or objective.method = "stable_opd".'
        message += ": it loops by itself"
    else:
        return Check((Finding("OK", "teacher rollouts", f"{message}."),), numbers)
    return Check((Finding("WARN", "teacher rollouts", f"{message}.", fix),), numbers)


def alignment(scores: Many[TokenScores], num_tokens: int) -> Check:
    """How far the teacher is from the student, at the states that the student visits.

    Args:
        scores: Scores of the student's rollouts, with a teacher's.
        num_tokens: Ids that both models share.

    Returns:
        WARN where the sets of likely tokens hardly overlap and the divergence is large.
    """

    def mean(values: Many[NDArray[np.float64]]) -> float:
        return float(np.concatenate(values).mean())

    k = overlap_k(num_tokens)
    numbers = {
        "k": k,
        "overlap": mean([s.overlap for s in scores]),
        "kl_student_teacher": mean([s.kl for s in scores]),
        "student_entropy": mean([s.student_entropy for s in scores]),
        "teacher_entropy": mean([s.teacher_entropy for s in scores]),
        "student_logp": mean([s.student for s in scores]),
        "teacher_logp": mean([s.teacher for s in scores]),
    }
    message = (
        f"of the teacher's {k} likeliest tokens {numbers['overlap']:.0%} are among the student's; "
        f"KL(student || teacher) {numbers['kl_student_teacher']:.2f}, entropies "
        f"{numbers['student_entropy']:.2f} and {numbers['teacher_entropy']:.2f} nats a token"
    )
    if numbers["overlap"] >= LOW_OVERLAP or numbers["kl_student_teacher"] < HIGH_KL_NATS:
        return Check((Finding("OK", "overlap", f"{message}."),), numbers)
    fix = (
        "fine-tune the student on solutions of the teacher first (sft), take prompts and a prompt "
        "format that the teacher was trained on, or use a teacher of the same family (2604.13016)."
    )
    message += ": the two seldom consider the same tokens, and little can be taught"
    return Check((Finding("WARN", "overlap", f"{message}.", fix),), numbers)


def _rollout_numbers(rollouts: Many[Rollout], used: RepetitionConfig) -> dict[str, float]:
    labels = [repetitive_tokens(r.completion_ids, used.ngram, used.min_run) for r in rollouts]
    texts = [r.completion for r in rollouts]
    return {
        "num_rollouts": len(rollouts),
        "mean_length": float(np.mean([len(r.completion_ids) for r in rollouts])),
        "truncation_rate": truncation_rate([r.stop_reason for r in rollouts]),
        "repetition_rate": repetition_rate(texts, used.window_chars, used.ratio),
        "repetitive_share": float(np.concatenate(labels).mean()),
    }
