"""A world of a second in which plain distillation unlearns to stop, and golden solutions help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tiny
from tiny import EOS

STEPS, SAVE_EVERY, WARMUP, RATE = 40, 3, 12, 2e-3
WEIGHTS = ("lambda_gold", "beta_reference")
FIELDS: dict[str, dict[str, Any]] = {
    "run": {"steps": STEPS, "save_every": SAVE_EVERY},
    "objective": {"method": "opd"},
    "rollout": {"prompts_per_step": 6, "rollouts_per_prompt": 4, "max_new_tokens": 10},
    # Healthy while it warms up.
    "optimizer": {"learning_rate": RATE, "warmup_steps": WARMUP},
}


def stopping_llama(seed: int, share: float, width: int = 32) -> Any:
    """A random Llama that stops with about that probability, whatever came before."""
    model = tiny.make_llama(seed, width)
    with torch.no_grad():
        # All tokens have a component in common, and the head reads the stop from it.
        model.model.embed_tokens.weight[:, 0] = 1.0
        hidden = model.model(torch.tensor([[5, 9, 13, 20]])).last_hidden_state[0, :, 0].mean()
        odds = torch.tensor(share / (1 - share) * (tiny.V - 1)).log()
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[EOS] = 0.0
        model.lm_head.weight[EOS, 0] = odds / hidden
    return model


def make_world(folder: Path) -> Path:
    """A student that stops soon, and a teacher that all but never does."""
    folder.mkdir(exist_ok=True)
    tiny.save_model(folder / "student", stopping_llama(0, 0.4))
    tiny.save_model(folder / "teacher", stopping_llama(1, 0.01, width=48))
    tiny.write_rows(folder / "train.jsonl", tiny.sums())
    return folder


def configure(world: Path, name: str, action: str, **changes: dict[str, Any]) -> Path:
    """The configuration of a run of its own with an action of the alarm."""
    fields = {section: dict(values) for section, values in FIELDS.items()}
    fields["alarm"] = {"action": action}
    for section, values in changes.items():
        fields.setdefault(section, {}).update(values)
    fields["run"]["output"] = str(world / name)
    return tiny.write_config(world, f"{name}.toml", **fields)
