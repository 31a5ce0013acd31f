"""A training step beside a peer's: agreement first, then time and memory in turns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pairs
from common import Options, Row, alternate, measure, of, require_close

SIDES = str(Path(__file__).with_name("sides.py"))
# Losses and norms are float32 sums in different orders.
AGREEMENT = 1e-5
REPLAYED = 2


def check(method: str, peer: str, world: str) -> None:
    """Compare what both sides find on the same rollouts before and after an update of the weights.

    The sampled-token loss is -A logp with TRL and -A with us, with the same gradient: compared are
    the mean advantage and the norm of the gradient. StableOPD has no peer: its plain part has
    been compared with the others, and its whole is compared with the dense formula.
    """
    spec = {"world": world, "warm": 0, "steps": REPLAYED, "replay": True}
    ours = measure(SIDES, spec | {"side": method})
    if method == "stable_opd":
        # Differences of log-probs of some 10 nats: what is left of them is compared in nats.
        require_close(f"the loss of {method}", ours["loss"], ours["dense"], AGREEMENT, 1.0)
        return
    theirs = measure(SIDES, spec | {"side": peer})
    expected = [-a for a in theirs["advantage"]] if method == "opd" else theirs["loss"]
    require_close(f"the loss of {method}", ours["loss"], expected, AGREEMENT)
    require_close(
        f"the gradient of {method}", ours["grad_norm"], theirs["grad_norm"], 10 * AGREEMENT
    )


def compare(
    options: Options,
    methods: dict[str, dict[str, float]],
    peer: str,
    world: str,
    steps: tuple[int, int],
) -> None:
    """Print the rows of one step.

    Args:
        options: What the command line asked for.
        methods: Ours, each with the targets of its ratio by quantity; all beside one peer.
        peer: The trainer of TRL.
        world: The models and the size of the step.
        steps: Warm-up steps and timed steps.
    """
    if not pairs.make(world):
        print(f"| {world} | not measured: install requirements/smollm2.txt | | | | | |")
        return
    for method in methods:
        check(method, peer, world)
    spec: dict[str, Any] = {"world": world, "warm": steps[0], "steps": steps[1]}
    sides = {name: spec | {"side": name} for name in (*methods, peer)}
    found = alternate(SIDES, sides, options.runs)
    size = pairs.WORLDS[world]
    what = f"{size.rollouts} x {size.new_tokens} tokens, "
    what += f"V = {size.vocabulary:,}" if size.vocabulary else "SmolLM2-135M"
    for method, targets in methods.items():
        for key, quantity, digits in (
            ("cpu_s", "CPU s a step", 3),
            ("wall_s", "wall s a step", 3),
            ("memory_mb", "memory above the start, MB", 0),
            ("process_mb", "the whole process, MB", 0),
        ):
            values = of(found[method], key), of(found[peer], key)
            row = Row(f"`{method}`, {what}", quantity, *values, digits, targets.get(key))
            print(row.markdown(), flush=True)


def heading(peer: str) -> None:
    """Print what the rows mean, and the head of the table."""
    print(f"\nPeer: TRL's `{peer}`.\n")
    print(Row.HEADER)
    sys.stdout.flush()
