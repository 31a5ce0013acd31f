"""Loading language models, and what the rest of the program needs to know of them.

This file stands below `rollout/`, `teacher/` and `training/`, because all three need heads. Models
are any causal LM of transformers whose logits are `head(hidden)`, which is checked when one is
loaded. Weights come from safetensors or GGUF alone, and no remote code runs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

from stableopd.hidden import hidden_states
from stableopd.model_files import (
    ModelFiles,
    find_files,
    guarded,
    read_tokenizer_files,
    stored_types,
)
from stableopd.objective.heads import Head
from stableopd.types import ModelError

__all__ = [
    "LanguageModel",
    "add_lora",
    "head_of",
    "load",
    "load_tokenizer",
    "require_head",
    "require_same_tokenizer",
    "require_same_vocabulary",
    "rounding_note",
    "save_tokenizer",
    "shared_vocabulary",
]

# Logits of the full model and of head(hidden) may differ by rounding alone.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
HEAD_TOLERANCE_HALF = 0.1

# Design: below this share of weights that an update changes, rounding takes part of the training.
MOVING_SHARE, ROUNDED = 0.9, 1_000_000


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        name: The folder or hub name it came from.
        model: The transformers (or PEFT) model.
        tokenizer: Its tokenizer.
        context: Longest sequence it reads, or None where its config does not say.
        folders: The folders that its weights came from.
        tokenizer_files: The files that the tokenizer was read from, byte by byte.
        notes: Sentences for whoever trains it.
    """

    name: str
    model: Any
    tokenizer: Any
    context: int | None
    folders: tuple[Path, ...] = ()
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    notes: tuple[str, ...] = ()


def load(
    source: str, *, role: str, dtype: torch.dtype, device: torch.device, gguf_file: str = ""
) -> LanguageModel:
    """Load a model and its tokenizer from a folder or a hub name.

    Of an adapter the base is loaded, and the adapter merged into it; its folder's tokenizer and
    generation_config.json come before those of the base.

    Args:
        source: A folder with safetensors (or the GGUF file, or a LoRA adapter), or a hub name.
        role: "student" or "teacher", for messages.
        dtype: Type of the weights.
        device: Where the weights go.
        gguf_file: Name of a GGUF file in that folder; it is dequantised.

    Returns:
        The model in evaluation mode, every weight finite and `head(hidden)` equal to its logits.

    Raises:
        ModelError: There is no model, it has no safetensors, a weight is missing, left over or not
            finite, it needs remote code, or its logits are not `head(hidden)`.
    """
    transformers.utils.logging.disable_progress_bar()
    where = f"{role}.model = {source!r}"
    files = find_files(source, where, gguf_file)
    loaded = _load(files, where, dtype, gguf_file)
    with guarded(where):
        model = loaded.model.to(device).eval()
        _require_finite(model, role, source)
        require_head(model, role, source)
    return loaded


def _load(files: ModelFiles, where: str, dtype: torch.dtype, gguf_file: str = "") -> LanguageModel:
    if files.base is not None:
        return _with_adapter(_load(files.base, where, dtype), files, where)
    tokenizer = load_tokenizer(files.folder, where, gguf_file)
    model = _load_weights(files, where, dtype, gguf_file)
    notes: tuple[str, ...] = ()
    if isinstance(files.config.get("text_config"), dict) and (
        model.config.model_type != files.config.get("model_type")
    ):
        names = files.config.get("architectures")
        name = names[0] if isinstance(names, list) and names else "a model of images and text"
        notes = (
            f"{files.source} is {name}: only its text part, {type(model).__name__}, is used, "
            "and a checkpoint of it holds no other part.",
        )
    with guarded(where):
        context = _context(model, where)
        kept = {} if gguf_file else read_tokenizer_files(files.folder)
    return LanguageModel(files.source, model, tokenizer, context, files.folders, kept, notes)


def load_tokenizer(folder: Path, where: str, gguf_file: str = "") -> Any:
    """Load a tokenizer and see that it works.

    Args:
        folder: Its folder.
        where: Names the model, for messages.
        gguf_file: Name of the GGUF file that holds it.

    Returns:
        The tokenizer.

    Raises:
        ModelError: It cannot be loaded.
    """
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    with guarded(where):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, **options
        )
        template = tokenizer.chat_template
        parts = list(template.values()) if isinstance(template, dict) else [template or ""]
        if not all(isinstance(part, str) for part in parts):
            raise ModelError(f"{where}: its chat template is no text; correct its tokenizer files.")
        ids = tokenizer("1", add_special_tokens=False, verbose=False)["input_ids"]
        if not isinstance(tokenizer.decode(ids), str) or not tokenizer.get_vocab():
            raise ModelError(f"{where}: its tokenizer has no tokens; copy its files here again.")
    return tokenizer


def _load_weights(files: ModelFiles, where: str, dtype: torch.dtype, gguf_file: str) -> Any:
    options: dict[str, Any] = {"trust_remote_code": False, "dtype": dtype}
    types: dict[str, tuple[str, tuple[int, ...]]] = {}
    with guarded(where):
        if gguf_file:
            options["gguf_file"] = gguf_file
            if hasattr(transformers, "GgufConfig"):  # before it, such weights were always expanded
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        else:
            types = stored_types(files, where)
            options["use_safetensors"] = True
            options["config"] = _own_config(files.folder)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(files.folder), output_loading_info=True, **options
        )
        model, info = loaded
        _require_complete(info, where)
        if "quantization_config" not in files.config:
            _require_floating(model, types, where)
        if str(files.folder) != files.source:
            # A copy of the hub, which goes by its name there.
            model.config._name_or_path = model.name_or_path = files.source
    return model


def _own_config(folder: Path) -> Any:
    """The configuration of a folder, without what it may say of how it is computed."""
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    # Else a file could ask for a kernel of the hub, which is code.
    config._attn_implementation = None
    if hasattr(config, "_experts_implementation"):
        # Before torch 2.9 the default runs on some GPUs only.
        has_grouped = Version(torch.__version__) >= Version("2.9")
        config._experts_implementation = None if has_grouped else "eager"
    vars(config).pop("fusion_config", None)
    for part in (config, config.get_text_config()):
        part.return_dict = True
        part.output_attentions = part.output_hidden_states = False
        if hasattr(part, "output_router_logits"):
            # The auxiliary loss of a mixture of experts, which takes masks of whole sequences.
            part.output_router_logits = False
    return config


def _require_complete(info: Mapping[str, Any], where: str) -> None:
    """Refuse weights that are not those of the architecture: another model would be measured."""
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise ModelError(
            f"{where}: the weights lack {missing[0]!r} ({len(missing)} missing in all); save the "
            "model again in full."
        )
    if extra:
        raise ModelError(
            f"{where}: the weights hold {extra[0]!r} ({len(extra)} such in all), for which the "
            "model has no place; correct config.json (its number of layers, say), or save the "
            "model again without them."
        )
    if info.get("error_msgs"):
        raise ModelError(f"{where}: cannot be loaded: {info['error_msgs'][0]}")


def _require_floating(
    model: Any, types: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> None:
    """Refuse weights that are stored as whole numbers, without the scales that they need."""
    prefix = f"{model.base_model_prefix}."
    known = {name for name, _ in model.named_parameters()}
    for name, (kind, _) in types.items():
        names = {name, prefix + name, name.removeprefix(prefix)}
        is_whole = kind[0] in "IU" or kind == "BOOL"  # masks and positions may be
        if is_whole and (name.endswith("weight") or names & known):
            raise ModelError(
                f"{where}: weight {name!r} is stored as whole numbers ({kind}), and config.json "
                "names no quantisation; save the model again in floating point."
            )


def _context(model: Any, where: str) -> int | None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    if not isinstance(context, int) or context < 1:
        raise ModelError(
            f"{where}: max_position_embeddings = {context!r} in config.json is no length; correct "
            "it."
        )
    return context


def _require_finite(model: nn.Module, role: str, source: str) -> None:
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"{role}.model = {source!r}: weight {name!r} is not finite (NaN or infinity); "
                "use an earlier checkpoint."
            )


def save_tokenizer(student: LanguageModel, folder: Path) -> None:
    """Write a tokenizer as it was read, so that programs that read it before read it again.

    transformers would write the same tokenizer in the form of its own version.

    Args:
        student: The model with the tokenizer.
        folder: The folder to write to.
    """
    student.tokenizer.save_pretrained(folder)
    template = student.tokenizer.chat_template
    for name, data in student.tokenizer_files.items():
        if name.startswith("chat_template") or name == "tokenizer_config.json":
            continue
        (folder / name).write_bytes(data)
    config = student.tokenizer_files.get("tokenizer_config.json")
    if config is None:
        return
    settings = json.loads(config)
    if isinstance(template, str) and settings.get("chat_template", template) != template:
        settings["chat_template"] = template  # another one was chosen for this run
        config = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    (folder / "tokenizer_config.json").write_bytes(config)


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

    The tokenizer may have ids beyond, as that of a text-only Gemma 3 has: what uses them is
    refused where texts are encoded.

    Args:
        student: The student.
        teacher: The teacher, or None.

    Returns:
        The smaller of the two heads' sizes.
    """
    return min(head_of(m.model).weight_VD.shape[0] for m in (student, teacher) if m is not None)


@torch.no_grad()
def rounding_note(model: Any, learning_rate: float) -> str:
    """Say where rounding takes the updates of weights in half precision.

    Adam moves each weight by about the learning rate. A weight w keeps its value where
    round(w + rate) = w, which is looked at for up to a million weights of each tensor.

    Args:
        model: The student.
        learning_rate: The largest one.

    Returns:
        A sentence with the share of weights that such a step changes; "" where nearly all do.
    """
    moved = total = 0.0
    kinds = (torch.bfloat16, torch.float16)
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in kinds:
            flat = weight.detach().flatten()
            part = flat[:: max(1, flat.numel() // ROUNDED)]
            for step in (learning_rate, -learning_rate):
                share = ((part.float() + step).to(part.dtype) != part).float().mean().item()
                moved += share * flat.numel() / 2
            total += flat.numel()
    if not total or moved / total >= MOVING_SHARE:
        return ""
    return (
        f"a step of optimizer.learning_rate = {learning_rate:g} changes {moved / total:.1%} of the "
        f"student's weights, measured on them: the others are rounded back to what they were, as "
        "student.dtype is a half precision."
    )


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
    # An adapter names its base; a relative path would hold in this folder alone.
    base = str(Path(student.name).resolve()) if Path(student.name).exists() else student.name
    student.model.config._name_or_path = student.model.name_or_path = base
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
    return replace(student, model=model)


def _with_adapter(base: LanguageModel, files: ModelFiles, where: str) -> LanguageModel:
    """Merge a saved adapter into the model that it was trained on; the base's weights change."""
    try:
        import peft
    except ImportError:
        raise ModelError(
            f"{files.source} is an adapter, which needs the package peft; install stableopd[peft]."
        ) from None
    types = stored_types(files, where)
    _fit_embeddings(base.model, types, where)
    fault = f"the adapter does not fit {base.name}"
    with guarded(where, fault), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for an attribute by its former name; and it only warns
        # of weights that it does not find.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        adapted: Any = peft.PeftModel.from_pretrained(base.model, str(files.folder))
        saved = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        own = adapted.state_dict().keys()
        known = {
            n.replace(part, "") for n in own for part in (".default", ".modules_to_save.default")
        }
        lacking, extra = sorted(saved - types.keys()), sorted(types.keys() - saved - known)
        for names, said in ((lacking, "lacks"), (extra, "has no place for")):
            if names:
                raise ModelError(f"{where}: {fault}: it {said} {names[0]!r}.")
        _require_floating(adapted, types, where)
        merged = adapted.merge_and_unload().eval()
        merged.requires_grad_(True)  # PEFT freezes the base
        kept = read_tokenizer_files(files.folder)
        if (files.folder / "generation_config.json").is_file():
            merged.generation_config = transformers.GenerationConfig.from_pretrained(files.folder)
    tokenizer = load_tokenizer(files.folder, where) if kept else base.tokenizer
    return replace(
        base,
        name=files.source,
        model=merged,
        tokenizer=tokenizer,
        folders=files.folders,
        tokenizer_files=kept or base.tokenizer_files,
    )


def _fit_embeddings(
    model: Any, types: Mapping[str, tuple[str, tuple[int, ...]]], where: str
) -> None:
    """Give the embeddings as many rows as an adapter has saved of them."""
    names = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
    rows = {
        shape[0]
        for name, (_, shape) in types.items()
        if ".lora_" not in name and any(part in names for part in name.split("."))
    }
    if len(rows) > 1:
        raise ModelError(f"{where}: its embeddings have {sorted(rows)} rows; save it again.")
    if rows and rows != {head_of(model).weight_VD.shape[0]}:
        with guarded(where):
            model.resize_token_embeddings(rows.pop(), mean_resizing=False)
