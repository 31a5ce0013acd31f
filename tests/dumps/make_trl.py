"""Make the TRL dumps of this folder: train the embedded student with TRL itself.

In the environment of `make test`, ten minutes on one core:

    .venv/bin/python tests/dumps/make_trl.py /tmp/trl

The settings are those of src/stableopd/embedded/demo.toml as far as TRL has them. With
`log_completions=True` and `logging_steps=1` TRL writes a parquet file a step, 64 rows each; kept
here are every STRIDE-th file and the first ROWS rows of it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as parquet
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from stableopd import embedded
from stableopd.data.arithmetic import ANSWER_MARKER, make_problems

PROMPTS, SAMPLES = 16, 4  # a step
STRIDE, ROWS = 4, 16
HERE = Path(__file__).parent

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": PROMPTS * SAMPLES,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 96,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "log_completions": True,
    "num_completions_to_print": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 0,
}


def prompts(steps: int, copies: int) -> datasets.Dataset:
    """The prompts of `steps` steps; each stands `copies` times in a row."""
    problems = make_problems(PROMPTS * steps, 0, "train")
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in problems for _ in range(copies)]
    return datasets.Dataset.from_list(rows)


def student() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded.path("student"))


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded.path("student"))


def distil(out: Path, steps: int, rate: float) -> None:
    """Distil on the student's own rollouts: KL(student || teacher) over the vocabulary."""
    settings = DistillationConfig(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=rate,
        beta=1.0,
        shuffle_dataset=False,
        **COMMON,
    )
    DistillationTrainer(
        model=student(),
        teacher_model=AutoModelForCausalLM.from_pretrained(embedded.path("teacher")),
        args=settings,
        train_dataset=prompts(steps, SAMPLES),
        processing_class=tokenizer(),
    ).train()


def correct(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the text after the last marker is the answer."""
    found = [c.rpartition(ANSWER_MARKER)[2] for c in completions]
    return [float(f == a) for f, a in zip(found, answer, strict=True)]


def reinforce(out: Path, steps: int, rate: float) -> None:
    """Train with GRPO, whose dumps have a column for each reward, and the advantage."""
    settings = GRPOConfig(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=rate,
        num_generations=SAMPLES,
        beta=0.0,
        **COMMON,
    )
    GRPOTrainer(
        model=student(),
        reward_funcs=[correct],
        args=settings,
        train_dataset=prompts(steps, 1),
        processing_class=tokenizer(),
    ).train()


def thin(source: Path, target: Path) -> None:
    """Keep some rows of some files, in the schema and with the metadata that TRL gave them."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "completions").mkdir(parents=True)
    for file in sorted((source / "completions").iterdir()):
        if int(file.stem.rpartition("_")[2]) % STRIDE == 0:
            table = parquet.read_table(file).slice(0, ROWS)
            parquet.write_table(table, target / "completions" / file.name, compression="zstd")


if __name__ == "__main__":
    scratch = Path(sys.argv[1])
    distil(scratch / "collapse", steps=120, rate=3e-4)
    distil(scratch / "healthy", steps=40, rate=3e-5)
    reinforce(scratch / "grpo", steps=12, rate=1e-5)
    for name in ("collapse", "healthy", "grpo"):
        thin(scratch / name, HERE / f"trl-{name}")
