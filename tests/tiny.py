"""Models, tokenizers, data and configurations so small that a training run takes a second."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.utils import logging

from stableopd import cli

PAD, EOS, END = 0, 1, 2
CHARACTERS = "0123456789+-=#? \nabcdefghij"
VOCABULARY = {"<pad>": PAD, "<eos>": EOS, "<end>": END} | {
    character: place for place, character in enumerate(CHARACTERS, start=3)
}
V = len(VOCABULARY)
CPU = torch.device("cpu")


def make_tokenizer(vocabulary: dict[str, int] = VOCABULARY, eos: str = "<eos>") -> Any:
    """A tokenizer of single characters."""
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token=eos)


def make_llama(seed: int = 0, width: int = 32, rows: int = V, sharp: float = 1.0, **options: Any):
    """A random Llama in evaluation mode; `sharp` scales its head and so its log-probs."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | options)))
    model.generation_config.eos_token_id = EOS
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model.eval()


def in_double(model: Any) -> Any:
    """The model in float64, its norms too, which transformers computes in float32."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model.double()


def make_stable_lm(seed: int = 0, width: int = 32, sharp: float = 1.0):
    """A random model that computes in float64 where its weights are: Llama's norms never do.

    No bias of a key, whose gradient is nothing but rounding.
    """
    torch.manual_seed(seed)
    rotary = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    settings = StableLmConfig(
        vocab_size=V,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters=rotary,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = StableLmForCausalLM(settings)
    model.generation_config.eos_token_id = EOS
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model.eval()


def save_model(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    """Write a model folder, without a progress bar on standard error."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[Any]) -> Path:
    """Write a .jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sums(count: int = 20) -> list[dict[str, str]]:
    """Problems that the tokenizer knows the characters of."""
    return [
        {"prompt": f"{i}+{i}=", "solution": f"{2 * i}", "answer": f"{2 * i}"} for i in range(count)
    ]


def make_world(folder: Path, make: Any = make_llama) -> Path:
    """Write student/, teacher/, train.jsonl and config.toml into a folder."""
    folder.mkdir(exist_ok=True)
    save_model(folder / "student", make(0, sharp=8))
    save_model(folder / "teacher", make(1, width=48, sharp=8))
    write_rows(folder / "train.jsonl", sums())
    write_config(folder)
    return folder


def write_config(folder: Path, name: str = "config.toml", **sections: dict[str, Any]) -> Path:
    """Write a configuration over the files of `make_world`, with some of its fields changed."""
    table: dict[str, dict[str, Any]] = {
        "run": {"output": str(folder / "run"), "steps": 2, "save_every": 1, "device": "cpu"},
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {"train": str(folder / "train.jsonl")},
        "rollout": {"prompts_per_step": 4, "rollouts_per_prompt": 2, "max_new_tokens": 8},
        "optimizer": {"learning_rate": 1e-3},
    }
    for section, fields in sections.items():
        table.setdefault(section, {}).update(fields)
    lines: list[str] = []
    for section, fields in table.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    file = folder / name
    file.write_text("\n".join(lines) + "\n")
    return file


def run_cli(*arguments: object, draws: bool = False) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error.

    The page of a run takes longer than all else and is made with `draws` alone.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["stableopd", *map(str, arguments)]
    page = contextlib.nullcontext() if draws else mock.patch("stableopd.report.page.write_page")
    with (
        page,
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, out.getvalue(), err.getvalue()


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte by byte."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "tokens_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]
