"""What a user gets wrong: exit code 2, one line on standard error, and nothing is broken by it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import tiny
from stableopd.training.devices import dtype_of
from stableopd.types import ConfigError
from tiny import EOS, V, make_llama, save_model, write_config, write_rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tiny.make_world(tmp_path_factory.mktemp("shared") / "w")


@pytest.fixture
def world(shared, tmp_path):
    """A world of its own for each test, which may break it."""
    shutil.copytree(shared, tmp_path / "w")
    write_config(tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def refused(capfd):
    """Runs the command line and gives back the one line that it must print."""

    def run(*arguments):
        code, _, err = tiny.run_cli("train", *arguments)
        err += capfd.readouterr().err
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert err.startswith("error: ")
        return err.strip()

    return run


def mount(path, options):
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")


@pytest.fixture
def disk(tmp_path):
    """An empty file system whose size and flags a test can change."""
    path = tmp_path / "disk"
    mount(path, "size=4m")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def remount(path, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def test_a_good_run_says_nothing_on_standard_error(world, capfd):
    assert tiny.run_cli("train", world / "config.toml")[::2] == (0, "")
    assert capfd.readouterr().err == ""


def test_missing_config_file(refused, tmp_path):
    assert f"{tmp_path / 'none.toml'}: no such file" in refused(tmp_path / "none.toml")


def test_broken_toml(refused, world):
    file = world / "config.toml"
    file.write_text(file.read_text() + "[run\n")
    assert f"{file}: not valid TOML" in refused(file)


def test_unknown_key(refused, world):
    file = write_config(world, rollout={"max_new_token": 3})
    message = refused(file)
    assert f"{file}: unknown key 'rollout.max_new_token'; did you mean 'max_new_tokens'?" in message
    assert "did you mean 'steps'?" in refused(world / "config.toml", "--set", "run.setps=3")


def test_clip_without_several_updates(refused, world):
    assert "objective.clip has no effect" in refused(write_config(world, objective={"clip": 0.1}))


def test_top_p_under_an_on_policy_objective(refused, world):
    config = write_config(world, rollout={"top_p": 0.9})
    assert "draw from another distribution" in refused(config)
    allowed = ("--set", "rollout.allow_off_policy_sampling=true")
    assert tiny.run_cli("train", config, *allowed)[0] == 0


def test_missing_and_empty_data(refused, world):
    config, data = world / "config.toml", world / "train.jsonl"
    data.unlink()
    assert f"{data}: no such file or folder" in refused(config)
    for text in ("", "\n \n"):
        data.write_text(text)
        assert f"{data}: there is no row in it" in refused(config)
    data.unlink()
    data.mkdir()
    assert f"{data}: neither a folder" in refused(config)


def test_a_row_without_a_needed_column(refused, world):
    config, rows = world / "config.toml", tiny.sums()
    for column in ("prompt", "solution"):
        broken = [dict(row) for row in rows]
        del broken[6][column]
        write_rows(world / "train.jsonl", broken)
        message = refused(config)
        assert f"{world / 'train.jsonl'}, line 7: no column '{column}'" in message
    assert "line 7: no column 'answer'" in refused(
        write_config(world, "eval.toml", eval={"data": str(answerless(world, rows))})
    )
    write_rows(world / "train.jsonl", [*rows[:3], "text"])
    assert "line 4: JSON, but not an object" in refused(config)


def answerless(world, rows):
    broken = [dict(row) for row in rows]
    del broken[6]["answer"]
    write_rows(world / "train.jsonl", rows)
    return write_rows(world / "test.jsonl", broken)


def test_a_golden_term_without_solutions(refused, world):
    write_rows(world / "train.jsonl", [{"prompt": row["prompt"]} for row in tiny.sums()])
    message = refused(world / "config.toml")
    assert "line 1: no column 'solution'" in message
    assert "objective.lambda_gold above 0" in message
    assert tiny.run_cli("train", world / "config.toml", "--set", "objective.method=opd")[0] == 0


@pytest.mark.parametrize("action", ["rollback", "strengthen"])
def test_an_alarm_that_may_turn_the_golden_term_on_without_solutions(refused, world, action):
    rows = tiny.sums()
    del rows[3]["solution"]
    write_rows(world / "train.jsonl", rows)
    opd = ("--set", "objective.method=opd", "--set", f"alarm.action={action}")
    message = refused(world / "config.toml", *opd)
    assert f"{world / 'train.jsonl'}: prompt train.jsonl:4 has no solution" in message
    assert f"in the column 'solution', and alarm.action = '{action}' turns the golden" in message
    assert not (world / "run").exists()
    renamed = refused(world / "config.toml", *opd, "--set", "data.solution=proof")
    assert "no row has the column 'proof' that data.solution names" in renamed
    for harmless in ("warn", "stop"):
        arguments = ("--set", "objective.method=opd", "--set", f"alarm.action={harmless}")
        output = f"run.output={world / harmless}"
        assert tiny.run_cli("train", world / "config.toml", *arguments, "--set", output)[0] == 0


def test_rewards_without_answers(refused, world):
    rows = [{"prompt": row["prompt"], "solution": row["solution"]} for row in tiny.sums()]
    write_rows(world / "train.jsonl", rows)
    assert "line 1: no column 'answer'" in refused(
        write_config(world, objective={"method": "grpo"})
    )


def test_a_prompt_longer_than_the_context(refused, world):
    rows = tiny.sums()
    rows[4]["prompt"] = "1+" * 62 + "1="
    write_rows(world / "train.jsonl", rows)
    message = refused(world / "config.toml")
    assert "1 of 20 prompts are too long: train.jsonl:5 (126 tokens)" in message
    assert "context of 128" in message
    assert "at most 100 tokens are allowed" in refused(
        world / "config.toml", "--set", "rollout.max_prompt_tokens=100"
    )
    assert tiny.run_cli("train", world / "config.toml", "--set", "data.skip_long=true")[0] == 0
    files = (world / "run/rollouts").glob("*")
    lines = [json.loads(x) for f in files for x in f.read_text().splitlines()]
    assert lines
    assert all(len(line["prompt_ids"]) < 126 for line in lines)


def test_the_shorter_context_of_the_two_models_counts(refused, world):
    save_model(world / "teacher", make_llama(1, max_position_embeddings=12))
    rows = [*tiny.sums(), {"prompt": "10+10=", "solution": "20", "answer": "20"}]
    write_rows(world / "train.jsonl", rows)
    assert "context of 12" in refused(world / "config.toml")


def test_top_k_larger_than_the_vocabulary(refused, world):
    config = write_config(world, objective={"method": "gkd", "top_k": V + 1})
    assert f"objective.top_k = {V + 1} is larger than the vocabulary of {V}" in refused(config)
    assert tiny.run_cli("train", config, "--set", f"objective.top_k={V}")[0] == 0


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_folder_that_is_none(refused, world, role):
    config = write_config(world, **{role: {"model": str(world)}})
    assert f"{role}.model = '{world}': not a model folder" in refused(config)


def test_different_tokenizers(refused, world):
    swapped = dict(tiny.VOCABULARY) | {"5": tiny.VOCABULARY["7"], "7": tiny.VOCABULARY["5"]}
    save_model(world / "teacher", make_llama(1), tiny.make_tokenizer(swapped))
    message = refused(world / "config.toml")
    assert f"student '{world / 'student'}' and teacher '{world / 'teacher'}'" in message
    assert "is '5' for the student and '7' for the teacher" in message


def test_a_teacher_with_weights_that_are_not_finite(refused, world):
    teacher = make_llama(1, width=48)
    with torch.no_grad():
        teacher.model.norm.weight[3] = torch.nan
    save_model(world / "teacher", teacher)
    message = refused(world / "config.toml")
    assert message.startswith(f"error: teacher.model = '{world / 'teacher'}': weight 'model.norm.")


def test_devices_and_trackers_that_are_not_there(refused, world):
    if not torch.backends.mps.is_available():
        assert "torch finds no such device" in refused(write_config(world, run={"device": "mps"}))
    assert "run.trackers names 'trackio', which is not installed" in refused(
        write_config(world, run={"trackers": ["trackio"]})
    )


def test_a_device_without_the_type():
    with pytest.raises(ConfigError, match="float64"):
        dtype_of("float64", "student", torch.device("mps"))
    assert dtype_of("float64", "student", torch.device("cpu")) == torch.float64


def test_a_folder_that_holds_a_run(refused, world):
    config, run = world / "config.toml", world / "run"
    assert tiny.run_cli("train", config)[0] == 0
    before = tiny.files_in(run)
    message = refused(config, "--set", "objective.method=opd")
    assert message == (
        f"error: {run}: already holds a run; choose another run.output or continue it with "
        "--resume."
    )
    assert tiny.files_in(run) == before


def test_an_output_that_is_a_file(refused, world):
    (world / "run").write_text("mine")
    assert f"{world / 'run'}: is a file" in refused(world / "config.toml")
    assert (world / "run").read_text() == "mine"


def test_a_failed_start_leaves_nothing_that_blocks_the_next(refused, world):
    config = world / "config.toml"
    good = (world / "train.jsonl").read_text()
    (world / "train.jsonl").write_text(good + '{"prompt": "no solution"}\n')
    refused(config)
    poison_position(world / "teacher", 0)
    (world / "train.jsonl").write_text(good)
    refused(config)
    assert not (world / "run").exists()
    save_model(world / "teacher", make_llama(1))
    assert tiny.run_cli("train", config)[::2] == (0, "")


def test_a_read_only_disk(refused, world, disk):
    config = write_config(world, run={"output": str(disk / "deep" / "run")})
    remount(disk, "ro")
    message = refused(config)
    assert f"{disk / 'deep' / 'run'}: cannot be written: the file system is read-only" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(refused, world, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    config = write_config(world, run={"output": str(locked / "run")})
    assert "permission denied" in refused(config)


# In KiB. A checkpoint takes about 330, so that each of these ends a run at another place.
@pytest.mark.parametrize("size", [4, 40, 200, 340, 700])
def test_a_full_disk_stops_the_run_and_loses_nothing(refused, world, disk, size):
    rollout = {"prompts_per_step": 16, "rollouts_per_prompt": 4}
    fields = {"rollout": rollout, "run": {"output": str(world / "run"), "steps": 6}}
    assert tiny.run_cli("train", write_config(world, "whole.toml", **fields))[0] == 0
    whole, run = world / "run", disk / "run"
    fields["run"]["output"] = str(run)
    config = write_config(world, **fields)
    remount(disk, f"size={size}k")
    assert "the disk is full" in refused(config)
    resume = ("--resume",) if (run / "config.toml").exists() else ()
    if resume:
        lines = tiny.metrics_of(run) if (run / "metrics.jsonl").exists() else []
        assert lines == tiny.metrics_of(whole)[: len(lines)]
        for checkpoint in (run / "checkpoints").glob("*"):
            AutoModelForCausalLM.from_pretrained(checkpoint)
        assert "the disk is full" in refused(config, *resume)
    remount(disk, "size=8m")
    assert tiny.run_cli("train", config, *resume)[::2] == (0, "")
    assert tiny.metrics_of(run) == tiny.metrics_of(whole)
    weights = "checkpoints/000006/model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    assert tiny.files_in(run / "rollouts") == tiny.files_in(whole / "rollouts")


def poison_position(folder, position):
    """A model of finite weights whose log-probs are NaN from a position on."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=EOS, bos_token_id=EOS))
    with torch.no_grad():
        model.transformer.wpe.weight[position] = 3e38
    return save_model(folder, model)


def one_long_prompt():
    """Prompts of which the first eight, those that the audit reads, are short."""
    return [*tiny.sums(8), {"prompt": "1+" * 20 + "1=", "solution": "3", "answer": "3"}]


def test_a_teacher_that_breaks_while_the_run_goes_on(refused, world):
    poison_position(world / "teacher", 30)
    write_rows(world / "train.jsonl", one_long_prompt())
    config = write_config(world, rollout={"prompts_per_step": 2}, run={"steps": 8})
    message = refused(config)
    run = world / "run"
    failed = next((run / "failed").iterdir())
    step = int(failed.stem)
    assert step > 1
    assert f"error: step {step}: the teacher gave a log-prob that is not finite" in message
    assert message.endswith(f"The batch is in {failed}.")
    rows = [json.loads(line) for line in failed.read_text().splitlines()]
    assert len(rows) == 4
    assert any(len(row["prompt_ids"]) > 30 for row in rows)
    assert all(len(row["student_logprobs"]) == len(row["completion_ids"]) for row in rows)
    assert "teacher_logprobs" not in rows[0]
    assert [line["step"] for line in tiny.metrics_of(run)] == list(range(1, step))


def test_a_teacher_that_breaks_in_the_audit(refused, world):
    poison_position(world / "teacher", 9)
    # A student that stops at once in about half of all cases.
    student = make_llama(0, sharp=0.1)
    with torch.no_grad():
        student.lm_head.weight[EOS] = 0
        student.lm_head.weight[3:] = 0
    save_model(world / "student", student)
    rows = [{"prompt": "1+1+1+1+1+", "solution": "5", "answer": "5"}]
    write_rows(world / "train.jsonl", rows * 8)
    config = write_config(world, rollout={"max_new_tokens": 100})
    assert "the teacher gives log-probs that are not finite on the first" in refused(config)
    assert not (world / "run").exists()


def test_a_student_that_cannot_write(refused, world):
    poison_position(world / "student", 12)
    write_rows(world / "train.jsonl", one_long_prompt()[8:])
    assert "the student's logits are not finite" in refused(world / "config.toml")
    assert not (world / "run").exists()


def test_a_model_whose_logits_are_not_finite(refused, world):
    poison_position(world / "teacher", 0)
    assert "its logits are not finite" in refused(world / "config.toml")


def test_a_loss_that_is_not_finite(refused, world):
    teacher = make_llama(1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1e38)
    save_model(world / "teacher", teacher)
    config = write_config(world, run={"steps": 3})
    message = refused(config)
    failed = world / "run" / "failed" / "000001.jsonl"
    assert message.startswith("error: step 1: ")
    assert "this update was not made" in message
    assert str(failed) in message
    assert len(failed.read_text().splitlines()) == 8
    # The evidence stays when the run goes on, with another fault to the same end.
    assert refused(config, "--resume") == message
    assert failed.exists()


def test_in_a_process_of_its_own(world):
    """What the shell sees: no traceback, no warnings of libraries, one line."""
    save_model(world / "teacher", GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_head=2)))
    (world / "teacher" / "model.safetensors").write_bytes(b"")
    for arguments in (
        (world / "none.toml",),
        (world / "config.toml", "--set", "run.step=3"),
        (world / "config.toml",),
    ):
        command = [sys.executable, "-m", "stableopd", "train", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
