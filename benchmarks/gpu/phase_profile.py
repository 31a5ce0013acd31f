"""Where a step's time goes: dearest kernels, launches, shares of the card's own rates.

The rate of matrix products and the bandwidth of copies are measured in the same process. The share
of the rate counts the FLOPs of all products that were made; the share of the bandwidth, in
decoding, counts the student's weights once for each token, which is the least that must be read.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import pairs
import sides
from common import Clock
from meter import Setting, free, seconds_of
from phase_step import world_of
from stableopd.data.prompts import prompts_of_step
from stableopd.training.step import step
from stableopd.training.terms import Work
from stableopd.types import SamplingSettings

TOP, NEW_TOKENS, NAME = 5, 32, 90


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    rates = card(setting)
    free(setting.device)
    yield {"what": "card", **rates}
    pairs.make(world_of(setting))
    world = pairs.WORLDS[world_of(setting)]
    with tempfile.TemporaryDirectory() as folder:
        prepared = sides.our_run(world, "stable_opd", Path(folder), 1, setting.device)
        yield from _of_step(setting, prepared, rates)


def card(setting: Setting) -> dict[str, float]:
    """TFLOP/s of a large bfloat16 product, and GB/s of a large copy, read and written."""
    size = setting.choose(8_192, 256)
    with torch.device(setting.device):
        one, two = torch.randn(2, size, size).to(torch.bfloat16)
        numbers = torch.randn(setting.choose(2**30, 2**20)).to(torch.bfloat16)
        other = torch.empty_like(numbers)
    repeats = setting.choose(10, 2)

    def products() -> None:
        for _ in range(repeats):
            one @ two

    def copies() -> None:
        for _ in range(repeats):
            other.copy_(numbers)

    products()
    copies()
    product_s = seconds_of(products, setting.device) / repeats
    copy_s = seconds_of(copies, setting.device) / repeats
    return {
        "tflops": 2 * size**3 / product_s / 1e12,
        "gb_per_s": 2 * numbers.nbytes / copy_s / 1e9,
    }


def _of_step(setting: Setting, prepared: Any, rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Decoding and update of one step, each profiled, counted and timed by itself."""
    config, players, train = prepared.config, prepared.players, prepared.train
    num_tokens = setting.choose(NEW_TOKENS, 4)
    places = prompts_of_step(0, len(train.prompts), config.rollout.prompts_per_step, 0)
    settings = SamplingSettings(num_tokens)
    per_prompt = config.rollout.rollouts_per_prompt
    made: list[Any] = []

    def decode() -> None:
        with players.autocast():
            made[:] = prepared.sampler.sample(train.named_ids(places), per_prompt, settings, 0)

    def update() -> None:
        golden = [train.golden[i] for i in places]
        step(
            players,
            prepared.optimizer,
            Work(config.objective, made, golden, None, num_tokens),
            micro_batch_tokens=config.optimizer.micro_batch_tokens,
            grad_clip=config.optimizer.grad_clip,
        )

    decode()
    update()
    numbers = players.student.parameters()
    # Autocast reads float32 weights and multiplies their copies in bfloat16.
    read_gb = sum(p.nbytes for p in numbers) * num_tokens / 1e9
    for what, part in (("decoding", decode), ("scoring and update", update)):
        with FlopCounterMode(display=False) as counter:
            part()
        start = Clock.now(setting.device)
        part()
        seconds = Clock.now(setting.device).since(start)["wall_s"]
        tflops = counter.get_total_flops() / 1e12 / seconds
        row = {"what": what, "seconds": seconds, "tflops": tflops}
        row["share_of_rate"] = tflops / rates["tflops"]
        if what == "decoding":
            row["share_of_copies"] = read_gb / seconds / rates["gb_per_s"]
        yield row | _kernels(setting, part)
    yield {"what": "sizes", "new_tokens": num_tokens, "rollouts": len(made)}


def _kernels(setting: Setting, part: Callable[[], None]) -> dict[str, Any]:
    """Launches of a part, and what took its device's time."""
    on_gpu = setting.device == "cuda"
    # Without the CPU's operations there is much less to write down; a release may want them.
    ways = (
        ([ProfilerActivity.CUDA], [ProfilerActivity.CPU, ProfilerActivity.CUDA])
        if on_gpu
        else ([ProfilerActivity.CPU],)
    )
    for activities in ways:
        with profile(activities=activities) as seen:
            part()
            Clock.now(setting.device)
        found = dearest(seen.events() or [], on_gpu)
        if found["launches"]:
            break
    return found


def dearest(events: Iterable[Any], on_gpu: bool) -> dict[str, Any]:
    """How many kernels (without a GPU: operations) there were, and which took the most time."""
    milliseconds, launches = Counter[str](), Counter[str]()
    for event in events:
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        # Named ranges of the code show on the GPU too, around kernels.
        if event.is_user_annotation or (on_gpu and not is_kernel):
            continue
        time_us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        milliseconds[event.name] += time_us / 1e3
        launches[event.name] += 1
    total = sum(milliseconds.values())
    top = [
        {"name": name[:NAME], "ms": ms, "share": ms / total, "launches": launches[name]}
        for name, ms in milliseconds.most_common(TOP)
    ]
    return {"launches": sum(launches.values()), "device_ms": total, "kernels": top}


def summary(rows: list[dict[str, Any]]) -> str:
    """What to print of the rows."""
    told = [
        f"{row['what']}: {row['launches']:,} launches, {row['share_of_rate']:.0%} of the rate"
        for row in rows
        if "launches" in row
    ]
    return "; ".join(told)
