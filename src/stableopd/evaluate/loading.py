"""A model to be looked at, and a fingerprint of its weights, by which a folder knows it again."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from stableopd import embedded, models
from stableopd.evaluate.store import fingerprint
from stableopd.models import LanguageModel
from stableopd.runfolder import newest_checkpoint
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
        The model; and SHA-256 of its weights, of an adapter with those of its base.

    Raises:
        ModelError: It cannot be loaded.
    """
    name = EMBEDDED.get(source)
    transformers.logging.set_verbosity_error()
    checkpoint = None if name else newest_checkpoint(Path(source))
    if checkpoint is not None:
        raise ModelError(
            f"{source} is the folder of a run, not a model's; its newest checkpoint is "
            f"{checkpoint}."
        )
    model = models.load(
        str(embedded.path(name)) if name else source,
        role=role,
        dtype=dtype,
        device=device,
        gguf_file=gguf_file,
    )
    return model, _fingerprint(model)


def _fingerprint(model: LanguageModel) -> str:
    """What changes when weights, an adapter's scale, or the shape of the model do."""
    weights = sorted(
        p for f in model.folders for kind in ("*.safetensors", "*.gguf") for p in f.glob(kind)
    )
    settings = [f / name for f in model.folders for name in ("config.json", "adapter_config.json")]
    return fingerprint([*weights, *(path for path in settings if path.is_file())])
