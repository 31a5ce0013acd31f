"""Size a run of on-policy distillation before it starts: memory, seconds, GPU hours. Arithmetic.

python benchmarks/sizing.py                                    every table of docs/sizing.md
python benchmarks/sizing.py --student 1.5B --teacher 7B --gpus 8 --gpu h100
python benchmarks/sizing.py --student path/to/folder --teacher path/to/other --gpu a100
python benchmarks/sizing.py --write docs/sizing.md             renew the page's tables
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sizing_memory import DEVICES, Plan, fits, memory, served
from sizing_models import MODELS, find_model
from sizing_seconds import gpu_hours, parts, step_seconds
from stableopd.doctor.memory import kept_per_token
from stableopd.types import ConfigError, StableOPDError

Rows = list[list[str]]
_H, _CPU = DEVICES["h100"], DEVICES["cpu2"]
_M = MODELS
_PAPER = Plan(_M["Qwen2.5-1.5B"], _M["Qwen2.5-7B"], _H)
_MIDDLE = Plan(_M["Qwen3-4B"], _M["Qwen3-32B"], _H, 8, sharded=True)
_LARGE = Plan(_M["Llama-3.1-8B"], _M["Llama-3.1-70B"], _H, 64, sharded=True, prompts=64)
_SERVERS = {"rollout_gpus": 2, "teacher_gpus": 2}

PLANS = {
    # As src/stableopd/embedded/demo.toml and recipes/smollm2-gsm/distil.toml.
    "embedded, 2 CPU cores": Plan(
        _M["embedded"], _M["embedded"], _CPU, prompt_tokens=12, max_prompt_tokens=16, tokens=28,
        budget=96, golden_tokens=25, batch=64, micro_batch=8_192, checkpoints=False, steps=100,
    ),
    "SmolLM2-135M, 2 CPU cores": Plan(
        _M["SmolLM2-135M"], _M["SmolLM2-135M"], _CPU, prompts=4, rollouts_per_prompt=3,
        prompt_tokens=42, max_prompt_tokens=128, tokens=55, budget=96, golden_tokens=58,
        micro_batch=1_024, checkpoints=False, steps=16,
    ),
    "0.5B <- 1.5B, laptop GPU, LoRA": Plan(
        _M["Qwen2.5-0.5B"], _M["Qwen2.5-1.5B"], DEVICES["laptop"], tokens=600, budget=1_024,
        golden_tokens=450, max_prompt_tokens=512, micro_batch=8_192, lora_rank=64,
    ),
    "1.5B <- 7B, 1 A100": dataclasses.replace(_PAPER, device=DEVICES["a100"]),
    "1.5B <- 7B, 1 H100": _PAPER,
    "1.5B <- 7B, 8 H100, copies": dataclasses.replace(_PAPER, gpus=8),
    "1.5B <- 7B, 8 H100, 2 + 2 serve": dataclasses.replace(_PAPER, gpus=8, **_SERVERS),
    "4B <- 32B, 8 H100, FSDP2": _MIDDLE,
    "4B <- 32B, 8 H100, 2 + 2 serve": dataclasses.replace(_MIDDLE, **_SERVERS),
    "8B <- 70B, 64 H100, FSDP2": _LARGE,
    "8B <- 70B, 64 H100, 16 + 16 serve": dataclasses.replace(
        _LARGE, rollout_gpus=16, teacher_gpus=16
    ),
}  # fmt: skip


def models_table() -> Rows:
    """Weights, cache, FLOPs and activations of the models.

    Returns:
        Heading, then rows.
    """
    rows = [["model", "weights", "layers", "width", "keys", "head", "cache, KB a token"]]
    rows[0] += ["forward, GFLOP a token", "activations, KB a token", "with checkpointing"]
    for s in MODELS.values():
        number = 4 if s.weights < 2e8 else 3
        kept = [kept_per_token(s.layers, s.width, s.inner, s.keys, c) for c in (False, True)]
        rows.append(
            [s.name, f"{s.weights:,}", str(s.layers), str(s.width), f"{s.key_heads} x {s.head_dim}"]
            + [f"{s.head / s.weights:.0%}", f"{s.cache_bytes() / 1e3:.1f}"]
            + [f"{s.forward_flops(4_096) / 1e9:.3g}"]
            + [f"{number * value / 1e3:,.0f}" for value in kept]
        )
    return rows


def hardware_table() -> Rows:
    """What is assumed of each device.

    Returns:
        Heading, then rows.
    """
    rows = [["--gpu", "peak, TFLOP/s", "MFU", "memory, GB", "TB/s", "share", "link, GB/s", "$/h"]]
    for d in DEVICES.values():
        cells = [d.name, f"{d.peak / 1e12:g}", f"{d.compute_share:.2f}", f"{d.memory / 1e9:.0f}"]
        cells += [f"{d.bandwidth / 1e12:g}", f"{d.memory_share:.2f}", f"{d.link / 1e9:.0f}"]
        rows.append([*cells, f"{d.price:.2f}"])
    return rows


def memory_table(plans: dict[str, Plan]) -> Rows:
    """Gigabytes of each part on one training GPU, and on servers.

    Args:
        plans: Runs by name.

    Returns:
        Heading, then rows.
    """
    names = [name for name in memory(_PAPER) if name != "host"]
    rows = [["GB on one GPU", *names, "rollout server", "teacher server", "fits"]]
    for name, plan in plans.items():
        found, others = memory(plan), served(plan)
        cells = [f"{found[part] / 1e9:.1f}" for part in names]
        cells += [f"{others[k] / 1e9:.1f}" if k in others else "" for k in ("rollouts", "teacher")]
        rows.append([name, *cells, "yes" if fits(plan) else "no"])
    return rows


def seconds_table(plans: dict[str, Plan]) -> Rows:
    """Seconds of each part of a step, and what bounds it.

    Args:
        plans: Runs by name.

    Returns:
        Heading, then rows.
    """
    rows = [["seconds of a step", *parts(_PAPER), "all", "tokens/s"]]
    for name, plan in plans.items():
        cells = [
            f"{part.seconds:.3g} ({part.bound})" if part.seconds else "-"
            for part in parts(plan).values()
        ]
        total = step_seconds(plan)
        rows.append([name, *cells, f"{total:.3g}", f"{plan.rollouts * plan.tokens / total:,.0f}"])
    return rows


def cost_table(plans: dict[str, Plan], price: float | None = None) -> Rows:
    """GPU hours and money of whole runs.

    Args:
        plans: Runs by name.
        price: Dollars a GPU hour; None takes the device's illustration.

    Returns:
        Heading, then rows.
    """
    rows = [["run", "GPUs", "steps", "hours", "GPU hours", "$ a GPU hour", "$"]]
    for name, plan in plans.items():
        hours = gpu_hours(plan)
        each = plan.device.price if price is None else price
        cells = [name, str(plan.gpus), str(plan.steps), f"{hours / plan.gpus:.2g}"]
        rows.append([*cells, f"{hours:.3g}", f"{each:.2f}", f"{hours * each:,.2f}"])
    return rows


TABLES: dict[str, Callable[[], Rows]] = {
    "models": models_table,
    "hardware": hardware_table,
    "memory": lambda: memory_table(PLANS),
    "seconds": lambda: seconds_table(PLANS),
    "cost": lambda: cost_table(PLANS),
}


def markdown(rows: Rows) -> str:
    """A table in markdown.

    Args:
        rows: Heading, then rows.

    Returns:
        Lines.
    """
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def renewed(text: str) -> str:
    """A page with its tables as they are now.

    Args:
        text: The page; a table stands between `<!-- sizing: NAME -->` and `<!-- /sizing -->`.

    Returns:
        The page; its other text is as it was.

    Raises:
        ConfigError: It lacks a table's place.
    """
    for name, table in TABLES.items():
        start, end = f"<!-- sizing: {name} -->\n", "\n<!-- /sizing -->"
        place = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        made = start + markdown(table()) + end
        text, count = place.subn(lambda _, made=made: made, text)
        if count != 1:
            raise ConfigError(f"the page has {count} places {start.strip()!r} instead of one.")
    return text


def show(console: Console, rows: Rows) -> None:
    """Print a table.

    Args:
        console: Where to.
        rows: Heading, then rows.
    """
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def main(
    student: Annotated[str, typer.Option(help='"1.5B", a model\'s name, or its folder.')] = "",
    teacher: Annotated[str, typer.Option(help="The same for the teacher.")] = "",
    gpu: Annotated[str, typer.Option(help=", ".join(DEVICES))] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="All, servers included.")] = 1,
    rollout_gpus: Annotated[int, typer.Option(min=0, help="Behind the rollout engine.")] = 0,
    teacher_gpus: Annotated[int, typer.Option(min=0, help="Behind teacher.url.")] = 0,
    sharded: Annotated[bool, typer.Option(help="FSDP2 instead of copies.")] = False,
    offloads: Annotated[bool, typer.Option(help="FSDP2 with weights on the CPU.")] = False,
    prompts: Annotated[int, typer.Option(min=1, help="A step.")] = 16,
    rollouts_per_prompt: Annotated[int, typer.Option(min=1)] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Mean length of a rollout.")] = 6_000,
    budget: Annotated[int, typer.Option(min=1, help="rollout.max_new_tokens")] = 8_192,
    golden_tokens: Annotated[int, typer.Option(min=0, help="Mean; 0: no term.")] = 4_500,
    batch: Annotated[int, typer.Option(min=1, help="rollout.batch_size")] = 32,
    micro_batch: Annotated[int, typer.Option(min=1)] = 16_384,
    checkpoints: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = True,
    lora_rank: Annotated[int, typer.Option(min=0)] = 0,
    reference: Annotated[bool, typer.Option(help="The reference KL.")] = True,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    price: Annotated[float | None, typer.Option(min=0, help="$ a GPU hour.")] = None,
    write: Annotated[Path | None, typer.Option(help="A page to renew the tables of.")] = None,
) -> None:
    """Print what a run takes; without a student, all that docs/sizing.md shows."""
    console = Console()
    try:
        if write is not None:
            write.write_text(renewed(write.read_text()))
            return
        if not student and not teacher:
            for table in TABLES.values():
                show(console, table())
            return
        if gpu not in DEVICES:
            raise ConfigError(f"--gpu {gpu} is none of {', '.join(DEVICES)}.")
        plan = Plan(
            find_model(student or teacher), find_model(teacher or student), DEVICES[gpu], gpus,
            rollout_gpus, teacher_gpus, sharded or offloads, offloads, prompts,
            rollouts_per_prompt, tokens=tokens, budget=budget, golden_tokens=golden_tokens,
            batch=batch, micro_batch=micro_batch, checkpoints=checkpoints, lora_rank=lora_rank,
            reference=reference, steps=steps,
        )  # fmt: skip
    except (StableOPDError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    named = {f"{plan.student.name} <- {plan.teacher.name}, {gpus} x {gpu}": plan}
    for rows in (memory_table(named), seconds_table(named), cost_table(named, price)):
        show(console, [list(pair) for pair in zip(*rows, strict=True)])
    if offloads:
        console.print(f"On the CPU, for each GPU: {memory(plan)['host'] / 1e9:.1f} GB.")


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
