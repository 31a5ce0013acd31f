"""One training step: StableOPD, plain OPD and the reverse KL, next to TRL's `DistillationTrainer`.

Student and teacher have the shapes of Qwen3-0.6B and Qwen3-1.7B and random weights. Each side is a
process of its own. The losses on given rollouts are compared first: the reverse KL's with TRL's,
the others', of which TRL has none, with the dense formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pairs
import sides
from meter import Setting, forked, why
from plan import PEER

# In the order of their worth, should the time not do.
TIMED = ("stable_opd", PEER, "opd", "gkd")
# bfloat16 products in the models of both sides; the dense formula has float32's.
AGREEMENT = 3e-2
# Losses below this many nats are compared as if they were that large.
LEAST = 0.1
WARM, STEPS = 1, 2


def world_of(setting: Setting) -> str:
    """The models and the size of a step."""
    return setting.choose("qwen3", "qwen3-tiny")


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    world = world_of(setting)
    # In a child too, as it makes the weights on the GPU.
    forked(pairs.make, world)
    spec = {"world": world, "device": setting.device}
    yield from _compared(spec)
    for name in TIMED:
        row = {"side": "peer" if name == PEER else "ours", "method": name}
        counts = {"warm": WARM, "steps": setting.choose(STEPS, 1)}
        try:
            row |= forked(sides.compute, spec | counts | {"side": name})
        except Exception as error:
            row["error_text"] = why(error)
        yield row


def _compared(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The losses of both sides on the same rollouts."""
    replay = spec | {"warm": 0, "steps": 1, "replay": True}

    def loss_of(name: str, key: str = "loss") -> Any:
        return forked(sides.compute, replay | {"side": name})[key][0]

    def row(method: str, against: str, ours: float, theirs: float) -> dict[str, Any]:
        error = abs(ours - theirs) / max(abs(theirs), LEAST)
        found = {"side": "compared", "method": method, "against": against}
        return found | {"ours": ours, "theirs": theirs, "error": error, "ok": error <= AGREEMENT}

    try:
        found = forked(sides.compute, replay | {"side": "stable_opd"})
        yield row("stable_opd", "dense formula", found["loss"][0], found["dense"][0])
    except Exception as error:
        yield {"side": "ours", "method": "stable_opd", "error_text": why(error)}
    try:
        ours = loss_of("gkd")
    except Exception as error:
        yield {"side": "ours", "method": "gkd", "error_text": why(error)}
        return
    try:
        yield row("gkd", PEER, ours, loss_of(PEER))
    except Exception as error:
        yield {"side": "compared", "method": "gkd", "against": PEER, "error_text": why(error)}


def summary(rows: list[dict[str, Any]]) -> str:
    """What to print of the rows."""
    told = [f"{row['method']} {row['wall_s']:.2f} s" for row in rows if "wall_s" in row]
    return "a step: " + ", ".join(told)
