"""Seconds of the parts of a step of on-policy distillation.

FLOPs / (peak x share) or bytes / (bandwidth x share), whichever is more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sizing_memory import Plan
from sizing_models import Shape
from stableopd.doctor.memory import FLOAT32, MIXED
from stableopd.objective.logprobs import CHUNK_ELEMENTS

# Assumptions about software. None was measured on a GPU.
CALL_S = 1e-3  # a layer of one decoding step of `generate`: launches, whatever the size
SERVER_STEP_S, SERVER_LAYER_S = 2e-3, 1e-4  # the same in an engine with recorded graphs
DISK = 2e9  # bytes/s at which a student's weights are written for a server, and read there
NETWORK = 50e9  # bytes/s from each GPU to another machine: 400 Gbit/s
MACHINE = 8  # GPUs of one machine
HOST_LINK = 25e9  # bytes/s between a GPU and its CPU, for weights that live there
HOST_BYTES = 50e9  # bytes/s of a CPU's memory that one process gets
LINK_SHARE = 0.7  # part of a link's speed that is reached
# Traffic of one tile of logits for each weight of the head, in bytes. Trained: read in float32 and
# cast, forward and again; read for the inputs' gradient; its own gradient written in bfloat16, cast
# and added in float32. Frozen: bfloat16, three times. The reference: read, cast, read.
TRAINED_TILE, FROZEN_TILE, REFERENCE_TILE = 32.0, 6.0, 8.0
ADAMW_TRAFFIC = 28  # bytes: weight, gradient and two states read; all but the gradient written


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
    plan: Plan, shape: Shape, tokens: float, passes: int, moved: float, devices: int
) -> dict[str, float]:
    """Seconds of a model's layers and head, where each tile of logits reads the whole head.

    `passes` counts a forward pass as one and a backward pass as two; `moved` is the bytes of
    traffic that a tile makes for each weight of the head.
    """
    d, tile = plan.device, max(1, CHUNK_ELEMENTS // plan.student.vocabulary)
    length = plan.prompt_tokens + plan.tokens
    layers = passes * tokens * shape.layer_flops(length) / d.flops
    arithmetic = passes * tokens * 2 * shape.head / d.flops
    traffic = tokens / tile * shape.head * moved / d.bytes
    return {
        "arithmetic": (layers + max(arithmetic, traffic)) / devices,
        "tiles": max(0.0, traffic - arithmetic) / devices,
    }


def _computed(found: dict[str, float], exchange: float) -> Part:
    """The longer of computing and exchanging weights, which overlap."""
    if exchange > found["arithmetic"]:
        return Part(exchange, "exchange")
    is_head = found["tiles"] > found["arithmetic"] / 2
    return Part(found["arithmetic"], "memory" if is_head else "arithmetic")


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

    Args:
        plan: The run.

    Returns:
        Its part.
    """
    t, number = plan.teacher, plan.teacher_bytes
    if plan.teacher_gpus:
        return _computed(_pass(plan, t, plan.scored, 1, 0.0, plan.teacher_gpus), 0.0)
    found = _pass(plan, t, plan.scored, 1, number, plan.trainers)
    return _computed(found, _exchange(plan, plan.scored, number * t.weights))


def reference_part(plan: Plan) -> Part:
    """The reference's forward pass; with LoRA that of the base with the adapter off.

    Args:
        plan: The run.

    Returns:
        Its part; nothing without the term.
    """
    if not plan.reference:
        return Part(0.0, "-")
    moved = REFERENCE_TILE if plan.device.mixed else FLOAT32
    found = _pass(plan, plan.student, plan.scored, 1, moved, plan.trainers)
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
    moved = FROZEN_TILE if plan.lora_rank else TRAINED_TILE
    found = _pass(plan, plan.student, tokens, passes, moved, n)
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
