"""Which files of a folder are read, which step they are of, and which attempt at a step counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stableopd.diagnose.command import diagnose_command, diagnose_paths
from stableopd.diagnose.runs import Reading
from stableopd.integrations.dump_steps import StepAttempts, step_in_name
from stableopd.integrations.dumps import Dump, open_dump
from stableopd.types import DataError, Record

LOOP = "so we add one more and then " * 20


def said(step: int, i: int, onset: int = 13) -> str:
    return LOOP if step >= onset and i % 16 else f"It makes {i + step}, so that is it."


def put(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def diagnosed(path: Path, **mapping: str) -> tuple[int, int | None, int]:
    """Exit code, step of the onset, and number of rollouts."""
    reading = Reading(mapping=mapping or None)
    found = diagnose_paths([path], reading)
    code = diagnose_command([path], reading, True, None)
    return code, found.onset.step, found.summary.overall.num_rollouts


def records(dump: Dump, **options: Any) -> list[Record]:
    return [record for batch in dump.batches(**options) for record in batch]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_12_rank_0.jsonl", 12),
        ("rollout_12-rank3.parquet", 12),
        ("rollouts_12_dp_rank_3.jsonl", 12),
        ("12_rank_3.jsonl", 12),
        ("12.shard-3.jsonl", 12),
        ("step_12/train/all/traces.jsonl", 12),
        ("step_12/run/3.jsonl", 3),
        ("rank_3.jsonl", None),
        (f"{2**53 + 1}.jsonl", None),
    ],
)
def test_steps_in_names(name: str, step: int | None) -> None:
    assert step_in_name(Path("d", name)) == step


def areal(folder: Path) -> Path:
    """rollout/<version of the weights>/<task>.jsonl; tasks are in no order."""
    for v in range(24):
        for i in range(8):
            task = (v * 8 + i) * 37 % 400
            row = {"task_id": task, "head_version": v, "tail_version": v, "prompt": f"Q{task}"}
            rows = [row | {"sample_idx": s, "completion": said(v, i + s)} for s in range(2)]
            put(folder / "rollout" / str(v) / f"{task}.jsonl", rows)
    return folder / "rollout"


def test_areal_names_the_version_and_not_the_task(tmp_path: Path) -> None:
    found = areal(tmp_path)
    assert diagnosed(found) == (1, 13, 384)
    assert diagnosed(found, step="tail_version") == (1, 13, 384)
    # Without such a column the two numbers of a name are not guessed at.
    for file in found.rglob("*.jsonl"):
        file.write_text(file.read_text().replace("_version", "_v"))
    dump = open_dump([found])
    assert {record.step for record in records(dump)} == {None}
    assert any("--map step=" in note for note in dump.notes)
    assert len({r.step for r in records(open_dump([found], mapping={"step": "@file"}))}) == 192


def trace(step: int, i: int, kind: str) -> dict[str, Any]:
    text = said(step, i)
    sampled = {"parent": 0, "sampled": True, "message": {"role": "assistant", "content": text}}
    sampled |= {"token_ids": [1 + j % 6 for j in range(9)], "mask": [True] * 9}
    asked = {"parent": None, "sampled": False, "message": {"role": "user", "content": f"Q{i}"}}
    reason = "length" if text is LOOP else "stop"
    return {"id": f"{kind}{step}-{i}", "task": {"data": {"idx": i // 4}}, "rewards": {"r": 1.0}} | {
        "calls": [{"finish_reason": reason}],
        "nodes": [asked, sampled],
    }


@pytest.mark.parametrize("form", ["traces", "episodes"])
def test_prime_rl_counts_each_rollout_of_training_once(tmp_path: Path, form: str) -> None:
    for step in range(1, 25):
        for kind in ("train", "eval") if step % 4 == 0 else ("train",):
            rows = [trace(step, i, kind) for i in range(16)]
            if form == "episodes":
                work = {"work": {"type": kind, "step": step}}
                rows = [{"task": row["task"], "traces": [row], "run": work} for row in rows]
            else:
                rows = [row | {"kind": kind, "policy_version": step - 2} for row in rows]
            for part in ("all", "effective"):
                put(tmp_path / f"rollouts/step_{step}/{kind}/{part}/traces.jsonl", rows)
    assert diagnosed(tmp_path) == (1, 13, 384)
    assert open_dump([tmp_path]).num_files == 24
    with pytest.raises(DataError, match="could be read"):  # evaluations by name, none of training
        records(open_dump([tmp_path / "rollouts/step_4/eval/all/traces.jsonl"]))


def test_folders_of_evaluations_are_passed_over(tmp_path: Path) -> None:
    for name in ("train", "eval", "validation"):
        put(tmp_path / name / "x.jsonl", [{"step": 1, "response": name}])
    assert [r.completion for r in records(open_dump([tmp_path]))] == ["train"]
    assert [r.completion for r in records(open_dump([tmp_path / "eval"]))] == ["eval"]


def test_ranks_are_parts_of_a_step(tmp_path: Path) -> None:
    for step in range(1, 25):
        for rank in (0, 1):
            texts = [said(step, i) for i in range(8)]
            rows = [
                {
                    "prompt": f"Q{i}",
                    "completion": t,
                    "finish_reason": "length" if t is LOOP else "stop",
                }
                for i, t in enumerate(texts)
            ]
            put(tmp_path / f"step_{step}_rank_{rank}.jsonl", rows)
    assert diagnosed(tmp_path) == (1, 13, 384)
    dump = open_dump([tmp_path])
    records(dump)
    assert dump.shared_steps == 0


def test_numbers_that_may_be_ranks_are_asked_for(tmp_path: Path) -> None:
    for rank in range(8):
        put(tmp_path / f"{rank}.jsonl", [{"completion": f"It is {rank}."}] * 3)
    with pytest.raises(DataError, match=r"0 to 7.*--map step=@file.*--map step=@none") as caught:
        open_dump([tmp_path])
    assert "\n" not in str(caught.value)
    for choice, steps in (("@none", {None}), ("@file", set(range(8)))):
        dump = open_dump([tmp_path], mapping={"step": choice})
        assert {record.step for record in records(dump)} == steps
    (tmp_path / "8.jsonl").write_text('{"completion": "It is 8."}\n')
    dump = open_dump([tmp_path])
    assert {record.step for record in records(dump)} == set(range(9))
    assert any("--map step=@none" in note for note in dump.notes)
    # With a column of steps nothing is asked.
    for rank in range(8):
        put(tmp_path / "c" / f"{rank}.jsonl", [{"completion": "It is.", "step": 5}])
    assert {record.step for record in records(open_dump([tmp_path / "c"]))} == {5}
    dump = open_dump([tmp_path / "c"], mapping={"step": "@none"})
    assert {record.step for record in records(dump)} == {None}


def test_steps_of_several_folders_or_runs_are_told(tmp_path: Path) -> None:
    for run in ("a", "b"):
        put(tmp_path / f"{run}.jsonl", [{"completion": run, "step": s} for s in range(9)])
        for step in range(1, 4):
            put(tmp_path / run / f"step_{step}.jsonl", [{"completion": run}])
    for paths, shared in ((["a.jsonl", "b.jsonl"], 9), (["a", "b"], 3), (["a"], 0)):
        dump = open_dump([tmp_path / path for path in paths])
        records(dump)
        assert dump.shared_steps == shared


def run_rows(steps: range, onset: int = 99, num: int = 16) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt": f"Q{i}",
            "completion": said(step, i, onset),
            "finish_reason": "length" if said(step, i, onset) is LOOP else "stop",
        }
        for step in steps
        for i in range(num)
    ]


def test_the_last_attempt_at_a_step_counts(tmp_path: Path) -> None:
    rows = run_rows(range(1, 61), onset=40) + run_rows(range(31, 61))
    assert diagnosed(put(tmp_path / "a.jsonl", rows)) == (0, None, 960)
    dump = open_dump([tmp_path / "a.jsonl"])
    assert not any("31 to 60" in note for note in dump.notes)
    assert len(records(dump)) == 1440
    kept = records(dump, last_attempts=True)
    assert [r.step for r in kept] == [row["step"] for row in run_rows(range(1, 61))]
    assert not any(r.completion == LOOP for r in kept)
    assert any("31 to 60" in note and "480" in note for note in dump.notes)


def test_a_second_attempt_that_ended_early_takes_the_place_of_all_later_steps(
    tmp_path: Path,
) -> None:
    rows = run_rows(range(1, 61), onset=40) + run_rows(range(31, 46)) + run_rows(range(41, 50))
    dump = open_dump([put(tmp_path / "a.jsonl", rows)])
    records(dump)
    kept = records(dump, last_attempts=True)
    assert sorted({r.step for r in kept if r.step is not None}) == list(range(1, 50))
    assert len(kept) == 49 * 16


def stretches(steps: list[int]) -> dict[tuple[int, int], int]:
    attempts = StepAttempts()
    for step in steps:
        attempts.see(0, step)
    return dict(attempts.cuts())


def test_what_is_no_resumed_run() -> None:
    run = [step for step in range(1, 61) for _ in range(8)]
    assert stretches(run) == {}
    assert stretches([*run, 30]) == {}  # a straggler
    assert stretches([*run, 30, *range(61, 70)]) == {}
    assert stretches([*run, 30, 31]) == {}  # with far fewer rollouts than there were
    assert stretches(run + run) == {}  # two runs, or two ranks
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(run).tolist()
    assert stretches(shuffled) == {}
    late = [max(1, step - int(rng.integers(0, 4))) for step in run]  # an asynchronous trainer
    assert stretches(late) == {}
    by_turns = [s for first in range(1, 9, 2) for s in (first, first + 1) * 2 for _ in range(4)]
    assert stretches(by_turns) == {}
    assert stretches([*run, *(s for s in range(30, 40) for _ in range(8))]) == {(0, 0): 30}


def test_two_runs_in_one_file_are_told(tmp_path: Path) -> None:
    dump = open_dump([put(tmp_path / "a.jsonl", run_rows(range(1, 9)) * 2)])
    records(dump)
    assert not dump.has_earlier_attempts
    assert any("one at a time" in note for note in dump.notes)


def test_several_completions_of_a_prompt(tmp_path: Path) -> None:
    texts = [said(1, i) for i in range(4)]
    row = {"step": 1, "prompt": "Q", "completions": texts, "rewards": [0.0, 1.0, 0.5, 0.0]}
    row |= {"finish_reason": ["stop", "length", "stop", "stop"], "score": [0.0, 1.0, 0.5, 0.0]}
    row["logprobs"] = [[-1.0], [-2.0], [-3.0], [-4.0]]
    found = records(open_dump([put(tmp_path / "a.jsonl", [row])]))
    assert [r.completion for r in found] == texts
    assert [r.score for r in found] == [0.0, 1.0, 0.5, 0.0]
    assert [str(r.stop_reason) for r in found] == ["stop", "length", "stop", "stop"]
    assert [r.student_logps.tolist() for r in found if r.student_logps is not None] == [
        [-1.0], [-2.0], [-3.0], [-4.0],
    ]  # fmt: skip
    assert {(r.step, r.prompt) for r in found} == {(1, "Q")}
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    found = records(open_dump([put(tmp_path / "b.jsonl", [row | {"completions": chats}])]))
    assert [r.completion for r in found] == texts


def test_token_ids_without_text(tmp_path: Path) -> None:
    ids = [5 + j % 6 for j in range(100)]
    rows = [
        {"response_tokens": ids, "step": step, "finish_reason": "length"}
        for step in range(1, 25)
        for _ in range(8)
    ]
    assert diagnosed(put(tmp_path / "a.jsonl", rows))[::2] == (1, 192)
    dump = open_dump([put(tmp_path / "b.jsonl", [*rows, {"response_tokens": None}])])
    found = records(dump)
    assert found[0].completion_ids is not None
    assert (len(found), dump.num_damaged) == (192, 1)
    # A column of that name may hold how many there are.
    with pytest.raises(DataError, match="no column that is known as a completion"):
        open_dump([put(tmp_path / "c.jsonl", [{"response_tokens": 7, "step": 1}])])


def test_nan_is_no_reason(tmp_path: Path) -> None:
    rows = [{"completion": said(1, i), "is_truncated": float("nan")} for i in range(3)]
    dump = open_dump([put(tmp_path / "a.jsonl", rows)])
    assert {record.stop_reason for record in records(dump)} == {None}
    assert (dump.num_dropped, dump.unknown_reasons) == (0, {})


def test_links_pipes_and_closed_folders(tmp_path: Path) -> None:
    put(tmp_path / "d/1.jsonl", [{"step": 1, "completion": "a"}])
    (tmp_path / "d/2.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "d/3.jsonl").symlink_to("3.jsonl")
    os.mkfifo(tmp_path / "d/4.jsonl")
    dump = open_dump([tmp_path / "d"])
    assert len(records(dump)) == 1
    assert dump.num_damaged == 3
    for name, damaged in zip("234", dump.damaged, strict=True):
        assert f"{name}.jsonl" in damaged
        with pytest.raises(DataError, match=rf"{name}\.jsonl") as caught:
            open_dump([tmp_path / "d" / f"{name}.jsonl"])
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        records(open_dump([tmp_path / "d"], strict=True))
    with pytest.raises(DataError, match="File name too long"):
        open_dump([tmp_path / ("x" * 300)])


def test_printed_commands_write_over_nothing(tmp_path: Path) -> None:
    array = tmp_path / "my dump.jsonl"
    array.write_text('[{"completion": "a"}]')
    (tmp_path / "a.jsonl").write_text("mine")
    (tmp_path / "a.pt").write_bytes(b"x")
    for path in (array, tmp_path / "a.pt"):
        with pytest.raises(DataError) as caught:
            open_dump([path])
        target = str(caught.value).rpartition("> ")[2].strip("'")
        assert not Path(target).exists()
        assert target.startswith(str(tmp_path))
