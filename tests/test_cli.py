import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import stableopd
import tiny
from tiny import END, EOS, write_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.make_world(tmp_path_factory.mktemp("world") / "w")


@pytest.fixture(scope="module")
def trained(world):
    """A run with an evaluation, and what was printed on the way."""
    evaluation = {"data": str(world / "train.jsonl"), "max_problems": 3, "every": 1}
    config = write_config(world, run={"output": str(world / "trained")}, eval=evaluation)
    return world / "trained", *tiny.run_cli("train", config, draws=True)


@pytest.mark.parametrize(
    "command", [(), ("train",), ("demo",), ("diagnose",), ("doctor",), ("compare",), ("report",)]
)
def test_help(command):
    code, out, err = tiny.run_cli(*command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: " in out
    for word in {(): "report", ("train",): "--resume"}.get(command, "--help").split():
        assert word in out


def test_help_as_a_module():
    command = [sys.executable, "-m", "stableopd", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    "arguments", [("train",), ("nonsense",), ("train", "a", "b"), ("train", "c", "--no-such"), ()]
)
def test_what_is_no_command(arguments):
    code, _, err = tiny.run_cli(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_train_prints_the_audit_first_and_then_plain_lines(trained):
    run, code, out, err = trained
    assert (code, err) == (0, "")
    audit, title = out.index("Before the first step"), out.index(f"stable_opd in {run}\n")
    steps = [out.index(f"step {n}/2  ") for n in range(3)]
    assert [audit, title, *steps] == sorted([audit, title, *steps])
    assert "student and teacher both stop with 1 (<eos>)" in out
    assert "\x1b" not in out
    assert out.endswith(f"Report: {run / 'report.html'}\n")


def test_the_run_folder_is_complete(trained):
    run = trained[0]
    assert {p.name for p in run.iterdir()} == {
        "checkpoints",
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "report.html",
        "rollouts",
    }
    assert [line["step"] for line in tiny.metrics_of(run)] == [0, 1, 2]
    assert all("eval/accuracy" in line for line in tiny.metrics_of(run))
    environment = json.loads((run / "environment.json").read_text())
    # The name of the build is not part of every installation's version.
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["packages"]["stableopd"] == stableopd.__version__
    row = json.loads((run / "rollouts" / "000001.jsonl").read_text().splitlines()[0])
    assert len(row["teacher_logprobs"]) == len(row["completion_ids"])
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "000002")


def test_the_written_config_makes_the_same_run(trained, world):
    run, again = trained[0], world / "again"
    command = ("train", run / "config.toml", "--set", f"run.output={again}")
    assert tiny.run_cli(*command)[::2] == (0, "")
    assert tiny.metrics_of(again) == tiny.metrics_of(run)


def test_report(trained, world):
    run = trained[0]
    page = (run / "report.html").read_text()
    assert run.name in page
    assert str(run) not in page
    (run / "report.html").unlink()
    code, out, err = tiny.run_cli("report", run, draws=True)
    assert (code, err) == (0, "")
    assert out == f"Report: {run / 'report.html'}\n"
    elsewhere = world / "pages" / "one.html"
    code, out, err = tiny.run_cli("report", run, "--output", elsewhere, draws=True)
    assert (code, out, err) == (0, f"Report: {elsewhere}\n", "")
    assert elsewhere.read_text() == (run / "report.html").read_text()


def test_compare(trained, world):
    run, both = trained[0], world / "both.html"
    shutil.copytree(run, world / "copy")
    config = world / "copy" / "config.toml"
    config.write_text(config.read_text().replace("lambda_gold = 1.0", "lambda_gold = 0.5"))
    code, out, err = tiny.run_cli("compare", run, world / "copy", "--output", both)
    assert (code, err) == (0, "")
    assert "lambda_gold = 0.5" in " ".join(out.split())
    assert out.endswith(f"Page: {both}\n")
    assert "objective.lambda_gold" in both.read_text()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_is_no_run(world, trained, command):
    teacher, none = world / "teacher", world / "none"
    for folder, fault in ((teacher, "has no config.toml"), (none, "no such folder")):
        for arguments in ((folder,), (trained[0], folder))[: 1 + (command == "compare")]:
            page = world / "never.html"
            code, out, err = tiny.run_cli(command, *arguments, "--output", page, draws=True)
            assert (code, out) == (2, "")
            assert err == f"error: {folder}: {fault}; give the run.output of a run.\n"
            assert not page.exists()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_pages_that_cannot_be_written(world, trained, command):
    for page in (world, world / "config.toml" / "page.html"):
        code, out, err = tiny.run_cli(command, trained[0], "--output", page, draws=True)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {page}: ")


def test_report_on_a_run_without_a_step(trained, world):
    young = world / "young"
    shutil.copytree(trained[0], young)
    shutil.rmtree(young / "rollouts")
    (young / "metrics.jsonl").unlink()
    assert tiny.run_cli("report", young, draws=True)[::2] == (0, "")


def test_golden_solutions_that_do_not_fit_are_told(world):
    rows = [*tiny.sums(), {"prompt": "1+1=", "solution": "1" * 30, "answer": "2"}]
    tiny.write_rows(world / "long.jsonl", rows)
    fields = {"train": str(world / "long.jsonl")}
    config = write_config(world, run={"output": str(world / "long")}, data=fields)
    out = tiny.run_cli("train", config)[1]
    assert "1 of 21 golden solutions are longer than rollout.max_new_tokens = 8" in out


def test_the_python_interface(world):
    config = write_config(world, run={"output": str(world / "python")})
    run = stableopd.prepare(stableopd.load_config(config, ["run.steps=1"]))
    assert not (world / "python").exists()
    lines = list(stableopd.train(run, lambda: False))
    assert [line["step"] for line in lines] == [1]
    written = stableopd.RunFolder.open(world / "python").metrics()
    assert [line["loss/total"] for line in written] == [line["loss/total"] for line in lines]


@pytest.fixture(scope="module")
def stops_differ(tmp_path_factory):
    """A student that learnt to stop, and its copy, which stops with another id."""
    world = tiny.make_world(tmp_path_factory.mktemp("stops") / "w")
    run = {"output": str(world / "taught"), "steps": 60, "save_every": 60}
    config = write_config(
        world, run=run, objective={"method": "sft"}, optimizer={"learning_rate": 1e-2}
    )
    assert tiny.run_cli("train", config)[0] == 0
    shutil.rmtree(world / "student")
    shutil.rmtree(world / "teacher")
    model = AutoModelForCausalLM.from_pretrained(world / "taught" / "checkpoints" / "000060")
    tiny.save_model(world / "student", model)
    with torch.no_grad():
        head = model.lm_head.weight
        head[[EOS, END]] = head[[END, EOS]]
    model.generation_config.eos_token_id = model.config.eos_token_id = END
    tiny.save_model(world / "teacher", model, tiny.make_tokenizer(eos="<end>"))
    return world


@pytest.mark.parametrize("stop", ["token", "event"])
def test_stop_ids_that_differ(stops_differ, monkeypatch, stop):
    monkeypatch.setenv("COLUMNS", "400")
    run = stops_differ / stop
    config = write_config(
        stops_differ,
        run={"output": str(run), "steps": 15, "save_every": 15},
        objective={"method": "opd", "stop": stop},
        optimizer={"learning_rate": 3e-3},
        rollout={"prompts_per_step": 8},
    )
    code, out, err = tiny.run_cli("train", config)
    assert (code, err) == (0, "")
    checks = {row.split("│")[2].strip(): row for row in out.splitlines() if row.startswith("│")}
    lines = tiny.metrics_of(run)
    first = lines[0]["stop/student_logp"]
    last = [line["stop/student_logp"] for line in lines if "stop/student_logp" in line][-1]
    assert "the student stops with 1 (<eos>), the teacher with 2 (<end>)" in checks["stop ids"]
    if stop == "token":
        assert checks["stop ids"].startswith("│ WARN")
        assert checks["stop log-probs"].startswith("│ WARN")
        assert 'set objective.stop = "event"' in checks["stop ids"]
        assert lines[0]["stop/teacher_logp"] < first - 5
        assert last < first - 1
        assert lines[-1]["rollout/mean_length"] > lines[0]["rollout/mean_length"] + 1
    else:
        assert checks["stop ids"].startswith("│ OK")
        assert checks["stop log-probs"].startswith("│ OK")
        assert "the event of ids {1, 2} is scored as one stop" in checks["stop ids"]
        # The two are one model but for the name of the stop: nothing is to be learnt, and the
        # student goes no further than AdamW carries it on the rounding of zeros.
        assert lines[0]["stop/teacher_logp"] == pytest.approx(first, abs=1e-5)
        assert abs(last - first) < 0.9
        assert lines[0]["advantage/mean"] == pytest.approx(0.0, abs=1e-6)


def test_a_demo_in_a_name_that_no_file_system_takes(tmp_path):
    code, _, err = tiny.run_cli("demo", "--output", tmp_path / ("x" * 300))
    assert (code, err.count("\n")) == (2, 1)
