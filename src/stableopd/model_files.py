"""The files of a model: where they are, and what is refused before a library opens them.

Weights come from safetensors or GGUF only. transformers and PEFT open a pickle all the same where
an index or a config names one, so names are checked here first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stableopd.text import one_line
from stableopd.types import ModelError, StableOPDError

__all__ = [
    "ModelFiles",
    "find_files",
    "find_tokenizer",
    "guarded",
    "read_tokenizer_files",
    "stored_types",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

# What a tokenizer may be made of; a folder with one of the first holds a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.txt",
)
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")

# Design: far above every published model, and little enough to be read at once.
MAX_JSON_BYTES, MAX_LAYERS, MAX_ADAPTERS = 2**28, 10_000, 8


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found.

    Attributes:
        source: Its folder or hub name, as it was given.
        folder: Where its files are.
        weights: Its files of weights.
        config: What config.json (of an adapter: adapter_config.json) holds; empty for GGUF.
        base: The model that an adapter was trained on; None for a full model.
    """

    source: str
    folder: Path
    weights: tuple[Path, ...]
    config: Mapping[str, Any]
    base: ModelFiles | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders with weights: its own, and those of the models below an adapter."""
        return (self.folder, *(self.base.folders if self.base else ()))


@contextmanager
def guarded(where: str, what: str = "cannot be loaded") -> Iterator[None]:
    """Turn what transformers, its libraries and broken files raise into one sentence.

    Args:
        where: Names the model, for the message.
        what: What could not be done.

    Raises:
        ModelError: Anything else than an interrupt or an error of our own was raised.
    """
    try:
        yield
    except (StableOPDError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        reason = one_line(error, 300)
        raise ModelError(f"{where}: {what}: {reason}") from error


def find_files(source: str, where: str, gguf_file: str = "") -> ModelFiles:
    """Find a model, and refuse what must not be opened.

    Args:
        source: A folder (of a model or an adapter), or a hub name, which is downloaded.
        where: Names the model, for messages.
        gguf_file: Name of a GGUF file in that folder.

    Returns:
        Its files.

    Raises:
        ModelError: There is no such model, a file that it needs is missing, or its weights are
            pickles.
    """
    return _find(source, where, gguf_file, 0)


def _find(source: str, where: str, gguf_file: str, num_adapters: int) -> ModelFiles:
    folder = _folder(source, where, (gguf_file,) if gguf_file else ())
    if gguf_file:
        file = folder / gguf_file
        if not file.is_file():
            raise _no_model(where, gguf_file)
        return ModelFiles(source, folder, (file,), {})
    if (folder / ADAPTER).is_file():
        return _find_adapter(source, folder, where, num_adapters)
    if not (folder / "config.json").is_file():
        raise _no_model(where, "config.json")
    config = _read_json(folder / "config.json", where)
    _check_config(config, where)
    return ModelFiles(source, folder, _weights(source, folder, config, where), config)


def _find_adapter(source: str, folder: Path, where: str, num_adapters: int) -> ModelFiles:
    config = _read_json(folder / ADAPTER, where)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ModelError(
            f"{where}: {ADAPTER} names no base_model_name_or_path; add the base model to it."
        )
    if num_adapters >= MAX_ADAPTERS:
        raise ModelError(f"{where}: adapters name each other as their base; correct {ADAPTER}.")
    if config.get("megatron_config"):
        # PEFT would import the module that megatron_core names.
        raise ModelError(f"{where}: {ADAPTER} has a megatron_config; remove it.")
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        _fetch(source, folder, (ADAPTER_WEIGHTS,), where)
    if not file.is_file():
        raise _no_weights(folder, where, ADAPTER_WEIGHTS)
    below = _find(base, f"{where}: its base {base!r}", "", num_adapters + 1)
    return ModelFiles(source, folder, (file,), config, below)


def find_tokenizer(source: str, where: str) -> Path:
    """The folder of a tokenizer, which may hold nothing else.

    Args:
        source: A folder or a hub name.
        where: Names the tokenizer, for messages.

    Returns:
        The folder.

    Raises:
        ModelError: There is none.
    """
    folder = _folder(source, where, ())
    if not folder.is_dir():
        raise ModelError(f"{where}: there is no such folder; give a folder or a hub name.")
    return folder


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer as they are.

    Args:
        folder: A model folder.

    Returns:
        Their bytes by name; empty where the folder holds no tokenizer.

    Raises:
        OSError: A file cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return {}
    return {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}


def stored_types(files: ModelFiles, where: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor in the files of weights.

    Args:
        files: A model with safetensors.
        where: Names the model, for messages.

    Returns:
        A type such as "F32" or "I8", and the shape, by name.

    Raises:
        ModelError: A file is damaged.
    """
    from safetensors import safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    with guarded(where):
        for file in files.weights:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    part = tensors.get_slice(name)
                    found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def _folder(source: str, where: str, more: tuple[str, ...]) -> Path:
    """The folder that a source is, or its copy of the hub."""
    path = Path(source)
    try:
        is_path = (
            path.exists() or bool({"\\", "\0"} & set(source)) or source.startswith((".", "/", "~"))
        )
        is_path |= source.count("/") > 1 or ("/" in source and path.parent.exists())
    except (OSError, ValueError):  # a name that no file can have
        raise _no_model(where, "config.json") from None
    if is_path:
        return path
    return _fetch(source, path, (*SMALL_FILES, *more), where)


def _fetch(source: str, folder: Path, patterns: tuple[str, ...], where: str) -> Path:
    """Download files of a hub name, in one request for their list; nothing for a local folder.

    Args:
        source: The folder or the hub name.
        folder: Where its files are, if it is known.
        patterns: The files; those of subfolders are left out.
        where: Names the model, for messages.
    """
    if Path(source).exists():
        return folder
    import huggingface_hub

    revision = folder.name if folder.parent.name == "snapshots" else None
    try:
        got = huggingface_hub.snapshot_download(
            source, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    except Exception as error:
        # Of the hub's client, of HTTP, of sockets, of the disk.
        reason = one_line(error)
        raise ModelError(
            f"{where}: there is no folder {source!r}, so it was taken for a hub name, and that "
            f"cannot be loaded: {reason}"
        ) from error
    return Path(got)


def _weights(source: str, folder: Path, config: Mapping[str, Any], where: str) -> tuple[Path, ...]:
    """The safetensors files of a model, chosen as transformers chooses them."""
    named = config.get("transformers_weights")
    if named is not None and not _is_safe_name(named, (".safetensors", INDEX)):
        raise ModelError(
            f"{where}: config.json names the weights {named!r}, which are no safetensors in this "
            "folder; remove transformers_weights from it."
        )
    first = named if isinstance(named, str) and not named.endswith(INDEX) else WEIGHTS
    index = folder / (named if isinstance(named, str) and named.endswith(INDEX) else INDEX)
    if not (folder / first).is_file() and not index.is_file():
        _fetch(source, folder, (first,), where)
    if (folder / first).is_file() and (folder / first) != index:
        return (folder / first,)
    if not index.is_file():
        raise _no_weights(folder, where, WEIGHTS)
    names = _read_json(index, where).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{where}: {index.name} has no weight_map; save the model again.")
    files = sorted({str(name) for name in cast(dict[str, Any], names).values()})
    for name in files:
        if not _is_safe_name(name, (".safetensors",)):
            raise ModelError(
                f"{where}: {index.name} names {name!r}, which is no safetensors file in this "
                "folder, and a pickle could run code; save the model again as safetensors."
            )
    if not all((folder / name).is_file() for name in files):
        _fetch(source, folder, tuple(files), where)
    for name in files:
        if not (folder / name).is_file():
            raise ModelError(f"{where}: {index.name} names {name}, which is missing; copy it here.")
    return tuple(folder / name for name in files)


def _is_safe_name(name: Any, endings: tuple[str, ...]) -> bool:
    """Whether it is the name of a file in the folder itself, of a kind that is no pickle."""
    return isinstance(name, str) and name.endswith(endings) and Path(name).name == name


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse numbers with which building a model would never end."""
    parts = (config, *(v for v in config.values() if isinstance(v, dict)))
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts"):
        for part in parts:
            value = cast(Mapping[str, Any], part).get(name)
            if isinstance(value, int | float) and value > MAX_LAYERS:
                raise ModelError(
                    f"{where}: cannot be loaded: config.json has {name} = {value}; correct it."
                )


def _read_json(file: Path, where: str) -> dict[str, Any]:
    with guarded(where):
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{where}: cannot be loaded: {file.name} is larger than 256 MiB.")
        read = json.loads(file.read_bytes())
    if not isinstance(read, dict):
        raise ModelError(f"{where}: cannot be loaded: {file.name} is not a JSON object.")
    return cast(dict[str, Any], read)


def _no_model(where: str, needed: str) -> ModelError:
    return ModelError(
        f"{where}: not a model folder, it has no {needed}; give a folder that save_pretrained "
        "wrote, or a hub name."
    )


def _no_weights(folder: Path, where: str, needed: str) -> ModelError:
    try:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    except OSError:
        pickles = []
    if pickles:
        return ModelError(
            f"{where}: cannot be loaded: its weights are a pickle ({pickles[0]}), which could run "
            f"code; save it again with safe_serialization=True, as {needed}."
        )
    return ModelError(f"{where}: cannot be loaded: it has no {needed}; copy the weights there.")
