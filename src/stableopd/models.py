"""Loading language models, and what the rest of the program needs to know of them.

This file stands below `rollout/`, `teacher/` and `training/`, because all three need heads. Models
are any causal LM of transformers whose logits are `head(hidden)`, which is checked when one is
loaded. Weights come from safetensors or GGUF alone, and no remote code runs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from stableopd.hidden import hidden_states
from stableopd.objective.heads import Head
from stableopd.types import ModelError

__all__ = [
    "LanguageModel",
    "add_lora",
    "head_of",
    "load",
    "require_head",
    "require_same_tokenizer",
    "require_same_vocabulary",
    "shared_vocabulary",
    "with_adapter",
]

# What transformers, its libraries and broken files raise when a model cannot be loaded.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)

# Logits of the full model and of head(hidden) may differ by rounding alone.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
HEAD_TOLERANCE_HALF = 0.1


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        name: The folder or hub name it came from.
        model: The transformers (or PEFT) model.
        tokenizer: Its tokenizer.
        context: Longest sequence it reads, or None where its config does not say.
    """

    name: str
    model: Any
    tokenizer: Any
    context: int | None


def load(
    source: str, *, role: str, dtype: torch.dtype, device: torch.device, gguf_file: str = ""
) -> LanguageModel:
    """Load a model and its tokenizer from a folder or a hub name.

    Args:
        source: A folder with safetensors (or the GGUF file), or a name on the hub.
        role: "student" or "teacher", for messages.
        dtype: Type of the weights.
        device: Where the weights go.
        gguf_file: Name of a GGUF file in that folder; it is dequantised.

    Returns:
        The model in evaluation mode, every weight finite and `head(hidden)` equal to its logits.

    Raises:
        ModelError: There is no model, it has no safetensors, a weight is missing or not finite, it
            needs remote code, or its logits are not `head(hidden)`.
    """
    folder = Path(source)
    is_path = folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    needed = gguf_file or "config.json"
    if is_path and not (folder / needed).is_file():
        raise ModelError(
            f"{role}.model = {source!r}: not a model folder, it has no {needed}; give a folder "
            "that save_pretrained wrote, or a hub name."
        )
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"trust_remote_code": False}
    model_options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if gguf_file:
        options["gguf_file"] = gguf_file
        model_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        model_options["use_safetensors"] = True
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, **options, **model_options
        )
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{role}.model = {source!r}: cannot be loaded: {reason}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ModelError(
            f"{role}.model = {source!r}: the weights lack {sorted(info['missing_keys'])[0]!r} "
            f"({len(info['missing_keys'])} missing in all); save the model again in full."
        )
    model = model.to(device).eval()
    _require_finite(model, role, source)
    require_head(model, role, source)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return LanguageModel(source, model, tokenizer, context)


def _require_finite(model: nn.Module, role: str, source: str) -> None:
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"{role}.model = {source!r}: weight {name!r} is not finite (NaN or infinity); "
                "use an earlier checkpoint."
            )


@torch.no_grad()
def require_head(model: Any, role: str, source: str, is_half: bool = False) -> None:
    """Refuse a model whose logits are not its output embedding applied to its hidden states.

    Args:
        model: A transformers model, or a PEFT model around one, without dropout.
        role: "student" or "teacher", for messages.
        source: Name of the model, for messages.
        is_half: Whether float32 weights are rounded to half precision in a forward pass.

    Raises:
        ModelError: It is so, or the logits are not finite.
    """
    head = head_of(model, role, source)
    ids_BT = torch.arange(1, 9, device=model.device).unsqueeze(0) % head.weight_VD.shape[0]
    mask_BT = torch.ones_like(ids_BT)
    whole = model(input_ids=ids_BT, attention_mask=mask_BT).logits[0].float()
    if not bool(torch.isfinite(whole).all()):
        raise ModelError(
            f"{role}.model = {source!r}: its logits are not finite (NaN or infinity), though its "
            "weights are; use an earlier checkpoint or another dtype."
        )
    parts = head.logits(hidden_states(model, ids_BT, mask_BT)[0]).float()
    rounded = torch.bfloat16 if is_half else model.dtype
    tolerance = HEAD_TOLERANCE.get(rounded, HEAD_TOLERANCE_HALF)
    if not torch.allclose(whole, parts, rtol=tolerance, atol=tolerance * whole.abs().max().item()):
        raise ModelError(
            f"{role}.model = {source!r}: the logits of {type(model).__name__} are not its output "
            "embedding applied to its last hidden states, so it cannot be scored in chunks; use "
            "another architecture."
        )


def head_of(model: Any, role: str = "model", source: str = "") -> Head:
    """The output head of a causal language model.

    Args:
        model: A transformers model, or a PEFT model around one.
        role: "student" or "teacher", for messages.
        source: Name of the model, for messages.

    Returns:
        A head on the model's own parameters (tied or untied), with the scale and the soft cap
        that its config names.

    Raises:
        ModelError: The model has no linear output embedding.
    """
    output = _in_use(model.get_output_embeddings())
    if not isinstance(output, nn.Linear):
        kind = type(output)
        found = "" if output is None else f" but {kind.__module__}.{kind.__name__}"
        raise ModelError(
            f"{role}.model = {source!r}: {type(model).__name__} has no linear output head{found}; "
            "use a causal language model, and no adapter on its head but modules_to_save."
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, output.bias, scale, float(softcap) if softcap else None)


def _in_use(head: Any) -> Any:
    """The head that the model applies, where PEFT's `modules_to_save` holds a trained copy."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return copies[head.active_adapters[0]]


def require_same_tokenizer(student: LanguageModel, teacher: LanguageModel) -> None:
    """Refuse two models whose token ids mean different things.

    Args:
        student: One model.
        teacher: The other.

    Raises:
        ModelError: Their vocabularies differ; names both, and the first token that differs.
    """
    require_same_vocabulary(student.name, student.tokenizer, teacher.name, teacher.tokenizer)


def require_same_vocabulary(
    student: str, student_tokenizer: Any, teacher: str, teacher_tokenizer: Any
) -> None:
    """Refuse two tokenizers whose token ids mean different things.

    Args:
        student: Name of the student.
        student_tokenizer: Its tokenizer.
        teacher: Name of the teacher.
        teacher_tokenizer: Its tokenizer.

    Raises:
        ModelError: Their vocabularies differ; names both, and the first token that differs.
    """
    mine, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if mine == theirs:
        return
    student_token = {i: token for token, i in mine.items()}
    teacher_token = {i: token for token, i in theirs.items()}
    # Tokens that one of them added behind the shared ids contradict nothing.
    for i in range(min(max(student_token), max(teacher_token)) + 1):
        a, b = student_token.get(i), teacher_token.get(i)
        if a != b:
            raise ModelError(
                f"student {student!r} and teacher {teacher!r} have different "
                f"tokenizers: id {i} is {a!r} for the student and {b!r} for the teacher; "
                "distillation compares token by token, so use models that share one tokenizer."
            )


def shared_vocabulary(student: LanguageModel, teacher: LanguageModel | None) -> int:
    """How many ids both models have a logit for, padding of the vocabulary left out.

    Args:
        student: The student.
        teacher: The teacher, or None.

    Returns:
        The smaller of the two heads' sizes.

    Raises:
        ModelError: It does not even hold the tokenizer's ids.
    """
    sizes = [head_of(m.model).weight_VD.shape[0] for m in (student, teacher) if m is not None]
    num_tokens = min(sizes)
    largest_id = max(student.tokenizer.get_vocab().values())
    if largest_id >= num_tokens:
        raise ModelError(
            f"the tokenizer of {student.name!r} has id {largest_id}, but the models share logits "
            f"for {num_tokens} ids alone; resize the embeddings of the smaller one."
        )
    return num_tokens


def add_lora(student: LanguageModel, rank: int, alpha: int, targets: str) -> LanguageModel:
    """Put a LoRA adapter on the student; its base is then the reference.

    Args:
        student: The student, in full.
        rank: Rank of the adapter, at least 1.
        alpha: Scale of the adapter.
        targets: "all-linear", or names of modules separated by commas.

    Returns:
        The student as a PEFT model of which the adapter alone is trained.

    Raises:
        ModelError: peft is not installed, or no module has such a name.
    """
    try:
        import peft
    except ImportError:
        raise ModelError(
            "student.lora_rank needs the package peft; install stableopd[peft] or set it to 0."
        ) from None
    if Path(student.name).exists():
        # An adapter names its base; a relative path would hold in this folder alone.
        student.model.config._name_or_path = str(Path(student.name).resolve())
        student.model.name_or_path = str(Path(student.name).resolve())
    names = targets if targets == "all-linear" else [t.strip() for t in targets.split(",")]
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for an attribute by its former name.
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(student.model, config)
    except ValueError as error:
        raise ModelError(f"student.lora_targets = {targets!r}: {error}") from None
    return LanguageModel(student.name, model, student.tokenizer, student.context)


def with_adapter(base: LanguageModel, folder: Path) -> LanguageModel:
    """Merge a saved LoRA adapter into the model that it was trained on.

    Args:
        base: The model without the adapter; its weights are changed.
        folder: What PEFT's `save_pretrained` wrote, such as a checkpoint of a run with LoRA.

    Returns:
        The merged model under the folder's name.

    Raises:
        ModelError: peft is not installed, or the adapter does not fit the model.
    """
    try:
        import peft
    except ImportError:
        raise ModelError(
            f"{folder} is an adapter, which needs the package peft; install stableopd[peft]."
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as in add_lora
            adapted: Any = peft.PeftModel.from_pretrained(base.model, str(folder))
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: the adapter does not fit {base.name}: {reason}") from error
    merged = adapted.merge_and_unload().eval()
    return LanguageModel(str(folder), merged, base.tokenizer, base.context)
