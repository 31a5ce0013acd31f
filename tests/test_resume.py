"""Killed and continued, a run ends in the bits of one that nobody disturbed.

How runs are started and killed is in resume_parts.py. The two tests at the end go through
`python -m stableopd` itself.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest

import resume_parts
import tiny
from resume_parts import (
    ENVIRONMENT,
    PATIENCE_S,
    alive,
    assert_same,
    check_intact,
    kill_until_done,
    num_lines,
    wait_until,
)
from stableopd.runfolder import RunFolder

server = resume_parts.server  # a fixture

STEPS = 24
FIELDS = {
    "run": {"steps": STEPS, "save_every": 4, "rollouts_every": 3},
    "rollout": {"prompts_per_step": 6, "rollouts_per_prompt": 2, "max_new_tokens": 12},
    "optimizer": {"schedule": "cosine", "warmup_steps": 3, "learning_rate": 1e-2},
    "eval": {"max_problems": 4, "samples": 2, "every": 5},
}


def configure(world, name, **changes):
    """A configuration of a run of its own in a world."""
    fields = {section: dict(values) for section, values in FIELDS.items()}
    fields["eval"]["data"] = str(world / "train.jsonl")
    for section, values in changes.items():
        fields.setdefault(section, {}).update(values)
    fields["run"]["output"] = str(world / name)
    return tiny.write_config(world, f"{name}.toml", **fields)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make_world(tmp_path_factory.mktemp("world") / "w")


@pytest.fixture(scope="module")
def undisturbed(world, server):
    code, text = server.run(configure(world, "undisturbed"))
    assert code == 0, text
    return world / "undisturbed"


def test_killed_again_and_again(world, undisturbed, server):
    run = world / "killed"
    num_kills, writing = kill_until_done(server, run, configure(world, "killed"))
    assert num_kills >= 4
    assert writing, "no kill came during the write of a checkpoint"
    assert_same(run, undisturbed)


def test_killed_before_the_first_checkpoint(world, undisturbed, server):
    run, config = world / "early", configure(world, "early")
    child = server.start(config)
    wait_until(lambda: num_lines(run) >= 3, "two steps")
    os.kill(child, signal.SIGKILL)
    assert server.end()[0] == -signal.SIGKILL
    assert not RunFolder.open(run).checkpoints()
    code, text = server.run(config)
    assert (code, text.count("already holds a run")) == (2, 1)
    assert server.run(config, "--resume")[0] == 0
    assert_same(run, undisturbed)


def test_more_steps_and_a_folder_that_was_moved(world, server):
    changes = {"optimizer": {"schedule": "constant"}, "eval": {"data": ""}}
    whole = configure(world, "whole", **changes)
    assert server.run(whole)[0] == 0
    part = configure(world, "part", **changes, run={"steps": 7})
    assert server.run(part)[0] == 0
    (world / "part").rename(world / "moved")
    moved = configure(world, "moved", **changes)
    code, text = server.run(moved, "--resume")
    assert code == 0, text
    # The last step of a run writes its rollouts: there is one file more.
    (world / "moved" / "rollouts" / "000007.jsonl").unlink()
    assert_same(world / "moved", world / "whole")
    code, text = server.run(moved, "--set", "run.steps=8", "--resume")
    assert code == 2
    assert "error: --resume: run.steps may only grow" in text
    assert f"{world / 'moved'} has 24" in text


def test_other_settings_are_refused_and_a_finished_run_says_so(world, undisturbed, server):
    config = configure(world, "undisturbed")
    before = tiny.files_in(undisturbed)
    for change, words in (
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate is 0.5, but the run in"),
        ("rollout.temperature=0.9", "rollout.temperature is 0.9"),
        ("run.seed=1", "run.seed is 1"),
        ("objective.updates_per_batch=2", "objective.clip is 0.2"),
    ):
        code, text = server.run(config, "--resume", "--set", change)
        assert code == 2
        assert text.startswith("error: --resume: ")
        assert words in text
        assert text.count("\n") == 1
    code, text = server.run(config, "--resume")
    assert code == 0
    assert f"{undisturbed} has made all of its {STEPS} steps already." in " ".join(text.split())
    assert tiny.files_in(undisturbed) == before


def test_resume_of_what_is_no_run(world, server):
    config = configure(world, "nowhere")
    code, text = server.run(config, "--resume")
    assert code == 2
    assert text == f"error: {world / 'nowhere'}: no such folder; give the run.output of a run.\n"
    assert not (world / "nowhere").exists()


def test_resume_with_a_broken_checkpoint(world, undisturbed, server):
    shutil.copytree(undisturbed, world / "broken")
    config = configure(world, "broken", run={"steps": STEPS})
    newest = world / "broken" / "checkpoints" / f"{STEPS:06d}"
    for damage in (b"", b"PK", (newest / "trainer" / "state.pt").read_bytes()[:5000]):
        (newest / "trainer" / "state.pt").write_bytes(damage)
        code, text = server.run(config, "--resume")
        assert code == 2
        assert f"remove the folder {newest} to go on from the checkpoint before it" in text
    shutil.rmtree(newest)
    assert server.run(config, "--resume")[0] == 0
    assert_same(world / "broken", undisturbed)


def test_lora(world, server):
    lora = {"student": {"lora_rank": 2}, "run": {"steps": 8, "save_every": 2}}
    lora["objective"] = {"beta_reference": 0.1}
    assert server.run(configure(world, "lora", **lora))[0] == 0
    config = configure(world, "lora2", **lora)
    child = server.start(config)
    wait_until(lambda: num_lines(world / "lora2") >= 4, "three steps")
    os.kill(child, signal.SIGKILL)
    assert server.end()[0] == -signal.SIGKILL
    assert RunFolder.open(world / "lora2").checkpoints()
    code, text = server.run(config, "--resume")
    assert code == 0, text
    assert_same(world / "lora2", world / "lora")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step(world, undisturbed, server, number):
    name = f"interrupted-{number}"
    run, config = world / name, configure(world, name)
    child = server.start(config)
    wait_until(lambda: num_lines(run) >= 3, "two steps")
    os.kill(child, number)
    code, text = server.end()
    assert code == 130, text
    assert text.count("Interrupted: finishing this step and saving.") == 1
    last = num_lines(run) - 1
    assert 2 <= last < STEPS
    assert (
        f"Stopped after step {last} of {STEPS}. Go on with the same command and --resume.\n" in text
    )
    assert RunFolder.open(run).checkpoints()[-1] == last
    code, text = server.run(config, "--resume")
    assert code == 0, text
    assert_same(run, undisturbed)


def real(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "stableopd", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def test_the_command_itself(world, undisturbed, server):
    """Killed, interrupted once, then twice at once, and continued, through `python -m`."""
    run, config = world / "real", configure(world, "real")
    process = real(config)
    wait_until(lambda: num_lines(run) >= 7, "six steps")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    check_intact(run)
    process = real(config, "--resume")
    before = num_lines(run)
    wait_until(lambda: num_lines(run) not in (before, 5), "a step")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert err.startswith("Interrupted: finishing this step and saving.")
    assert err.count("\n") == 1
    assert "Go on with the same command." in out
    assert (run / "report.html").stat().st_size > 1000
    code, text = server.run(config, "--resume")
    assert code == 0, text
    assert_same(run, undisturbed)


def test_a_second_interrupt_ends_at_once(world, server):
    long = {"prompts_per_step": 400, "max_new_tokens": 100}
    changes = {"run": {"save_every": 1}, "rollout": long, "eval": {"data": ""}}
    run, config = world / "twice", configure(world, "twice", **changes)
    child = server.start(config)
    wait_until(lambda: num_lines(run) >= 1, "a step")
    told = "Interrupted: finishing this step and saving."
    for _ in range(2):
        os.kill(child, signal.SIGINT)
        wait_until(lambda: told in server.log.read_text() or not alive(child), "an answer")
    code, text = server.end()
    assert code in (1, 130), text
    assert "Traceback" not in text
    assert "Stopped after step" not in text
    assert num_lines(run) == 1
    assert "step 2" in text
    assert "--resume" in text.splitlines()[-1]
    assert check_intact(run) <= 1
