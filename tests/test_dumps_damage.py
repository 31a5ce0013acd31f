"""Damage in dumps: named, counted and skipped, or refused in one sentence; and odd values."""

from __future__ import annotations

import gzip
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from stableopd.integrations import dump_values as values
from stableopd.integrations.dump_files import step_in_name
from stableopd.integrations.dump_formats import unfold
from stableopd.integrations.dumps import open_dump
from stableopd.types import DataError, StopReason

GOOD = b'{"input": "p", "output": "c", "score": 1}'

DAMAGED = [
    (b'{"input": "p", "output": ', "not valid JSON (Expecting value, at character 25)"),
    (b"[1, 2]", "JSON, but not an object (list)"),
    (b"{}", "an empty object"),
    (b'{"input": "p", "score": 1}', "no completion"),
    (b'{"input": "p", "output": null}', "no completion"),
    (b'{"input": "p", "output": 5}', "the completion is a number, neither text nor messages"),
    (b'{"output": [1]}', "the completion is a list of a number, not of messages"),
    (b'{"output": [{"role": "user", "content": "x"}]}', "has no message of the assistant"),
    (b'{"input": "\xff", "output": "c"}', "not valid UTF-8 at byte 12 of the line"),
    (b'{"output": "c", "score": ' + b"9" * 5000 + b"}", "JSON that is too large"),
    (b"[" * 200_000, "JSON that is too large"),
]


@pytest.mark.parametrize(("line", "reason"), DAMAGED, ids=[reason[:30] for _, reason in DAMAGED])
def test_a_damaged_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "4.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)  # the last without a line's end
    dump = open_dump([path])
    assert [r.line for batch in dump.batches() for r in batch] == [1, 3]
    assert dump.num_damaged == 1
    assert dump.damaged[0].startswith(f"{path}, line 2: ")
    assert reason in dump.damaged[0]
    with pytest.raises(DataError) as caught:
        list(open_dump([path], strict=True).batches())
    assert str(caught.value) == f"{dump.damaged[0]}."


def test_a_line_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "4.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-3])
    dump = open_dump([path])
    assert sum(map(len, dump.batches())) == 1
    assert dump.damaged[0].endswith("; the line is cut off")


def test_many_damaged_lines_are_counted_and_twenty_named(tmp_path: Path) -> None:
    path = tmp_path / "4.jsonl"
    path.write_bytes(GOOD + b"\n" + b"x\n" * 50)
    dump = open_dump([path])
    assert sum(map(len, dump.batches())) == 1
    assert (dump.num_damaged, len(dump.damaged)) == (50, 20)


def test_byte_order_mark_blank_lines_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "4.jsonl"
    odd = '{"input": "p", "output": "a\\u2028b\u2028c", "score": 1}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + odd + b"\n")
    dump = open_dump([path], strict=True)
    assert [(r.line, r.completion) for b in dump.batches() for r in b] == [
        (1, "c"),
        (4, "a\u2028b\u2028c"),
    ]


def test_a_very_long_line(tmp_path: Path) -> None:
    path = tmp_path / "4.jsonl"
    path.write_text(json.dumps({"input": "p", "output": "x" * 5_000_000, "score": 1}))
    assert len(next(open_dump([path]).batches())[0].completion) == 5_000_000


def test_a_gzip_file_that_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "4.jsonl.gz"
    rows = b"".join(GOOD.replace(b"c", str(i).encode()) + b"\n" for i in range(20_000))
    path.write_bytes(gzip.compress(rows)[:-2000])
    dump = open_dump([path])
    assert sum(map(len, dump.batches())) > 1000
    assert "gzip file breaks off" in dump.damaged[-1]


def test_a_broken_parquet_file_beside_a_whole_one(tmp_path: Path) -> None:
    table = pa.table({"step": [1], "prompt": ["p"], "completion": ["c"], "image": [b"\x00\xff"]})
    parquet.write_table(table, tmp_path / "completions_00001.parquet")
    whole = (tmp_path / "completions_00001.parquet").read_bytes()
    (tmp_path / "completions_00002.parquet").write_bytes(whole[:-30])
    dump = open_dump([tmp_path])
    assert sum(map(len, dump.batches())) == 1
    assert dump.num_damaged == 1
    assert "completions_00002.parquet, row 1: not readable as parquet" in dump.damaged[0]


@pytest.mark.parametrize(
    ("change", "role"),
    [
        ({"student_logprobs": [-1.0]}, "student_logprobs: 1 number for 2 tokens"),
        ({"teacher_logprobs": [-1.0, "x"]}, "teacher_logprobs: not a list of numbers"),
        ({"teacher_logprobs": [[1], [2]]}, "teacher_logprobs: not a list of numbers"),
        ({"completion_ids": [1.5, 2]}, "completion_ids: not a list of token ids"),
        ({"completion_ids": "12"}, "completion_ids: not a list of token ids"),
        ({"stop_reason": "because"}, "stop_reason: 'because' is no known reason"),
        *(({"step": odd}, "step: ") for odd in (1.5, -3, True, "x", 10**26, 2**53 + 2)),
        *(({"step": odd}, "step: ") for odd in (math.nan, math.inf, [], 1e300)),
        ({"step": 1.5}, "step: 1.5 is not a whole number from 0 to 2**53"),
        ({"length": -4, "completion_ids": None}, "length: -4 is not a whole number"),
        ({"length": 1e300, "completion_ids": None}, "length: 1e+300 is not a whole number"),
        ({"student_logprobs": [10**400, 1]}, "student_logprobs: not a list of numbers"),
        ({"completion_ids": [2**63, 1]}, "completion_ids: not a list of token ids"),
        ({"completion_ids": [math.inf, 1]}, "completion_ids: not a list of token ids"),
        ({"score": math.inf}, "score: inf is not a finite number"),
        ({"correct": "maybe"}, "correct: 'maybe' is neither yes nor no"),
        ({"length": 5}, "length: 5 for 2 token ids"),
    ],
)
def test_a_value_that_cannot_be_used_is_dropped(
    tmp_path: Path, change: dict[str, Any], role: str
) -> None:
    row: dict[str, Any] = {"completion": "c", "completion_ids": [1, 2], "length": 2}
    row |= {"student_logprobs": [-1, -2], "teacher_logprobs": [-1, -2], "step": 1}
    row |= {"correct": True, "stop_reason": "stop", "score": 1.0}
    mapping = {name: name for name in row}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | change))
    dump = open_dump([path], mapping=mapping)
    (good, odd), *_ = dump.batches()
    assert dump.num_damaged == 0
    # Without ids the length is the column's, so that the log-probs still fit.
    assert dump.num_dropped == 1
    assert f"{path}, line 2: {role}" in dump.dropped[0]
    field = {"student_logprobs": "student_logps", "teacher_logprobs": "teacher_logps"}
    name = next(iter(change))
    if name != "length":
        assert getattr(odd, field.get(name, name)) is None
        assert getattr(good, field.get(name, name)) is not None
    with pytest.raises(DataError, match="line 2"):
        list(open_dump([path], mapping=mapping, strict=True).batches())


def test_log_probs_give_the_length_where_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"completion": "c", "teacher_logprobs": [-1, null, null], "advantage": 2}')
    (found,) = next(open_dump([path]).batches())
    assert found.num_tokens == 3
    np.testing.assert_array_equal(found.teacher_logps, [-1, np.nan, np.nan])
    np.testing.assert_array_equal(found.advantages, [2, 2, 2])
    # Text that splits in another number of tokens than were drawn is not theirs.
    dump = open_dump([path], tokenizer=lambda text: [ord(text)])
    (found,) = next(dump.batches())
    assert found.completion_ids is None
    assert not dump.lengths_are_retokenised


def test_refusals(tmp_path: Path) -> None:
    verl, other = tmp_path / "a/1.jsonl", tmp_path / "b/x.jsonl"
    for path, text in ((verl, GOOD.decode()), (other, '{"text": "t", "n": 1}')):
        path.parent.mkdir()
        path.write_text(text)
    (tmp_path / "empty").mkdir()
    files = {
        "empty.jsonl": b"",
        "blank.jsonl": b"\n\n",
        "array.json": b'[{"text": "t"},\n {"text": "u"}]',
        "torn.jsonl": b'{"a": \nx\n',
        "numbers.jsonl": b'{"loss": 1}\n',
        "none.jsonl": b'{"text": null}\n{"text": 3}\n',
        "rollout_1.pt": pickle.dumps({"samples": []}),
        "00000.jsonl.zst": b"(\xb5/\xfd",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/1.pt").write_bytes(b"x")
    refused: list[tuple[list[Path], dict[str, Any], str]] = [
        ([tmp_path / "no"], {}, "no: no such file or folder."),
        ([tmp_path / "empty"], {}, "empty: no rollouts in it; give a folder of .jsonl"),
        ([tmp_path / "empty.jsonl"], {}, "empty.jsonl: the file is empty"),
        ([verl, tmp_path / "empty.jsonl"], {"strict": True}, "empty.jsonl: the file is empty"),
        ([tmp_path / "blank.jsonl"], {}, "no readable line; line 1: only blank lines"),
        ([tmp_path / "array.json"], {}, "array.json: a JSON array; write one object a line: jq"),
        ([tmp_path / "torn.jsonl"], {}, "torn.jsonl: no readable line; line 1: not valid JSON"),
        ([tmp_path / "numbers.jsonl"], {}, "its columns are 'loss'; say which it is"),
        ([tmp_path / "rollout_1.pt"], {}, "is never opened here; where you trust it, make lines"),
        ([tmp_path / "pickles"], {}, "1.pt: a pickle"),
        ([tmp_path / "00000.jsonl.zst"], {}, "compressed with zstd; unpack it with: zstd -d"),
        ([verl, other], {}, f"{verl} is verl, {other} is generic; give one kind"),
        ([verl], {"format": "trl"}, "no column 'completion' for the completion"),
        ([verl], {"format": "vrel"}, "format 'vrel' is not known; choose from auto, stableopd"),
        ([verl], {"mapping": {"text": "output"}}, "'text' is no role of a column; choose from"),
        ([verl], {"mapping": {"score": "scores"}}, "no column 'scores' for the score; its columns"),
        ([], {}, "No file was named"),
    ]
    for paths, options, message in refused:
        with pytest.raises(DataError) as caught:
            open_dump(paths, **options)
        assert message in str(caught.value), paths
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no completion in 1 file could be read .*2 damaged lines"):
        list(open_dump([tmp_path / "none.jsonl"]).batches())


def test_an_empty_file_among_others_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_bytes(GOOD)
    (tmp_path / "2.jsonl").touch()
    dump = open_dump([tmp_path])
    assert sum(map(len, dump.batches())) == 1
    assert [f.name for f in dump.left_out] == ["2.jsonl"]


@pytest.mark.parametrize(
    ("value", "column", "expected"),
    [
        ("length", "", StopReason.LENGTH),
        ("FinishReason.LENGTH", "", StopReason.LENGTH),
        ("Status.TRUNCATED", "", StopReason.LENGTH),
        ("max_tokens", "", StopReason.LENGTH),
        ({"type": "length", "length": 96}, "", StopReason.LENGTH),
        ("completed", "status", StopReason.STOP),
        ({"type": "stop", "matched": 2}, "", StopReason.STOP),
        ("tool_calls", "", StopReason.STOP),
        ("aborted", "", None),
        (None, "", None),
        (True, "is_truncated", StopReason.LENGTH),
        (0, "meta.truncated", StopReason.STOP),
        ("True", "is_finished", StopReason.STOP),
        (False, "terminated", StopReason.LENGTH),
    ],
)
def test_stop_reasons(value: Any, column: str, expected: StopReason | None) -> None:
    assert values.stop_reason(value, column) is expected


def test_yes_in_a_column_of_no_meaning() -> None:
    with pytest.raises(ValueError, match="does not say what True means"):
        values.stop_reason(True, "reason")


def test_texts_of_chats() -> None:
    turns = [
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "image"}]},
    ]
    assert values.completion_text(turns) == "hm\na\nb"
    assert values.completion_text(turns[2]) == "b"
    chat = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]
    assert values.prompt_text(chat) == "system: s\nhuman: q"
    asked, said = values.split_chat([*chat, {"from": "gpt", "value": "a"}])
    assert (len(asked), values.completion_text(said)) == (2, "a")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("12.jsonl", 12),
        ("000012.jsonl", 12),
        ("completions_00012.parquet", 12),
        ("train_data_step12.jsonl", 12),
        ("rollout_12.jsonl.gz", 12),
        ("step_12/train_rollouts.jsonl", 12),
        ("global_step_12/0.jsonl", 12),
        ("qwen2.5-7b.jsonl", None),
        ("run3.jsonl", None),
    ],
)
def test_steps_in_names(name: str, step: int | None) -> None:
    assert step_in_name(Path(name)) == step


def test_nemo_rl_messages() -> None:
    """The system's message goes to the prompt, the environment's to nobody."""
    system, user = "<|im_start|>system\nBe brief.", "<|im_start|>user\nq"
    both = f"{system}<|im_end|>\n{user}"
    cases = [
        ([[user, "a", "Environment: correct"]], user, "a"),
        ([[system, user, "a"]], system + user, "a"),
        ([[both, "a", "env", "b", "env"]], both, "a\nb"),
        ([user, "a"], user, "a"),
        (["alone"], None, "alone"),
    ]
    for content, prompt, completion in cases:
        (roles,) = unfold("nemo-rl", {"content": content, "input_lengths": [9]}, {})
        assert roles["completion"] == completion
        assert roles.get("prompt") == prompt
    with pytest.raises(ValueError, match="neither text nor a list of messages"):
        list(unfold("nemo-rl", {"content": [[]]}, {}))
