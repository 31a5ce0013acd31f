"""A run of on-policy distillation, the hardware it is assumed to have, and its memory.

What a run holds is the arithmetic of `stableopd doctor` (doctor/memory.py), shared out over
processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sizing_models import Shape
from stableopd.doctor.memory import FLOAT32, MIXED, SAMPLED_LOGITS, kept_per_token, tile_elements
from stableopd.types import ConfigError

BUCKETS = 2  # layers gathered at a time
USABLE = 0.85  # as the doctor's: beyond, fragments may not fit


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the cores of one process.

    Attributes:
        name: What to call it.
        peak: FLOP/s of dense products, in bfloat16 on a GPU and float32 on a CPU.
        bandwidth: Bytes/s of its memory.
        memory: Bytes.
        link: Bytes/s to another one in the same machine, one way.
        price: An illustration, in dollars an hour.
        compute_share: Part of the peak that is reached (MFU).
        memory_share: Part of the bandwidth that is reached.
        mixed: Whether float32 weights are computed with in bfloat16, by autocast.
    """

    name: str
    peak: float
    bandwidth: float
    memory: float
    link: float
    price: float
    compute_share: float = 0.30
    memory_share: float = 0.60
    mixed: bool = True

    @property
    def flops(self) -> float:
        """FLOP/s to count with."""
        return self.peak * self.compute_share

    @property
    def bytes(self) -> float:
        """Bytes/s to count with."""
        return self.bandwidth * self.memory_share


DEVICES = {
    device.name: device
    for device in (
        Device("cpu2", 200e9, 20e9, 16e9, 20e9, 0.10, 0.7, 0.7, mixed=False),
        Device("laptop", 80e12, 576e9, 16e9, 25e9, 0.0),
        Device("a100", 312e12, 2.0e12, 80e9, 300e9, 1.50),
        Device("h100", 989e12, 3.35e12, 80e9, 450e9, 2.50),
    )
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A run to size.

    Attributes:
        student: The student.
        teacher: The teacher.
        device: What it runs on.
        gpus: Number of these, servers included.
        rollout_gpus: Of them, those behind `rollout.engine = "vllm"`; each holds the student.
        teacher_gpus: Of them, those behind `teacher.url`, which share the teacher.
        sharded: Whether the trainers share the weights out by FSDP2; else each holds a copy.
        offloads: Whether sharded weights and AdamW live on the CPU.
        prompts: `rollout.prompts_per_step`.
        rollouts_per_prompt: The same name.
        prompt_tokens: Mean length of a prompt.
        max_prompt_tokens: The longest.
        tokens: Mean length of a rollout.
        budget: `rollout.max_new_tokens`; the longest rollout of a batch reaches it.
        golden_tokens: Mean length of a golden solution; 0 leaves the term out.
        batch: `rollout.batch_size`, of each process.
        micro_batch: `optimizer.micro_batch_tokens`.
        checkpoints: `student.gradient_checkpointing`.
        lora_rank: `student.lora_rank`.
        reference: Whether the reference KL is on.
        steps: `run.steps`.
    """

    student: Shape
    teacher: Shape
    device: Device
    gpus: int = 1
    rollout_gpus: int = 0
    teacher_gpus: int = 0
    sharded: bool = False
    offloads: bool = False
    prompts: int = 16
    rollouts_per_prompt: int = 4
    prompt_tokens: int = 200
    max_prompt_tokens: int = 1_024
    tokens: int = 6_000
    budget: int = 8_192
    golden_tokens: int = 4_500
    batch: int = 32
    micro_batch: int = 16_384
    checkpoints: bool = True
    lora_rank: int = 0
    reference: bool = True
    steps: int = 200

    def __post_init__(self) -> None:
        """Refuse what no run can be."""
        if self.trainers < 1:
            raise ConfigError("no GPU is left to train on: lower the numbers of servers' GPUs.")
        if self.prompts < self.trainers:
            raise ConfigError(
                f"rollout.prompts_per_step = {self.prompts} is fewer than {self.trainers} training "
                "processes: raise it, or use fewer GPUs."
            )

    @property
    def trainers(self) -> int:
        """GPUs that train."""
        return self.gpus - self.rollout_gpus - self.teacher_gpus

    @property
    def parts(self) -> int:
        """Into how many parts the weights are shared out."""
        return self.trainers if self.sharded else 1

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.prompts * self.rollouts_per_prompt

    @property
    def rows(self) -> int:
        """Rollouts that a process, or a server's GPU, writes at once."""
        if self.rollout_gpus:
            return math.ceil(self.rollouts / self.rollout_gpus)
        return min(self.batch, math.ceil(self.rollouts / self.trainers))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt_tokens + self.budget

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        return self.student.adapter(self.lora_rank) if self.lora_rank else self.student.weights

    @property
    def teacher_bytes(self) -> int:
        """Bytes of one weight of the teacher."""
        return 2 if self.device.mixed else FLOAT32

    @property
    def scored(self) -> float:
        """Tokens of a step's rollouts with their prompts, which all models read."""
        return float(self.rollouts * (self.prompt_tokens + self.tokens))

    @property
    def golden(self) -> float:
        """Tokens of a step's golden solutions with their prompts."""
        each = self.golden_tokens and self.prompt_tokens + self.golden_tokens
        return float(self.prompts * each)


def memory(plan: Plan) -> dict[str, float]:
    """Bytes of each part on one training GPU, the peak, and what the CPU holds for it.

    Args:
        plan: The run.

    Returns:
        Parts in the doctor's names; "gathered" is what FSDP2 holds in whole, in the larger phase.
    """
    s, t, mixed = plan.student, plan.teacher, plan.device.mixed
    all_weights = s.weights + (plan.trained if plan.lora_rank else 0)
    has_copy = plan.reference and not plan.lora_rank
    number = MIXED if mixed else FLOAT32
    served = bool(plan.rollout_gpus)
    tokens = min(max(plan.micro_batch, plan.longest), plan.rollouts * plan.longest)
    kept = kept_per_token(s.layers, s.width, s.inner, s.keys, plan.checkpoints)
    trained_head = 0 if plan.lora_rank else s.head
    shared = {
        "student": FLOAT32 * all_weights,
        "gradients": FLOAT32 * plan.trained,
        "AdamW": 2 * FLOAT32 * plan.trained,
        "teacher": 0 if plan.teacher_gpus else plan.teacher_bytes * t.weights,
        "reference": FLOAT32 * s.weights if has_copy else 0,
    }
    shared = {name: value / plan.parts for name, value in shared.items()}
    host = sum(shared.values()) if plan.offloads else 0.0
    if plan.offloads:
        shared = dict.fromkeys(shared, 0.0)
    copies = 2 * all_weights if mixed else 0
    updating = {
        "gathered": _gathered(plan) if plan.sharded else 0,
        "activations": tokens * kept * number,
        "logits": FLOAT32 * tile_elements(tokens, s.vocabulary, trained_head, not mixed),
    }
    sampling = {
        "gathered": FLOAT32 * all_weights if plan.sharded and not served else 0,
        "cache": 0 if served else plan.rows * plan.longest * s.cache_bytes(number),
        "logits": 0 if served else SAMPLED_LOGITS * FLOAT32 * plan.rows * s.vocabulary,
    }
    held = sum(shared.values()) - shared["gradients"] + copies
    update, sample = shared["gradients"] + sum(updating.values()), sum(sampling.values())
    return shared | {
        "copies": float(copies),
        "gathered": float(max(updating["gathered"], sampling["gathered"])),
        "activations": float(updating["activations"]),
        "logits": float(max(updating["logits"], sampling["logits"])),
        "cache": float(sampling["cache"]),
        "peak": float(held + max(update, sample)),
        "host": float(host),
    }


def _gathered(plan: Plan) -> float:
    """Bytes that FSDP2 holds in whole in an update: head and embedding throughout, a few layers."""
    s, t = plan.student, plan.teacher
    reads_teacher = not plan.teacher_gpus
    whole = FLOAT32 * s.outer * (2 if plan.reference and not plan.lora_rank else 1)
    whole += plan.teacher_bytes * t.outer if reads_teacher else 0
    layer = max(FLOAT32 * s.layer, plan.teacher_bytes * t.layer if reads_teacher else 0)
    return whole + BUCKETS * layer


def served(plan: Plan) -> dict[str, float]:
    """Bytes on one GPU of each kind of server.

    Args:
        plan: The run.

    Returns:
        Weights and cache in bfloat16: all rollouts of a GPU at their longest; one sequence scored.
    """
    found: dict[str, float] = {}
    if plan.rollout_gpus:
        cache = plan.rows * plan.longest * plan.student.cache_bytes()
        found["rollouts"] = float(2 * plan.student.weights + cache)
    if plan.teacher_gpus:
        cache = plan.longest * plan.teacher.cache_bytes()
        found["teacher"] = (2 * plan.teacher.weights + cache) / plan.teacher_gpus
    return found


def fits(plan: Plan) -> bool:
    """Whether the peaks leave 15% of each GPU free.

    Args:
        plan: The run.

    Returns:
        True where they do.
    """
    peaks = [memory(plan)["peak"], *served(plan).values()]
    return max(peaks) <= USABLE * plan.device.memory
