"""Trainers of TRL on tiny models, which the tests of integrations/trl share."""

from __future__ import annotations

from typing import Any

import datasets
from trl import DistillationConfig, DistillationTrainer

from stableopd.integrations.trl import StableOPDConfig, StableOPDTrainer
from tiny import END, make_llama, make_tokenizer, sums

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 3,
}
PLAIN = {"lambda_gold": 0.0, "beta_reference": 0.0}


def rows(count=16):
    return datasets.Dataset.from_list(sums(count))


def student(sharp=8.0):
    return make_llama(0, sharp=sharp)


def teacher(stop=None):
    """A wider model; with `stop` it ends with that id and not with the student's."""
    found = make_llama(1, width=48, sharp=8.0)
    if stop is not None:
        found.generation_config.eos_token_id = stop
    return found


def make(folder, model=None, data=None, teacher_model=None, **settings):
    """A `StableOPDTrainer`; settings over SETTINGS."""
    others = {k: settings.pop(k) for k in ("peft_config", "callbacks", "tools") if k in settings}
    eos = "<end>" if settings.pop("teacher_ends", False) else "<eos>"
    return StableOPDTrainer(
        model=student() if model is None else model,
        teacher_model=teacher(END if eos == "<end>" else None)
        if teacher_model is None
        else teacher_model,
        args=StableOPDConfig(output_dir=str(folder), **(SETTINGS | settings)),
        train_dataset=rows() if data is None else data,
        processing_class=make_tokenizer(),
        teacher_processing_class=make_tokenizer(eos=eos),
        **others,
    )


def make_plain(folder, trainer=DistillationTrainer, **settings):
    """TRL's own trainer on the same models and rows."""
    return trainer(
        model=student(),
        teacher_model=teacher(),
        args=DistillationConfig(output_dir=str(folder), **(SETTINGS | settings)),
        train_dataset=rows(),
        processing_class=make_tokenizer(),
    )


def logged(trainer, *names):
    """What a run logged of each step."""
    return [
        tuple(line[name] for name in names) for line in trainer.state.log_history if "loss" in line
    ]
