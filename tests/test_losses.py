"""What is lost of a dump reaches the verdict: its confidence, and "too little data"."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from stableopd.diagnose.command import diagnose_command, diagnose_paths
from stableopd.diagnose.runs import Reading
from stableopd.diagnostics.losses import LossCounter, Losses, hidden_by, weaken

HEALTHY, COLLAPSED, TOO_LITTLE = 0, 1, 3


def rows_of(num_steps: int = 24, per_step: int = 8, collapse: bool = True) -> list[dict[str, Any]]:
    """Rollouts of which nearly all of the second half are cut off, where `collapse`."""
    made: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        for i in range(per_step):
            cut = collapse and step > num_steps // 2
            text = f"{step}+{i}={step + i};" * (8 if cut else 1)
            reason = "length" if cut else "stop"
            made.append({"step": step, "prompt": f"{step}+{i}", "response": text})
            made[-1]["finish_reason"] = reason
    return made


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row) for row in rows]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def judged(*paths: Path) -> tuple[int, str]:
    """Exit code and confidence of a diagnosis."""
    code = diagnose_command(paths, Reading(), True, None)
    return code, diagnose_paths(paths, Reading()).verdict.confidence


def test_a_collapse_that_is_torn_away(tmp_path: Path) -> None:
    lines = lines_of(rows_of())
    assert judged(write(tmp_path / "a.jsonl", lines))[0] == COLLAPSED
    torn = [line if i < 96 else line[:40] for i, line in enumerate(lines)]
    assert judged(write(tmp_path / "b.jsonl", torn)) == (TOO_LITTLE, "low")
    # Of every step of the second half only what was not cut off is left.
    kept = [line if i < 96 or i % 8 < 3 else "x" for i, line in enumerate(lines)]
    healthy = [line.replace('"length"', '"stop"') for line in kept]
    assert judged(write(tmp_path / "c.jsonl", healthy)) == (TOO_LITTLE, "low")


def test_a_collapse_that_can_be_read_stays_one(tmp_path: Path) -> None:
    lines = [line if i % 4 else "x" for i, line in enumerate(lines_of(rows_of()))]
    assert judged(write(tmp_path / "a.jsonl", lines)) == (COLLAPSED, "low")


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        ((), (HEALTHY, "high")),
        ((191,), (HEALTHY, "high")),  # a file that is being written
        ((50, 51, 52), (HEALTHY, "medium")),
        (range(30), (HEALTHY, "low")),
        (range(80), (TOO_LITTLE, "low")),
        (range(176, 192), (TOO_LITTLE, "medium")),
    ],
)
def test_a_healthy_dump(tmp_path: Path, damaged: Any, expected: tuple[int, str]) -> None:
    lines = lines_of(rows_of(collapse=False))
    for place in damaged:
        lines[place] = lines[place][:30]
    code, confidence = judged(write(tmp_path / "a.jsonl", lines))
    assert code == expected[0]
    if code == HEALTHY:
        assert confidence == expected[1]


def tables(folder: Path, num_steps: int = 24, collapse: bool = True) -> list[Path]:
    """A file of TRL's a step."""
    folder.mkdir()
    made: list[Path] = []
    for step in range(1, num_steps + 1):
        found = [row for row in rows_of(num_steps, collapse=collapse) if row["step"] == step]
        columns = {"step": [step] * 8, "prompt": [row["prompt"] for row in found]}
        columns |= {"completion": [row["response"] for row in found]}
        columns |= {"finish_reason": [row["finish_reason"] for row in found]}
        made.append(folder / f"completions_{step:05d}.parquet")
        parquet.write_table(pa.table(columns), made[-1])
    return made


def test_files_that_are_cut(tmp_path: Path) -> None:
    files = tables(tmp_path / "c")
    for file in files[12:]:
        file.write_bytes(file.read_bytes()[:200])
    assert judged(tmp_path / "c") == (TOO_LITTLE, "low")
    losses_of_last = tables(tmp_path / "d", collapse=False)[-1]
    losses_of_last.write_bytes(losses_of_last.read_bytes()[:200])  # it is being written
    assert judged(tmp_path / "d") == (HEALTHY, "medium")


def test_files_that_are_empty_or_lead_nowhere(tmp_path: Path) -> None:
    files = tables(tmp_path / "c")
    for file in files[12:18]:
        file.write_bytes(b"")
    for file in files[18:]:
        file.unlink()
        file.symlink_to("gone.parquet")
    assert judged(tmp_path / "c")[0] == TOO_LITTLE


def test_ranks_without_rollouts_lose_none(tmp_path: Path) -> None:
    for step in range(1, 25):
        lines = [line for line in lines_of(rows_of(collapse=False)) if f'"step": {step},' in line]
        write(tmp_path / f"step_{step}_rank_0.jsonl", lines)
        write(tmp_path / f"step_{step}_rank_1.jsonl", [])
    assert judged(tmp_path) == (HEALTHY, "high")


def test_a_gzip_file_with_a_flipped_byte(tmp_path: Path) -> None:
    rows = rows_of(1000, collapse=False)
    for row in rows:  # so that the stream does not consist of repetitions
        row["response"] += str(random.Random(row["prompt"]).random())
    data = bytearray(gzip.compress("".join(f"{x}\n" for x in lines_of(rows)).encode()))
    data[len(data) // 2] ^= 0x55
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    assert judged(tmp_path / "a.jsonl.gz") == (TOO_LITTLE, "low")
    cut = gzip.compress("".join(f"{x}\n" for x in lines_of(rows)).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(cut[: len(cut) * 9 // 10])  # as while it is written
    assert judged(tmp_path / "b.jsonl.gz")[0] == HEALTHY


def test_steps_that_cannot_be_used(tmp_path: Path) -> None:
    rows = rows_of()
    huge = [row | {"step": 10**18 + row["step"]} for row in rows]
    assert judged(write(tmp_path / "a.jsonl", lines_of(huge))) == (TOO_LITTLE, "low")
    few = [row if i % 50 else row | {"step": -1} for i, row in enumerate(rows_of(collapse=False))]
    assert judged(write(tmp_path / "b.jsonl", lines_of(few))) == (HEALTHY, "medium")


def test_counting_by_place() -> None:
    """The late losses are those that a list of all rollouts gives, up to the width of a block."""
    draw = random.Random(0)
    for size in (50, 5_000):
        counter, order = LossCounter(), list[bool]()
        for _ in range(size):
            if draw.random() < 0.7:
                counter.read()
                order.append(False)
            else:
                number = draw.randint(1, 4)
                counter.lose(number)
                order += [True] * number
        found = counter.losses(0, 1.0, 0)
        late = round(0.2 * len(order))
        assert (found.num_read, found.num_lost) == (order.count(False), order.count(True))
        assert found.num_late == late
        assert abs(found.num_lost_late - sum(order[-late:])) <= len(order) / 512 + 1
        at_end = len(order) - 1 - max(i for i, lost in enumerate(order) if not lost)
        assert found.num_lost_at_end == at_end


def test_losing_a_great_number_takes_no_time() -> None:
    counter = LossCounter()
    counter.read()
    counter.lose(2**60)
    assert counter.losses(0, 1.0, 0).num_lost_late == round(0.2 * (2**60 + 1))


def test_rules() -> None:
    assert not hidden_by(Losses(100, 0))
    assert not hidden_by(Losses(100, 8, 8, 8, 21, per_step=8))
    assert hidden_by(Losses(100, 9, 9, 9, 21, per_step=8))
    assert not hidden_by(Losses(1000, 9, 9, 9, 201, per_step=8))
    assert hidden_by(Losses(100, 12, 12, 0, 22, per_step=8))
    assert hidden_by(Losses(100, 60, 10, 0, 32))
    assert hidden_by(Losses(100, num_without_step=11))
    assert [weaken("high", Losses(1000, lost)) for lost in (9, 11, 120)] == [
        "high",
        "medium",
        "low",
    ]
    assert weaken("low", Losses(1000, 11)) == "low"
