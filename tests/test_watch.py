"""Following folders that are not there yet, half-written files, and files that are no dump."""

import json
import shutil

import pytest

import run_parts
import tiny
from stableopd.diagnose.runs import Reading
from stableopd.diagnose.watch import PATIENCE, watch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    run = run_parts.make_run(tmp_path_factory.mktemp("runs") / "opd", jump=22)
    return sorted((run.path / "rollouts").iterdir())


def follow(path, acts):
    """Watch while one act after the other is done between looks: steps seen, sentences said."""
    said: list[str] = []

    def wait() -> bool:
        act = next(acts, None)
        if act:
            act()
        return act is not None

    seen = [entry.line for entry in watch(path, Reading(), wait, said.append)]
    return seen, said


def test_a_folder_that_is_not_there_yet_is_waited_for(files, tmp_path):
    folder = tmp_path / "later"
    acts = [folder.mkdir, lambda: shutil.copy(files[0], folder), lambda: None, lambda: None]
    seen, said = follow(folder, iter(acts))
    assert [line["step"] for line in seen] == [1]
    assert said[0] == f"Waiting for {folder}."


def test_half_a_file_is_not_a_step(files, tmp_path):
    whole, part = files[0].read_bytes(), tmp_path / "000001.jsonl"
    acts = [lambda: part.write_bytes(whole[: len(whole) // 2])]
    acts += [lambda: None] * (PATIENCE - 1)
    acts += [lambda: part.write_bytes(whole), lambda: None, lambda: None]
    seen, _ = follow(tmp_path, iter(acts))
    assert len(seen) == 1
    rows = [json.loads(line) for line in whole.splitlines()]
    lengths = [len(row["completion_ids"]) for row in rows]
    assert seen[0]["rollout/mean_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_a_file_that_cannot_be_read_does_not_end_the_watch(files, tmp_path):
    (tmp_path / "000000.parquet").write_bytes(b"\x00\x01 no parquet")
    shutil.copy(files[3], tmp_path)
    seen, said = follow(tmp_path, iter([lambda: None, lambda: None]))
    assert [line["step"] for line in seen] == [4]
    assert len(said) == 1
    assert said[0].startswith("passed over: ")
    assert "000000.parquet" in said[0]


def test_text_alone_is_told_to_be_too_little(files, tmp_path):
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    kept = [{"step": 1, "completion": row["completion"]} for row in rows]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    seen, said = follow(tmp_path, iter([lambda: None, lambda: None]))
    assert "rollout/truncation_rate" not in seen[0]
    assert "--max-new-tokens" in said[0]


def test_a_tokenizer_that_does_not_know_the_text_is_refused(tmp_path):
    embedded = run_parts.Path(__file__).parent.parent / "src" / "stableopd" / "embedded" / "student"
    rows = [{"step": i, "completion": "The quick brown fox jumps."} for i in range(1, 30)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = tiny.run_cli("diagnose", tmp_path / "x.jsonl", "--tokenizer", embedded)
    assert (code, out) == (2, "")
    assert "does not know the text" in err


def test_a_fault_of_the_program_is_not_the_answer_one(monkeypatch, tmp_path):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("stableopd.diagnose.command.diagnose_command", broken)
    code, _, err = tiny.run_cli("diagnose", tmp_path)
    assert code == 70
    assert "ZeroDivisionError" in err


def test_two_runs_given_twice(files, tmp_path):
    run = files[0].parent.parent
    code, _, err = tiny.run_cli("compare", run, run, "--output", tmp_path / "c.html")
    assert code == 2
    assert "given twice" in err
