"""Runs that are started, killed and compared, shared by the tests of resuming.

Starting Python and loading torch takes far longer than these runs. So one process loads everything
once, and each run is a child that it forks: a process of its own, which SIGKILL ends as it would
any other.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import tiny
from stableopd.runfolder import RunFolder

SERVER = """
import json, os, sys, traceback
import peft, stableopd.report.page, stableopd.terminal
import stableopd.training.loop, stableopd.training.preflight
from stableopd.cli import main
from transformers import LlamaForCausalLM
print("ready", flush=True)
for line in sys.stdin:
    arguments, output = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = ["stableopd", *arguments]
        stableopd.report.page.write_page = lambda *_: None
        code = 70
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
PATIENCE_S = 60.0


class Server:
    """Forks one run at a time."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, *arguments):
        print(json.dumps([["train", *map(str, arguments)], str(self.log)]), file=self.process.stdin)
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Exit code of the run, and all that it printed."""
        code = int(self.process.stdout.readline())
        return code, self.log.read_text()

    def run(self, *arguments):
        self.start(*arguments)
        return self.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server") / "log")
    yield started
    started.process.communicate()


def assert_same(run, other):
    """Metrics, events, rollouts and the last checkpoint, weights and optimizer: the same bits."""
    assert tiny.metrics_of(run) == tiny.metrics_of(other)
    assert RunFolder.open(run).events() == RunFolder.open(other).events()
    assert tiny.files_in(run / "rollouts") == tiny.files_in(other / "rollouts")
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (run, other)]
    assert names[0][-1] == names[1][-1]
    found, expected = (tiny.files_in(f / "checkpoints" / names[0][-1]) for f in (run, other))
    assert found.keys() == expected.keys()
    weights = [name for name in found if name.endswith(".safetensors")]
    assert weights
    assert all(found[name] == expected[name] for name in weights)
    states = [
        torch.load(f / "checkpoints" / names[0][-1] / "trainer" / "state.pt") for f in (run, other)
    ]
    assert str(states[0]) == str(states[1])
    first, second = (s["optimizer"]["state"] for s in states)
    for key, values in first.items():
        assert all(torch.equal(values[name], second[key][name]) for name in values)


def wait_until(condition, what):
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.0005)


def is_writing(run):
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob(".*.tmp/*"))


def num_lines(run):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def check_intact(run):
    """What a killed run left can be read, and its checkpoints are whole."""
    if not (run / "config.toml").exists():
        return 0
    folder = RunFolder.open(run)
    steps = [line["step"] for line in folder.metrics()]
    first = steps[0] if steps else 0
    assert steps == list(range(first, first + len(steps)))
    for step in folder.checkpoints():
        path = folder.checkpoint_path(step)
        assert torch.load(path / "trainer" / "state.pt")["step"] == step
        assert step <= steps[-1]
    return folder.checkpoints()[-1] if folder.checkpoints() else 0


def alive(child):
    """Whether a process runs; one that ended and is not yet waited for does not."""
    try:
        with open(f"/proc/{child}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for_moment(run, child, kind, draw):
    """Wait for a random moment: at any time, soon after a step, or in the write of a checkpoint."""
    before = num_lines(run)
    if kind == "step":
        wait_until(lambda: num_lines(run) > before or not alive(child), "a step")
    elif kind == "checkpoint":
        wait_until(lambda: is_writing(run) or not alive(child), "a checkpoint")
    time.sleep(draw.random() * {"any": 0.6, "step": 0.25, "checkpoint": 0.002}[kind])


def kill_until_done(server, run, config, kinds=("any", "step", "checkpoint", "step", "checkpoint")):
    """Start and kill a run, until once it ends by itself; says how often, and when in a write."""
    draw = random.Random(0)
    writing, reached, code = 0, [], None
    for kind in itertools.cycle(kinds):
        is_started = (run / "config.toml").exists()
        child = server.start(config, *(["--resume"] if is_started else []))
        wait_for_moment(run, child, kind, draw)
        if alive(child):
            os.kill(child, signal.SIGKILL)
        code, text = server.end()
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        writing += is_writing(run)
        reached.append(check_intact(run))
        assert len(reached) < 60, f"no end is in sight: {reached}"
    assert not is_writing(run)
    return len(reached), writing
