"""A model to be looked at, and a fingerprint of its weights, by which a folder knows it again."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from stableopd import embedded, models
from stableopd.evaluate.store import fingerprint
from stableopd.models import LanguageModel
from stableopd.runfolder.files import read_object
from stableopd.types import ModelError

__all__ = ["load_model"]

EMBEDDED = {"embedded": "student", "embedded-teacher": "teacher"}


def load_model(
    source: str, gguf_file: str, dtype: torch.dtype, device: torch.device, role: str
) -> tuple[LanguageModel, str]:
    """Load a model from wherever it may be.

    Args:
        source: A model folder, a LoRA adapter's folder, a hub name, "embedded" (the student) or
            "embedded-teacher".
        gguf_file: Name of a GGUF file in that folder.
        dtype: Type of the weights.
        device: Where the weights go.
        role: What the model is, for messages.

    Returns:
        The model; and SHA-256 of its weights, or the commit of one of the hub.

    Raises:
        ModelError: It cannot be loaded.
    """
    name = EMBEDDED.get(source)
    folder = embedded.path(name) if name else Path(source)
    adapter = folder / "adapter_config.json"
    transformers.logging.set_verbosity_error()
    if not adapter.is_file():
        model = models.load(
            str(folder) if name else source,
            role=role,
            dtype=dtype,
            device=device,
            gguf_file=gguf_file,
        )
        return model, _fingerprint(model, [folder])
    base = read_object(adapter).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter}: names no base_model_name_or_path; add the base model to it.")
    model = models.load(str(base), role=role, dtype=dtype, device=device)
    model = models.with_adapter(model, folder)
    return model, _fingerprint(model, [folder, Path(base)])


def _fingerprint(model: LanguageModel, folders: list[Path]) -> str:
    kinds = ("*.safetensors", "*.gguf")
    files = [path for f in folders for path in sorted(p for kind in kinds for p in f.glob(kind))]
    return fingerprint(files) if files else str(getattr(model.model.config, "_commit_hash", None))
