"""Shapes of language models: how many weights they have, what FLOPs and bytes a token takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopd.types import ModelError

MIXTURES = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes in a config.json of a dense Llama-shaped model (Llama, Qwen2, Qwen3, SmolLM2).

    Attributes:
        name: What to call it.
        layers: Layers.
        width: Width of the residual stream, D.
        inner: Width of the feed-forward layer, F.
        heads: Heads of the queries.
        key_heads: Heads of keys and of values.
        head_dim: Width of a head.
        vocabulary: Rows of the output head, V.
        tied: Whether the head is the input embedding.
        biased: Whether queries, keys and values have a bias (Qwen2).
        normed: Whether queries and keys have a norm (Qwen3).
    """

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    biased: bool = False
    normed: bool = False

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token; values have the same."""
        return self.key_heads * self.head_dim

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.width

    @property
    def products(self) -> int:
        """Weights of a layer's matrices."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.inner)

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        biases = (self.queries + 2 * self.keys) if self.biased else 0
        norms = 2 * self.width + (2 * self.head_dim if self.normed else 0)
        return self.products + biases + norms

    @property
    def outer(self) -> int:
        """Weights outside of the layers: embedding, final norm, head."""
        return self.head * (1 if self.tied else 2) + self.width

    @property
    def weights(self) -> int:
        """All weights, P."""
        return self.layers * self.layer + self.outer

    def adapter(self, rank: int) -> int:
        """Weights of a LoRA adapter on every linear layer but the head.

        Args:
            rank: Its rank.

        Returns:
            rank (inputs + outputs), over the seven matrices of all layers.
        """
        d, q, k, f = self.width, self.queries, self.keys, self.inner
        return self.layers * rank * (2 * (d + q) + 2 * (d + k) + 3 * (d + f))

    def cache_bytes(self, number: int = 2) -> int:
        """Bytes of the keys and values of one token.

        Args:
            number: Bytes of one number.

        Returns:
            2 layers key_heads head_dim bytes.
        """
        return 2 * self.layers * self.keys * number

    def layer_flops(self, length: float) -> float:
        """FLOPs of one token's forward pass through the layers.

        Args:
            length: Tokens of its sequence; a token attends to half of them on average.

        Returns:
            2 for each weight of a matrix, and 4 x half the length for each number of a query.
        """
        return self.layers * (2.0 * self.products + 2.0 * length * self.queries)

    def forward_flops(self, length: float) -> float:
        """FLOPs of one token's forward pass, head included.

        Args:
            length: Tokens of its sequence.

        Returns:
            About 2 P.
        """
        return self.layer_flops(length) + 2.0 * self.head


def _qwen2(
    name: str, layers: int, width: int, inner: int, heads: int, keys: int, **more: Any
) -> Shape:
    options: dict[str, Any] = {"vocabulary": 151_936, "tied": True, "biased": True}
    return Shape(name, layers, width, inner, heads, keys, width // heads, **(options | more))


def _llama(name: str, layers: int, width: int, inner: int, heads: int) -> Shape:
    return Shape(name, layers, width, inner, heads, 8, 128, 128_256, False)


# From the models' config.json; tests/test_sizing.py compares the sums with published counts.
MODELS = {
    shape.name: shape
    for shape in (
        Shape("embedded", 3, 64, 192, 4, 4, 16, 18, False),
        Shape("SmolLM2-135M", 30, 576, 1_536, 9, 3, 64, 49_152, True),
        _qwen2("Qwen2.5-0.5B", 24, 896, 4_864, 14, 2),
        _qwen2("Qwen2.5-1.5B", 28, 1_536, 8_960, 12, 2),
        _qwen2("Qwen2.5-7B", 28, 3_584, 18_944, 28, 4, vocabulary=152_064, tied=False),
        Shape("Qwen3-0.6B", 28, 1_024, 3_072, 16, 8, 128, 151_936, True, normed=True),
        Shape("Qwen3-1.7B", 28, 2_048, 6_144, 16, 8, 128, 151_936, True, normed=True),
        Shape("Qwen3-4B", 36, 2_560, 9_728, 32, 8, 128, 151_936, True, normed=True),
        Shape("Qwen3-32B", 64, 5_120, 25_600, 64, 8, 128, 151_936, False, normed=True),
        _llama("Llama-3.1-8B", 32, 4_096, 14_336, 32),
        _llama("Llama-3.1-70B", 80, 8_192, 28_672, 64),
    )
}


def find_model(text: str) -> Shape:
    """A model by its name, by the end of its name such as "1.5B", or from its folder.

    Args:
        text: Name, end of a name, or folder with a config.json.

    Returns:
        Its shape.

    Raises:
        ModelError: There is none, or there are several.
    """
    if (Path(text) / "config.json").is_file():
        return read_shape(Path(text))
    ends = f"-{text}".lower()
    found = [s for s in MODELS.values() if s.name.lower() == text.lower()]
    found = found or [s for s in MODELS.values() if s.name.lower().endswith(ends)]
    if len(found) != 1:
        raise ModelError(
            f"{text!r} is neither a folder with a config.json nor one of {', '.join(MODELS)}."
        )
    return found[0]


def read_shape(folder: Path) -> Shape:
    """The shape of a model of one's own.

    Args:
        folder: Holds a config.json as transformers writes it.

    Returns:
        Its shape, named like the folder.

    Raises:
        ModelError: The file is no such configuration, or the model is not dense.
    """
    file = folder / "config.json"
    try:
        read = json.loads(file.read_text())
        config = read.get("text_config", read)
        experts = next((key for key in MIXTURES if config.get(key)), None)
        if experts is not None:
            raise ModelError(
                f"{file} has {experts}: the arithmetic here is that of dense models; take a dense "
                "one, or measure two steps."
            )
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        kind = str(config.get("model_type", ""))
        return Shape(
            name=folder.resolve().name,
            layers=int(config["num_hidden_layers"]),
            width=width,
            inner=int(config["intermediate_size"]),
            heads=heads,
            key_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            vocabulary=int(config["vocab_size"]),
            # transformers' own default, where a file leaves it out.
            tied=bool(config.get("tie_word_embeddings", False)),
            biased=kind == "qwen2",
            normed=kind == "qwen3",
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read as a model's configuration: {error}.") from error
    except KeyError as error:
        raise ModelError(f"{file} has no {error.args[0]}, which the arithmetic needs.") from error
