"""The embedded pair inside TRL: its own DistillationTrainer collapses, StableOPDTrainer does not.

    python recipes/trl/train.py trl runs/trl
    python recipes/trl/train.py stable runs/trl-stable

Both arms have the same models, prompts, seed and arguments; README.md has what you should see.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from stableopd import embedded
from stableopd.config import RepetitionConfig
from stableopd.data.arithmetic import ANSWER_MARKER, make_problems
from stableopd.evaluation import evaluate
from stableopd.integrations.trl import CollapseAlarm, StableOPDConfig, StableOPDTrainer
from stableopd.rollout.sampler import TransformersSampler
from stableopd.types import SamplingSettings

PROMPTS, SAMPLES = 16, 4  # a step
MAX_NEW_TOKENS = 96
NUM_PROBLEMS = 100  # held out
REPETITION = RepetitionConfig(window_chars=64, ratio=3.0)
REPORTED = {
    "rollout/truncation_rate": 2,
    "rollout/repetition_rate": 2,
    "rollout/repetitive_share": 2,
    "rollout/mean_length": 0,
}


def arguments(output: Path, steps: int, seed: int) -> dict[str, Any]:
    """TRL's own arguments, the same for both arms."""
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "seed": seed,
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "max_completion_length": MAX_NEW_TOKENS,
        "beta": 1.0,  # KL(student || teacher)
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "logging_steps": 1,
        "log_completions": True,
        "num_completions_to_print": 1,
        "save_strategy": "no",
        "shuffle_dataset": False,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }


def prompts(steps: int) -> datasets.Dataset:
    """Prompts with golden solutions; each stands SAMPLES times in a row."""
    problems = make_problems(PROMPTS * steps, 0, "train")
    rows = [{"prompt": p.prompt, "solution": p.solution} for p in problems for _ in range(SAMPLES)]
    return datasets.Dataset.from_list(rows)


def load(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded.path(name))


def make_trainer(arm: str, output: Path, steps: int, seed: int) -> tuple[Any, CollapseAlarm]:
    """The trainer of an arm, and the alarm that listens to it."""
    shared = {
        "model": load("student"),
        "teacher_model": load("teacher"),
        "train_dataset": prompts(steps),
        "processing_class": AutoTokenizer.from_pretrained(embedded.path("student")),
    }
    given = arguments(output, steps, seed)
    if arm == "trl":
        alarm = CollapseAlarm("warn", REPETITION)
        trainer = DistillationTrainer(args=DistillationConfig(**given), callbacks=[alarm], **shared)
        return trainer, alarm
    settings = StableOPDConfig(
        repetition_window_chars=REPETITION.window_chars, repetition_ratio=REPETITION.ratio, **given
    )
    trainer = StableOPDTrainer(args=settings, **shared)
    return trainer, trainer.collapse_alarm


def accuracy(trainer: Any, seed: int) -> float:
    """Share of correct answers on held-out problems, at temperature 0.6."""
    tokenizer, problems = trainer.processing_class, make_problems(NUM_PROBLEMS, 0, "test")
    ids = [tuple(tokenizer(p.prompt)["input_ids"]) for p in problems]
    size, stops = trainer.model.config.vocab_size, [tokenizer.eos_token_id]
    found = evaluate(
        TransformersSampler(trainer.model.eval(), tokenizer, stops, size, 128),
        problems,
        ids,
        num_samples=1,
        settings=SamplingSettings(MAX_NEW_TOKENS, temperature=0.6),
        seed=seed,
        grader="exact",
        marker=ANSWER_MARKER,
        repetition=REPETITION,
    )
    return found.accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=("trl", "stable"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    trainer, alarm = make_trainer(chosen.arm, chosen.output, chosen.steps, chosen.seed)
    before, start = accuracy(trainer, chosen.seed), time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    result = {
        "arm": chosen.arm,
        "seed": chosen.seed,
        "steps": trainer.state.global_step,
        "accuracy before": before,
        "accuracy after": accuracy(trainer, chosen.seed),
        "last five steps": {
            name: round(sum(line[name] for line in alarm.lines[-5:]) / 5, digits)
            for name, digits in REPORTED.items()
        },
        "first warning": first(alarm, 1),
        "first collapse": first(alarm, 2),
        "verdict": alarm.verdict().headline,
        "CPU seconds": round(seconds),
        "threads": torch.get_num_threads(),
    }
    lines = "".join(json.dumps(line) + "\n" for line in alarm.lines)
    (chosen.output / "metrics.jsonl").write_text(lines)
    (chosen.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def first(alarm: CollapseAlarm, level: int) -> int | None:
    """The first step at which the alarm was at a level or above."""
    return next((line["step"] for line in alarm.lines if line["alarm/level"] >= level), None)


if __name__ == "__main__":
    main()
