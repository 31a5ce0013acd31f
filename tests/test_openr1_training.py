"""Model folders and TOMLs of recipes/openr1-math: each stage for two steps, with tiny models."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from openr1_parts import (
    PLAIN,
    RECIPE,
    RENAMED,
    SMALL,
    THINKING,
    make_base,
    must,
    read,
    run,
    scripts,
    tokenizer_with,
    write_evaluation_sets,
    write_openr1,
)
from stableopd import config
from stableopd.models import load, require_same_tokenizer
from stableopd.types import ModelError
from tiny import CPU, END, EOS, VOCABULARY, files_in, make_llama, run_cli, save_model

pytestmark = pytest.mark.recipe

SIZES = {
    "run.steps": 2,
    "run.save_every": 2,
    "rollout.prompts_per_step": 2,
    "rollout.max_new_tokens": 60,
    "rollout.max_prompt_tokens": 200,
    "eval.max_problems": 2,
    "eval.every": 2,
}


@pytest.fixture(scope="module")
def recipe():
    with scripts() as modules:
        yield modules


@pytest.fixture(scope="module")
def world(recipe, tmp_path_factory):
    """The commands of the first pair up to the training: models, evaluation sets, data."""
    folder = tmp_path_factory.mktemp("openr1")
    make_base(folder / "base")
    teacher = make_llama(1, width=48, sharp=8, max_position_embeddings=2048)
    teacher.generation_config.eos_token_id = END
    save_model(folder / "teacher", teacher, tokenizer_with(PLAIN))
    write_openr1(folder / "hub")
    write_evaluation_sets(folder / "sets")
    must(recipe["model_folders"], "extend", folder / "base", folder / "student")
    make_data(recipe, folder, folder, folder / "student")
    return folder


def make_data(recipe, world: Path, output: Path, student: Path, place: str = "system") -> None:
    """Write eval/ and data/ of a student into a folder."""
    options = ("--output", output / "eval", "--place", place)
    must(recipe["evaluation_sets"], world / "sets", *options)
    must(
        recipe["prepare"],
        *(world / "hub", "--tokenizer", student, "--output", output / "data"),
        *("--evaluation", output / "eval", "--place", place, *SMALL),
    )


def train(toml: str, data: Path, **changes: object) -> Path:
    """Run a shipped TOML with other paths and sizes, and nothing else changed."""
    paths = {"eval.data": data / "eval" / "math500.jsonl"}
    paths["data.train"] = data / "data" / f"train-{'sft' if 'sft' in toml else 'opd'}.jsonl"
    overrides = [f"--set={key}={value}" for key, value in (SIZES | paths | changes).items()]
    code, _, error = run_cli("train", RECIPE / toml, *overrides)
    assert code == 0, error
    return Path(str(changes["run.output"]))


@pytest.fixture(scope="module")
def sft(world):
    """Two steps of sft-1.5b.toml."""
    changes = {"run.output": world / "runs" / "sft", "student.model": world / "student"}
    return train("sft-1.5b.toml", world, **changes)


def settings_of(folder: Path):
    return config.load(folder / "config.toml")


def test_warm_start(sft):
    lines = read(sft / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(line["loss/golden"]) for line in lines[1:])
    assert "loss/opd" not in lines[2]
    assert settings_of(sft).optimizer.learning_rate == 5e-5
    assert (sft / "checkpoints" / "000002" / "config.json").exists()


ARMS = {
    "stable_opd": ({}, 1.0, 0.01),
    "opd": ({"objective.method": "opd"}, 0.0, 0.0),
    "opd-kl": ({"objective.method": "opd", "objective.beta_reference": 0.01}, 0.0, 0.01),
    "opd-golden": ({"objective.method": "opd", "objective.lambda_gold": 1.0}, 1.0, 0.0),
}


@pytest.mark.parametrize("arm", ARMS)
def test_arms(arm, world, sft, tmp_path):
    """Two steps of each arm from the warm start, with a teacher that stops with another token."""
    changes, lambda_gold, beta = ARMS[arm]
    models = {"student.model": sft / "checkpoints/000002", "teacher.model": world / "teacher"}
    made = {"run.output": tmp_path / arm, **models, **changes}
    folder = train("1.5b-openthinker3.toml", world, **made)
    objective = settings_of(folder).objective
    assert (objective.lambda_gold, objective.beta_reference) == (lambda_gold, beta)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["stops"]["event_ids"] == [EOS, END]
    lines = read(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert math.isfinite(line["loss/opd"])
        assert ("loss/golden" in line) is bool(lambda_gold)
        assert ("loss/reference_kl" in line) is bool(beta)
        assert line["mismatch/kl"] < 1e-3
        assert line["learning_rate"] == 1e-6


def test_lora_in_bfloat16_and_back(recipe, world, tmp_path):
    """What one GPU takes of the 7B pair: SFT as LoRA, merged, then StableOPD as LoRA."""
    base, merged = world / "student", tmp_path / "merged"
    lora = {"student.lora_rank": 4, "student.dtype": "bfloat16"}
    made = {"run.output": tmp_path / "sft", "student.model": base, **lora}
    checkpoint = train("sft-7b.toml", world, **made) / "checkpoints" / "000002"
    script = recipe["model_folders"]
    must(script, "merge", checkpoint, merged)

    # W + alpha / rank B A, by hand.
    name = "model.layers.1.mlp.up_proj"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    before, after = (load_file(f / "model.safetensors")[f"{name}.weight"] for f in (base, merged))
    assert torch.allclose(after, before + 32 / 4 * b @ a, atol=1e-7)
    assert not torch.equal(after, before)
    assert load(str(merged), role="student", dtype=torch.float32, device=CPU).context == 16_384
    code, _, error = run(script, "merge", base, tmp_path / "none")
    assert code == 2
    assert "cannot be merged" in error
    assert not (tmp_path / "none").exists()

    made = {"run.output": tmp_path / "opd", "student.model": merged, **lora}
    folder = train("7b-openthinker3.toml", world, **made, **{"teacher.model": world / "teacher"})
    line = read(folder / "metrics.jsonl")[-1]
    assert math.isfinite(line["loss/reference_kl"])
    assert math.isfinite(line["loss/opd"])
    options = ("-k", 2, "--max-new-tokens", 8, "--device", "cpu", "--output", tmp_path / "eval")
    adapter, problems = folder / "checkpoints/000002", world / "eval" / "aime24.jsonl"
    code, _, error = run_cli("eval", "--model", adapter, "--data", problems, *options)
    assert code == 0, error


def test_the_pair_with_other_special_tokens(recipe, world, tmp_path):
    """The student with the teacher's tokenizer, from its data to two steps of StableOPD."""
    theirs = tokenizer_with(THINKING, vocabulary=RENAMED, eos="<stop>")
    teacher = make_llama(2, sharp=8, max_position_embeddings=2048)
    save_model(tmp_path / "teacher", teacher, theirs)
    options = ("--tokenizer", tmp_path / "teacher")
    must(recipe["model_folders"], "extend", world / "base", tmp_path / "student", *options)
    make_data(recipe, world, tmp_path, tmp_path / "student", place="user")
    rows = read(tmp_path / "data" / "train-opd.jsonl")
    assert not any(r["solution"].startswith("<think>") for r in rows)
    assert all("</think>" in r["solution"] for r in rows)
    counts = json.loads((tmp_path / "data" / "counts.json").read_text())["counts"]
    assert counts["problems dropped: in an evaluation set"] == 1
    assert counts["problems kept"] == 13  # as in the other data, and what held <eos>

    made = {"run.output": tmp_path / "sft", "student.model": tmp_path / "student"}
    warm = train("sft-1.5b.toml", tmp_path, **made) / "checkpoints" / "000002"
    made = {"run.output": tmp_path / "opd", "student.model": warm}
    models = {"teacher.model": tmp_path / "teacher"}
    folder = train("1.5b-r1-distill.toml", tmp_path, **made, **models)
    line = read(folder / "metrics.jsonl")[-1]
    assert math.isfinite(line["loss/opd"])
    assert math.isfinite(line["loss/golden"])
    rollouts = read(folder / "rollouts" / "000001.jsonl")
    assert len(rollouts) == 2 * 4
    opening = theirs("?think?\n", add_special_tokens=False)["input_ids"]
    assert all(r["prompt_ids"][-len(opening) :] == opening for r in rollouts)


def test_a_tokenizer_that_does_not_fit(recipe, world, tmp_path):
    theirs = tokenizer_with(THINKING, vocabulary=RENAMED, eos="<stop>")
    save_model(tmp_path / "r1", make_llama(2), theirs)
    paths = (world / "base", tmp_path / "r1")
    models = [load(str(p), role="student", dtype=torch.float32, device=CPU) for p in paths]
    with pytest.raises(ModelError, match="id 1 is '<eos>' for the student and '<stop>' for the"):
        require_same_tokenizer(*models)
    script = recipe["model_folders"]
    must(script, "extend", world / "base", tmp_path / "new", "--tokenizer", tmp_path / "r1")
    student = load(str(tmp_path / "new"), role="student", dtype=torch.float32, device=CPU)
    require_same_tokenizer(student, models[1])
    assert student.tokenizer.chat_template == THINKING

    swapped = RENAMED | {"1": VOCABULARY["2"], "2": VOCABULARY["1"]}
    save_model(tmp_path / "foreign", make_llama(2), tokenizer_with(PLAIN, vocabulary=swapped))
    options = ("--tokenizer", tmp_path / "foreign")
    code, _, error = run(script, "extend", world / "base", tmp_path / "other", *options)
    assert code == 2
    assert "does not belong to these weights" in error
    assert not (tmp_path / "other").exists()


def test_extend(recipe, world, tmp_path):
    script, base, new_folder = recipe["model_folders"], world / "base", tmp_path / "new"
    left = tmp_path / "new.part"  # of a call that was interrupted
    left.mkdir()
    (left / "model.safetensors").write_text("half a fi")
    assert f"stop ids [{EOS}]" in must(script, "extend", base, new_folder)
    assert not left.exists()
    old = load(str(base), role="student", dtype=torch.float32, device=CPU)
    new = load(str(new_folder), role="student", dtype=torch.float32, device=CPU)
    assert (old.context, new.context) == (400, 16_384)
    assert new.model.config.rope_parameters["rope_theta"] == 40_000
    for a, b in zip(old.model.parameters(), new.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ids = torch.arange(3, 20)[None]
    assert not torch.allclose(old.model(ids).logits, new.model(ids).logits)  # RoPE did change
    assert new.tokenizer.chat_template == PLAIN
    before = files_in(new_folder)
    code, _, error = run(script, "extend", base, new_folder)
    assert code == 2
    assert "is there already" in error
    assert files_in(new_folder) == before


def test_positions_in_both_forms_of_a_qwen2_config(recipe, tmp_path):
    """The hub's files have rope_theta beside the sizes, transformers 5 writes rope_parameters."""
    with_positions = recipe["model_folders"].with_positions
    hub = {"model_type": "qwen2", "max_position_embeddings": 4096, "rope_theta": 10_000}
    new = transformers.Qwen2Config(max_position_embeddings=4096, rope_theta=10_000.0).to_dict()
    assert "rope_parameters" in new
    for number, values in enumerate((hub, new)):
        folder = tmp_path / str(number)
        folder.mkdir()
        text = json.dumps(with_positions(values, 16_384, 40_000.0))
        (folder / "config.json").write_text(text)
        read_back = transformers.AutoConfig.from_pretrained(folder)
        assert read_back.max_position_embeddings == 16_384
        assert read_back.rope_parameters["rope_theta"] == 40_000
    assert hub["rope_theta"] == 10_000


def test_evaluation_and_table(recipe, world, sft, tmp_path):
    """evaluate.sh with the real command, and the table made of what it leaves."""
    arm = tmp_path / "evaluations" / "1.5b-sft"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = ("--max-new-tokens", "16", "--device", "cpu")
    done = subprocess.run(
        ["bash", RECIPE / "evaluate.sh", sft / "checkpoints/000002", world / "eval", arm, *options],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = read(arm / "k32" / "amc.jsonl")
    assert [len(row["completions"]) for row in answers] == [32]
    assert [len(row["completions"]) for row in read(arm / "k1" / "math500.jsonl")] == [1, 1]
    scores = recipe["table"].read_scores(tmp_path / "evaluations")["1.5b-sft"]
    assert set(scores) == set(recipe["evaluation_sets"].SETS)
    assert scores["amc"].num_samples == 32
    assert 0 < scores["amc"].mean_length <= 16
    text = must(recipe["table"], tmp_path / "evaluations", "--output", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == text
    assert "| 1.5b-sft | " in text
