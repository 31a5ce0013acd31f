"""Dumps of every framework: recognised, read, and refused in one sentence where they cannot be."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from stableopd import embedded
from stableopd.integrations.dumps import Dump, open_dump
from stableopd.types import DataError, Record, StopReason

DUMPS = Path(__file__).parent / "dumps"
ASKED = {"role": "user", "content": "p"}
OWN = {
    "step": 3,
    "prompt_id": "a",
    "prompt": [{"role": "user", "content": "1+1="}],
    "completion": "2",
    "prompt_ids": [5, 6],
    "completion_ids": [7, 1],
    "stop_reason": "stop",
    "student_logprobs": [-0.5, None],
    "teacher_logprobs": [-1.0, -2.0],
    "correct": True,
}


def records(dump: Dump) -> list[Record]:
    return [record for batch in dump.batches() for record in batch]


def read(*paths: Path, **options: Any) -> list[Record]:
    return records(open_dump(paths, **options))


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def lines(folder: str) -> list[dict[str, Any]]:
    """The objects of a committed dump, in the order of its steps."""
    files = sorted((DUMPS / folder).rglob("*.jsonl"), key=lambda f: (len(str(f)), str(f)))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def character_ids() -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(embedded.path("student") / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def cut_off_share(found: Sequence[Record], budget: int) -> dict[int | None, float]:
    """The share of each step's rollouts that are as long as the budget."""
    totals = Counter(record.step for record in found)
    cut_off = Counter(r.step for r in found if r.num_tokens is not None and r.num_tokens >= budget)
    return {step: cut_off[step] / totals[step] for step in totals}


def test_trl_distillation_that_collapsed() -> None:
    """TRL's own files: text alone, whose lengths a tokenizer gives."""
    dump = open_dump([DUMPS / "trl-collapse"], tokenizer=character_ids())
    found = records(dump)
    assert dump.format_name == "TRL (parquet)"
    assert dump.lengths_are_retokenised
    assert (dump.num_files, len(found), dump.num_damaged, dump.num_dropped) == (30, 480, 0, 0)
    share = cut_off_share(found, 96)
    assert list(share) == list(range(4, 121, 4))
    assert max(share[step] for step in range(4, 33, 4)) == 0
    assert np.mean([share[step] for step in range(60, 121, 4)]) > 0.85
    assert all(r.stop_reason is None and r.num_tokens == len(r.completion) for r in found)
    assert found[0].completion_ids is not None
    assert found[0].prompt[-1] == ":"


def test_trl_distillation_that_stayed_healthy() -> None:
    found = read(DUMPS / "trl-healthy" / "completions", tokenizer=character_ids())
    assert set(cut_off_share(found, 96).values()) == {0}
    assert [r.step for r in found[::16]] == list(range(4, 41, 4))


def test_trl_grpo_has_a_reward_and_an_advantage() -> None:
    dump = open_dump([DUMPS / "trl-grpo"])
    found = records(dump)
    table = parquet.read_table(DUMPS / "trl-grpo/completions/completions_00004.parquet")
    assert dump.columns["score"] == "correct"
    assert [r.score for r in found[:16]] == table["correct"].to_pylist()
    assert found[0].advantages is None  # without a length, no number for each token
    spread = read(DUMPS / "trl-grpo", tokenizer=len_ids)[0].advantages
    np.testing.assert_array_equal(spread, [table["advantage"][0].as_py()] * len(spread))
    assert not dump.lengths_are_retokenised


def len_ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_two_reward_columns_of_trl_are_no_score(tmp_path: Path) -> None:
    columns = {"step": [1], "prompt": ["p"], "completion": ["c"], "a": [1.0], "b": [0.5]}
    parquet.write_table(pa.table(columns), tmp_path / "completions_00001.parquet")
    assert read(tmp_path)[0].score is None
    assert read(tmp_path, mapping={"score": "b"})[0].score == 0.5


def test_columns_that_users_add(tmp_path: Path) -> None:
    row = {"input": "p", "output": "c", "score": 1.0, "finish_reason": "length", "num_tokens": 4}
    (found,) = read(write(tmp_path / "1.jsonl", [row | {"student_logps": [-1, -2, -3, -4]}]))
    assert (found.stop_reason, found.num_tokens) == (StopReason.LENGTH, 4)
    np.testing.assert_array_equal(found.student_logps, [-1, -2, -3, -4])


def test_trl_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "1+1="}]
    answer = [{"role": "assistant", "content": "2"}]
    table = pa.table({"step": [1], "prompt": [chat], "completion": [answer]})
    parquet.write_table(table, tmp_path / "completions_00001.parquet")
    (found,) = read(tmp_path)
    assert (found.prompt, found.completion) == ("1+1=", "2")


def test_verl() -> None:
    dump = open_dump([DUMPS / "verl"])
    found = records(dump)
    assert dump.format_name == "verl (JSONL)"
    assert [Path(f).name for f in dump.files[:3]] == ["4.jsonl", "8.jsonl", "12.jsonl"]
    rows = lines("verl")
    assert Counter(r.step for r in found) == Counter(row["step"] for row in rows)
    by_step = sorted(rows, key=lambda row: row["step"])
    for record, row in zip(found, by_step, strict=True):
        assert (record.completion, record.prompt) == (row["output"], row["input"])
        assert (record.score, record.correct) == (row["score"], row["acc"])
        assert record.stop_reason is None


def test_one_set_of_rollouts_in_every_layout() -> None:
    """The same twelve rollouts come out of every framework's files, with what each one keeps."""
    names = ("slime", "nemo-rl", "nemo-rl-distillation", "prime-rl", "prime-rl-traces", "ms-swift")
    found = {name: read(DUMPS / name) for name in names}
    rows = lines("slime")
    steps = [1] * 4 + [50] * 4 + [100] * 4
    for name, read_back in found.items():
        assert [r.completion for r in read_back] == [row["response"] for row in rows], name
        assert [r.prompt for r in read_back] == [row["prompt"] for row in rows], name
        assert [r.step for r in read_back] == steps, name
    for i, row in enumerate(rows):
        own = row["tokens"][-row["response_length"] :]
        reason = StopReason.LENGTH if row["status"] == "truncated" else StopReason.STOP
        slime, nemo, trace = (found[n][i] for n in ("slime", "nemo-rl", "prime-rl-traces"))
        for record in (slime, nemo, trace):
            assert record.completion_ids is not None
            assert record.completion_ids.tolist() == own
            np.testing.assert_array_equal(record.student_logps, row["rollout_log_probs"])
        for record in (slime, trace):
            np.testing.assert_array_equal(record.teacher_logps, row["teacher_log_probs"])
        for record in (slime, trace, found["prime-rl"][i]):
            assert record.stop_reason is reason
            assert record.num_tokens == len(own)
        assert {r.score for r in (slime, nemo, trace, found["prime-rl"][i])} == {row["reward"]}
        ratio = np.subtract(row["teacher_log_probs"], row["rollout_log_probs"])
        np.testing.assert_allclose(nemo.advantages, ratio, atol=1e-5)
        assert nemo.stop_reason is None
        assert found["nemo-rl-distillation"][i].num_tokens is None


def test_names_of_the_formats() -> None:
    named = {p.name: open_dump([p]).format_name for p in sorted(DUMPS.iterdir()) if p.is_dir()}
    assert named == {
        "causes": "stableopd (JSONL)",
        "ms-swift": "ms-swift (JSONL)",
        "nemo-rl": "NeMo-RL (JSONL)",
        "nemo-rl-distillation": "NeMo-RL (JSONL)",
        "prime-rl": "prime-rl (JSONL)",
        "prime-rl-traces": "prime-rl (JSONL)",
        "slime": "slime (JSONL)",
        "trl-collapse": "TRL (parquet)",
        "trl-grpo": "TRL (parquet)",
        "trl-healthy": "TRL (parquet)",
        "verl": "verl (JSONL)",
    }


def own_run(folder: Path) -> Path:
    write(folder / "config.toml", [""])
    write(folder / "metrics.jsonl", [{"step": 3}])
    write(folder / "rollouts/000003.jsonl", [OWN])
    return folder


def test_own_run_folder(tmp_path: Path) -> None:
    run = own_run(tmp_path / "run")
    for path in (run, run / "rollouts", run / "rollouts/000003.jsonl", tmp_path):
        dump = open_dump([path])
        (found,) = records(dump)
        assert dump.format_name == "stableopd (JSONL)"
        assert (found.source, found.line) == (str(run / "rollouts/000003.jsonl"), 1)
        assert (found.step, found.prompt_id, found.prompt) == (3, "a", "1+1=")
        assert (found.stop_reason, found.correct, found.num_tokens) == ("stop", True, 2)
        np.testing.assert_array_equal(found.student_logps, [-0.5, np.nan])
        np.testing.assert_array_equal(found.teacher_logps, [-1.0, -2.0])
    own_run(tmp_path / "other")
    with pytest.raises(DataError, match="holds 2 run folders"):
        open_dump([tmp_path])


def test_a_folder_is_searched_sensibly(tmp_path: Path) -> None:
    """Checkpoints, logs and evaluations beside the dumps are left out, and said to be."""
    for step in (2, 10):
        write(tmp_path / f"{step}.jsonl", [{"input": "p", "output": f"{step}", "score": 1}])
    write(tmp_path / "metrics.jsonl", [{"loss": 1}])
    write(tmp_path / "eval_2.jsonl", [{"input": "p", "output": "e", "score": 1}])
    write(tmp_path / "checkpoint-2/data.jsonl", [{"text": "t"}])
    write(tmp_path / ".cache/x.jsonl", [{"text": "t"}])
    dump = open_dump([tmp_path])
    assert [(r.completion, r.step) for r in records(dump)] == [("2", 2), ("10", 10)]
    assert {f.name for f in dump.left_out} == {"metrics.jsonl", "eval_2.jsonl"}
    assert [r.completion for r in read(tmp_path / "eval_2.jsonl")] == ["e"]
    twice = open_dump([tmp_path / "10.jsonl", tmp_path])
    assert [r.completion for r in records(twice)] == ["10", "2"]


def test_mapping_reaches_into_objects(tmp_path: Path) -> None:
    row = {"q": "p", "it": "7", "a": {"t": "text", "n": 2.0, "why": {"type": "length"}}}
    row |= {"lp": [[-1, None]], "ok": "yes", "v": "0.5"}
    mapping = {"completion": "a.t", "prompt": "q", "step": "it", "stop_reason": "a.why"}
    mapping |= {"length": "a.n", "student_logprobs": "lp.0", "correct": "ok", "score": "v"}
    dump = open_dump([write(tmp_path / "x.jsonl", [row])], mapping=mapping)
    (found,) = records(dump)
    assert dump.format_name == "JSONL (completion from 'a.t')"
    assert (found.completion, found.prompt, found.step, found.num_tokens) == ("text", "p", 7, 2)
    assert (found.stop_reason, found.correct, found.score) == (StopReason.LENGTH, True, 0.5)
    np.testing.assert_array_equal(found.student_logps, [-1.0, np.nan])


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "p", "response": "c"}, "response"),
        ({"input": "p", "output": "c"}, "output"),
        ({"question": "p", "text": "c", "is_truncated": True}, "text"),
        ({"messages": [ASKED, {"role": "assistant", "content": "c"}]}, "messages"),
    ],
)
def test_a_completion_is_recognised(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    write(tmp_path / "x.jsonl", [row])
    for kind in ("JSONL", "parquet"):
        dump = open_dump([tmp_path / f"x.{kind.lower()}"])
        (found,) = records(dump)
        assert dump.format_name == f"{kind} (completion from {column!r})"
        assert (found.completion, found.prompt) == ("c", "p")
        assert found.stop_reason == (StopReason.LENGTH if "is_truncated" in row else None)


def test_reading_loads_neither_torch_nor_pyarrow() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom stableopd.integrations.dumps import open_dump\n"
        f"dump = open_dump([Path({str(DUMPS / 'slime')!r})])\n"
        "assert sum(map(len, dump.batches())) == 12\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["verl", "trl-collapse", "gz"])
def test_bytes_add_up_and_batches_are_bounded(tmp_path: Path, folder: str) -> None:
    path = DUMPS / folder
    if folder == "gz":
        path = tmp_path / "step_5.jsonl.gz"
        path.write_bytes(gzip.compress((DUMPS / "verl/4.jsonl").read_bytes()))
    told: list[int] = []
    dump = open_dump([path], batch_size=7)
    sizes = [len(batch) for batch in dump.batches(told.append)]
    assert sum(told) == dump.num_bytes
    assert all(count >= 0 for count in told)
    assert set(sizes[:-1]) == {7}
    assert 0 < sizes[-1] <= 7
    again = [len(batch) for batch in dump.batches()]
    assert again == sizes


def test_memory_stays_flat(tmp_path: Path) -> None:
    row = json.dumps({"input": "p", "output": "x" * 2000, "score": 1, "step": 1}) + "\n"
    path = tmp_path / "1.jsonl"
    path.write_text(row * 5000)  # 10 MB
    dump = open_dump([path])
    tracemalloc.start()
    num = sum(map(len, dump.batches()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num == 5000
    assert peak < 3_000_000


TEXT_LINES = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.text(max_size=20).map(str.encode),
        st.dictionaries(
            st.sampled_from(["completion", "prompt", "step", "score", "stop_reason", "x"]),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=5,
            ),
        ).map(lambda row: json.dumps(row).encode()),
    ),
    max_size=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TEXT_LINES)
def test_every_line_is_a_record_or_damaged(tmp_path: Path, content: list[bytes]) -> None:
    """Whatever stands in a file, each line that is not blank is read or counted, and nothing raises
    but DataError. A line with a list of texts is several rollouts."""
    path = tmp_path / "1.jsonl"
    path.write_bytes(b"\n".join([b'{"completion": "c", "prompt": 1}', *content]))
    dump = open_dump([path], mapping={"completion": "completion"})
    try:
        num = len({record.line for record in records(dump)})
    except DataError:
        num = 0
    counted = [line for line in path.read_bytes().split(b"\n") if _is_counted(line)]
    assert num + dump.num_damaged == len(counted)


def _is_counted(line: bytes) -> bool:
    try:
        return bool(line.decode().strip())
    except UnicodeDecodeError:
        return True
