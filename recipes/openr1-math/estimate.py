"""Arithmetic of memory and time for each stage on one GPU. Nothing here is measured.

The counts of weights follow from the models' config.json; everything below ASSUMED is an assumption
that a first run of two steps will correct.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from evaluation_sets import SETS

GIB = 2**30

# ASSUMED
DECODE_S = 0.03  # one decoding step of 28 layers under `generate`: bound by launches, not by size
LORA_DECODE = 1.5  # the same with an adapter that is not merged
FLOPS = 300e12  # of an H100's 989 in bfloat16
BYTES_PER_S = 2e12  # of an H100's 3.35
ROLLOUT_TOKENS = 6_000  # mean length of a rollout, half of them cut off at BUDGET
GOLDEN_TOKENS = 4_500  # mean length of a golden solution

# What the TOMLs and evaluate.sh say.
BUDGET = 8_192  # a batch decodes until its last rollout ends, which is at the budget
CONTEXT = 1_024 + BUDGET
ROLLOUTS, PROMPTS, GOLDEN = 64, 16, 64  # a step of OPD; a step of SFT
MICRO_BATCH = 16_384  # optimizer.micro_batch_tokens
LOOKS, LOOK_PROBLEMS = 5, 128  # evaluations within a run
EVALUATION_BATCH = 64
LORA_RANK = 64
TILE = (2**23 + 2**18) // 151_936  # tokens of one tile of the output head


@dataclass(frozen=True)
class Shape:
    """The sizes in a Qwen2 config.json."""

    vocabulary: int
    width: int
    inner: int
    key_value: int  # heads of keys and values x 128
    tied: bool
    layers: int = 28

    def head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.width

    def weights(self) -> int:
        """All weights, biases and norms."""
        d, k = self.width, self.key_value
        layer = d * d + d + 2 * (d * k + k) + d * d + 3 * d * self.inner + 2 * d
        return self.head() * (1 if self.tied else 2) + self.layers * layer + d

    def lora(self, rank: int) -> int:
        """Weights of an adapter on every linear layer but the head."""
        d, k, i = self.width, self.key_value, self.inner
        return self.layers * rank * (2 * (d + d) + 2 * (d + k) + 3 * (d + i))


SMALL = Shape(vocabulary=151_936, width=1_536, inner=8_960, key_value=256, tied=True)
LARGE = Shape(vocabulary=152_064, width=3_584, inner=18_944, key_value=512, tied=False)


@dataclass(frozen=True)
class Stage:
    """One stage of training on one GPU.

    Attributes:
        name: Of its row.
        student: The student.
        steps: run.steps.
        runs: How many runs of it are among README.md's commands.
        batch: rollout.batch_size and eval.batch_size.
        teacher: The teacher; None draws no rollouts.
        has_lora: Whether the student is an adapter.
        has_reference: Whether the reference KL and the golden term are on.
    """

    name: str
    student: Shape
    steps: int
    runs: int
    batch: int
    teacher: Shape | None = None
    has_lora: bool = False
    has_reference: bool = False


STAGES = (
    Stage("SFT 1.5B", SMALL, 1_547, 2, 32),
    Stage("OPD 1.5B <- 7B", SMALL, 200, 2, 32, LARGE),
    Stage("StableOPD 1.5B <- 7B (or OPD + one term)", SMALL, 200, 4, 32, LARGE, False, True),
    Stage("SFT 7B", LARGE, 1_547, 0, 16),
    Stage("SFT 7B, LoRA 64", LARGE, 1_547, 1, 16, None, True),
    Stage("StableOPD 7B <- 7B", LARGE, 200, 0, 16, LARGE, False, True),
    Stage("OPD 7B <- 7B, LoRA 64", LARGE, 200, 1, 16, LARGE, True),
    Stage("StableOPD 7B <- 7B, LoRA 64", LARGE, 200, 1, 16, LARGE, True, True),
)
EVALUATIONS = 13  # calls of evaluate.sh among README.md's commands


def memory(stage: Stage) -> dict[str, float]:
    """Bytes of each part, and the larger of the two peaks: at the update and in the rollouts."""
    s, weights = stage.student, stage.student.weights()
    if stage.has_lora:
        state = 2 * weights + 16 * s.lora(LORA_RANK)
        grads, copies, reference = 4 * s.lora(LORA_RANK), 0, 0
    else:
        state, grads, copies = 16 * weights, 4 * weights, 2 * weights
        reference = 4 * weights if stage.has_reference else 0
    teacher = 2 * stage.teacher.weights() if stage.teacher else 0
    # Inputs of all layers in float32, and all that one layer keeps while it is computed again.
    activations = MICRO_BATCH * (4 * s.layers * s.width + 12 * s.inner + 64 * s.width)
    # Rotary embeddings leave keys in float32 under autocast; values are bfloat16.
    per_token = 2 * s.layers * s.key_value * (2 if stage.has_lora else 3)
    cache = stage.batch * CONTEXT * per_token
    fixed = state + copies + reference + teacher
    return {
        "state": state,
        "copies": copies,
        "reference": reference,
        "teacher": teacher,
        "activations": activations,
        "cache": cache,
        "peak": max(fixed + activations, fixed - grads + cache),
    }


def seconds(stage: Stage) -> dict[str, float]:
    """Seconds of one step: rollouts, matrix products, and the tiles of the output heads."""
    s, weights = stage.student, stage.student.weights()
    rollouts = ROLLOUTS if stage.teacher else 0
    golden = (PROMPTS if stage.has_reference else 0) if stage.teacher else GOLDEN
    drawn, given = rollouts * ROLLOUT_TOKENS, golden * GOLDEN_TOKENS
    # Forward 2, backward 4, forward again 2; without gradients of frozen weights 2 fewer.
    products = (6 if stage.has_lora else 8) * weights * (drawn + given)
    products += 2 * weights * drawn if stage.has_reference else 0
    products += 2 * stage.teacher.weights() * drawn if stage.teacher else 0
    # Per tile the whole head is read: twice forward, and for its gradient in float32 as well.
    moved = (6 if stage.has_lora else 32) * s.head() * (drawn + given)
    moved += (4 if stage.has_lora else 8) * s.head() * drawn if stage.has_reference else 0
    moved += 2 * stage.teacher.head() * drawn if stage.teacher else 0
    return {
        "rollouts": rollouts / stage.batch * BUDGET * _decode_s(stage),
        "products": products / FLOPS,
        "heads": moved / TILE / BYTES_PER_S,
    }


def hours(stage: Stage) -> float:
    """Hours of one run, with its evaluations on the way."""
    looks = LOOKS * LOOK_PROBLEMS / stage.batch * BUDGET * _decode_s(stage)
    return (stage.steps * sum(seconds(stage).values()) + looks) / 3600


def evaluation_hours() -> float:
    """Hours of one call of evaluate.sh."""
    answers = [0, 0]  # of the sets with several samples a problem, and of the others
    for part in SETS.values():
        answers[part.num_samples == 1] += part.num_problems * part.num_samples
    batches = sum(math.ceil(number / EVALUATION_BATCH) for number in answers)
    return batches * BUDGET * DECODE_S / 3600


def _decode_s(stage: Stage) -> float:
    return DECODE_S * (LORA_DECODE if stage.has_lora else 1.0)


def _fits(stage: Stage) -> bool:
    """Whether a card that shows 79 GiB takes it, with 5 GiB to spare for what is not counted."""
    return memory(stage)["peak"] / GIB < 74


def tables() -> str:
    """Both tables and the sum in markdown."""
    heads = list(memory(STAGES[0]))
    lines = [f"| stage | {' | '.join(heads)} | one 80 GB GPU |", "|---" * (2 + len(heads)) + "|"]
    for stage in STAGES:
        cells = " | ".join(f"{value / GIB:.1f}" for value in memory(stage).values())
        fits = "fits" if _fits(stage) else "does not fit"
        lines.append(f"| {stage.name} | {cells} | {fits} |")
    heads = [*seconds(STAGES[0]), "a step", "steps", "hours", "runs", "hours of all"]
    lines += ["", f"| stage | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    rows: list[list[str]] = []
    for stage in (stage for stage in STAGES if _fits(stage)):
        parts = seconds(stage).values()
        cells = [f"{value:.0f} s" for value in (*parts, sum(parts))]
        cells += [str(stage.steps), f"{hours(stage):.0f}", str(stage.runs)]
        rows.append([stage.name, *cells, f"{stage.runs * hours(stage):.0f}"])
    once, empty = evaluation_hours(), [""] * (len(heads) - 3)
    total = EVALUATIONS * once + sum(stage.runs * hours(stage) for stage in STAGES)
    rows.append(
        ["evaluate.sh", *empty, f"{once:.1f}", str(EVALUATIONS), f"{EVALUATIONS * once:.0f}"]
    )
    rows.append(["all commands", *empty, "", "", f"{total:.0f}"])
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
