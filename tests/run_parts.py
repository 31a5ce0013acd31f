"""Run folders made by hand: a run that falls into loops, and one that stays as it was."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from stableopd.runfolder import RunFolder

BUDGET, PER_STEP = 48, 16
CONFIG = """[run]
output = "somewhere"
seed = {seed}
steps = {steps}

[data]
answer_marker = ";#"

[objective]
method = "{method}"

[repetition]
window_chars = 32
ratio = 2.0
"""


def rollout(step: int, index: int, is_loop: bool, rng: random.Random) -> dict[str, Any]:
    """A completion of characters: a sum, its answer, and then perhaps the answer for ever."""
    a, b = rng.randrange(10, 50), rng.randrange(10, 50)
    text = f"{a}+{b}={a + b};#{a + b}"
    ids = [ord(c) for c in text]
    if is_loop:
        copy = f"#{a + b}"
        text = (text + copy * BUDGET)[:BUDGET]
        ids = [ord(c) for c in text]
    else:
        ids.append(1)
    length = len(ids)
    student = [-0.3] * min(length, 12) + [-0.05] * max(0, length - 12)
    teacher = [-0.5] * min(length, 12) + [-0.06] * max(0, length - 12)
    return {
        "step": step,
        "prompt_id": f"p{index % 8}",
        "prompt": f"{a}+{b}:",
        "completion": text,
        "prompt_ids": [2, 3],
        "completion_ids": ids,
        "stop_reason": "length" if is_loop else "stop",
        "student_logprobs": student,
        "teacher_logprobs": teacher,
        "correct": not is_loop,
    }


def line_of(step: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of metrics that goes with some rollouts."""
    loops = sum(row["stop_reason"] == "length" for row in rows) / len(rows)
    return {
        "step": step,
        "rollout/mean_length": sum(len(row["completion_ids"]) for row in rows) / len(rows),
        "rollout/truncation_rate": loops,
        "rollout/repetition_rate": loops,
        "rollout/repetitive_share": 0.7 * loops,
        "rollout/accuracy": 1 - loops,
        "advantage/mean": -0.1,
        "advantage/repetitive_mean": -0.01,
        "advantage/regular_mean": -0.2,
        "logp/student_mean": -0.2,
        "logp/teacher_mean": -0.3,
        "stop/student_logp": -0.3,
        "stop/teacher_logp": -0.5,
        "eval/accuracy": 1 - loops,
    }


def loop_share(step: int, jump: int) -> float:
    """Share of looping rollouts: 0, then within six steps nearly all."""
    return min(0.95, max(0.0, (step - jump) / 6))


def make_run(
    path: Path, *, jump: int = 10**6, steps: int = 40, seed: int = 0, method: str = "opd"
) -> RunFolder:
    """Write a run folder whose rollouts fall into loops from step `jump` on."""
    environment = {
        "stops": {"mode": "event", "student_ids": [1], "teacher_ids": [1], "event_ids": [1]}
    }
    folder = RunFolder.create(
        path, CONFIG.format(seed=seed, steps=steps, method=method), environment
    )
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        share = loop_share(step, jump)
        rows = [rollout(step, i, i < share * PER_STEP, rng) for i in range(PER_STEP)]
        folder.write_rollouts(step, rows)
        folder.append_metrics(line_of(step, rows))
    return folder
