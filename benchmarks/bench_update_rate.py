"""Arithmetic rate of the StableOPD update beside this machine's own matrix product.

    python benchmarks/bench_update_rate.py

In one process: a step is made on given rollouts while the shapes of all its matrix products are
written down; the next steps are timed (scoring and update, from the run's own metrics); then the
products alone are made again, each in its shape and layout. "Needed" counts what the objective
cannot do without (2 floating-point operations for each weight and token forward, 4 backward; no
recomputation); "made" counts every product that was made. The target is held against "needed".
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common
import pairs

# How often a shape is timed at most; it stands for all products of that shape.
REPEATS = 12
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
# Names of products among the operations, and the places of their two matrices.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of (batch, m, k) and (batch, k, n); whether each side lies transposed in memory."""

    batch: int
    m: int
    k: int
    n: int
    transposed: tuple[bool, bool] = (False, False)

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


def products_of(name: str, arguments: tuple[Any, ...]) -> list[Product]:
    """The matrix products of one operation."""
    if name in PRODUCTS:
        a, b = arguments[PRODUCTS[name] : PRODUCTS[name] + 2]
        batch = a.shape[0] if a.dim() == 3 else 1
        transposed = (_is_transposed(a), _is_transposed(b))
        return [Product(batch, a.shape[-2], a.shape[-1], b.shape[-1], transposed)]
    if name in (ATTENTION, f"{ATTENTION}_backward"):
        # Scores and values forward; scores again and four gradients backward.
        place = 1 if name.endswith("backward") else 0
        query, key = arguments[place : place + 2]
        batch, length, other, width = (
            query.shape[0] * query.shape[1],
            query.shape[2],
            key.shape[2],
            query.shape[3],
        )
        scores = Product(batch, length, width, other)
        values = Product(batch, length, other, width)
        return [scores, values] if place == 0 else [scores, scores, values, values, values]
    return []


def _is_transposed(x: Any) -> bool:
    return x.stride(-2) == 1 and x.shape[-2] > 1


def recorder(found: Counter[Product]) -> Any:
    """A context in which every matrix product is written down."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found.update(products_of(func.overloadpacket.__name__, args))
            return func(*args, **(kwargs or {}))

    return Recorder()


def seconds_of(found: Counter[Product]) -> float:
    """Seconds of the products alone."""
    import torch

    def matrix(batch: int, rows: int, columns: int, transposed: bool) -> Any:
        shape = (batch, columns, rows) if transposed else (batch, rows, columns)
        made = torch.randn(shape)
        made = made.transpose(1, 2) if transposed else made
        return made if batch > 1 else made[0]

    total = 0.0
    with torch.no_grad():
        for product, count in found.items():
            a = matrix(product.batch, product.m, product.k, product.transposed[0])
            b = matrix(product.batch, product.k, product.n, product.transposed[1])
            a @ b
            repeats = min(count, REPEATS)
            start = time.perf_counter()
            for _ in range(repeats):
                a @ b
            total += (time.perf_counter() - start) * count / repeats
    return total


def needed_flops(run: Any) -> int:
    """Operations that the objective needs, from weights and tokens, each prompt read once."""
    train, rollout, players = run.train, run.config.rollout, run.players
    written = [rollout.max_new_tokens] * rollout.rollouts_per_prompt
    rollouts = {ids: list(written) for ids in train.prompt_ids}
    everything = {ids: list(written) for ids in train.prompt_ids}
    for solution in train.golden:
        everything[solution.prompt_ids].append(len(solution.completion_ids))

    def passes(model: Any, completions: dict[tuple[int, ...], list[int]]) -> int:
        c, flops = model.config, 0
        head = c.vocab_size * c.hidden_size
        body = sum(
            p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n
        )
        body -= 0 if c.tie_word_embeddings else head
        for prompt_ids, lengths in completions.items():
            prompt = len(prompt_ids)
            scores = prompt * prompt + sum((n - 1) * (prompt + n - 1) for n in lengths)
            flops += 2 * body * (prompt + sum(n - 1 for n in lengths))
            flops += 2 * head * sum(lengths)
            # Scores and values.
            flops += 4 * c.num_hidden_layers * scores * c.hidden_size
        return flops

    frozen = passes(players.teacher.model, rollouts) + passes(players.reference.model, rollouts)
    return 3 * passes(players.student, everything) + frozen


def compute(spec: dict[str, Any]) -> dict[str, Any]:
    import sides
    import stableopd

    world, found, seconds = pairs.WORLDS[spec["world"]], Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        run = sides.our_run(world, "stable_opd", Path(folder), spec["steps"] + 1)
        replay = sides.Replay(world, run.players.num_tokens)
        run = dataclasses.replace(run, sampler=replay)
        lines = stableopd.train(run, should_stop=lambda: False)
        with recorder(found):
            next(lines)
        for _ in range(spec["steps"]):
            line = next(lines)
            seconds.append(line["time/score_s"] + line["time/update_s"])
        lines.close()
        needed = needed_flops(run)
    made, step_s = sum(p.flops * n for p, n in found.items()), statistics.fmean(seconds)
    if not needed <= 1.02 * made:
        raise SystemExit(f"{made} operations were made, but {needed} are needed.")
    return {
        "step_s": step_s,
        "needed": needed / step_s / 1e9,
        "made": made / step_s / 1e9,
        "machine": made / seconds_of(found) / 1e9,
        "gflop": made / 1e9,
    }


def main() -> None:
    options = common.options(__doc__, minutes=5.5)
    print(f"\n{common.Row.HEADER.replace('peer', 'matrix product')}")
    for name in options.choose(("small", "smollm2"), ("tiny",)):
        if not pairs.make(name):
            print(f"| {name} | not measured: install requirements/smollm2.txt | | | | | |")
            continue
        spec = {"world": name, "steps": 1 if name == "smollm2" else 3}
        found = [common.measure(__file__, spec) for _ in range(options.runs)]
        machine = common.of(found, "machine")
        world = pairs.WORLDS[name]
        what = f"{world.rollouts} x {world.new_tokens} tokens, "
        what += f"V = {world.vocabulary:,}" if world.vocabulary else "SmolLM2-135M"
        for key, quantity in (("needed", "needed GFLOP/s"), ("made", "made GFLOP/s")):
            target = 0.6 if name == "smollm2" and key == "needed" else None
            values = common.of(found, key)
            row = common.Row(what, quantity, values, machine, 1, target, at_least=True)
            print(row.markdown(), flush=True)


if __name__ == "__main__":
    if common.is_measurement():
        common.answer(compute)
    else:
        main()
