"""What a set of rollouts looks like: the numbers that verdicts, tables and pages are made of.

`diagnostics/collect.py` fills these from rollouts that stream by; nothing here computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stableopd.types import StopReason

__all__ = [
    "Histogram",
    "Measures",
    "Parameters",
    "Positions",
    "PromptMeasures",
    "StepMeasures",
    "Summary",
    "WorstRollout",
]


@dataclass(frozen=True, slots=True)
class Parameters:
    """What repetition was measured with.

    Attributes:
        window_chars: L of RepRate, in characters.
        ratio: tau of RepRate.
        ngram: n of the token labels, in units.
        min_run: Shortest run of repetitive units that counts; 0 and 1 count all.
        unit: What the labels are of: "tokens" where the file has ids, else "words" or "characters".
    """

    window_chars: int = 10_000
    ratio: float = 10.0
    ngram: int = 8
    min_run: int = 0
    unit: str = "tokens"


@dataclass(frozen=True, slots=True)
class Measures:
    """Measurements of a set of rollouts; nan where the files do not have what it needs.

    Attributes:
        num_rollouts: How many there are.
        num_stops: How many of them stopped and have log-probs of student and teacher at the stop.
        mean_length: Mean length, in `Summary.length_unit`, as are the next three.
        median_length: Middle length (within 1% above 1,024).
        p90_length: 90th percentile (within 1% above 1,024).
        max_length: Longest.
        truncation_rate: TruncRate, share of the rollouts.
        repetition_rate: RepRate, share of the rollouts.
        repetitive_share: Share of the units that are repetitive.
        loop_share: Share of the rollouts that end in a loop of three copies or more.
        accuracy: Share of the graded rollouts that are correct.
        score: Mean of the framework's own score.
        advantage: Mean advantage over tokens, in nats, as are all log-probs here.
        repetitive_advantage: The same over repetitive tokens.
        regular_advantage: The same over all others.
        repetitive_weight: Share of the sum of |advantage| that is on repetitive tokens.
        student_logp: Mean log-prob of the tokens under the student.
        teacher_logp: The same under the teacher.
        student_stop_logp: Mean log-prob under the student of the last tokens of `num_stops`.
        teacher_stop_logp: The same under the teacher.
    """

    num_rollouts: int
    num_stops: int = 0
    mean_length: float = math.nan
    median_length: float = math.nan
    p90_length: float = math.nan
    max_length: float = math.nan
    truncation_rate: float = math.nan
    repetition_rate: float = math.nan
    repetitive_share: float = math.nan
    loop_share: float = math.nan
    accuracy: float = math.nan
    score: float = math.nan
    advantage: float = math.nan
    repetitive_advantage: float = math.nan
    regular_advantage: float = math.nan
    repetitive_weight: float = math.nan
    student_logp: float = math.nan
    teacher_logp: float = math.nan
    student_stop_logp: float = math.nan
    teacher_stop_logp: float = math.nan


@dataclass(frozen=True, slots=True)
class StepMeasures:
    """The rollouts of one step."""

    step: int
    measures: Measures


@dataclass(frozen=True, slots=True)
class PromptMeasures:
    """The rollouts of one prompt, over all steps; `prompt` is its beginning."""

    prompt_id: str
    prompt: str
    num_rollouts: int
    mean_length: float
    truncation_rate: float
    repetition_rate: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Rollouts by length: `counts[i]` lie in [edges[i], edges[i + 1]), `truncated[i]` of them cut.

    Attributes:
        edges: (H + 1,) lengths in `Summary.length_unit`.
        counts: (H,) numbers of rollouts.
        truncated: (H,) those cut off; all 0 where that is not known.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    truncated: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Positions:
    """Sums over tokens by step and by position in the completion; bin p covers p*width onwards.

    Attributes:
        width: Units per bin.
        steps: (S,) the steps, in order; -1 stands for rollouts without a step.
        num_tokens: (S, P) units in a bin.
        num_repetitive: (S, P) those that are repetitive.
        num_scored: (S, P) tokens with an advantage.
        advantage: (S, P) sum of their advantages, in nats.
    """

    width: int
    steps: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_repetitive: NDArray[np.int64]
    num_scored: NDArray[np.int64]
    advantage: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WorstRollout:
    """A rollout to look at.

    Attributes:
        source: Its file.
        line: Its line there.
        step: Its step; None where unknown.
        prompt: The prompt, shortened.
        completion: The completion; a long one is cut in the middle, at `gap`.
        gap: (place, number): so many characters were left out at this place; None for none.
        spans: (start, stop) of repetitive stretches, in characters of `completion`.
        loop_start: Character of `completion` at which the last loop begins; None without a loop.
        loop_text: One copy of that loop, shortened.
        loop_period: Length of one copy, in units.
        loop_copies: How often it stands there.
        length: In `Summary.length_unit`.
        repetitive_share: Share of its units that are repetitive.
        stop_reason: Why it ended; None where unknown.
        correct: Whether it was graded correct; None where unknown.
    """

    source: str
    line: int
    step: int | None
    prompt: str
    completion: str
    gap: tuple[int, int] | None
    spans: tuple[tuple[int, int], ...]
    loop_start: int | None
    loop_text: str
    loop_period: int
    loop_copies: float
    length: int
    repetitive_share: float
    stop_reason: StopReason | None
    correct: bool | None


@dataclass(frozen=True)
class Summary:
    """Everything measured of a set of rollouts.

    Attributes:
        parameters: What repetition was measured with.
        length_unit: "tokens" or "characters".
        truncation_source: Where the knowledge of cut-offs comes from: "file" (a column says so),
            "max-new-tokens" (a length at the budget), "pile-up" (a length at which rollouts pile
            up), or "unknown".
        budget: The length at which rollouts are cut off, in `length_unit`; None where unknown.
        overall: All rollouts.
        by_step: One entry a step, in order; empty where the files name no steps.
        num_prompts: Number of different prompts; 0 where the files have none.
        by_prompt: The prompts with most cut-off, then most repetitive, rollouts; at most 50.
        histogram: Lengths.
        positions: Repetition and advantage by position.
        worst: The rollouts with the most repetitive units, the worst first.
        truncated: Measurements of the cut-off rollouts alone.
        answered_before_loop: Of the cut-off rollouts that end in a loop, the share with a final
            answer before the loop begins; nan where there is none to look at.
        marker_share: Of the cut-off rollouts, the share with a chat or end-of-text marker inside
            the text, after which the student went on; nan where there is none to look at.
        markers: The markers that were found, the most frequent first.
    """

    parameters: Parameters
    length_unit: str
    truncation_source: str
    budget: int | None
    overall: Measures
    by_step: tuple[StepMeasures, ...]
    num_prompts: int
    by_prompt: tuple[PromptMeasures, ...]
    histogram: Histogram
    positions: Positions
    worst: tuple[WorstRollout, ...]
    truncated: Measures
    answered_before_loop: float
    marker_share: float
    markers: tuple[str, ...]
