"""How much memory a run needs, from the sizes of its models and its batch.

With P the parameters of a model, s the bytes of one of its weights, and P_t those that are trained:

    student, teacher, reference  P s each; no reference without its term, or with an adapter
    gradients                    P_t s
    AdamW                        2 P_t s
    copies                       2 P of the student where bfloat16 and float32 are mixed
    activations                  N layers (10 D + 4 F + 2 kv) a, of one micro-batch of N tokens
                                 (N D a layers plus one layer's, with gradient checkpointing)
    logits while updating        9 tiles of at most 2^25 float32 numbers (2^20 on a CPU), and one
                                 float32 gradient of a trained head; below 4,096 entries of the
                                 vocabulary 12 tiles of at most 8.65 million
    key-value cache              2 layers kv (prompt + budget) rows a
    logits while sampling        4 rows V float32 numbers

D is the width, F the width of the feed-forward layer, kv that of the keys, V the vocabulary; a the
bytes of an activation: s, or 3 where bfloat16 and float32 are mixed (keys are float32 there, values
bfloat16). The copies are the weights as autocast casts them: it keeps them to the end of a pass,
and the backward pass needs them. N is the larger of `optimizer.micro_batch_tokens` and the longest
sequence, but no more than a step has; rows are the rollouts that are generated at once. Ten D and
four F are what a Llama-shaped layer keeps for its backward pass: two residual streams, two norms
with their scaled outputs, queries, attention's output twice; gate, its activation, up, and their
product. Sampling and updating follow each other, so that the peak is models, AdamW and copies plus
the larger of the two phases. What Python and torch take by themselves (0.4 to 0.5 GB measured with
the CPU build) is added on a CPU alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from stableopd.config import Config
from stableopd.doctor.patient import Check, Patient
from stableopd.models import LanguageModel
from stableopd.objective.logprobs import CHUNK_ELEMENTS, SWEEP_ELEMENTS, SWEEP_VOCABULARY
from stableopd.objective.sweep import TILE_ELEMENTS, TILE_ELEMENTS_DEVICE
from stableopd.rollout.stops import Finding

__all__ = [
    "Estimate",
    "estimate",
    "kept_per_token",
    "memory",
    "memory_of_device",
    "tile_elements",
]

TILES = 12  # measured in docs/log.md, 2026-11-22: 362 MB at a vocabulary of 151,936, and a teacher
SWEPT_TILES = 9  # three buffers of each of three heads
SAMPLED_LOGITS = 4  # scores, their copy in float32, probabilities, the scores kept for log-probs
FLOAT32 = 4
BFLOAT16 = 2
MIXED = 3  # an activation under autocast: about half are float32, half bfloat16
PROCESS_BYTES = 0.5e9
SHOWN_BYTES = 5e6  # smaller parts would be shown as 0.00 GB
TIGHT = 0.85  # design: beyond, fragments and the rest of the machine may not fit


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of each part of a run's memory.

    Attributes:
        student: Weights of the student.
        teacher: Weights of the teacher.
        reference: Weights of the reference.
        gradients: Gradients of what is trained.
        adamw: The optimizer's two states.
        copies: The student's weights in bfloat16, where autocast makes these.
        activations: What one micro-batch keeps for its backward pass.
        tiles: Tiles of logits while updating, and the gradient that a sweep adds up beside them.
        cache: Keys and values while sampling.
        sampled_logits: Logits while sampling.
        process: Python and torch themselves.
    """

    student: float
    teacher: float
    reference: float
    gradients: float
    adamw: float
    copies: float
    activations: float
    tiles: float
    cache: float
    sampled_logits: float
    process: float

    @property
    def held(self) -> float:
        """What is there all the time."""
        models = self.student + self.teacher + self.reference
        return self.process + models + self.adamw + self.copies

    @property
    def updating(self) -> float:
        """What comes on top in an update."""
        return self.gradients + self.activations + self.tiles

    @property
    def sampling(self) -> float:
        """What comes on top while rollouts are written."""
        return self.cache + self.sampled_logits

    @property
    def peak(self) -> float:
        """The larger of the two phases, on top of what is held."""
        return self.held + max(self.updating, self.sampling)


def estimate(
    config: Config,
    student: LanguageModel,
    teacher: LanguageModel | None,
    prompt_tokens: int,
    is_mixed: bool,
    on_cpu: bool,
) -> Estimate:
    """Estimate the memory of a run.

    Args:
        config: Objective, batch and budget.
        student: The student, with its adapter where one is configured.
        teacher: The teacher, where the objective needs one.
        prompt_tokens: The longest prompt.
        is_mixed: Whether the forward pass mixes bfloat16 with float32 weights.
        on_cpu: Whether the run is on a CPU.

    Returns:
        Bytes by part; see the head of this file for the arithmetic.
    """
    o, r = config.objective, config.rollout
    weights = _bytes(student.model.parameters())
    trained = _bytes(p for p in student.model.parameters() if p.requires_grad)
    has_reference = bool(o.beta_reference) and not config.student.lora_rank
    shape = student.model.config.get_text_config()
    layers, width = shape.num_hidden_layers, shape.hidden_size
    heads = shape.num_attention_heads
    head_width = getattr(shape, "head_dim", None) or width // heads
    keys = (getattr(shape, "num_key_value_heads", None) or heads) * head_width
    forward = getattr(shape, "intermediate_size", None) or 4 * width
    experts = getattr(shape, "num_experts_per_tok", None) or 1
    size = student.model.dtype.itemsize
    rows = r.prompts_per_step * r.rollouts_per_prompt
    longest = prompt_tokens + r.max_new_tokens
    trained_rows = rows + (r.prompts_per_step if o.lambda_gold else 0)
    tokens = min(max(config.optimizer.micro_batch_tokens, longest), trained_rows * longest)
    checkpoints = config.student.gradient_checkpointing
    kept = kept_per_token(layers, width, forward * experts, keys, checkpoints)
    activation = MIXED if is_mixed else size
    head = student.model.get_output_embeddings().weight
    vocabulary, num_trained = head.shape[0], head.numel() if head.requires_grad else 0
    needs_chunks = bool(o.lambda_divergence) and (o.top_k or o.divergence == "jensen_shannon")
    at_once = min(r.batch_size or rows, rows)
    needs_rollouts = bool(o.lambda_policy or o.lambda_divergence or o.beta_reference)
    return Estimate(
        student=weights,
        teacher=0.0 if teacher is None else _bytes(teacher.model.parameters()),
        reference=weights if has_reference else 0.0,
        gradients=trained,
        adamw=2 * trained,
        copies=BFLOAT16 * _count(student.model.parameters()) if is_mixed else 0.0,
        activations=float(tokens * kept * activation),
        tiles=float(
            FLOAT32 * tile_elements(tokens, vocabulary, num_trained, on_cpu, bool(needs_chunks))
        ),
        cache=2.0 * layers * keys * longest * at_once * activation if needs_rollouts else 0.0,
        sampled_logits=SAMPLED_LOGITS * FLOAT32 * at_once * vocabulary if needs_rollouts else 0.0,
        process=PROCESS_BYTES if on_cpu else 0.0,
    )


def tile_elements(
    tokens: int, vocabulary: int, num_trained: int, on_cpu: bool, needs_chunks: bool = False
) -> int:
    """Numbers in the tiles of logits while updating, as `score_tokens` chooses its way.

    Args:
        tokens: Tokens of a micro-batch.
        vocabulary: Rows of the output head.
        num_trained: Weights of the head that are trained: all or none.
        on_cpu: Whether the run is on a CPU.
        needs_chunks: Whether a divergence needs whole distributions.

    Returns:
        Those of all tiles, and of the head's gradient, which a sweep adds up beside the one that
        earlier micro-batches left.
    """
    num_logits = tokens * vocabulary
    if needs_chunks or vocabulary < SWEEP_VOCABULARY or num_logits < SWEEP_ELEMENTS:
        return TILES * min(CHUNK_ELEMENTS, num_logits)
    at_once = min(TILE_ELEMENTS if on_cpu else TILE_ELEMENTS_DEVICE, num_logits)
    return SWEPT_TILES * at_once + num_trained


def kept_per_token(layers: int, width: int, forward: int, keys: int, checkpoints: bool) -> int:
    """Numbers that a model keeps for its backward pass.

    Args:
        layers: How many layers it has.
        width: Width of the model.
        forward: Width of the feed-forward layer, of all experts that a token goes through.
        keys: Width of the keys.
        checkpoints: Whether layers are computed again, all but their input.

    Returns:
        Activations per token; see the head of this file.
    """
    per_layer = 10 * width + 4 * forward + 2 * keys
    return layers * width + per_layer if checkpoints else layers * per_layer


def _bytes(parameters: Any) -> float:
    return float(sum(p.numel() * p.element_size() for p in parameters))


def _count(parameters: Any) -> float:
    return float(sum(p.numel() for p in parameters))


def memory_of_device(device: torch.device) -> float:
    """Bytes that a run could have there, what this process holds counted as free.

    Args:
        device: Where the run would be.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    # MPS shares its memory with the CPU.
    return float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def memory(patient: Patient, available: float) -> Check:
    """Compare the estimate with what the device has.

    Args:
        patient: Models, prompts and settings.
        available: Bytes that the run can have.

    Returns:
        FAIL where the estimate is more, WARN where it is nearly as much.
    """
    config = patient.config
    o = config.objective
    teaches = (o.lambda_policy and o.advantage != "group_reward") or o.lambda_divergence
    with patient.autocast():
        is_mixed = torch.is_autocast_enabled(patient.device.type)
    e = estimate(
        config,
        patient.student,
        patient.teacher if teaches else None,
        max(len(ids) for ids in patient.prompt_ids),
        is_mixed,
        patient.device.type == "cpu",
    )
    if patient.device.type == "mps":  # shares the memory of the process
        e = replace(e, process=PROCESS_BYTES)
    parts = {name: getattr(e, name) for name in Estimate.__slots__}
    numbers = {f"{name}_bytes": value for name, value in parts.items()}
    numbers |= {"peak_bytes": e.peak, "available_bytes": available}
    r = config.rollout
    models = [("student", e.student), ("teacher", e.teacher), ("reference", e.reference)]
    held = [*models, ("AdamW", e.adamw), ("copies", e.copies), ("process", e.process)]
    phase = [("gradients", e.gradients), ("activations", e.activations), ("logits", e.tiles)]
    where = "updating"
    if e.sampling > e.updating:
        phase = [("key-value cache", e.cache), ("logits", e.sampled_logits)]
        where = f"sampling {r.prompts_per_step} x {r.rollouts_per_prompt} rollouts"
    said = f"{_sum(held)}, and while {where} {_sum(phase)}"
    message = f"about {_gb(e.peak)} of {_gb(available)} GB free: {said}"
    if e.peak <= TIGHT * available:
        return Check((Finding("OK", "memory", f"{message}."),), numbers)
    fix = "lower optimizer.micro_batch_tokens, or set student.gradient_checkpointing or lora_rank."
    if e.sampling > e.updating:
        fix = "set rollout.batch_size, or lower rollout.max_new_tokens."
    if e.held > TIGHT * available:
        fix = "set student.lora_rank, use smaller models or a larger device."
    level = "FAIL" if e.peak > available else "WARN"
    return Check((Finding(level, "memory", f"{message}.", fix),), numbers)


def _sum(parts: list[tuple[str, float]]) -> str:
    shown = [(name, value) for name, value in parts if value >= SHOWN_BYTES]
    return " + ".join(f"{name} {_gb(value)}" for name, value in shown) or "less than 0.01"


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value < 10e9 else f"{value / 1e9:.0f}"
