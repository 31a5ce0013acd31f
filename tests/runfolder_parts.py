"""A run folder and its checkpoints, shared by the tests of run folders."""

import os
import subprocess
import sys

import pytest

from stableopd.runfolder import RunFolder

CONFIG = '[run]\noutput = "x"\n'


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", CONFIG, {"python": "3.11"})


def entries(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def fill(folder, step, text="weights"):
    with folder.new_checkpoint(step) as path:
        (path / "model.safetensors").write_text(text)
        (path / "trainer").mkdir()
        (path / "trainer" / "rng.json").write_text("{}")


def event(step, **fields):
    """A line of events.jsonl."""
    line = {"step": step, "level": "warn", "reason": "r", "action": "warn", "restored_step": None}
    return line | {"lambda_gold": 1.0, "beta_reference": 0.0} | fields


HOLDER = """
import sys, time
from pathlib import Path
from stableopd.runfolder import RunFolder
RunFolder(Path(sys.argv[1])).lock()
print("held", flush=True)
time.sleep(60)
"""


def held_by_another(path):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process
