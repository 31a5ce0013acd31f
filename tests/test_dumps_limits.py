"""Small files take little memory: what is read at once is bounded, and what is over is counted."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from stableopd.diagnostics import collect
from stableopd.diagnostics.collect import Collector
from stableopd.diagnostics.lengths import Lengths
from stableopd.integrations import dump_checks, dump_rows, dump_values, dumps
from stableopd.integrations.dumps import Dump, open_dump
from stableopd.types import Record

ROW = json.dumps({"response": "a b", "step": 1})


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, a thousand times smaller, so that the tests are quick."""
    monkeypatch.setattr(dump_rows, "MOST_BYTES", 2**15)
    monkeypatch.setattr(dump_rows, "PROGRESS_BYTES", 2**12)
    monkeypatch.setattr(dump_rows, "LARGE_GROUP", 2**18)
    monkeypatch.setattr(dump_checks, "PEEKED_BYTES", 2**13)
    monkeypatch.setattr(dump_values, "MOST_CHARACTERS", 2**13)
    monkeypatch.setattr(dump_values, "MOST_TOKENS", 2**11)
    monkeypatch.setattr(dumps, "BATCH_BYTES", 2**14)


def read(path: Path) -> tuple[Dump, list[list[Record]]]:
    dump = open_dump([path])
    return dump, list(dump.batches())


def peak(path: Path) -> int:
    """Most bytes that Python held while a file was read."""
    tracemalloc.start()
    dump = open_dump([path])
    for _ in dump.batches():
        pass
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_line_over_the_limit_is_counted_and_passed_over(tmp_path: Path, ending: str) -> None:
    long = json.dumps({"response": "x" * 20_000_000, "step": 1})
    data = f"{ROW}\n{long}\n{ROW}\n{long}".encode()
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(data, 1) if ending.endswith("gz") else data)
    told = list[int]()
    dump = open_dump([path])
    lines = [record.line for batch in dump.batches(told.append) for record in batch]
    assert (lines, dump.num_damaged) == ([1, 3], 2)
    assert "line 2" in dump.damaged[0]
    assert sum(told) == path.stat().st_size
    assert peak(path) < 5_000_000


def test_a_completion_over_the_limit_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"response": "{"x" * n}"}}\n' for n in (5, 2**13, 2**13 + 1)))
    dump, batches = read(path)
    assert [len(r.completion) for b in batches for r in b] == [5, 2**13]
    assert dump.num_damaged == 1
    assert "8,193" in dump.damaged[0]


def test_lists_and_prompts_over_the_limit_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"response": "a", "logprobs": [0.0] * 2049, "response_ids": [0] * 2049}
    path.write_text(json.dumps(row | {"prompt": "p" * (2**13 + 1)}))
    dump, ((found,),) = read(path)
    assert (dump.num_damaged, dump.num_dropped) == (0, 3)
    assert found.student_logps is None
    assert found.completion_ids is None
    assert found.prompt == ""


@pytest.mark.parametrize(
    ("logps", "is_used"),
    [
        ("[-0.5, -0.1]", True),
        ("[-0.5, 0.0005]", True),  # rounding
        ("[-0.5, null]", True),  # unknown
        ("[-0.5, 0.1]", False),
        ("[-0.5, NaN]", False),
        ("[-0.5, Infinity]", False),
    ],
)
def test_values_that_are_no_log_probs_are_dropped(
    tmp_path: Path, logps: str, is_used: bool
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"response": "a b", "logprobs": {logps}}}\n')
    dump, ((found,),) = read(path)
    assert found.completion == "a b"
    assert (found.student_logps is not None) == is_used
    assert dump.num_dropped == (not is_used)


def repeated(num: int, text: str) -> Any:
    places = pa.array([0] * num, pa.int32())
    return pa.DictionaryArray.from_arrays(places, pa.array([text]))


def table(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path, compression="zstd")
    return path


def test_columns_that_play_no_role_are_not_read(tmp_path: Path) -> None:
    dates = pa.array([1_200_000_000_000] * 40, pa.timestamp("s"))  # the year 40000
    large = repeated(40, "x" * 1_000_000)
    path = table(tmp_path / "a.parquet", response=["a b"] * 40, extra=large, made_at=dates)
    dump, batches = read(path)
    assert (sum(map(len, batches)), dump.num_damaged) == (40, 0)
    assert peak(path) < 1_000_000


def test_a_row_that_python_cannot_hold_is_counted(tmp_path: Path) -> None:
    dates = pa.array([0, 1_200_000_000_000, 0], pa.timestamp("s"))
    path = table(tmp_path / "a.parquet", response=["a"] * 3, step=dates)
    dump, batches = read(path)
    assert [r.line for b in batches for r in b] == [1, 3]
    assert "row 2" in dump.damaged[0]


def test_a_text_that_stands_in_every_row(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", response=repeated(200, "abc defg " * 900))
    dump, batches = read(path)
    assert (sum(map(len, batches)), dump.num_damaged) == (200, 0)
    assert max(map(len, batches)) <= 3  # of 8 KB each
    with parquet.ParquetFile(path) as file:
        assert dump_rows._batch_rows(path, file, 0, ["response"]) <= 4
    path = table(tmp_path / "b.parquet", response=repeated(200, "abc defg " * 10_000))
    dump = open_dump([table(tmp_path / "c.parquet", response=["a"]), path])
    assert sum(map(len, dump.batches())) == 1
    assert dump.num_damaged == 200
    assert dump.losses.num_lost == 200


def test_messages_that_stand_in_every_row(tmp_path: Path) -> None:
    said = pa.StructArray.from_arrays(
        [pa.array(["assistant"] * 200), repeated(200, "abc defg " * 900).dictionary_decode()],
        names=["role", "content"],
    )
    offsets = pa.array(range(201), pa.int32())
    path = table(tmp_path / "a.parquet", response=pa.ListArray.from_arrays(offsets, said))
    with parquet.ParquetFile(path) as file:
        assert dump_rows._batch_rows(path, file, 0, ["response"]) <= 4
    dump, batches = read(path)
    assert (sum(map(len, batches)), dump.num_damaged) == (200, 0)


def test_many_log_probs_in_a_small_file(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", response=["a b"] * 20, logprobs=[[0.0] * 4000] * 20)
    assert path.stat().st_size < 3000
    dump, batches = read(path)
    assert (sum(map(len, batches)), dump.num_dropped) == (20, 20)
    assert peak(path) < 600_000  # a row takes 130 KB; one is looked at first, and not eight


def test_batches_are_bounded_by_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"response": "a" * 8000}) + "\n") * 20)
    _, batches = read(path)
    assert max(map(len, batches)) == 3


def test_ids_with_a_long_text_in_them(tmp_path: Path) -> None:
    """numpy would make an array of texts that are all as long as the longest."""
    path = tmp_path / "a.jsonl"
    row = {"response": "a", "response_ids": ["x" * 20_000, *(["a"] * 1000)]}
    path.write_text(json.dumps(row))
    assert open_dump([path]).num_dropped == 0
    dump, _ = read(path)
    assert dump.num_dropped == 1
    assert peak(path) < 2_000_000


def test_the_first_rollouts_wait_for_so_much_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_FIRST_CHARACTERS", 1000)
    monkeypatch.setattr(collect, "_CHUNK_CHARACTERS", 300)
    records = [Record("f", i, f"{i} abc " * 20, step=i // 8) for i in range(1, 100)]
    found = list[Any]()
    for size in (1, 7, 99):
        collector = Collector()
        for start in range(0, len(records), size):
            collector.add(records[start : start + size])
        found.append(collector.summary())
        assert not collector._waiting
    assert [s.overall for s in found[1:]] == [found[0].overall] * 2
    assert [s.by_step for s in found[1:]] == [found[0].by_step] * 2


def test_work_does_not_grow_with_a_length() -> None:
    began = time.perf_counter()
    lengths = Lengths()
    for length in (20, 20, 20, 2**53, 10**12):
        lengths.add(length, False)
    for budget in (None, 20, 10**12, 10**12 + 39, 2**53, 2**53 - 1):
        found = lengths.histogram(budget)
        assert found.counts.sum() == 5
        assert len(found.counts) < 140
    assert time.perf_counter() - began < 5


def test_widths_of_bins_are_what_a_search_of_all_gives() -> None:
    for budget in (*range(1, 300), 1024, 3000, 4096, 8191, 16384, 32768):
        lengths = Lengths()
        lengths.add(budget, True)
        widths = {round(w) for w in np.diff(lengths.histogram(budget).edges)[:-1]}
        near = range(max(1, budget // 64), budget // 20 + 1)
        fitting = [w for w in near if budget % w == 0]
        if fitting:
            assert widths == {min(fitting, key=lambda w: abs(np.log(w * 40 / budget)))}
