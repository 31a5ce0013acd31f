"""Pretrain the embedded student and teacher: `python -m stableopd.embedded.make_models --out DIR`.

Both are Llama-shaped models of characters, and see each document of `data/arithmetic.py` once. The
teacher slips seldom, and knows that an answer that was written three times goes on for ever. The
student calculates well but slips in 42% of its steps (it was made sloppy last), and repeats its
answer with the same small probability however often it did so before: it ends its loops
by itself, and has never had to tell the first copy from the fifth. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import Tensor

from stableopd.data.arithmetic import ALPHABET, Document, DocumentStyle, make_document

__all__ = ["main", "make_model", "make_tokenizer", "pretrain"]

PAD, END = "<pad>", "<end>"
PAD_ID, END_ID = 0, 1
BUDGET = 96  # tokens of a completion at most, here and in demo.toml
WIDTH, NUM_LAYERS, NUM_HEADS, FEED_FORWARD = 64, 3, 4, 192
CONTEXT = 128
BATCH, WARMUP_STEPS, FINAL_RATE = 96, 50, 0.1
BETAS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.98), 0.01, 1.0
CHECKSUMS = "CHECKSUMS.sha256"


@dataclass(frozen=True)
class Phase:
    """A part of a pretraining: its documents, how many steps, and how fast.

    Attributes:
        style: How its documents are written.
        num_steps: Optimizer steps of `BATCH` documents.
        learning_rate: Rate after the warm-up.
        is_decayed: Whether the rate falls linearly to a tenth, or stays.
    """

    style: DocumentStyle
    num_steps: int
    learning_rate: float
    is_decayed: bool


PHASES: dict[str, tuple[Phase, ...]] = {
    "teacher": (Phase(DocumentStyle(slip=0.04, repeat=(0.12, 0.85, 1.0)), 1300, 3e-3, True),),
    "student": (
        Phase(DocumentStyle(slip=0.0, repeat=(0.15,)), 450, 3e-3, False),
        Phase(DocumentStyle(slip=0.42, repeat=(0.15,)), 80, 1e-3, False),
    ),
}
SEEDS = {"teacher": 0, "student": 1}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with one token for each character of the alphabet, a pad and an end token."""
    vocabulary = {token: i for i, token in enumerate((PAD, END, *ALPHABET))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=PAD))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> transformers.LlamaForCausalLM:
    """A model with fresh weights.

    Args:
        seed: Seed of the weights.

    Returns:
        The model; every matrix has standard deviation 1 / sqrt(inputs), those that write into the
        residual stream half of it.
    """
    config = transformers.LlamaConfig(
        vocab_size=len(ALPHABET) + 2,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=END_ID,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            scale = 0.5 if name.endswith(("embed_tokens.weight", "o_proj.weight")) else 1.0
            scale = 0.5 if name.endswith("down_proj.weight") else scale
            inputs = 1 if "embed_tokens" in name else weight.shape[1]
            weight.normal_(0.0, scale * inputs**-0.5, generator=generator)
    return model


def pretrain(
    name: str, seed: int, phases: Sequence[Phase], scale: float = 1.0
) -> transformers.LlamaForCausalLM:
    """Pretrain a model on documents of the embedded world.

    Args:
        name: What is printed beside its losses.
        seed: Of its weights and its documents.
        phases: The parts of its pretraining, in order.
        scale: Factor on all numbers of steps; other than 1 only to try the script.

    Returns:
        The model. The same seed and phases give the same documents; weights agree to rounding.
    """
    model, tokenizer = make_model(seed), make_tokenizer()
    rng = random.Random(seed)
    for number, phase in enumerate(phases, start=1):
        num_steps = max(1, round(phase.num_steps * scale))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=phase.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        for step in range(num_steps):
            rate = phase.learning_rate * min((step + 1) / WARMUP_STEPS, 1)
            if phase.is_decayed:
                rate *= FINAL_RATE + (1 - FINAL_RATE) * (1 - (step + 1) / num_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            documents = [make_document(rng, phase.style, BUDGET) for _ in range(BATCH)]
            loss = _step(model, optimizer, tokenizer, documents)
            if (step + 1) % 100 == 0 or step + 1 == num_steps:
                print(f"{name}, phase {number}, step {step + 1}: loss {loss:.3f}", flush=True)
    return model


def _step(
    model: transformers.LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokenizer: transformers.PreTrainedTokenizerFast,
    documents: Sequence[Document],
) -> float:
    """One update; short and long documents apart, so that little padding is computed."""
    limit = BUDGET // 2
    short = [d for d in documents if len(d.completion) < limit]
    long = [d for d in documents if len(d.completion) >= limit]
    optimizer.zero_grad()
    total = 0.0
    for part in (short, long):
        if part:
            ids_BT, mask_BT = _encode(tokenizer, part)
            logits_BTV = model(input_ids=ids_BT[:, :-1]).logits
            loss_BT = torch.nn.functional.cross_entropy(
                logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none"
            )
            # Divided by the length of a plain solution: a document that loops weighs more.
            loss = (loss_BT * mask_BT[:, 1:]).sum() / (len(documents) * 30)
            loss.backward()
            total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    optimizer.step()
    return total


def _encode(
    tokenizer: transformers.PreTrainedTokenizerFast, documents: Sequence[Document]
) -> tuple[Tensor, Tensor]:
    """Ids padded on the right, and 1 at the tokens of completions (stop token included)."""
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    for document in documents:
        prompt = tokenizer.encode(document.prompt)
        end = [END_ID] if document.is_terminated else []
        rows.append(prompt + tokenizer.encode(document.completion) + end)
        prompt_lengths.append(len(prompt))
    longest = max(map(len, rows))
    ids_BT = torch.full((len(rows), longest), PAD_ID)
    mask_BT = torch.zeros(len(rows), longest)
    for i, (row, start) in enumerate(zip(rows, prompt_lengths, strict=True)):
        ids_BT[i, : len(row)] = torch.tensor(row)
        mask_BT[i, start : len(row)] = 1.0
    return ids_BT, mask_BT


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 sums of both model folders, in the format of `sha256sum`.

    Args:
        folder: The folder that holds "student" and "teacher".
    """
    files = sorted(f for role in SEEDS for f in (folder / role).iterdir() if f.is_file())
    lines = [
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(folder).as_posix()}\n"
        for f in files
    ]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Pretrain both models, or one, and write them as Hugging Face folders."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded student and teacher.")
    parser.add_argument("--out", type=Path, required=True, help="folder for student/ and teacher/")
    parser.add_argument("--only", choices=sorted(SEEDS), help="make one of the two alone")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for role in [arguments.only] if arguments.only else sorted(SEEDS):
        model = pretrain(role, SEEDS[role], PHASES[role], arguments.scale)
        model.save_pretrained(arguments.out / role)
        make_tokenizer().save_pretrained(arguments.out / role)
    for file in arguments.out.glob("*/model.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone
    if all((arguments.out / role).is_dir() for role in SEEDS):
        write_checksums(arguments.out)


if __name__ == "__main__":
    main()
