"""Many small cells: when does OPD collapse at all?

A cell is a short run with a student, a teacher, a budget and a rate. It counts as collapsed when
the mean TruncRate of ten steps in a row passes one half, and ends there; else it runs to its end.
The rate is higher and the batch smaller than the demo's, which makes a cell cheap.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

__all__ = ["Cell", "cells", "make_cell", "models_of"]

STEPS = 80
RATE = 8e-4
BUDGET = 96
WINDOW, BOUND = 10, 0.5
METHODS = ("opd", "stable_opd")
SEEDS = (0, 1)

# Shares of the teacher's documents that repeat, and clean steps of the student's pretraining. The
# shipped models are 0.12 and 450.
LOOPS = ("0", "0.02", "0.05", "0.12", "0.3")
STRENGTHS = ("100", "300", "450", "700", "1100")
# Probability that the student writes a further copy of its answer; the shipped one 0.15.
OWN_LOOPS = ("0", "0.05", "0.15", "0.3")
BUDGETS = (28, 32, 40, 64, 96)
RATES = (4e-4, 8e-4, 1.6e-3)
SHIPPED_LOOPS, SHIPPED_STEPS, SHIPPED_OWN = "0.12", "450", "0.15"


@dataclass(frozen=True)
class Cell:
    """One short run.

    Attributes:
        loops: Share of documents that repeat in the teacher's pretraining.
        strength: Clean pretraining steps of the student.
        own_loops: The student's probability of a further copy.
        budget: Tokens of a completion at most.
        rate: Learning rate.
        method: "opd" or "stable_opd".
        seed: Of the run; the models are the same for all.
        steps: Most steps.
    """

    loops: str = SHIPPED_LOOPS
    strength: str = SHIPPED_STEPS
    own_loops: str = SHIPPED_OWN
    budget: int = BUDGET
    rate: float = RATE
    method: str = "opd"
    seed: int = 0
    steps: int = STEPS

    @property
    def name(self) -> str:
        """A name for people and for its file."""
        return (
            f"{self.method}-loops{self.loops}-steps{self.strength}-own{self.own_loops}"
            f"-budget{self.budget}-rate{self.rate:g}-s{self.seed}"
        )

    def file(self, output: Path) -> Path:
        """Where its result lies."""
        return output / "cells" / f"{self.name}.json"

    @property
    def models(self) -> dict[str, str]:
        """The model of each role: one that is to be made, or "embedded"."""
        student, teacher = "embedded", "embedded"
        if self.strength != SHIPPED_STEPS:
            student = f"student-steps-{self.strength}"
        elif self.own_loops != SHIPPED_OWN:
            student = f"student-loops-{self.own_loops}"
        if self.loops != SHIPPED_LOOPS:
            teacher = f"teacher-loops-{self.loops}"
        return {"student.model": student, "teacher.model": teacher}


def cells() -> list[Cell]:
    """All cells, each once: a map, and slices along own loops, budget and rate."""
    found: dict[Cell, None] = {}
    for seed in SEEDS:
        for method in METHODS:
            for loops in LOOPS:
                for strength in STRENGTHS:
                    found[Cell(loops, strength, method=method, seed=seed)] = None
            for own in OWN_LOOPS:
                found[Cell(own_loops=own, method=method, seed=seed)] = None
            for budget in BUDGETS:
                found[Cell(budget=budget, method=method, seed=seed)] = None
            for rate in RATES:
                # As far as the others at their rate, at least.
                steps = round(STEPS * max(1.0, RATE / rate))
                found[Cell(rate=rate, method=method, seed=seed, steps=steps)] = None
    return list(found)


def models_of(chosen: list[Cell]) -> list[str]:
    """The models that have to be made for these cells."""
    return sorted({m for cell in chosen for m in cell.models.values() if m != "embedded"})


def make_cell(cell: Cell, output: Path, steps: int = 0) -> None:
    """Make the run of a cell and keep its series."""
    from stableopd import config, embedded
    from stableopd.training.loop import train
    from stableopd.training.setup import prepare

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        num_steps = steps or cell.steps
        fields: dict[str, Any] = {
            "run.output": f"{folder}/run",
            "run.seed": cell.seed,
            "run.steps": num_steps,
            "run.save_every": 10**6,
            "run.rollouts_every": 10**6,
            "objective.method": cell.method,
            "optimizer.learning_rate": cell.rate,
            "rollout.prompts_per_step": 8,
            "rollout.max_new_tokens": cell.budget,
            "eval.every": 10**6,
            "alarm.action": "none",
        }
        for field, name in cell.models.items():
            fields[field] = name if name == "embedded" else output / "models" / name
        overrides = [f"{k}={v}" for k, v in fields.items()]
        run = prepare(config.load(embedded.path("demo"), overrides))
        truncation: list[float] = []
        lines: list[dict[str, Any]] = []
        for line in train(run, lambda: is_collapsed(truncation)):
            lines.append(line)
            if "rollout/truncation_rate" in line:
                truncation.append(line["rollout/truncation_rate"])
    result = {
        **vars(cell),
        "is_collapsed": is_collapsed(truncation),
        "truncation_rate": [round(x, 4) for x in truncation],
        "accuracy_start": lines[0].get("eval/accuracy"),
        "accuracy_end": lines[-1].get("eval/accuracy"),
        "cpu_s": round(time.process_time() - started, 1),
    }
    file = cell.file(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n")
    part.rename(file)


def is_collapsed(truncation: list[float]) -> bool:
    """Whether the last ten steps have a mean TruncRate above one half."""
    return len(truncation) >= WINDOW and fmean(truncation[-WINDOW:]) > BOUND
