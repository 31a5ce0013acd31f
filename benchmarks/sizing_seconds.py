"""Seconds of the parts of a step of on-policy distillation.

FLOPs / (peak x share) or bytes / (bandwidth x share), whichever is more; in the sweep of the output
heads (src/stableopd/objective/sweep.py) both, as its passes over a tile of logits lie between the
products that make and use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sizing_memory import Plan
from sizing_models import Shape
from stableopd.doctor.memory import FLOAT32, MIXED
from stableopd.objective.likeliest import BLOCK_ELSEWHERE
from stableopd.objective.logprobs import SWEEP_VOCABULARY
from stableopd.objective.sweep import MAX_ROWS
from stableopd.training.opinions import OVERLAP_K

# Assumptions about software. None was measured on a GPU.
CALL_S = 1e-3  # a layer of one decoding step of `generate`: launches, whatever the size
SERVER_STEP_S, SERVER_LAYER_S = 2e-3, 1e-4  # the same in an engine with recorded graphs
DISK = 2e9  # bytes/s at which a student's weights are written for a server, and read there
NETWORK = 50e9  # bytes/s from each GPU to another machine: 400 Gbit/s
MACHINE = 8  # GPUs of one machine
HOST_LINK = 25e9  # bytes/s between a GPU and its CPU, for weights that live there
HOST_BYTES = 50e9  # bytes/s of a CPU's memory that one process gets
LINK_SHARE = 0.7  # part of a link's speed that is reached
ADAMW_TRAFFIC = 28  # bytes: weight, gradient and two states read; all but the gradient written


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep over the vocabulary does with one head.

    Attributes:
        products: Matrix products of the size of the logits.
        weight: Bytes of traffic for each weight, once in MAX_ROWS positions.
        logit: Bytes of traffic for each logit.
        weight_cpu: Bytes for each weight in float32, without casts. A CPU's tiles of logits stay in
            its cache.
    """

    products: int
    weight: float
    logit: float
    weight_cpu: float


# A float32 weight that is multiplied in bfloat16: 4 read, 2 written, 2 read for the product. The
# student's is made so for the logits, for those of the backward pass, and for the hidden states'
# gradient; its own gradient is 2 written and read, and added to 4 read and written.
#
# A logit: 2 from the product, cast (6), largest (4), less the largest (8), exp (8), its sum (4) and
# that with the logit (8): 40; 4 more where the likeliest are wanted. The reference's difference to
# the student's: 12, and 8 for its sum. Backward, the student's: made again (8), less the largest
# (8), exp (8), times a factor (12), cast (6), and 2 for each product. The reference's: made again
# (8), difference (12), times (8), plus (8).
TRAINED, FROZEN = Sweep(4, 36.0, 44.0 + 46.0, 20.0), Sweep(3, 24.0, 44.0 + 44.0, 12.0)
TEACHER, REFERENCE = Sweep(1, 2.0, 44.0, 4.0), Sweep(2, 16.0, 60.0 + 36.0, 8.0)
SERVED = Sweep(1, 0.0, 0.0, 0.0)  # another's software: its products alone

# The likeliest tokens of both models: OVERLAP_K blocks of the head's rows are gathered for each
# position. A weight of the teacher's is read, written and read in bfloat16; one of the student's is
# read and written in float32, cast, and read. A CPU gathers nothing.
TEACHER_GATHERED, STUDENT_GATHERED = 6, 16


@dataclass(frozen=True, slots=True)
class Part:
    """Seconds of a part of a step, and what they are bound by."""

    seconds: float
    bound: str


def _slowest(**seconds: float) -> Part:
    name = max(seconds, key=lambda key: seconds[key])
    return Part(seconds[name], name)


def rollout_part(plan: Plan) -> Part:
    """Writing the rollouts: as many decoding steps as the longest has, batch after batch.

    Args:
        plan: The run.

    Returns:
        Launches, memory (weights once a step, keys and values of every row) or arithmetic.
    """
    s, d = plan.student, plan.device
    number = MIXED if d.mixed and not plan.rollout_gpus else 2 if d.mixed else FLOAT32
    writers = plan.rollout_gpus or plan.trainers
    rows = math.ceil(plan.rollouts / writers)
    steps = math.ceil(rows / plan.rows) * plan.budget
    call = CALL_S * s.layers
    if plan.rollout_gpus:
        call = SERVER_STEP_S + SERVER_LAYER_S * s.layers
    weights = (2 if d.mixed else FLOAT32) * (s.layers * s.products + s.head)
    context = plan.prompt_tokens + plan.tokens / 2
    read = steps * weights + rows * plan.tokens * context * s.cache_bytes(number)
    done = rows * (plan.prompt_tokens + plan.tokens) * s.forward_flops(context)
    return _slowest(launches=steps * call, memory=read / d.bytes, arithmetic=done / d.flops)


def _pass(
    plan: Plan, shape: Shape, tokens: float, passes: int, sweep: Sweep, devices: int
) -> dict[str, float]:
    """Seconds of a model's layers and head, and those of them in which the head moves bytes.

    `passes` counts a forward pass through the layers as one and a backward pass as two. The head of
    a small vocabulary is not swept: it goes with the layers, and stays in a cache.
    """
    d, length = plan.device, plan.prompt_tokens + plan.tokens
    layers = passes * tokens * shape.layer_flops(length) / d.flops
    is_swept = shape.vocabulary >= SWEEP_VOCABULARY
    products = sweep.products if is_swept else passes
    arithmetic = products * tokens * 2 * shape.head / d.flops
    per_weight, per_logit = sweep.weight_cpu, 0.0
    if d.mixed:
        per_weight, per_logit = sweep.weight, sweep.logit
    rows = min(MAX_ROWS, plan.micro_batch)
    moved = shape.head / rows * per_weight + shape.vocabulary * per_logit
    traffic = tokens * moved / d.bytes if is_swept else 0.0
    return {"all": (layers + arithmetic + traffic) / devices, "traffic": traffic / devices}


def _computed(found: dict[str, float], exchange: float) -> Part:
    """The longer of computing and exchanging weights, which overlap."""
    if exchange > found["all"]:
        return Part(exchange, "exchange")
    is_memory = found["traffic"] > found["all"] / 2
    return Part(found["all"], "memory" if is_memory else "arithmetic")


def _exchange(plan: Plan, tokens: float, gathered: float) -> float:
    """Seconds in which a process receives weights, `gathered` bytes in whole for a micro-batch."""
    if not plan.sharded:
        return 0.0
    n = plan.trainers
    micro_batches = max(1, math.ceil(tokens / n / plan.micro_batch))
    seconds = gathered * (1 - 1 / n) / _link(plan)
    if plan.offloads:
        seconds += gathered / n / HOST_LINK
    return micro_batches * seconds


def _link(plan: Plan) -> float:
    """Bytes/s at which a GPU receives: all GPUs of a machine share the machine's network."""
    d = plan.device
    speed = d.link if plan.trainers <= MACHINE else min(d.link, MACHINE * NETWORK)
    return LINK_SHARE * speed


def teacher_part(plan: Plan) -> Part:
    """The teacher's forward pass over the rollouts, in the trainers or behind `teacher.url`.

    In the trainers with the likeliest tokens of teacher and student, which are compared.

    Args:
        plan: The run.

    Returns:
        Its part.
    """
    t, number = plan.teacher, plan.teacher_bytes
    if plan.teacher_gpus:
        return _computed(_pass(plan, t, plan.scored, 1, SERVED, plan.teacher_gpus), 0.0)
    found = _pass(plan, t, plan.scored, 1, TEACHER, plan.trainers)
    if plan.device.mixed and t.vocabulary >= SWEEP_VOCABULARY:
        rows = plan.scored / plan.trainers * OVERLAP_K * BLOCK_ELSEWHERE
        moved = rows * (TEACHER_GATHERED * t.width + STUDENT_GATHERED * plan.student.width)
        found = {name: value + moved / plan.device.bytes for name, value in found.items()}
    return _computed(found, _exchange(plan, plan.scored, number * t.weights))


def reference_part(plan: Plan) -> Part:
    """The reference's forward pass, and its head's backward; with LoRA with the adapter off.

    Args:
        plan: The run.

    Returns:
        Its part; nothing without the term.
    """
    if not plan.reference:
        return Part(0.0, "-")
    found = _pass(plan, plan.student, plan.scored, 1, REFERENCE, plan.trainers)
    return _computed(found, _exchange(plan, plan.scored, FLOAT32 * plan.student.weights))


def update_part(plan: Plan) -> Part:
    """Forward, backward and AdamW of the student over rollouts and golden solutions.

    Args:
        plan: The run.

    Returns:
        Its part.
    """
    tokens, n, d = plan.scored + plan.golden, plan.trainers, plan.device
    passes = 2 if plan.lora_rank else 3  # frozen weights need no gradient of their own
    passes += 1 if plan.checkpoints else 0
    found = _pass(plan, plan.student, tokens, passes, FROZEN if plan.lora_rank else TRAINED, n)
    # Gathered forward and backward; the gradient goes back, with an adapter almost nothing.
    times = 2 if plan.lora_rank else 3
    part = _computed(found, _exchange(plan, tokens, times * FLOAT32 * plan.student.weights))
    speed = HOST_BYTES if plan.offloads else d.bytes
    extra = ADAMW_TRAFFIC * plan.trained / plan.parts / speed
    if not plan.sharded and n > 1:
        extra += 2 * FLOAT32 * plan.trained * (1 - 1 / n) / _link(plan)
    return Part(part.seconds + extra, part.bound)


def sync_part(plan: Plan) -> Part:
    """Bringing the new weights to where rollouts are written.

    Args:
        plan: The run.

    Returns:
        A write and a read of bfloat16 weights for servers; a gathering of float32 ones with FSDP2.
    """
    if plan.rollout_gpus:
        return Part(2 * 2 * plan.student.weights / DISK, "disk")
    if plan.sharded:
        n = plan.trainers
        seconds = FLOAT32 * plan.student.weights * (1 - 1 / n) / _link(plan)
        return Part(seconds, "exchange")
    return Part(0.0, "-")


def parts(plan: Plan) -> dict[str, Part]:
    """All parts of a step, which follow one another.

    Args:
        plan: The run.

    Returns:
        Parts by name.
    """
    return {
        "rollouts": rollout_part(plan),
        "teacher": teacher_part(plan),
        "reference": reference_part(plan),
        "update": update_part(plan),
        "sync": sync_part(plan),
    }


def step_seconds(plan: Plan) -> float:
    """Seconds of a step.

    Args:
        plan: The run.

    Returns:
        The sum of its parts.
    """
    return sum(part.seconds for part in parts(plan).values())


def gpu_hours(plan: Plan) -> float:
    """GPU hours of a run, servers and waiting included, evaluations not.

    Args:
        plan: The run.

    Returns:
        Hours.
    """
    return plan.gpus * plan.steps * step_seconds(plan) / 3600
