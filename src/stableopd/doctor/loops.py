"""The loop test: how surely does each model write once more what has just been repeated?

A rollout that repeats itself is cheap to score where the teacher expects the next copy. If the
teacher expects it *more* than the student does, the log-ratio pays for looping: this is how
truncation collapse by repetition begins, and how it locks (the embedded models are such a pair).

How it is built. Of a completion without its stop the last segment is taken: what follows the last
line end, semicolon, or sentence end (a mark before white space), marks at its own end included. A
segment that closes with no such mark is also tried with the mark before it. Copies that
are there already are removed but for one, six copies are appended, and one forward pass of each
model gives the log-prob of every copy: of the first after none, of the second after one, ... Where
two segments were tried, that one counts to which both models together give more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableopd.doctor.patient import Check
from stableopd.rollout.stops import Finding
from stableopd.types import Sequence

__all__ = ["Trial", "copy_logps", "loop_test", "make_trials", "segments"]

COPIES_BEFORE = (0, 1, 2, 3, 5)  # after so many copies a further one is scored
NUM_APPENDED = 6
MAX_SEGMENT = 32  # tokens; of a longer segment the end is taken

ALWAYS, BEFORE_SPACE = "\n;。！？", ".!?"

# Design: a teacher that gives a further copy even odds, and e^0.5 times the student's.
EVEN_ODDS, LOOP_GAP_NATS = math.log(0.5), 0.5


@dataclass(frozen=True, slots=True)
class Trial:
    """A completion with copies of its last segment.

    Attributes:
        completion: Which completion, from 0.
        sequence: Prompt, completion and copies.
        start: Where the first appended copy begins in the completion.
        width: Tokens of the segment.
    """

    completion: int
    sequence: Sequence
    start: int
    width: int


def segments(pieces: Many[str]) -> list[int]:
    """Where the last segment of a completion begins.

    Args:
        pieces: The text of each token.

    Returns:
        One place, or two where the segment closes with no mark and can also be taken with the
        mark before it; none for an empty completion. A segment is at most `MAX_SEGMENT` tokens.
    """
    end = len(pieces)
    if not end:
        return []
    inner = end
    while inner > 0 and (_is_boundary(pieces, inner) or not pieces[inner - 1].strip()):
        inner -= 1
    if not inner:  # nothing but marks and spaces
        return [max(0, end - MAX_SEGMENT)]
    start = inner - 1
    while start > 0 and not _is_boundary(pieces, start):
        start -= 1
    starts = [start]
    if inner == end and start > 0:
        before = start - 1
        while before > 0 and not pieces[before].strip(" "):
            before -= 1
        starts.append(before)
    return sorted({max(s, end - MAX_SEGMENT) for s in starts}, reverse=True)


def _is_boundary(pieces: Many[str], place: int) -> bool:
    """Whether a segment may end before this place, which is not 0."""
    before = pieces[place - 1]
    after = pieces[place] if place < len(pieces) else " "
    if before.rstrip(" ").endswith(tuple(ALWAYS)):
        return True
    closes = before.rstrip().endswith(tuple(BEFORE_SPACE))
    return closes and (before[-1].isspace() or not after or after[0].isspace())


def make_trials(
    completions: Many[tuple[tuple[int, ...], tuple[int, ...], Many[str]]],
    context: int | None,
    max_completions: int,
) -> list[Trial]:
    """Append copies of their last segments to completions.

    Args:
        completions: Prompt ids, completion ids without the stop, and the text of each of these.
        context: The longest sequence in tokens; trials that do not fit are left out.
        max_completions: As many completions are used, the first that fit.

    Returns:
        One or two trials for each completion that fits.
    """
    trials: list[Trial] = []
    for number, (prompt_ids, ids, pieces) in enumerate(completions):
        if len({t.completion for t in trials}) == max_completions:
            break
        for start in segments(pieces):
            segment, base = ids[start:], ids
            width = len(segment)
            while base[-2 * width : -width] == segment:
                base = base[:-width]
            whole = base + segment * NUM_APPENDED
            if context is None or len(prompt_ids) + len(whole) <= context:
                sequence = Sequence(prompt_ids, whole, False, len(trials))
                trials.append(Trial(number, sequence, len(base), width))
    return trials


def copy_logps(trial: Trial, logps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-prob of each appended copy as a whole.

    Args:
        trial: A trial.
        logps: (T,) log-probs of its completion's tokens, in nats.

    Returns:
        (`NUM_APPENDED`,) nats; entry n is of a further copy after n of them.
    """
    return logps[trial.start :].reshape(NUM_APPENDED, trial.width).sum(1)


def loop_test(
    trials: Many[Trial],
    student: Many[NDArray[np.float64]],
    teacher: Many[NDArray[np.float64]] | None,
    is_held: bool = False,
) -> Check:
    """Compare how both models go on with a loop.

    Args:
        trials: Trials; where a completion has two, the likelier one is used.
        student: (T,) log-probs of each trial's completion under the student.
        teacher: The same under the teacher, or None.
        is_held: Whether the user's configuration has a golden term, which holds against loops.

    Returns:
        WARN (OK where `is_held`) where the teacher likes loops better than the student: after some
        copies it gives a further one at least even odds, and e^0.5 times what the student gives.
        The numbers hold for each of `COPIES_BEFORE` the mean log-prob of a whole copy in nats and
        its mean probability.
    """
    if not trials:
        found = Finding("OK", "loops", "not measured: no completion leaves room for copies.")
        return Check((found,), {"num_completions": 0})
    chosen: dict[int, tuple[float, NDArray[np.float64]]] = {}
    for i, trial in enumerate(trials):
        rows = np.stack([copy_logps(trial, logps[i]) for logps in (student, teacher) if logps])
        total = float(rows.sum())
        if trial.completion not in chosen or total > chosen[trial.completion][0]:
            chosen[trial.completion] = (total, rows)
    copies_CRN = np.stack([rows for _, rows in chosen.values()])  # completion, role, copies before
    logp_RN = copies_CRN.mean(0)[:, COPIES_BEFORE]
    probability_RN = np.exp(copies_CRN).mean(0)[:, COPIES_BEFORE]
    roles = ("student", "teacher")[: len(logp_RN)]
    numbers: dict[str, object] = {"num_completions": len(chosen), "copies": list(COPIES_BEFORE)}
    for role, logp_N, probability_N in zip(roles, logp_RN, probability_RN, strict=True):
        numbers[f"{role}_logp"] = logp_N.tolist()
        numbers[f"{role}_probability"] = probability_N.tolist()
    said = "; ".join(
        f"{role} {', '.join(f'{p:.2f}' for p in row)}"
        for role, row in zip(roles, probability_RN, strict=True)
    )
    message = (
        f"probability of writing the last segment again after {', '.join(map(str, COPIES_BEFORE))} "
        f"copies of it, mean of {len(chosen)} completions: {said}"
    )
    if len(roles) == 2:
        likes = (logp_RN[1] >= EVEN_ODDS) & (logp_RN[1] - logp_RN[0] >= LOOP_GAP_NATS)
        if bool(likes[1:].any()):
            message += ": the teacher likes loops better than the student"
            if is_held:
                message += ", and the golden term of this configuration holds against it"
                return Check((Finding("OK", "loops", f"{message}."),), numbers)
            fix = (
                'use objective.method = "stable_opd": plain "opd" raises whatever the teacher '
                "likes better, loops as well."
            )
            return Check((Finding("WARN", "loops", f"{message}.", fix),), numbers)
    return Check((Finding("OK", "loops", f"{message}."),), numbers)
