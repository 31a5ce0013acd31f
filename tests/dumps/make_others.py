"""Make the dumps of frameworks that cannot be run here, from rollouts of a real run of ours.

    python tests/dumps/make_others.py runs/demo/opd

The rollouts are those of `stableopd demo`'s plain OPD, which collapses. verl's files are written
by verl's own function, so that verl 0.9.1 must be importable (its training needs GPUs, this does
not). The other files are conversions to the layouts that the frameworks' code writes, as named in
src/stableopd/integrations/dump_formats.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stableopd.data.arithmetic import make_problems

HERE = Path(__file__).parent
STEPS, ROWS = (1, 50, 100), 4  # of the conversions
VERL_STEPS, VERL_ROWS = range(4, 101, 4), 16

Row = dict[str, Any]


def rollouts(run: Path, step: int, num: int) -> list[Row]:
    lines = (run / "rollouts" / f"{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:num]]


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def verl(rows: Sequence[Row], step: int, out: Path) -> None:
    """<trainer.rollout_data_dir>/<step>.jsonl, by verl's own hand."""
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    answers = {p.id: p.answer for p in make_problems(20_000, 0, "train")}
    RayPPOTrainer._write_generations(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        [answers[row["prompt_id"]] for row in rows],
        [float(row["correct"]) for row in rows],
        {"acc": [row["correct"] for row in rows]},
        str(out),
        step,
    )


def slime(row: Row, index: int) -> Row:
    """A Sample.to_dict() of --save-debug-rollout-data, as JSON."""
    return {
        "group_index": index // 4,
        "index": index,
        "prompt": row["prompt"],
        "tokens": row["prompt_ids"] + row["completion_ids"],
        "response": row["completion"],
        "response_length": len(row["completion_ids"]),
        "label": None,
        "reward": float(row["correct"]),
        "loss_mask": None,
        "weight_versions": [],
        "rollout_log_probs": row["student_logprobs"],
        "remove_sample": False,
        "teacher_log_probs": row["teacher_logprobs"],
        "status": "truncated" if row["stop_reason"] == "length" else "completed",
        "metadata": {},
    }


def nemo_rl(row: Row, index: int, width: int) -> Row:
    """A line of GRPO's train_data_step{n}.jsonl: every value in a list of one, padded."""
    before, own = len(row["prompt_ids"]), len(row["completion_ids"])

    def padded(values: Sequence[float], head: float = 0.0) -> list[list[float]]:
        return [[*[head] * before, *values, *[0.0] * (width - before - own)]]

    pairs = zip(row["teacher_logprobs"], row["student_logprobs"], strict=True)
    pad = [0] * (width - before - own)
    return {
        "content": [[row["prompt"], row["completion"], "Environment: correct"]],
        "rewards": [float(row["correct"])],
        "input_lengths": [before + own],
        "token_ids": [row["prompt_ids"] + row["completion_ids"] + pad],
        "token_loss_mask": padded([1.0] * own),
        "sample_loss_mask": [1.0],
        "advantages": padded([round(t - s, 5) for t, s in pairs]),
        "generation_logprobs": padded(row["student_logprobs"]),
        "prev_logprobs": padded(row["student_logprobs"]),
        "idx": index,
    }


def nemo_rl_distillation(row: Row, index: int) -> Row:
    """The same of its distillation, which writes two columns."""
    full = nemo_rl(row, index, 128)
    return {key: full[key] for key in ("content", "input_lengths", "idx")}


def prime_rl(row: Row, index: int) -> Row:
    """A line of rollouts/step_N/train_rollouts.jsonl, before verifiers had traces."""
    return {
        "example_id": index // 4,
        "task": "arithmetic",
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
        "reward": float(row["correct"]),
        "metrics": {"correct": float(row["correct"])},
        "is_completed": True,
        "is_truncated": row["stop_reason"] == "length",
        "stop_condition": "max_tokens" if row["stop_reason"] == "length" else "completed",
        "token_usage": {
            "input_tokens": float(len(row["prompt_ids"])),
            "output_tokens": float(len(row["completion_ids"])),
        },
    }


def prime_rl_episode(row: Row, step: int, kind: str) -> Row:
    """An episode of the file monitor's trace stream, of one trace of one turn."""
    asked, own = row["prompt_ids"], row["completion_ids"]
    nodes = [
        {
            "message": {"role": "user", "content": row["prompt"]},
            "sampled": False,
            "token_ids": asked[:-1],
            "mask": [False] * (len(asked) - 1),
        },
        {
            "parent": 0,
            "message": {"role": "assistant", "content": row["completion"]},
            "sampled": True,
            # The template's last token before the answer is part of the assistant's node.
            "token_ids": [*asked[-1:], *own],
            "mask": [False, *[True] * len(own)],
            "logprobs": row["student_logprobs"],
            "reference_logprobs": row["teacher_logprobs"],
        },
    ]
    task = {"type": "Arithmetic", "data": {"idx": 0, "prompt": row["prompt"]}, "key": "task-0"}
    trace = {
        "version": 1,
        "id": f"{step}-{row['prompt_id']}",
        "task": task,
        "nodes": nodes,
        "calls": [{"node": 1, "finish_reason": row["stop_reason"]}],
        "rewards": {"correct": {"score": float(row["correct"]), "weight": 1.0}},
        "is_completed": True,
        "ok": True,
        "errors": [],
    }
    run = {"type": "train", "id": "r", "work": {"type": kind, "step": step}}
    return {"id": trace["id"], "task": task, "run": run, "ok": True, "traces": [trace]}


def ms_swift(rows: Sequence[Row], step: int) -> Row:
    """A line of completions.jsonl: the columns of a whole step."""
    return {
        "step": [str(step)] * len(rows),
        "prompt": [row["prompt"] for row in rows],
        "completion": [row["completion"] for row in rows],
    }


def main(run: Path) -> None:
    for name in ("verl", "slime", "nemo-rl", "nemo-rl-distillation", "prime-rl", "ms-swift"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    for step in VERL_STEPS:
        verl(rollouts(run, step, VERL_ROWS), step, HERE / "verl")
    tables: list[Row] = []
    episodes: list[Row] = []
    for step in STEPS:
        rows = rollouts(run, step, ROWS)
        width = max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
        write(HERE / f"slime/rollout_{step}.jsonl", map(slime, rows, range(ROWS)))
        name = f"train_data_step{step}.jsonl"
        lines = [nemo_rl(row, i, width) for i, row in enumerate(rows)]
        write(HERE / "nemo-rl/exp_001" / name, lines)
        lines = map(nemo_rl_distillation, rows, range(ROWS))
        write(HERE / "nemo-rl-distillation/exp_001" / name, lines)
        place = HERE / f"prime-rl/rollouts/step_{step}"
        write(place / "train_rollouts.jsonl", map(prime_rl, rows, range(ROWS)))
        episodes += [prime_rl_episode(row, step, "train") for row in rows]
        episodes += [prime_rl_episode(row, step, "eval") for row in rows[:1]]
        tables.append(ms_swift(rows, step))
    write(HERE / "prime-rl-traces/monitors/file/traces/stream/00000.jsonl", episodes)
    write(HERE / "ms-swift/completions.jsonl", tables)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
