"""Whatever stands in a file: its rows are read, counted as damage, or refused in one sentence."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stableopd.diagnose.command import diagnose_paths
from stableopd.diagnose.runs import Reading
from stableopd.integrations.dump_formats import FORMATS, KNOWN_COLUMNS
from stableopd.integrations.dumps import open_dump
from stableopd.types import StableOPDError

QUICK = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Numbers at the edges of what a float, an integer of 64 bits, or a time can be.
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**53, 2**63, 10**18, 10**400, -(10**400), 1e300, 0.5]),
    st.floats(),
    st.integers(),
)
WORDS = st.sampled_from(
    ["", "a b c", "stop", "length", "user", "assistant", "\x1b[2J", "\ud800", "1", "nan", "é\u2028"]
)
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=8))
INNER = """role content value from parent sampled message token_ids mask score weight finish_reason
stop_condition tokens work type prime_rl"""
KEYS = st.sampled_from([*sorted(KNOWN_COLUMNS), *INNER.split()])
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
ROWS = st.dictionaries(KEYS, VALUES, max_size=8)

MESSAGE = {"role": "assistant", "content": "a b"}
NODE = {"message": MESSAGE, "sampled": True, "parent": None, "token_ids": [1], "mask": [True]}
GOOD: dict[str, dict[str, Any]] = {
    "stableopd": {
        "prompt_id": "p",
        "completion": "c",
        "completion_ids": [1],
        "stop_reason": "stop",
    },
    "verl": {"input": "p", "output": "c", "score": 1, "step": 1},
    "slime": {"response": "c", "response_length": 1, "tokens": [1, 2], "status": "completed"},
    "nemo-rl": {"content": [["q", "a"]], "input_lengths": [2], "token_loss_mask": [[0, 1]]},
    "prime-rl": {"nodes": [NODE], "calls": [{"finish_reason": "stop"}], "task": {}, "rewards": {}},
    "ms-swift": {"step": ["1"], "prompt": ["p"], "completion": ["c"], "advantages": [0.5]},
    "generic": {"completions": ["a", "b"], "step": 1, "is_truncated": False, "logprobs": [-1]},
    "trl": {"step": 1, "prompt": "p", "completion": "c"},
}


def read(path: Path, **options: Any) -> None:
    """Read a file to its end, or be refused in one sentence."""
    try:
        dump = open_dump([path], **options)
        num = sum(map(len, dump.batches()))
    except StableOPDError as error:
        said = str(error)
    else:
        said = f"{path} is read"
        assert num > 0
        assert dump.losses.num_read == num
    assert path.name in said


def at(tmp_path: Path, name: str) -> Path:
    return tmp_path / name


@QUICK
@given(data=st.binary(max_size=300), ending=st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]))
def test_any_bytes(tmp_path: Path, data: bytes, ending: str) -> None:
    path = at(tmp_path, f"a{ending}")
    path.write_bytes(data)
    read(path)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "trl"])
@QUICK
@given(rows=st.lists(ROWS, min_size=1, max_size=3), change=ROWS, key=KEYS, value=VALUES)
def test_any_json(
    tmp_path: Path, format: str, rows: list[Any], change: Any, key: str, value: Any
) -> None:
    good = GOOD[format]
    inner = json.loads(json.dumps(good))
    for part in inner.values():  # one value within, too
        if isinstance(part, list) and part and isinstance(part[0], dict):
            part[0][key] = value
    lines = [good, good | change, good | {key: value}, inner, *rows]
    path = at(tmp_path, "a.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read(path)
    read(path, format=format)
    if format == "generic":
        read(path, format="generic", mapping={"completion": key})


@QUICK
@given(change=ROWS, key=KEYS, value=VALUES)
def test_any_json_is_diagnosed(tmp_path: Path, change: Any, key: str, value: Any) -> None:
    good = {"completion": "a b", "response_ids": [1, 2], "step": 3, "finish_reason": "stop"}
    lines = [*([good] * 16), good | change, good | {key: value}, {"completion": "a", key: value}]
    path = at(tmp_path, "a.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    diagnose_paths([path], Reading(max_new_tokens=20))


def flipped(data: bytes, places: list[tuple[int, int]]) -> bytes:
    made = bytearray(data)
    for place, value in places:
        made[place % len(made)] ^= value
    return bytes(made)


FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)


@QUICK
@given(flips=FLIPS, cut=st.integers(0, 400))
def test_damaged_gzip(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    rows = "".join(f'{{"step": {i}, "completion": "a {i * 7919 % 997}"}}\n' for i in range(80))
    data = flipped(gzip.compress(rows.encode()), flips)
    path = at(tmp_path, "a.jsonl.gz")
    path.write_bytes(data[: len(data) - cut] if cut < 200 else data)
    read(path)


def table() -> bytes:
    columns = {
        "step": list(range(50)),
        "completion": [f"a {i}" for i in range(50)],
        "logprobs": [[-1.0, None]] * 50,
        "made": pa.array([10**9] * 50, pa.timestamp("s")),
        "prompt": [[{"role": "user", "content": "q"}]] * 50,
    }
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink, row_group_size=20)
    return sink.getvalue()


@settings(QUICK, max_examples=120)
@given(flips=FLIPS, from_end=st.booleans())
def test_damaged_parquet(tmp_path: Path, flips: list[tuple[int, int]], from_end: bool) -> None:
    data = table()
    # The footer, from which all else is found, is a tenth of the places otherwise.
    places = [(-(place % 2000) - 1 if from_end else place, value) for place, value in flips]
    path = at(tmp_path, "a.parquet")
    path.write_bytes(flipped(data, places))
    read(path)


KINDS: dict[str, Any] = {
    "timestamp": pa.timestamp("s"),
    "date": pa.date32(),
    "duration": pa.duration("s"),
    "decimal": pa.decimal128(38, 3),
    "time": pa.time64("us"),
    "float": pa.float32(),
}


@QUICK
@given(
    values=st.lists(st.none() | st.integers(-(2**31), 2**31), min_size=3, max_size=6),
    scale=st.sampled_from([1, 2**20]),
    kind=st.sampled_from(sorted(KINDS)),
    role=st.sampled_from(["step", "completion", "score", "stop_reason", "prompt_id", "length"]),
)
def test_any_kind_of_column(
    tmp_path: Path, values: list[int | None], scale: int, kind: str, role: str
) -> None:
    scale = scale if kind in ("timestamp", "duration") else 1
    whole = [None if value is None else value * scale for value in values]
    width = pa.int32() if kind == "date" else pa.int64()
    column = pa.array(whole, width).cast(KINDS[kind], safe=False)
    path = at(tmp_path, "a.parquet")
    columns = {"completion": ["a b"] * len(values)} | {f"my {role}": column}
    parquet.write_table(pa.table(columns), path)
    read(path, mapping={"completion": "completion", role: f"my {role}"})
