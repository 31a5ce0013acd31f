"""`stableopd eval`: its numbers by brute force, killed and continued, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import peft
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

import runfolder_parts
import tiny
from stableopd import embedded
from stableopd.data.grading import judge
from stableopd.evaluate.loading import load_model
from stableopd.evaluate.measure import summarise
from stableopd.rollout.stops import stop_ids_of
from stableopd.runfolder import RunFolder

BASIC = ("eval", "--model", "embedded", "--data", "embedded", "--max-new-tokens", 40)


def run(output: Path, *more: object, basic: tuple[object, ...] = BASIC) -> str:
    code, out, err = tiny.run_cli(*basic, "--output", output, *more)
    assert (code, err) == (0, "")
    return out


def refused(output: Path, *more: object, basic: tuple[object, ...] = BASIC) -> str:
    code, _, err = tiny.run_cli(*basic, "--output", output, *more)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def rows_of(folder: Path, name: str = "embedded") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def summary_of(folder: Path, name: str = "embedded") -> dict:
    return json.loads((folder / "summary.json").read_text())["sets"][name]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """24 problems, four answers each; the budget cuts some off and short repeats count."""
    folder = tmp_path_factory.mktemp("made") / "eval"
    options = ("-k", 4, "--max-problems", 24, "--window-chars", 8, "--ratio", 1.0)
    out = run(folder, *options, "--batch-size", 12, "--temperature", 1.2, "--max-new-tokens", 27)
    return folder, out


def test_the_rows_are_what_was_written(made):
    rows = rows_of(made[0])
    assert [row["id"] for row in rows] == [f"test-0-{n}" for n in range(24)]
    for row in rows:
        assert row["prompt"].endswith(":")
        assert row["correct"] == [
            ";#" in text and text.rpartition(";#")[2] == row["answer"]
            for text in row["completions"]
        ]
        assert row["num_correct"] == sum(row["correct"])
        for text, length, reason in zip(
            row["completions"], row["lengths"], row["stop_reasons"], strict=True
        ):
            # One character is one token, and a stop is one more.
            assert length == len(text) + (reason == "stop")
            assert (length == 27) or reason == "stop"
    assert {reason for row in rows for reason in row["stop_reasons"]} == {"stop", "length"}
    # Text as a seed: neighbouring problems are drawn apart.
    assert len({row["completions"][0][-5:] for row in rows}) > 5


def test_the_summary_is_what_the_rows_say(made):
    rows, summary = rows_of(made[0]), summary_of(made[0])
    assert (summary["num_problems"], summary["num_samples"], summary["num_timeouts"]) == (24, 4, 0)
    shares = [fmean(row["correct"]) for row in rows]
    assert 0 < fmean(shares) < 1
    half = stats.t.ppf(0.975, 23) * stdev(shares) / 24**0.5
    expected = {"mean": fmean(shares), "low": fmean(shares) - half, "high": fmean(shares) + half}
    assert summary["accuracy"] == pytest.approx(expected, abs=1e-4)
    assert list(summary["pass_at"]) == ["1", "2", "4"]
    for k, found in summary["pass_at"].items():
        chances = [
            fmean(any(drawn) for drawn in itertools.combinations(row["correct"], int(k)))
            for row in rows
        ]
        assert found["mean"] == pytest.approx(fmean(chances))
        assert found["low"] < found["mean"] < found["high"]
    cut = [reason == "length" for row in rows for reason in row["stop_reasons"]]
    assert summary["truncation_rate"]["mean"] == pytest.approx(fmean(cut))
    lengths = [length for row in rows for length in row["lengths"]]
    assert summary["mean_length"]["mean"] == pytest.approx(fmean(lengths))
    flags = [flag for row in rows for flag in row["repetitive"]]
    assert summary["repetition_rate"]["mean"] == pytest.approx(fmean(flags))
    assert len(set(flags)) == 2 or summary["repetition_rate"]["mean"] in (0, 1)


def test_what_is_printed(made):
    folder, out = made
    summary = summary_of(folder)
    for name, value in (("avg@4", summary["accuracy"]), ("pass@4", summary["pass_at"]["4"])):
        (line,) = (line for line in out.splitlines() if name in line)
        for part in value.values():
            assert f"{part:.3f}" in line
    assert "24 problems" in out
    assert out.endswith(f"Summary and answers: {folder}\n")
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_an_evaluation_that_is_done_is_shown_again(made):
    folder, out = made
    before = tiny.files_in(folder)
    options = ("-k", 4, "--max-problems", 24, "--window-chars", 8, "--ratio", 1.0)
    options += ("--batch-size", 12, "--temperature", 1.2, "--max-new-tokens", 27)
    assert run(folder, *options) == out
    assert json.loads(run(folder, *options, "--json"))["sets"]["embedded"] == summary_of(folder)
    assert tiny.files_in(folder) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--temperature", 0.7), "temperature = 0.6, and this is 0.7"),
        (("-k", 3), "num_samples = 2, and this is 3"),
        (("--model", "embedded-teacher"), "model = 'embedded', and this is 'embedded-teacher'"),
        (("--max-problems", 5), "max_problems = 4, and this is 5"),
        (("--grader", "math"), "grader = 'auto', and this is 'math'"),
    ],
)
def test_other_settings_are_refused(tmp_path, changed, said):
    run(tmp_path / "e", "-k", 2, "--max-problems", 4)
    before = tiny.files_in(tmp_path)
    assert said in refused(tmp_path / "e", "-k", 2, "--max-problems", 4, *changed)
    assert tiny.files_in(tmp_path) == before


def test_killed_and_continued(tmp_path):
    """SIGKILL, several times; the files are those of an evaluation that nothing disturbed."""
    options = ["-k", "2", "--batch-size", "4", "--max-problems", "60"]
    run(tmp_path / "whole", *options)
    whole = (tmp_path / "whole" / "embedded.jsonl").read_bytes()
    command = [sys.executable, "-m", "stableopd", *map(str, BASIC), *options]
    command += ["--output", str(tmp_path / "killed")]
    file = tmp_path / "killed" / "embedded.jsonl"
    for least in (5, 25):
        child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if file.is_file() and file.read_bytes().count(b"\n") >= least:
                break
            time.sleep(0.002)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert least <= file.read_bytes().count(b"\n") < 60
        assert not (tmp_path / "killed" / "summary.json").exists()
    # As if the kill had come within the two problems that are written together, and a line.
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:7]) + b'{"id": "te')
    run(tmp_path / "killed", *options)
    assert file.read_bytes() == whole
    assert tiny.files_in(tmp_path / "killed") == tiny.files_in(tmp_path / "whole")


def test_data_sets_come_beside_each_other(tmp_path):
    rows = [{"prompt": f"{n}+1:", "answer": str(n + 1), "id": n} for n in range(10, 16)]
    tiny.write_rows(tmp_path / "small.jsonl", rows)
    options = ("--max-problems", 6, "--grader", "exact", "--answer-marker", ";#")
    basic = (*BASIC[:3], *BASIC[5:], "--data", tmp_path / "small.jsonl", *options)
    run(tmp_path / "e", basic=basic)
    small = (tmp_path / "e" / "small.jsonl").read_bytes()
    out = run(tmp_path / "e", *options)  # the embedded problems, in the same folder
    assert "small" in out
    assert "embedded" in out
    both = json.loads((tmp_path / "e" / "summary.json").read_text())["sets"]
    assert list(both) == ["small", "embedded"]
    assert (tmp_path / "e" / "small.jsonl").read_bytes() == small
    # Another problem under the same name would mix two data sets.
    tiny.write_rows(tmp_path / "small.jsonl", [*rows[:-1], {**rows[-1], "answer": "7"}])
    assert "small: the problems" in refused(tmp_path / "e", basic=basic)
    # Data that a kill left half answered is not in the summary.
    part = b"".join(small.splitlines(keepends=True)[:2])
    (tmp_path / "e" / "small.jsonl").write_bytes(part)
    run(tmp_path / "e", *options)
    both = json.loads((tmp_path / "e" / "summary.json").read_text())["sets"]
    assert list(both) == ["embedded"]


def test_math_is_graded_by_value(tmp_path):
    """The embedded models write their sum behind "#": math-verify takes it as the last number."""
    rows = [{"prompt": "51+8-4+1:", "answer": "\\frac{112}{2}"}]
    rows += [{"prompt": "9+5+3+1:", "answer": "2"}]
    tiny.write_rows(tmp_path / "sums.jsonl", rows)
    options = ("-k", 8, "--model", "embedded-teacher", "--data", tmp_path / "sums.jsonl")
    run(tmp_path / "e", *options, "--temperature", 0.1, basic=(BASIC[0], *BASIC[5:]))
    first, second = rows_of(tmp_path / "e", "sums")
    assert any(";#56" in text for text in first["completions"])
    for text, right in zip(first["completions"], first["correct"], strict=True):
        assert right == (text.rpartition("#")[2].partition(";")[0] == "56")
    assert second["num_correct"] == 0


def test_an_answer_that_takes_too_long_is_late_and_wrong():
    began = time.monotonic()
    late = judge("\\boxed{9^{9^{9^{9}}}}", "42", "math", "", time_limit=1.5)
    assert (late.is_right, late.is_late) == (False, True)
    assert time.monotonic() - began < 60
    assert judge("\\boxed{42}", "42", "math", "", time_limit=10.0).is_right
    wrong = judge("\\boxed{41}", "42", "math", "", time_limit=10.0)
    assert (wrong.is_right, wrong.is_late) == (False, False)


def row(num_correct: int, k: int = 2, num_timeouts: int = 0) -> dict:
    return {"num_correct": num_correct, "lengths": [10] * k, "stop_reasons": ["stop"] * k,
            "repetitive": [False] * k, "num_timeouts": num_timeouts}  # fmt: skip


def test_intervals_where_all_problems_agree():
    none = summarise([row(0)] * 30, 2)
    # Wilson's interval of 0 of 30, whatever k: z^2 / (n + z^2).
    expected = {"mean": 0, "low": 0, "high": 3.8415 / 33.8415}
    assert none["accuracy"] == pytest.approx(expected, abs=1e-4)
    assert summarise([row(2)] * 30, 2)["accuracy"]["low"] == pytest.approx(30 / 33.8415, abs=1e-4)
    half = summarise([row(1)] * 30, 2)["accuracy"]
    assert half == {"mean": 0.5, "low": None, "high": None}
    assert none["mean_length"] == {"mean": 10, "low": None, "high": None}
    assert summarise([row(0, num_timeouts=1), row(1)], 2)["num_timeouts"] == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_evaluated_as_its_merged_model(tmp_path):
    peft = pytest.importorskip("peft")
    student = AutoModelForCausalLM.from_pretrained(embedded.path("student"))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(student, config)
    adapted.peft_config["default"].base_model_name_or_path = str(embedded.path("student"))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("student"))
    tiny.save_model(tmp_path / "merged", adapted.merge_and_unload(), tokenizer)
    texts = {}
    for name in ("adapter", "merged"):
        basic = (*BASIC[:1], "--model", tmp_path / name, *BASIC[3:])
        run(tmp_path / f"e-{name}", "--max-problems", 4, "--temperature", 0, basic=basic)
        texts[name] = [row["completions"] for row in rows_of(tmp_path / f"e-{name}")]
    assert texts["adapter"] == texts["merged"]
    run(tmp_path / "base", "--max-problems", 4, "--temperature", 0)
    assert [row["completions"] for row in rows_of(tmp_path / "base")] != texts["merged"]
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    said = refused(tmp_path / "e", basic=(*BASIC[:1], "--model", tmp_path / "adapter", *BASIC[3:]))
    assert "adapter_model.safetensors" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-k", 4, "--temperature", 0), "--temperature 0 writes the same answer 4 times"),
        (("--data", "embedded"), "would both be called 'embedded'"),
        (("--grader", "guess"), "--grader guess: choose from auto, math, exact"),
        (("--top-p", 0), "--top-p 0.0"),
        (("--time-limit", "nan"), "--time-limit nan"),
        (("--max-new-tokens", 500), "lower --max-new-tokens"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--model", "./nowhere"), "not a model folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, options, said):
    assert said in refused(tmp_path / "e", *options)
    assert not (tmp_path / "e").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all")
    assert "holds no evaluation" in refused(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_problems_without_answers_are_refused(tmp_path):
    tiny.write_rows(tmp_path / "p.jsonl", [{"prompt": "1+1:"}])
    said = refused(tmp_path / "e", "--data", tmp_path / "p.jsonl")
    assert "no column 'answer'" in said


SHORT = ("--data", "p.jsonl", "--grader", "exact", "--answer-marker", ";#", "--max-new-tokens", 8)


@pytest.fixture
def short(tmp_path):
    """Four problems and a model folder of one's own: the folder of the evaluation, its command."""
    rows = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(4)]
    tiny.write_rows(tmp_path / "p.jsonl", rows)
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tiny.save_model(tmp_path / "model", tiny.make_llama(), tokenizer)
    basic = ("eval", "--model", tmp_path / "model", "--data", tmp_path / "p.jsonl", *SHORT[2:])
    run(tmp_path / "e", "--batch-size", 2, basic=basic)
    return tmp_path / "e", (*basic, "--batch-size", 2)


def changed_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "0{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


def changed_stop(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [tiny.EOS, tiny.END]
    model.save_pretrained(folder)


def changed_context(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "killed"])
@pytest.mark.parametrize("change", [changed_template, changed_stop, changed_context])
def test_stale_answers_are_never_shown_as_new(short, change, is_cut):
    folder, basic = short
    if is_cut:
        lines = (folder / "p.jsonl").read_text().splitlines(keepends=True)
        (folder / "p.jsonl").write_text("".join(lines[:2]))
    before = tiny.files_in(folder)
    change(folder.parent / "model")
    said = refused(folder, basic=basic)
    assert str(folder) in said
    assert not re.search("[0-9a-f]{64}", said)  # a hash tells nobody anything
    assert tiny.files_in(folder) == before


def test_an_evaluation_of_an_earlier_version_is_refused(short):
    folder, basic = short
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "format": 1}))
    assert "--output" in refused(folder, basic=basic)


def test_a_kill_in_the_first_write_leaves_a_folder_that_goes_on(short):
    folder, basic = short
    for file in folder.iterdir():
        file.unlink()
    (folder / ".settings.json.tmp").write_text("{")
    (folder / ".lock").touch()
    run(folder, basic=basic)
    assert not (folder / ".lock").exists()
    assert len(rows_of(folder, "p")) == 4


@pytest.mark.parametrize("damage", ["doubled", "swapped", "typed", "counted"])
def test_rows_that_two_processes_left_name_the_cure(short, damage):
    folder, basic = short
    lines = (folder / "p.jsonl").read_text().splitlines(keepends=True)
    lines = {
        "doubled": [*lines, *lines[:2]],
        "swapped": [lines[1], lines[0], *lines[2:]],
        "typed": [lines[0].replace('"lengths": [', '"lengths": ["'), *lines[1:]],
        "counted": [json.dumps({**json.loads(lines[0]), "num_correct": 7}) + "\n", *lines[1:]],
    }[damage]
    (folder / "p.jsonl").write_text("".join(lines))
    assert "p.jsonl" in refused(folder, basic=basic)
    (folder / "p.jsonl").unlink()
    run(folder, basic=basic)


def test_one_evaluation_at_a_time(short):
    folder, basic = short
    before = tiny.files_in(folder)
    with runfolder_parts.held_by_another(folder) as other:
        assert str(folder) in refused(folder, basic=basic)
        other.kill()
    (folder / ".lock").unlink()
    assert tiny.files_in(folder) == before


def test_a_run_is_no_model_and_its_newest_checkpoint_is_named(tmp_path):
    made = RunFolder.create(tmp_path / "run", "", {})
    for step in (5, 10):
        runfolder_parts.fill(made, step)
    basic = ("eval", "--model", tmp_path / "run", "--data", "embedded")
    assert str(tmp_path / "run" / "checkpoints" / "000010") in refused(tmp_path / "e", basic=basic)


def test_more_answers_than_can_be_held(tmp_path):
    assert "-k" in refused(tmp_path / "e", "-k", 10**12)
    assert not (tmp_path / "e").exists()


def test_a_name_that_no_file_system_takes(tmp_path):
    assert "too long" in refused(tmp_path / ("x" * 300), "--max-problems", 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_stops_where_its_run_did_and_its_scale_decides(tmp_path):
    base = tiny.save_model(tmp_path / "base", tiny.make_llama())
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        ),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    stops = {"eos_token_id": [tiny.EOS, tiny.END]}
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps(stops))
    load = functools.partial(load_model, gguf_file="", dtype=torch.float32, device=tiny.CPU)
    model, weights = load(str(tmp_path / "adapter"), role="eval")
    assert stop_ids_of(model.model, model.tokenizer) == (tiny.EOS, tiny.END)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 64}))
    assert load(str(tmp_path / "adapter"), role="eval")[1] != weights
