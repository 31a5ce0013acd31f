"""Whole runs of `stableopd train` in two processes: the folder, resuming, deaths and interrupts.

With top-k 1 a rollout does not depend on the draw, so that a run of two processes must give the
numbers of one.

All of it computes in float64. Processes add up in another order, and where a gradient is as small
as the rounding of its sum, Adam's first updates follow the rounding: an update is the learning
rate times g / (|g| + eps), so that an error d of g moves a weight by up to rate * d / eps. With
float32, d = 1e-8 and eps = 1e-8 make that a full step in any direction, and which weights it
strikes depends on the processor. With float64 and sums of terms near 1, d < 1e-14.
"""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import parallel_parts
import tiny
from parallel_parts import FSDP, KINDS
from resume_parts import ENVIRONMENT, num_lines, wait_until
from stableopd.runfolder import RunFolder
from stableopd.types import RunFolderError

server = parallel_parts.server  # a fixture

STEPS = 6
ADAM_EPS = 1e-8
# STEPS * rate * d / eps, for the largest rate of these tests.
WEIGHT_TOLERANCE = STEPS * 1e-2 * 1e-14 / ADAM_EPS
# Metrics pass through float32: some roundings of 6e-8 of a value, or of the parts of a difference.
METRIC_TOLERANCE = 1e-6
# Rollouts keep five digits, the last of which may round either way.
LOGP_TOLERANCE = 1.1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make_world(tmp_path_factory.mktemp("world") / "w", tiny.make_stable_lm)


def configure(world, name, **changes):
    fields = {
        "run": {"steps": STEPS, "save_every": 1, "output": str(world / name)},
        "student": {"dtype": "float64"},
        "teacher": {"dtype": "float64"},
        "rollout": {"prompts_per_step": 3, "top_k": 1, "allow_off_policy_sampling": True},
        "objective": {"beta_reference": 0.1, "mask_truncated": True},
        "optimizer": {"micro_batch_tokens": 40},
        # One problem: the other process has none.
        "eval": {"data": str(world / "train.jsonl"), "max_problems": 1, "every": 2},
    }
    fields["eval"] |= {"temperature": 0.0, "samples": 1}
    for section, values in changes.items():
        fields.setdefault(section, {}).update(values)
    return tiny.write_config(world, f"{name}.toml", **fields)


@pytest.fixture(scope="module")
def alone(world):
    """The run of one process."""
    code, _, err = tiny.run_cli("train", configure(world, "alone"))
    assert code == 0, err
    return world / "alone"


def test_processes_without_a_gpu_find_each_other(world, server):
    """Also where the configuration does not name the CPU."""
    codes, errors = server.train(configure(world, "auto", run={"device": "auto", "steps": 1}))
    assert codes == [0, 0], errors
    environment = json.loads((world / "auto" / "environment.json").read_text())
    assert environment["num_processes"] == 2


def assert_same(run, other):
    """The same lines, rollouts and weights."""
    lines, expected = (
        [{k: math.nan if v is None else v for k, v in line.items()} for line in tiny.metrics_of(f)]
        for f in (run, other)
    )
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(
            wanted, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE, nan_ok=True
        )
    folders = RunFolder.open(run), RunFolder.open(other)
    assert folders[0].rollout_steps() == folders[1].rollout_steps()
    for step in folders[0].rollout_steps():
        for row, wanted in zip(*(f.rollouts(step) for f in folders), strict=True):
            for key in ("student_logprobs", "teacher_logprobs"):
                assert row.pop(key) == pytest.approx(wanted.pop(key), rel=0, abs=LOGP_TOLERANCE)
            assert row == wanted
    steps = [folder.checkpoints()[-1] for folder in folders]
    assert steps[0] == steps[1]
    found, wanted = (f.checkpoint_path(steps[0]) for f in folders)
    names = {file.name for file in wanted.iterdir()}
    assert {file.name for file in found.iterdir()} == names
    (weights,) = (name for name in names if name.endswith(".safetensors"))
    found, wanted = load_file(found / weights), load_file(wanted / weights)
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.float64
        assert_close(weight, wanted[name], rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_leave_the_folder_of_one(world, alone, server, kind):
    fields = {"student": {"gradient_checkpointing": kind == "offloaded"}}
    launch = server.start(["train", str(configure(world, kind, **fields))], environment=KINDS[kind])
    assert launch.end() == [0, 0], launch.printed(0, "err") + launch.printed(1, "err")
    assert_same(world / kind, alone)
    told = launch.printed(0, "out")
    assert "2 processes, " in told
    assert "another number of processes draws other rollouts" in told
    assert launch.printed(1, "out") == ""
    environment = RunFolder.open(world / kind).environment()
    assert (environment["num_processes"], environment["shards"]) == (2, kind != "copies")


@pytest.mark.parametrize(
    ("first", "second"), [("copies", ""), ("", "copies"), ("sharded", ""), ("", "sharded")]
)
def test_a_run_goes_on_with_another_number_of_processes(world, alone, server, first, second):
    name = f"moved-{first}-{second}"
    short = configure(world, name, run={"steps": 2})
    for kind, arguments in (
        (first, [short]),
        (second, [short, "--resume", "--set", f"run.steps={STEPS}"]),
    ):
        if kind:
            codes, errors = server.train(*arguments, environment=KINDS[kind])
            assert codes == [0, 0], errors
        else:
            code, _, err = tiny.run_cli("train", *arguments)
            assert code == 0, err
    assert_same(world / name, alone)


@pytest.mark.parametrize("kind", ["copies", "sharded"])
def test_an_adapter(world, server, kind):
    fields = {"student": {"lora_rank": 2}, "optimizer": {"learning_rate": 1e-2}}
    if not (world / "adapter").exists():
        assert tiny.run_cli("train", configure(world, "adapter", **fields))[0] == 0
    config = configure(world, f"adapter-{kind}", **fields, run={"steps": 2})
    for arguments in ([config], [config, "--resume", "--set", f"run.steps={STEPS}"]):
        codes, errors = server.train(*arguments, environment=KINDS[kind])
        assert codes == [0, 0], errors
    assert_same(world / f"adapter-{kind}", world / "adapter")


@pytest.mark.parametrize(("kind", "victim"), [("copies", 0), ("sharded", 1)])
def test_a_process_that_dies_ends_the_run_and_it_resumes(world, alone, server, kind, victim):
    name = f"died-{kind}-{victim}"
    config = configure(world, name)
    launch = server.start(["train", str(config)], environment=KINDS[kind])
    wait_until(lambda: num_lines(world / name) >= 3, "two steps")
    os.kill(launch.children[victim], signal.SIGKILL)
    codes = launch.end()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 2
    error = [e for e in launch.printed(1 - victim, "err").splitlines() if "error" in e]
    assert len(error) == 1
    assert f"process {1 - victim} of 2 has lost another one" in error[0]
    assert "--resume" in error[0]
    assert RunFolder.open(world / name).checkpoints()[-1] < STEPS
    code, _, err = tiny.run_cli("train", config, "--resume")
    assert code == 0, err
    assert_same(world / name, alone)


@pytest.mark.parametrize("receiver", [0, 1])
def test_an_interrupt_of_one_process_ends_all_together(world, alone, server, receiver):
    name = f"interrupted-{receiver}"
    config = configure(world, name, run={"steps": 500})
    launch = server.start(["train", str(config)])
    wait_until(lambda: num_lines(world / name) >= 2, "a step")
    os.kill(launch.children[receiver], signal.SIGTERM)
    assert launch.end() == [130, 0]
    last = tiny.metrics_of(world / name)[-1]["step"]
    assert RunFolder.open(world / name).checkpoints()[-1] == last
    assert f"Stopped after step {last} of 500." in launch.printed(0, "out")
    assert launch.printed(1, "err") == ""


@pytest.mark.parametrize(
    ("changes", "environment", "words"),
    [
        ({"run": {"output": "alone"}}, {}, "already holds a run"),
        ({"rollout": {"prompts_per_step": 1}}, {}, "leaves some of 2 processes without a prompt"),
        ({"run": {"device": "cuda"}}, {}, "torch finds no such device here"),
        ({"run": {"nonsense": 1}}, {}, "unknown key 'run.nonsense'"),
        ({"student": {"model": "nowhere/at/all"}}, {}, "not a model folder"),
        ({}, FSDP | {"FSDP_VERSION": "1"}, "add --fsdp_version 2"),
        ({}, FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "student.gradient_checkpointing"),
    ],
)
def test_what_is_refused_is_told_once(world, alone, server, changes, environment, words):
    config = configure(world, "refused", **{"run": {}, **changes})
    if changes.get("run", {}).get("output"):
        config = configure(world, "refused", run={"output": str(alone)})
    before = tiny.files_in(alone)
    codes, errors = server.train(config, environment=environment)
    assert codes == [2, 2]
    assert errors[0].count("error: ") == 1
    assert words in errors[0]
    assert errors[1] == ""
    assert not (world / "refused").exists()
    assert tiny.files_in(alone) == before


def test_a_folder_that_cannot_be_written_ends_both(world, server):
    config = configure(world, "blocked", run={"steps": 500, "save_every": 500})
    launch = server.start(["train", str(config)])
    wait_until(lambda: num_lines(world / "blocked") >= 2, "a step")
    (world / "blocked" / "metrics.jsonl").unlink()
    (world / "blocked" / "metrics.jsonl").mkdir()
    assert launch.end() == [2, 2]
    assert "metrics.jsonl: cannot be written" in launch.printed(0, "err")
    assert launch.printed(1, "err") == ""
    with pytest.raises(RunFolderError):
        RunFolder.open(world / "blocked").metrics()


LAUNCHERS = {
    "accelerate": (
        "accelerate.commands.launch",
        *("--use_fsdp", "--fsdp_version=2", "--mixed_precision=no", "--dynamo_backend=no"),
        *("--num_machines=1", "--num_processes=2", "--main_process_port"),
    ),
    "torchrun": ("torch.distributed.run", "--nproc-per-node=2", "--master-port"),
}


# Each loads torch in three processes, for what is tested in forks above.
@pytest.mark.parametrize(
    "launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_the_launchers_themselves(world, launcher, alone):
    config = configure(world, launcher)
    port = parallel_parts.rendezvous(2)["MASTER_PORT"]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], port, "-m", "stableopd", "train", config],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same(world / launcher, alone)
    assert done.stdout.count("Before the first step") == 1
    assert (world / launcher / "report.html").stat().st_size > 1000
    environment = RunFolder.open(world / launcher).environment()
    assert (environment["num_processes"], environment["shards"]) == (2, launcher == "accelerate")
