import json
import math
import os
import shutil
import subprocess
import sys

import pytest

import runfolder_parts
from runfolder_parts import CONFIG, entries, event, fill
from stableopd.runfolder import RunFolder
from stableopd.runfolder.files import json_line
from stableopd.types import RunFolderError

folder = runfolder_parts.folder  # a fixture


def test_create_and_open(tmp_path):
    created = RunFolder.create(tmp_path / "a" / "b", CONFIG, {"gpu": None, "x": math.nan})
    opened = RunFolder.open(tmp_path / "a" / "b")
    assert opened.path == created.path
    assert opened.config_text() == CONFIG
    assert opened.environment() == {"gpu": None, "x": None}
    assert (opened.metrics(), opened.rollout_steps(), opened.checkpoints()) == ([], [], [])
    assert entries(created.path) == ["config.toml", "environment.json"]


def test_create_refuses_a_folder_with_a_run(folder):
    with pytest.raises(RunFolderError, match=r"already holds a run; .* with --resume"):
        RunFolder.create(folder.path, "other", {})
    assert folder.config_text() == CONFIG
    (folder.path / "config.toml").unlink()
    folder.append_metrics({"step": 1})
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.create(folder.path, "other", {})


def test_claim_refuses_what_create_refuses_and_writes_nothing(folder, tmp_path):
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.claim(folder.path)
    before = entries(tmp_path)
    RunFolder.claim(tmp_path / "new" / "run")
    assert entries(tmp_path) == before


def test_create_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path, CONFIG, {})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_create_refuses_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file, not a folder; choose another"):
        RunFolder.create(tmp_path / "file", CONFIG, {})
    with pytest.raises(RunFolderError, match="file/run: cannot be written: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG, {})


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match="no such folder"):
        RunFolder.open(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match=r"has no config\.toml"):
        RunFolder.open(tmp_path)


def test_metrics_round_trip_and_write_null_for_what_json_lacks(folder):
    folder.append_metrics({"step": 0, "eval/accuracy": 0.1})
    folder.append_metrics({"step": 1, "a": math.nan, "b": -math.inf, "c": 0.1 + 0.2})
    assert folder.metrics() == [
        {"step": 0, "eval/accuracy": 0.1},
        {"step": 1, "a": None, "b": None, "c": 0.1 + 0.2},
    ]
    text = (folder.path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert text.count("\n") == 2


def test_torn_last_line_is_ignored_and_replaced_by_the_next(folder):
    folder.append_metrics({"step": 1})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "loss/to')
    assert folder.metrics() == [{"step": 1}]
    folder.append_metrics({"step": 2})
    assert folder.metrics() == [{"step": 1}, {"step": 2}]


def test_events_are_lines_of_their_own_and_as_safe(folder):
    assert folder.events() == []
    folder.append_metrics({"step": 1})
    folder.append_event(event(1, lambda_gold=math.nan))
    assert folder.events() == [event(1, lambda_gold=None)]
    with (folder.path / "events.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lev')
    assert len(folder.events()) == 1
    folder.append_event(event(3))
    assert [event["step"] for event in folder.events()] == [1, 3]
    assert folder.metrics() == [{"step": 1}]
    (folder.path / "events.jsonl").write_bytes(json_line(event(1)) + b'{"st\n')
    with pytest.raises(RunFolderError, match=r"events\.jsonl, line 2: not a JSON object"):
        folder.events()


def test_rewind_drops_later_events(folder):
    for step in (2, 5, 7):
        folder.append_metrics({"step": step})
        folder.append_event(event(step))
    with (folder.path / "events.jsonl").open("ab") as file:
        file.write(b'{"step"')
    folder.rewind(5)
    assert [event["step"] for event in folder.events()] == [2, 5]
    assert (folder.path / "events.jsonl").read_bytes().endswith(b"}\n")
    folder.rewind(-1)
    assert folder.events() == []


def test_a_file_of_one_torn_line(folder):
    (folder.path / "metrics.jsonl").write_bytes(b'{"st')
    assert folder.metrics() == []
    folder.append_metrics({"step": 1})
    assert folder.metrics() == [{"step": 1}]


def test_a_broken_line_in_the_middle_is_an_error(folder):
    (folder.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        folder.metrics()


def test_rollouts_round_trip_any_text(folder):
    rows = [
        {"completion": "line one\nline two\u2028three\x85four", "student_logprobs": [-0.5, -1e-9]},
        {"completion": "日本 é 🙂", "student_logprobs": [-math.inf]},
        {"completion": "lone \ud800 surrogate", "student_logprobs": []},
    ]
    folder.write_rollouts(10, iter(rows))
    found = folder.rollouts(10)
    assert [row["completion"] for row in found] == [row["completion"] for row in rows]
    assert found[0]["student_logprobs"] == [-0.5, -1e-9]
    assert found[1]["student_logprobs"] == [None]
    assert "日本" in (folder.path / "rollouts" / "000010.jsonl").read_text(encoding="utf-8")
    folder.write_rollouts(2, [])
    assert folder.rollouts(2) == []
    assert folder.rollout_steps() == [2, 10]
    with pytest.raises(RunFolderError, match=r"000003\.jsonl: cannot be read: No such file"):
        folder.rollouts(3)


def test_an_error_while_rows_are_made_keeps_the_old_file(folder):
    folder.write_rollouts(1, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise KeyError("row")

    with pytest.raises(KeyError):
        folder.write_rollouts(1, rows())
    assert folder.rollouts(1) == [{"a": 1}]
    assert entries(folder.path / "rollouts") == ["000001.jsonl"]


def test_write_failure_and_text(folder):
    path = folder.write_failure(12, [{"loss": math.nan}])
    assert path == folder.path / "failed" / "000012.jsonl"
    assert json.loads(path.read_text()) == {"loss": None}
    report = folder.write_text("report.html", "<p>é</p>")
    assert report.read_text(encoding="utf-8") == "<p>é</p>"


def test_checkpoint_appears_when_the_block_ends(folder):
    with folder.new_checkpoint(50) as path:
        (path / "model.safetensors").write_text("weights")
        assert folder.checkpoints() == []
    fill(folder, 100)
    assert folder.checkpoints() == [50, 100]
    assert folder.checkpoint_path(50) == folder.path / "checkpoints" / "000050"
    assert (folder.checkpoint_path(100) / "trainer" / "rng.json").read_text() == "{}"
    assert sorted(os.listdir(folder.path / "checkpoints")) == ["000050", "000100"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, FileNotFoundError])
def test_an_exception_leaves_no_checkpoint(folder, error):
    def half_a_checkpoint():
        with folder.new_checkpoint(50) as path:
            (path / "model.safetensors").write_text("half")
            raise error

    with pytest.raises(error):
        half_a_checkpoint()
    assert folder.checkpoints() == []
    assert entries(folder.path / "checkpoints") == []


def test_a_checkpoint_of_the_same_step_is_replaced(folder):
    fill(folder, 50, "old")
    fill(folder, 50, "new")
    assert (folder.checkpoint_path(50) / "model.safetensors").read_text() == "new"
    assert os.listdir(folder.path / "checkpoints") == ["000050"]


def test_a_kill_between_the_two_renames_of_a_replacement(folder, monkeypatch):
    fill(folder, 50, "old")
    rename, calls = os.rename, []

    def stop_at_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        fill(folder, 50, "new")
    monkeypatch.undo()
    assert not (folder.path / "checkpoints" / "000050").exists()
    assert folder.checkpoints() == [50]
    assert (folder.checkpoint_path(50) / "model.safetensors").read_text() == "old"
    folder.rewind(50)
    assert os.listdir(folder.path / "checkpoints") == ["000050"]
    assert (folder.checkpoint_path(50) / "model.safetensors").read_text() == "old"


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [1, 2, 3]), (1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (9, [1, 2, 3])]
)
def test_prune_removes_the_oldest(folder, keep, left):
    for step in (3, 1, 2):
        fill(folder, step)
    folder.prune_checkpoints(keep)
    assert folder.checkpoints() == left
    assert len(os.listdir(folder.path / "checkpoints")) == len(left)


@pytest.mark.parametrize(
    ("keep", "spared", "left"),
    [(1, {2}, [2, 5]), (2, {1, 9}, [1, 4, 5]), (2, {4, 5}, [4, 5]), (0, {1}, [1, 2, 3, 4, 5])],
)
def test_prune_spares_some(folder, keep, spared, left):
    for step in range(1, 6):
        fill(folder, step)
    folder.prune_checkpoints(keep, spared)
    assert folder.checkpoints() == left


def test_checkpoints_ignores_other_names(folder):
    fill(folder, 1_234_567)
    for name in ("latest", "00005", ".000060.tmp", "000070.bak"):
        (folder.path / "checkpoints" / name).mkdir()
    assert folder.checkpoints() == [1_234_567]


def test_rewind_forgets_what_came_later(folder):
    for step in range(5):
        folder.append_metrics({"step": step, "x": 1 / 3})
        folder.write_rollouts(step, [{"step": step}])
    for step in (2, 4):
        fill(folder, step)
    folder.write_failure(4, [{"step": 4}])
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5')
    for left in ("checkpoints/.000006.tmp", "rollouts/.000005.jsonl.tmp", ".metrics.jsonl.tmp"):
        (folder.path / left).mkdir() if "checkpoints" in left else (folder.path / left).touch()
    before = (folder.path / "metrics.jsonl").read_bytes().split(b"\n")
    folder.rewind(2)
    assert (folder.path / "metrics.jsonl").read_bytes() == b"\n".join(before[:3]) + b"\n"
    assert folder.rollout_steps() == [0, 1, 2]
    assert folder.checkpoints() == [2]
    assert entries(folder.path) == [
        "checkpoints",
        "checkpoints/000002",
        "checkpoints/000002/model.safetensors",
        "checkpoints/000002/trainer",
        "checkpoints/000002/trainer/manifest.json",
        "checkpoints/000002/trainer/rng.json",
        "config.toml",
        "environment.json",
        "failed",
        "failed/000004.jsonl",
        "metrics.jsonl",
        "rollouts",
        "rollouts/000000.jsonl",
        "rollouts/000001.jsonl",
        "rollouts/000002.jsonl",
    ]
    folder.rewind(2)
    assert [line["step"] for line in folder.metrics()] == [0, 1, 2]


def test_rewind_of_a_folder_without_metrics(folder):
    folder.rewind(0)
    assert folder.metrics() == []
    assert entries(folder.path) == ["config.toml", "environment.json"]


def test_the_module_loads_no_torch():
    code = "import sys, stableopd.runfolder; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_folder_that_was_moved_still_opens(folder, tmp_path):
    folder.append_metrics({"step": 1})
    shutil.move(folder.path, tmp_path / "elsewhere")
    assert RunFolder.open(tmp_path / "elsewhere").metrics() == [{"step": 1}]
