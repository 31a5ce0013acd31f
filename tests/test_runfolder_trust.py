"""Run folders that another process, another run or another hand has been in."""

import contextlib
import json
import os
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import run_parts
import runfolder_parts
from runfolder_parts import CONFIG, event, fill, held_by_another
from stableopd.diagnose.command import read_runs
from stableopd.runfolder import RunFolder
from stableopd.runfolder.manifest import require_intact
from stableopd.types import RunFolderError, StableOPDError

folder = runfolder_parts.folder  # a fixture


def test_one_process_at_a_time_and_a_kill_frees_the_folder(folder):
    with held_by_another(folder.path) as other:
        with pytest.raises(RunFolderError, match=f"process {other.pid} is writing there"):
            folder.lock()
        other.send_signal(signal.SIGKILL)
    assert (folder.path / ".lock").exists()
    assert folder.lock() == ""
    assert folder.lock() == ""  # this process has it already
    folder.unlock()
    assert not (folder.path / ".lock").exists()
    folder.unlock()


def test_a_file_system_without_locks_is_told(folder, monkeypatch):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    assert "No locks available" in folder.lock()


def test_a_holder_that_leaves_between_open_and_lock(folder, monkeypatch):
    """Its file is gone: a lock on that one would keep nobody out."""
    import fcntl

    lockf, calls = fcntl.lockf, []

    def late(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            (folder.path / ".lock").unlink()
        lockf(descriptor, how)

    monkeypatch.setattr("fcntl.lockf", late)
    assert folder.lock() == ""
    assert len(calls) == 2
    assert (folder.path / ".lock").exists()
    folder.unlock()


NAMES = ("environment.json", "events.jsonl", "rollouts", "failed", "checkpoints", "report.html")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_would_replace_is_never_taken(tmp_path, name):
    (tmp_path / name).write_text("the only copy")
    for make in (RunFolder.claim, lambda path: RunFolder.create(path, CONFIG, {})):
        with pytest.raises(RunFolderError, match=name):
            make(tmp_path)
    assert (tmp_path / name).read_text() == "the only copy"
    assert os.listdir(tmp_path) == [name]


def test_a_kill_while_the_folder_is_made_leaves_one_that_resumes(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write_environment", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.create(tmp_path / "run", CONFIG, {})
    assert RunFolder.open(tmp_path / "run").config_text() == CONFIG


def test_a_checkpoint_knows_its_files(folder):
    fill(folder, 50)
    path = folder.checkpoint_path(50)
    assert require_intact(path, 50)
    for name, change in (
        ("model.safetensors", lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("trainer/rng.json", lambda data: data + b" "),
        ("trainer/manifest.json", lambda data: data.replace(b"50", b"51", 1)),
        ("trainer/manifest.json", lambda _: b"[" * 100_000),
    ):
        file = path / name
        before = file.read_bytes()
        file.write_bytes(change(before))
        with pytest.raises(RunFolderError, match=str(path)):
            require_intact(path, 50)
        file.write_bytes(before)
    (path / "model.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"model\.safetensors is missing"):
        require_intact(path, 50)
    (path / "trainer" / "manifest.json").unlink()
    assert not require_intact(path, 50)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS | st.sampled_from([10**400, -1, "collapse", 1e308]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
LINE_NAMES = ("rollout/truncation_rate", "rollout/mean_length", "alarm/restored_step")
LINE_NAMES += ("learning_rate", "level", "action", "restored_step")
STOP_NAMES = ("mode", "student_ids", "teacher_ids", "event_ids")
ROWS = st.fixed_dictionaries(
    {"step": st.integers(0, 9) | JSON}, optional=dict.fromkeys(LINE_NAMES, JSON)
)
STOPS = st.fixed_dictionaries({}, optional=dict.fromkeys(STOP_NAMES, JSON))
ENVIRONMENTS = st.fixed_dictionaries({}, optional={"inputs": JSON, "stops": JSON | STOPS})
CONFIGS = st.dictionaries(
    st.sampled_from(["run", "repetition", "data", "rollout", "objective"]),
    st.none()
    | st.dictionaries(
        st.sampled_from(["window_chars", "ratio", "ngram", "answer_marker", "max_new_tokens"]),
        st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]),
        max_size=3,
    ),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return run_parts.make_run(tmp_path_factory.mktemp("good") / "run", steps=3).path


def toml(tables):
    lines = []
    for name, table in tables.items():
        lines += [f"{name} = 1"] if table is None else []
    for name, table in tables.items():
        if table is not None:
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join(lines)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["metrics.jsonl", "events.jsonl", "environment.json", "config.toml"]),
    data=st.data(),
)
def test_any_value_in_a_file_is_read_or_refused(good, name, data):
    """No file of a run, whatever it holds, ends reading with any error but ours."""
    file = good / name
    before = file.read_bytes() if file.exists() else None
    if name == "config.toml":
        text = toml(data.draw(CONFIGS))
    else:
        kinds = ENVIRONMENTS if name == "environment.json" else ROWS
        text = json.dumps(data.draw(kinds | JSON)) + "\n"
    file.write_text(text)
    try:
        run = RunFolder.open(good)
        for read in (run.events, run.environment, run.config_table):
            with contextlib.suppress(RunFolderError):
                read()
        with contextlib.suppress(StableOPDError):
            read_runs([good])
    finally:
        file.unlink() if before is None else file.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metrics.jsonl", b"[" * 100_000 + b"\n"),
        ("metrics.jsonl", b'{"step": ' + b"1" * 5000 + b"}\n"),
        ("metrics.jsonl", b'{"step": 1, "a": "x"}\n'),
        ("metrics.jsonl", b'{"stap": 1}\n'),
        ("events.jsonl", b'{"step": 1, "a": 2}\n'),
        ("events.jsonl", b"\xff\n"),
        ("environment.json", b'{"stops": [1]}'),
        ("environment.json", b'{"stops": {"student_ids": [true]}}'),
        ("config.toml", b"\xff"),
        ("config.toml", b"x = " + b"[" * 5000),
        ("config.toml", b"x = " + b"1" * 5000),
    ],
)
def test_damage_is_named_by_its_file(folder, name, data):
    (folder.path / name).write_bytes(data)
    read = {
        "metrics.jsonl": folder.metrics,
        "events.jsonl": folder.events,
        "environment.json": folder.environment,
        "config.toml": folder.config_table,
    }[name]
    with pytest.raises(RunFolderError, match=name.replace(".", r"\.")):
        read()


def test_names_that_no_file_system_takes(tmp_path):
    long = tmp_path / ("x" * 300)
    for look in (RunFolder.open, RunFolder.claim):
        with pytest.raises(RunFolderError, match="too long"):
            look(long)


def test_events_keep_what_they_say(folder):
    folder.append_event(event(1, restored_step=0, action="rollback"))
    assert folder.events() == [event(1, restored_step=0, action="rollback")]
