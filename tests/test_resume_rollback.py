"""Killed around a rollback of the alarm, a run ends in the same bits, too."""

import math
import os
import signal

import pytest

import alarm_parts
import resume_parts
from resume_parts import assert_same, check_intact, kill_until_done, num_lines, wait_until
from stableopd.runfolder import RunFolder

server = resume_parts.server  # a fixture
SHORT = {"steps": 26}


@pytest.fixture(scope="module")
def collapsing(tmp_path_factory, server):
    """A world with a run in it that the alarm rolls back."""
    made = alarm_parts.make_world(tmp_path_factory.mktemp("collapsing") / "w")
    code, text = server.run(alarm_parts.configure(made, "undisturbed", "rollback", run=SHORT))
    assert code == 0, text
    assert 12 < rolled_back_at(made / "undisturbed") < 22
    return made


def num_rollbacks(run):
    file = run / "events.jsonl"
    return file.read_bytes().count(b'"action": "rollback"') if file.exists() else 0


def test_killed_again_and_again_around_rollbacks(collapsing, server):
    run = collapsing / "killed"
    config = alarm_parts.configure(collapsing, "killed", "rollback", run=SHORT)
    child = server.start(config)
    wait_until(lambda: num_lines(run) >= 10, "ten steps")
    os.kill(child, signal.SIGKILL)
    assert server.end()[0] == -signal.SIGKILL
    assert kill_until_done(server, run, config, kinds=("any", "step"))[0] >= 4
    assert_same(run, collapsing / "undisturbed")


def test_killed_at_a_rollback_and_interrupted_after_it(collapsing, server):
    run, config = collapsing / "at", alarm_parts.configure(collapsing, "at", "rollback", run=SHORT)
    child = server.start(config)
    wait_until(lambda: num_rollbacks(run), "a rollback")
    os.kill(child, signal.SIGKILL)
    assert server.end()[0] == -signal.SIGKILL
    check_intact(run)
    child = server.start(config, "--resume")
    wait_until(lambda: num_lines(run) > rolled_back_at(run) + 1, "two steps")
    os.kill(child, signal.SIGINT)
    code, text = server.end()
    assert code == 130, text
    assert server.run(config, "--resume")[0] == 0
    assert_same(run, collapsing / "undisturbed")


def rolled_back_at(run):
    """The step of the rollback; none yet is beyond all: a resumed run takes its events back."""
    steps = [e["step"] for e in RunFolder.open(run).events() if e["action"] == "rollback"]
    return steps[0] if steps else math.inf
