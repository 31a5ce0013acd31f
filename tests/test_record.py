"""What a run decides is in what it leaves, and a resumed run finds what it left, or says so."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import runfolder_parts
import tiny
from stableopd.config import load
from stableopd.data import rows
from stableopd.data.rows import read_rows
from stableopd.rollout.stops import stop_ids_of
from stableopd.runfolder import RunFolder
from stableopd.training.loop import train
from stableopd.training.setup import begin, prepare
from stableopd.types import DataError

TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The teacher stops with another id; the student has a chat template."""
    world = tiny.make_world(tmp_path_factory.mktemp("world") / "w")
    teacher = tiny.make_llama(1, width=48, sharp=8)
    teacher.generation_config.eos_token_id = tiny.END
    tiny.save_model(world / "teacher", teacher, tiny.make_tokenizer(eos="<end>"))
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(world / "student")
    return world


def configure(world, name, **sections):
    run = {"output": str(world / name), **sections.pop("run", {})}
    return tiny.write_config(world, f"{name}.toml", run=run, **sections)


@pytest.fixture(scope="module", params=["full", "lora"])
def made(world, request):
    """A run of two steps, with all weights or an adapter, and a reference."""
    fields = {"student": {"lora_rank": 2}} if request.param == "lora" else {}
    fields["objective"] = {"beta_reference": 0.1}
    fields["eval"] = {"data": str(world / "train.jsonl"), "max_problems": 2, "samples": 1}
    config = configure(world, request.param, **fields)
    code, _, err = tiny.run_cli("train", config)
    assert code == 0, err
    return RunFolder(world / request.param), config


@pytest.fixture
def copied(made, tmp_path):
    """A copy of that run, to be damaged, and how to resume it."""
    folder, config = made
    shutil.copytree(folder.path, tmp_path / "run")

    def resume(*options, steps=3, draws=False):
        sets = ("--set", f"run.output={tmp_path / 'run'}", "--set", f"run.steps={steps}")
        return tiny.run_cli("train", config, *sets, "--resume", *options, draws=draws)

    return RunFolder(tmp_path / "run"), resume


def test_a_checkpoint_stops_where_the_run_did(made):
    folder, _ = made
    path = folder.checkpoint_path(2)
    settings = json.loads((path / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tiny.EOS, tiny.END]
    if not (path / "adapter_config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(path)
        found = stop_ids_of(model, AutoTokenizer.from_pretrained(path))
        assert found == (tiny.EOS, tiny.END)


def test_resume_knows_the_ids_of_the_student_itself(made):
    folder, config = made
    run = prepare(load(config, ["run.steps=3"]), resume=True)
    assert run.stops.student_ids == (tiny.EOS,)
    assert run.stops.decode_ids == (tiny.EOS, tiny.END)
    run.folder.unlock()
    assert not (folder.path / ".lock").exists()


def test_the_environment_names_no_place(made, world):
    folder, _ = made
    text = (folder.path / "environment.json").read_text()
    assert str(world) not in text
    assert "/" not in "".join(json.loads(text)["command"])


def change_rows(world, field, value):
    file = world / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3][field] = value
    tiny.write_rows(file, rows)


def change_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(folder)


def change_template(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    tokenizer.chat_template = "7" + TEMPLATE
    tokenizer.save_pretrained(world / "student")


CHANGES = {
    "prompt": (lambda world: change_rows(world, "prompt", "1+1="), "data,eval"),
    "answer": (lambda world: change_rows(world, "answer", "1"), "data"),
    "solution": (lambda world: change_rows(world, "solution", "1"), "data"),
    "base": (lambda world: change_weights(world / "student"), "student"),
    "teacher": (lambda world: change_weights(world / "teacher"), "teacher"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_refused_and_allowed_by_name(world, copied, tmp_path, what):
    folder, resume = copied
    change, names = CHANGES[what]
    kept = tmp_path / "world"
    shutil.copytree(world, kept, ignore=shutil.ignore_patterns("full", "lora"))
    before = tiny.files_in(folder.path)
    try:
        change(world)
        code, _, err = resume()
        assert (code, err.count("\n")) == (2, 1)
        needed = names.split(",")[0]
        assert f"--allow-changed {needed}" in err
        assert tiny.files_in(folder.path) == before
        assert resume("--allow-changed", "eval")[0] == 2
        code, _, err = resume("--allow-changed", names)
        assert code == 0, err
        # Written down, so that it need not be allowed again.
        changed = folder.environment()["changed"]
        assert [one["step"] for one in changed] == [2]
        code, _, err = resume(steps=4)
        assert code == 0, err
        assert folder.metrics()[-1]["step"] == 4
    finally:
        shutil.copytree(kept, world, dirs_exist_ok=True)


def test_a_template_that_renders_other_prompts_is_refused(world, copied, tmp_path):
    """The template of a checkpoint is its own; that of an adapter's base counts."""
    folder, resume = copied
    path = folder.checkpoint_path(2)
    where = world if (path / "adapter_config.json").exists() else path.parent
    if where != world:
        shutil.copytree(path, where / "student")
        (path / "trainer" / "manifest.json").unlink()
    kept = tmp_path / "student"
    shutil.copytree(where / "student", kept)
    try:
        change_template(where)
        if where != world:
            for file in (where / "student").glob("*token*"):
                shutil.copy(file, path)
            for file in (where / "student").glob("*.jinja"):
                shutil.copy(file, path)
        code, _, err = resume()
        assert code == 2
        assert "--allow-changed data" in err
        assert "template" in err
    finally:
        shutil.copytree(kept, where / "student", dirs_exist_ok=True)


def test_names_that_cannot_be_allowed(made):
    _, config = made
    for options in (("--resume", "--allow-changed", "weights"), ("--allow-changed", "data")):
        code, _, err = tiny.run_cli("train", config, *options)
        assert (code, err.count("\n")) == (2, 1)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


def drop_line(folder, number):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


def double_line(folder):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([*lines, lines[-1]]))


def change_state(folder, change):
    """Change a state as one who also keeps the manifest right, or has none."""
    path = folder / "checkpoints" / "000002" / "trainer"
    state = torch.load(path / "state.pt")
    torch.save(change(state), path / "state.pt")
    (path / "manifest.json").unlink()


def reshaped(state):
    next(iter(state["optimizer"]["state"].values()))["exp_avg"] = torch.zeros(3)
    return state


def first_moment(name, value):
    def change(state):
        next(iter(state["optimizer"]["state"].values()))[name] = value
        return state

    return change


DAMAGE = {
    "weights": lambda run: flip(next((run / "checkpoints" / "000002").glob("*.safetensors"))),
    "state": lambda run: flip(run / "checkpoints" / "000002" / "trainer" / "state.pt"),
    "no line": lambda run: (run / "metrics.jsonl").unlink(),
    "torn line": lambda run: (run / "metrics.jsonl").write_bytes(
        (run / "metrics.jsonl").read_bytes()[:-1]
    ),
    "lost line": lambda run: drop_line(run, 1),
    "doubled line": double_line,
    "not the line of a step": lambda run: (run / "metrics.jsonl").write_text('{"stap": 1}\n'),
    "an event of other keys": lambda run: (run / "events.jsonl").write_text('{"step": 1}\n'),
    "another step": lambda run: change_state(run, lambda state: {**state, "step": 1}),
    "a step of text": lambda run: change_state(run, lambda state: {**state, "step": "x"}),
    "a list": lambda run: change_state(run, lambda _: [1]),
    "a number": lambda run: change_state(run, lambda state: {**state, "optimizer": 5}),
    "a shape": lambda run: change_state(run, reshaped),
    "a type": lambda run: change_state(run, first_moment("step", torch.tensor(1))),
    "no tensor": lambda run: change_state(run, first_moment("exp_avg_sq", None)),
    "the schedule": lambda run: change_state(
        run, lambda state: {**state, "scheduler": {**state["scheduler"], "last_epoch": 9}}
    ),
    "a file for a folder": lambda run: (
        shutil.rmtree(run / "rollouts"),
        (run / "rollouts").write_text(""),
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused(copied, what):
    folder, resume = copied
    DAMAGE[what](folder.path)
    before = tiny.files_in(folder.path)
    code, _, err = resume()
    assert (code, err.count("\n")) == (2, 1), err
    assert str(folder.path) in err
    assert tiny.files_in(folder.path) == before


def test_a_checkpoint_of_an_earlier_version_resumes(copied):
    """Without manifest and checksums, and with a note."""
    folder, resume = copied
    (folder.checkpoint_path(2) / "trainer" / "manifest.json").unlink()
    environment = folder.environment()
    folder.write_environment({k: v for k, v in environment.items() if k != "inputs"})
    code, out, err = resume()
    assert code == 0, err
    assert "manifest" in " ".join((out + err).split())
    assert folder.environment()["inputs"] == environment["inputs"]


def rates(folder):
    return [line["learning_rate"] for line in folder.metrics() if line["step"]]


def steps_of(config, sets, resume):
    run = prepare(load(config, sets), resume)
    for _ in train(run, lambda: False):
        pass
    return run


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_steps_of_a_decaying_schedule(world, tmp_path, schedule):
    optimizer = {"schedule": schedule, "learning_rate": 1e-3}
    config = configure(world, f"more-{schedule}", optimizer=optimizer)
    whole = steps_of(config, ["run.steps=4", f"run.output={tmp_path / 'whole'}"], False)
    for name, sets in (("stretched", []), ("kept", ["optimizer.schedule_steps=2"])):
        output = f"run.output={tmp_path / name}"
        first = steps_of(config, ["run.steps=2", output], False)
        assert not first.notes
        run = steps_of(config, ["run.steps=4", output, *sets], True)
        assert any("schedule" in note for note in run.notes)
        if name == "stretched":
            # No step at the old end's rate, and then what a run of four steps has.
            assert rates(run.folder)[2:] == rates(whole.folder)[2:]
            assert any("optimizer.schedule_steps=2" in note for note in run.notes)
        else:
            assert rates(run.folder) == [*rates(first.folder)[:2], 0, 0]


def test_a_warmup_that_never_ends_is_told(world, tmp_path):
    sets = ["optimizer.warmup_steps=5", f"run.output={tmp_path / 'run'}"]
    notes = prepare(load(configure(world, "warm"), sets)).notes
    assert any("warmup_steps" in note for note in notes)


def test_a_run_killed_after_its_last_checkpoint_gets_its_page(copied):
    folder, resume = copied
    (folder.path / "checkpoints" / ".000001.tmp").mkdir()
    folder.page.unlink(missing_ok=True)
    code, _, err = resume(steps=2, draws=True)
    assert code == 0, err
    assert folder.page.stat().st_size > 1000
    assert not (folder.path / "checkpoints" / ".000001.tmp").exists()
    assert not (folder.path / ".lock").exists()


def test_two_processes_do_not_share_a_folder(copied):
    folder, resume = copied
    before = tiny.files_in(folder.path)
    with runfolder_parts.held_by_another(folder.path) as other:
        code, _, err = resume()
        assert (code, err.count("\n")) == (2, 1)
        assert str(folder.path) in err
        other.kill()
    (folder.path / ".lock").unlink()
    assert tiny.files_in(folder.path) == before


def test_a_new_run_tells_of_a_file_system_without_locks(world, tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    sets = [f"run.output={tmp_path / 'run'}", "run.trackers=[]"]
    begin(prepare(load(configure(world, "unlocked"), sets)))
    assert "No locks available" in caplog.text
    assert (tmp_path / "run" / "config.toml").exists()


def test_more_prompts_a_step_than_there_are(world, tmp_path):
    config, output = configure(world, "many"), f"run.output={tmp_path / 'run'}"
    run = prepare(load(config, ["rollout.prompts_per_step=21", output]))
    assert any("prompts_per_step" in note for note in run.notes)
    for override in ("rollout.prompts_per_step=100000", "student.lora_rank=1000000"):
        code, _, err = tiny.run_cli("train", config, "--set", output, "--set", override)
        assert (code, err.count("\n")) == (2, 1)
        assert override.partition("=")[0] in err


def test_a_line_of_data_without_an_end_is_not_read_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LINE_BYTES", 100)
    path = tmp_path / "p.jsonl"
    good = '{"prompt": "1"}\n'
    path.write_text(good + '{"prompt": "' + "x" * 85 + '"}\n' + '{"prompt": "' + "x" * 86 + '"}\n')
    found = read_rows(path, "train")
    assert [next(found).values["prompt"][:1], next(found).values["prompt"][:1]] == ["1", "x"]
    with pytest.raises(DataError, match="line 3"):
        next(found)


def test_data_that_is_a_pipe_is_not_waited_for(world, tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match=r"p\.jsonl"):
        next(read_rows(tmp_path / "p.jsonl", "train"))
