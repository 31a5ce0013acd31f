import errno
import os
import signal
import subprocess
import sys

import pytest

import runfolder_parts
from runfolder_parts import CONFIG, entries, fill
from stableopd.runfolder import RunFolder, write_atomically
from stableopd.types import RunFolderError

folder = runfolder_parts.folder  # a fixture


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


WRITER = """
import sys
from stableopd.runfolder import RunFolder
folder = RunFolder.create(sys.argv[1], "", {})
for step in range(10**9):
    folder.append_metrics({"step": step, "x" * 2000: 1})
    folder.write_rollouts(step, [{"step": step}] * 50)
    with folder.new_checkpoint(step) as path:
        (path / "a").write_text("a" * 100_000)
        (path / "b").write_text("complete")
    folder.prune_checkpoints(2)
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_a_folder_that_can_go_on(tmp_path):
    path = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        for _ in range(7):
            seen = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
    folder = RunFolder.open(path)
    last = folder.checkpoints()[-1]
    assert last >= seen
    for step in folder.checkpoints():
        assert (folder.checkpoint_path(step) / "b").read_text() == "complete"
    folder.rewind(last)
    assert [line["step"] for line in folder.metrics()] == list(range(last + 1))
    assert folder.rollout_steps() == list(range(last + 1))
    assert all(len(folder.rollouts(step)) == 50 for step in folder.rollout_steps())
    assert not [name for name in entries(path) if "tmp" in name or "replaced" in name]


def test_full_disk_loses_nothing_that_was_written(small_disk):
    folder = RunFolder.create(small_disk / "run", CONFIG, {})
    fill(folder, 0)
    (small_disk / "filler").write_text("x" * 12_000)

    def append_until_full():
        for step in range(1000):
            folder.append_metrics({"step": step, "x" * 1500: 1})

    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written: the disk is f"):
        append_until_full()
    steps = [line["step"] for line in folder.metrics()]
    assert len(steps) > 10
    assert steps == list(range(len(steps)))
    assert (folder.path / "metrics.jsonl").read_bytes().endswith(b"\n")
    with pytest.raises(RunFolderError, match=r"000001\.jsonl: cannot be written: the disk is full"):
        folder.write_rollouts(1, [{"text": "x" * 100_000}])
    with (
        pytest.raises(RunFolderError, match="checkpoints/000001: cannot be written: the disk is"),
        folder.new_checkpoint(1) as path,
    ):
        (path / "weights").write_text("x" * 100_000)
    assert folder.checkpoints() == [0]
    assert folder.rollout_steps() == []
    assert not [name for name in entries(small_disk) if "tmp" in name]
    (small_disk / "filler").unlink()
    folder.rewind(0)
    folder.append_metrics({"step": 1})
    assert [line["step"] for line in folder.metrics()] == [0, 1]


def test_a_full_disk_is_named_whatever_the_writer_of_weights_raises(small_disk):
    folder = RunFolder.create(small_disk / "run", CONFIG, {})

    def write_weights():
        with folder.new_checkpoint(1) as path:
            try:
                (path / "weights").write_text("x" * 100_000)
            except OSError:
                raise RuntimeError("writer failed") from None

    with pytest.raises(RunFolderError, match=r"the disk is full.*continue with --resume"):
        write_weights()


def test_a_full_disk_is_known_by_the_words_of_safetensors(folder):
    def write_weights():
        with folder.new_checkpoint(1):
            raise RuntimeError("serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(RunFolderError, match="the disk is full"):
        write_weights()


def test_a_read_only_file_system(small_disk):
    folder = RunFolder.create(small_disk / "run", CONFIG, {})
    folder.append_metrics({"step": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = "cannot be written: the file system is read-only; choose another place"
    with pytest.raises(RunFolderError, match=message):
        RunFolder.create(small_disk / "other", CONFIG, {})
    with pytest.raises(RunFolderError, match=message):
        folder.append_metrics({"step": 2})
    with pytest.raises(RunFolderError, match=message), folder.new_checkpoint(1):
        pass
    with pytest.raises(RunFolderError, match=message):
        folder.rewind(1)
    assert folder.metrics() == [{"step": 1}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunFolderError, match="permission denied"):
        RunFolder.create(tmp_path / "run", CONFIG, {})
    tmp_path.chmod(0o700)


def test_permission_denied_has_its_own_words(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunFolderError, match=r"x\.txt: cannot be written: permission denied; cho"):
        write_atomically(tmp_path / "x.txt", "text")
    assert entries(tmp_path) == []
