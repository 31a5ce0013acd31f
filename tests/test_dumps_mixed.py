"""Dumps that need a second look: late columns, unknown reasons, several runs, odd files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from stableopd.diagnostics.collect import Collector
from stableopd.integrations.dump_files import step_in_name
from stableopd.integrations.dumps import Dump, open_dump
from stableopd.types import DataError, Record, StopReason

DUMPS = Path(__file__).parent / "dumps"
VERL = {"input": "p", "output": "c", "score": 1.0}


def records(dump: Dump) -> list[Record]:
    return [record for batch in dump.batches() for record in batch]


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_huge_step_is_dropped_and_the_name_of_the_file_counts(tmp_path: Path) -> None:
    odd = [{"step": step, "completion": "a"} for step in (10**26, -3, 1.5, "x", 7, None)]
    dump = open_dump([write(tmp_path / "12.jsonl", odd)])
    assert [r.step for r in records(dump)] == [12, 12, 12, 12, 7, 12]
    assert dump.num_dropped == 4
    dump = open_dump([write(tmp_path / "x.jsonl", [{"step": 2**53, "completion": "a"}, odd[0]])])
    assert [r.step for r in records(dump)] == [2**53, None]
    collector = Collector()
    collector.add(records(dump))
    assert [entry.step for entry in collector.summary().by_step] == [2**53]
    assert step_in_name(Path(f"{10**26}.jsonl")) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"student_logprobs": "abc"}, "student_logprobs: not a list of numbers"),
        ({"teacher_logprobs": [-1, -2], "length": 1}, "teacher_logprobs: 2 numbers for 1 token"),
        ({"completion_ids": [1, "x"]}, "completion_ids: not a list of token ids"),
        ({"num_tokens": -4}, "length: -4 is not a whole number"),
        ({"advantages": [[1]]}, "advantages: not a list of numbers"),
        ({"score": {}}, "score: {} is not a number"),
        ({"correct": "maybe"}, "correct: 'maybe' is neither yes nor no"),
        ({"prompt": {"x": [1]}}, "prompt: the prompt is an object that is no message"),
    ],
)
def test_columns_that_come_late_are_read(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    if "length" in change:
        change = {"teacher_logprobs": [-1, -2], "num_tokens": 1}
    rows = [{"step": 1, "completion": "a"}] * 20
    dump = open_dump([write(tmp_path / "x.jsonl", [*rows, rows[0] | change])])
    assert len(records(dump)) == 21
    assert dump.num_dropped == 1
    assert dump.dropped[0].startswith(f"{tmp_path / 'x.jsonl'}, line 21: {named}")


def test_a_late_reason_of_verl(tmp_path: Path) -> None:
    rows = [VERL] * 20 + [VERL | {"finish_reason": "length"}]
    found = records(open_dump([write(tmp_path / "1.jsonl", rows)]))
    assert [r.stop_reason for r in found] == [None] * 20 + [StopReason.LENGTH]


def odd_reasons(path: Path) -> Path:
    words = ["done"] * 8 + ["hit_limit", "Other"] * 3
    return write(path, [{"a": "t" * 9, "meta": {"why": word}} for word in words])


def test_unknown_reasons_are_named_and_can_be_explained(tmp_path: Path) -> None:
    path = odd_reasons(tmp_path / "x.jsonl")
    mapping = {"completion": "a", "stop_reason": "meta.why"}
    dump = open_dump([path], mapping=mapping)
    assert [r.stop_reason for r in records(dump)[8:]] == [None] * 6
    assert dump.unknown_reasons == {"hit_limit": 3, "Other": 3}
    assert dump.num_dropped == 6
    (note,) = dump.notes
    assert "'meta.why': 'hit_limit' (3), 'Other' (3); " in note
    assert "--map truncated_value=hit_limit" in note
    explained = mapping | {"truncated_value": "hit_limit, other"}
    dump = open_dump([path], mapping=explained)
    assert [r.stop_reason for r in records(dump)] == [StopReason.STOP] * 8 + [StopReason.LENGTH] * 6
    assert (dump.notes, dump.num_dropped) == ([], 0)
    both = mapping | {"truncated_value": "hit_limit", "stopped_value": "other"}
    found = [r.stop_reason for r in records(open_dump([path], mapping=both))[8:]]
    assert found == [StopReason.LENGTH, StopReason.STOP] * 3
    for wrong, message in (
        (mapping | {"truncated_value": ","}, "truncated_value names no value"),
        (both | {"stopped_value": "HIT_LIMIT"}, "cannot be both"),
        ({"completion": "a", "truncated_value": "x"}, "no column of stop reasons"),
    ):
        with pytest.raises(DataError, match=message):
            open_dump([path], mapping=wrong)


@pytest.mark.parametrize("folder", ["trl-collapse", "verl"])
def test_real_collapses_are_a_pile_up_of_characters(folder: str) -> None:
    """The tokens of these runs are characters."""
    collector = Collector()
    collector.add(records(open_dump([DUMPS / folder])))
    found = collector.summary()
    assert (found.length_unit, found.truncation_source) == ("characters", "pile-up")


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def test_two_frameworks_in_a_folder_are_refused(tmp_path: Path) -> None:
    trl = table(tmp_path / "completions_00001.parquet", step=[1], prompt=["p"], completion=["c"])
    for name in ("metrics.jsonl", "eval_1.jsonl"):
        write(tmp_path / name, [VERL])
    write(tmp_path / "data.jsonl", [{"question": "q", "text": "t"}])
    write(tmp_path / "losses.jsonl", [{"step": 1, "loss": 2.0}])
    dump = open_dump([tmp_path])
    assert (dump.format, len(records(dump)), len(dump.left_out)) == ("trl", 1, 4)
    verl = write(tmp_path / "1.jsonl", [VERL])
    with pytest.raises(DataError) as caught:
        open_dump([tmp_path])
    assert f"{trl} is TRL, {verl} is verl" in str(caught.value)
    verl.unlink()
    other = write(tmp_path / "x.jsonl", [{"step": 1, "response": "r"}])
    with pytest.raises(DataError, match=f"{other} is generic"):
        open_dump([tmp_path])


def test_odd_files_are_refused_in_their_own_words(tmp_path: Path) -> None:
    none = table(tmp_path / "none.parquet", completion=pa.array([], pa.string()))
    raw = table(tmp_path / "raw.parquet", completion=[b"c"], step=[1])
    csv = tmp_path / "in" / "table.csv"
    csv.parent.mkdir()
    csv.write_text("step,completion\n1,abc\n")
    for path, message in (
        (none, "none.parquet: the table has no rows; there is no rollout in it."),
        (raw, "its columns are 'step', 'completion' (bytes, which are not read); say"),
        (csv, "table.csv: a csv file, which is not read here; convert it to JSONL or parquet."),
        (csv.parent, "table.csv: a csv file, which is not read here"),
    ):
        with pytest.raises(DataError) as caught:
            open_dump([path])
        assert message in str(caught.value)


def test_steps_of_several_files_are_counted(tmp_path: Path) -> None:
    rows = [VERL | {"step": step} for step in (1, 2, 2, 3)]
    paths = [
        write(tmp_path / f"{name}.jsonl", rows[start:]) for name, start in (("a", 0), ("b", 1))
    ]
    dump = open_dump(paths)
    assert (dump.shared_steps, len(records(dump)), dump.shared_steps) == (0, 7, 2)
    assert len(records(dump)) == 7
    assert dump.shared_steps == 2
    alone = open_dump(paths[:1])
    assert (len(records(alone)), alone.shared_steps) == (4, 0)
