"""Make model folders that the recipe needs: a student with room for 8K answers, a merged adapter.

`extend` copies a model folder and changes what is said in its config.json about positions, and
nothing of its weights. Qwen2.5-Math was trained on 4,096 positions with a RoPE base of 10,000; the
LUFFY code base, on which the paper builds, uses 16,384 and 40,000 (config.json of
Elliott/Qwen2.5-Math-7B-SFT). `--tokenizer` puts another model's tokenizer beside the weights,
where both have the same tokens apart from the special ones.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from problem_text import run

from stableopd.data.rows import one_line
from stableopd.types import ModelError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)

# Spaces, digits, LaTeX, accents and two scripts: where tokenizers that are read wrongly differ.
SAMPLE = (
    "Let  $x^2+\\frac{12}{345} = \\pi$.\n\n<think>\nÉtude naïve: 三角形, ∑ of 1,000.5\t\\boxed{7}"
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def extend(
    source: Annotated[Path, typer.Argument(help="Model folder, such as Qwen2.5-Math-1.5B.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder whose tokenizer is taken; default: the source's.")
    ] = None,
    positions: Annotated[int, typer.Option(help="New max_position_embeddings.")] = 16_384,
    rope_theta: Annotated[float, typer.Option(help="New base of RoPE.")] = 40_000.0,
) -> None:
    """Copy a model folder with more positions, and perhaps another tokenizer."""
    if not (source / "config.json").is_file() or not list(source.glob("*.safetensors")):
        raise ModelError(f"{source}: not a model folder with config.json and safetensors.")
    if tokenizer is not None:
        require_same_ordinary_tokens(source, tokenizer)
    with _new_folder(target) as folder:
        for pattern in (*WEIGHTS, *CONFIGS):
            for file in sorted(source.glob(pattern)):
                shutil.copy2(file, folder / file.name)
        for name in TOKENIZER:
            if (file := (tokenizer or source) / name).is_file():
                shutil.copy2(file, folder / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = with_positions(config, positions, rope_theta)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _check(folder, positions, rope_theta)
    print(f"{target}: {positions} positions, RoPE base {rope_theta:g}.")


def with_positions(config: dict[str, Any], positions: int, rope_theta: float) -> dict[str, Any]:
    """A config.json with other positions, in the form that it has.

    Args:
        config: The file's object; RoPE stands in `rope_parameters` (transformers 5) or beside it.
        positions: New max_position_embeddings.
        rope_theta: New base of RoPE.

    Returns:
        A changed copy.
    """
    changed = {**config, "max_position_embeddings": positions}
    if isinstance(config.get("rope_parameters"), dict):
        changed["rope_parameters"] = {**config["rope_parameters"], "rope_theta": rope_theta}
    if "rope_theta" in config or "rope_parameters" not in config:
        changed["rope_theta"] = rope_theta
    return changed


def require_same_ordinary_tokens(source: Path, other: Path) -> None:
    """Refuse a tokenizer whose ordinary tokens are not those that the weights were trained with.

    Args:
        source: Folder of the model.
        other: Folder of the tokenizer.

    Raises:
        ModelError: An id means another text, and is not a special or added token in both.
    """
    mine, theirs = _tokenizer(source), _tokenizer(other)
    texts = [{i: token for token, i in t.get_vocab().items()} for t in (mine, theirs)]
    added = set(mine.added_tokens_decoder) & set(theirs.added_tokens_decoder)
    for i in sorted(set(texts[0]) & set(texts[1]) - added):
        if texts[0][i] != texts[1][i]:
            raise ModelError(
                f"{other}: id {i} is {texts[1][i]!r} there and {texts[0][i]!r} in {source}; this "
                "tokenizer does not belong to these weights."
            )


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a run with LoRA.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    dtype: Annotated[
        str, typer.Option(help="Of the merged weights: float32 or bfloat16.")
    ] = "float32",
) -> None:
    """Merge an adapter into its base, so that a later stage can start from it."""
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"--dtype {dtype}: choose from float32, bfloat16.")
    try:
        import peft
        import torch
        import transformers

        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for an attribute by its former name.
            warnings.simplefilter("ignore", FutureWarning)
            adapted: Any = peft.AutoPeftModelForCausalLM.from_pretrained(
                checkpoint, dtype=getattr(torch, dtype)
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{checkpoint}: cannot be merged ({one_line(error)}).") from None
    with _new_folder(target) as folder:
        adapted.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{target}: merged, {dtype}.")


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when all that goes into it went well."""
    if target.exists():
        raise ModelError(f"{target}: is there already; remove it or choose another folder.")
    folder = target.with_name(f"{target.name}.part")
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was interrupted
    folder.mkdir(parents=True)
    yield folder
    folder.rename(target)


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: no usable tokenizer ({one_line(error)}).") from None


def _check(folder: Path, positions: int, rope_theta: float) -> None:
    """What transformers reads out of the new folder is what was meant."""
    import tokenizers
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    read = (config.max_position_embeddings, config.rope_parameters["rope_theta"])
    if read != (positions, rope_theta):
        raise ModelError(f"{folder}: transformers reads positions and RoPE base as {read}.")
    tokenizer = _tokenizer(folder)
    if (file := folder / "tokenizer.json").is_file():
        # A tokenizer of another class than the file's own would train on other ids in silence.
        plain = tokenizers.Tokenizer.from_file(str(file)).encode(SAMPLE, add_special_tokens=False)
        if tokenizer(SAMPLE, add_special_tokens=False)["input_ids"] != plain.ids:
            raise ModelError(
                f"{folder}: transformers reads text differently from tokenizer.json itself; "
                "set tokenizer_class in tokenizer_config.json to TokenizersBackend."
            )
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    print(f"stop ids {stops} in config.json, {tokenizer.eos_token_id} in the tokenizer.")


if __name__ == "__main__":
    run(app)
