"""Runs of `StableOPDTrainer` in one process or in several; run by test_trl_parallel.py."""

import copy
import os

import datasets
import torch

from stableopd.types import DataError, TrainingError
from tiny import END, in_double, sums
from trl_parts import make, student, teacher

# Without chance the rollouts are the same, whichever process writes them.
GREEDY = {"generation_kwargs": {"do_sample": False}, "shuffle_dataset": False}
PER_STEP = 8


def some_solutions():
    """Rows of three steps: one has one golden solution, one none, one all but one."""
    rows = [dict(row) for row in sums(3 * PER_STEP)]
    for place, row in enumerate(rows):
        row["solution"] = row["solution"] if place == 2 or place > 2 * PER_STEP else None
    return datasets.Dataset.from_list(rows)


def trainer_of(folder, num_processes, **settings):
    """A trainer whose step has the same rows in any number of processes."""
    models = {"model": in_double(student(1.0)), "teacher_model": in_double(teacher(END))}
    steps = {1: 1, 2: 2}[num_processes]
    return make(
        folder,
        **models,
        data=some_solutions(),
        teacher_ends=True,
        per_device_train_batch_size=PER_STEP // (num_processes * steps),
        gradient_accumulation_steps=steps,
        **(GREEDY | {"lambda_gold": 0.5, "beta_reference": 2.0} | settings),
    )


def train(folder, num_processes):
    """What a run logs and what its alarm sees, and the weights after it."""
    trainer = trainer_of(folder, num_processes)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    log = [line for line in trainer.state.log_history if "loss" in line]
    return log, trainer.collapse_alarm.lines, weights


def refuse(folder):
    """What is raised where only the last process has read a solution that cannot be used."""
    rank = int(os.environ["RANK"])
    data = datasets.Dataset.from_dict({"prompt": ["1+1="], "solution": [[4, 5] if rank else [1]]})
    try:
        make(folder, data=data)
    except DataError as error:
        return str(error)
    return None


def fail(folder):
    """What is raised where the teacher is broken only in the last process; and the weights."""
    trainer = trainer_of(folder, 2)
    before = copy.deepcopy(trainer.model.state_dict())
    if trainer.accelerator.process_index == 1:
        with torch.no_grad():
            trainer.accelerator.unwrap_model(trainer.teacher_model).model.norm.weight.fill_(
                float("nan")
            )
    try:
        trainer.train()
    except TrainingError as error:
        after = trainer.model.state_dict()
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    return None
