"""What is run: every arm of every question as settings over the demo's file.

A world is a pair of models and a way to score stops. An arm is what is changed in a world. The
folder of a run is its world, arm and seed, so that a run which two questions share is made once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Arm", "all_arms", "cures", "groups", "models_of", "sweep_name"]

Settings = dict[str, Any]

ENDED = "ended-collapsed"  # a file in the folder of a run that ended for that reason
GOLDEN_LENGTH = 28  # tokens of the longest golden solution, its stop among them

# Prefix of a world's name: who loops, and whether the stop ids of the two models are equal.
WORLDS: dict[str, Settings] = {
    "B": {},
    "A": {"student.model": "different-student", "teacher.model": "different-plain-teacher"},
    "AB": {"student.model": "different-student", "teacher.model": "different-teacher"},
    "none": {"teacher.model": "teacher-loops-0"},
    "scarce": {"data.train": "problems-64.jsonl"},
}


@dataclass(frozen=True)
class Arm:
    """One arm in one world.

    Attributes:
        world: A name of `WORLDS`.
        name: The arm; a folder.
        settings: Fields of the configuration by "section.key".
        seeds: Each is a run.
        steps: Of a run.
        eval_every: Steps between evaluations.
        ends: Whether a run ends when it has collapsed, as a collapsed step is the dearest.
        goes_on: The arm of the same world, seed and settings whose finished runs this one goes
            on with; "" begins at step 1.
    """

    world: str
    name: str
    settings: Settings = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 120
    eval_every: int = 20
    ends: bool = True
    goes_on: str = ""

    @property
    def folder(self) -> str:
        """Where its runs lie, below the folder of all runs."""
        return f"{self.world}/{self.name}"

    def path(self, seed: int, output: Path) -> Path:
        """The run folder of a seed."""
        return output / "runs" / self.folder / f"s{seed}"

    def is_finished(self, seed: int, output: Path, steps: int = 0) -> bool:
        """Whether a run has made its last step, or ended when it had collapsed."""
        path = self.path(seed, output)
        if not (path / "seconds.json").is_file():  # the last file of a run
            return False
        spent = json.loads((path / "seconds.json").read_text())
        return spent["step"] >= (steps or self.steps) or (path / ENDED).is_file()

    def overrides(self, seed: int, output: Path, models: Path) -> list[str]:
        """The run as `--set` gives it: "section.key=value"."""
        fields = {
            "run.seed": seed,
            "run.steps": self.steps,
            "run.save_every": 40,
            "run.rollouts_every": 10,
            "run.output": output,
            "eval.samples": 4,
            "eval.every": self.eval_every,
            **{k: models / v for k, v in WORLDS[self.world].items()},
            **self.settings,
        }
        return [f"{name}={_toml(value)}" for name, value in fields.items()]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | Path) else repr(value)


def opd(**objective: Any) -> Settings:
    """Plain OPD with some fields of [objective] changed."""
    return {"objective.method": "opd", **{f"objective.{k}": v for k, v in objective.items()}}


METHODS: dict[str, Settings] = {
    "sft": {"objective.method": "sft"},
    "grpo": {"objective.method": "grpo"},
    "gkd": {"objective.method": "gkd"},
    "opd": opd(),
    "opd-kl-0.01": opd(beta_reference=0.01),
    "opd-kl-0.1": opd(beta_reference=0.1),
    "opd-golden": opd(lambda_gold=1.0),
    "stable_opd": opd(lambda_gold=1.0, beta_reference=0.01),
}

CURES: dict[str, Settings] = {
    "opd": METHODS["opd"],
    "opd-event": opd(stop="event"),
    "opd-kl-0.1": METHODS["opd-kl-0.1"],
    "opd-golden": METHODS["opd-golden"],
    "opd-golden-unstopped": opd(lambda_gold=1.0, golden_stop_label=False),
    "stable_opd": METHODS["stable_opd"],
    "stable_opd-unstopped": opd(lambda_gold=1.0, beta_reference=0.01, golden_stop_label=False),
    "clip-5": opd(advantage="clip"),
    "clip-1": opd(advantage="clip", advantage_parameter=1.0),
    "soft_log": opd(advantage="soft_log"),
    "tanh": opd(advantage="tanh"),
    "power": opd(advantage="power"),
    "floor": opd(advantage="floor"),
    "first-28": opd(first_n=GOLDEN_LENGTH),
    "first-14": opd(first_n=GOLDEN_LENGTH // 2),
    "prefix-0.5": opd(prefix_gain=0.5),
    "masked": opd(mask_truncated=True),
    "baseline-kl": opd(baseline="kl"),
    "gkd": METHODS["gkd"],
    "gkd-top-4": {"objective.method": "gkd", "objective.top_k": 4},
}

LAMBDAS, BETAS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0), (0.0, 0.001, 0.01, 0.1)
BETWEEN, BETWEEN_BETAS = (0.3, 3.0), (0.0, 0.01)  # around the boundary, and beyond the best row


def main_arms() -> list[Arm]:
    """The paper's comparison, and the arm that it left out."""
    few = {"opd-kl-0.01": (0, 1)}  # the stronger KL stands for "OPD + KL"
    seeds = (0, 1, 2, 3, 4)
    return [
        Arm("B", name, settings, few.get(name, seeds), 120, 10, ends=False)
        for name, settings in METHODS.items()
    ]


def scarce() -> list[Arm]:
    """With 64 problems to train on golden solutions alone do not reach the ceiling."""
    names = ("sft", "grpo", "opd", "opd-golden", "stable_opd")
    return [Arm("scarce", name, METHODS[name], (0, 1, 2), 120, 10, ends=False) for name in names]


def recovery() -> list[Arm]:
    """Does OPD come back when it goes on?"""
    return [Arm("B", "opd-300", METHODS["opd"], (0, 1), 300, 10, ends=False, goes_on="opd")]


def stops() -> list[Arm]:
    """Both causes by themselves and together, with both ways to score a stop."""
    token, event = opd(stop="token"), opd(stop="event")
    arms = [Arm("B", "opd-token", token, (0,)), Arm("none", "opd", METHODS["opd"])]
    arms += [Arm("AB", name, {**s, "objective.stop": "token"}) for name, s in (
        ("opd", token), ("stable_opd", METHODS["stable_opd"]))]  # fmt: skip
    arms += [Arm("AB", "opd-event", event)]
    arms += [Arm("AB", "stable_opd-event", METHODS["stable_opd"])]
    in_a = ("opd", "opd-event", "stable_opd")
    return arms + [arm for arm in cures("A") if arm.name in in_a]


def cures(world: str) -> list[Arm]:
    """One answer at a time, in the world of one cause."""
    arms: list[Arm] = []
    for name, settings in CURES.items():
        if world == "A":
            arms.append(Arm("A", name, {"objective.stop": "token", **settings}))
        elif name != "opd-event":  # with equal stop ids it is opd
            arms.append(_shared(Arm("B", name, settings)))
    return arms


def sweep() -> list[Arm]:
    """lambda_gold x beta_reference."""
    return [
        _shared(Arm("B", sweep_name(gold, beta), opd(lambda_gold=gold, beta_reference=beta)))
        for gold in LAMBDAS
        for beta in (BETWEEN_BETAS if gold in BETWEEN else BETAS)
    ]


def sweep_name(gold: float, beta: float) -> str:
    """The arm of these two weights; the paper's comparison has some of them already."""
    names = {(0, 0): "opd", (0, 0.01): "opd-kl-0.01", (0, 0.1): "opd-kl-0.1"}
    names |= {(1, 0): "opd-golden", (1, 0.01): "stable_opd"}
    return names.get((gold, beta), f"gold-{gold:g}-kl-{beta:g}")


def rates() -> list[Arm]:
    """Learning rate, and the clip, which acts where a batch is used more than once."""
    arms: list[Arm] = []
    for method in ("opd", "stable_opd"):
        for rate, steps in ((1e-4, 240), (1e-3, 120)):
            settings = {**METHODS[method], "optimizer.learning_rate": rate}
            arms.append(Arm("B", f"{method}-rate-{rate:g}", settings, steps=steps))
        for clip in (0.1, 0.2, 0.4):
            settings = {**METHODS[method], "objective.updates_per_batch": 4, "objective.clip": clip}
            arms.append(Arm("B", f"{method}-four-clip-{clip:g}", settings, steps=50))
    return arms


def _shared(arm: Arm) -> Arm:
    """The arm of the paper's comparison of the same name, if there is one."""
    return next((other for other in main_arms() if other.name == arm.name), arm)


def groups() -> dict[str, list[Arm]]:
    """All arms by the question that they answer, the most important question first."""
    return {
        "main": main_arms(),
        "sweep": sweep(),
        "stops": stops(),
        "cures": cures("B") + cures("A"),
        "recovery": recovery(),
        "scarce": scarce(),
        "rates": rates(),
    }


def all_arms(chosen: list[str]) -> list[Arm]:
    """The arms of some questions, each once."""
    arms: dict[str, Arm] = {}
    for name in chosen:
        for arm in groups()[name]:
            arms.setdefault(arm.folder, arm)
    return list(arms.values())


def models_of(arms: list[Arm]) -> list[str]:
    """The models that have to be made first; a plain teacher before the one made of it."""
    names = {name for arm in arms for name in WORLDS[arm.world].values()}
    if "different-plain-teacher" in names:
        names.add("teacher-loops-0")
    return sorted(names, key=lambda name: (name.startswith("different"), name))
