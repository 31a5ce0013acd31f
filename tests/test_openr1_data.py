"""Data of recipes/openr1-math, made from a sample with the hub's columns and layouts."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from openr1_parts import (
    SMALL,
    THINKING,
    make_base,
    must,
    openr1_rows,
    read,
    run,
    scripts,
    thought,
    tokenizer_with,
    write_evaluation_sets,
    write_openr1,
)
from stableopd.data.grading import grade
from stableopd.types import DataError
from tiny import make_llama, make_tokenizer, save_model

pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def recipe():
    with scripts() as modules:
        yield modules


@pytest.fixture(scope="module")
def world(recipe, tmp_path_factory):
    """Copies of the hub's data, and in data/ and eval/ what the scripts make of them."""
    folder = tmp_path_factory.mktemp("openr1")
    write_openr1(folder / "hub")
    write_evaluation_sets(folder / "sets")
    make_base(folder / "base")
    must(recipe["evaluation_sets"], folder / "sets", "--output", folder / "eval")
    must(
        recipe["prepare"],
        *(folder / "hub", "--tokenizer", folder / "base", "--output", folder / "data"),
        *("--evaluation", folder / "eval", *SMALL),
    )
    return folder


def test_evaluation_sets(recipe, world):
    sets = {name: read(world / "eval" / f"{name}.jsonl") for name in recipe["evaluation_sets"].SETS}
    answers = {name: [r["answer"] for r in rows] for name, rows in sets.items()}
    assert answers == {
        "math500": ["3", "3"],
        "minerva": ["4"],
        "olympiadbench": ["2, 3"],
        "amc": ["142"],
        "aime24": ["33"],
        "aime25": ["70"],
    }
    first = sets["math500"][0]
    assert first["id"] == "math500-0"
    assert first["prompt"] == [
        {
            "role": "system",
            "content": "Please reason step by step, and put your final answer within \\boxed{}.",
        },
        {"role": "user", "content": "Find $\\frac{a}{b}$."},
    ]
    assert grade("\\boxed{2} and \\boxed{3}", answers["olympiadbench"][0], "math", "")


def test_evaluation_sets_that_are_not_there(recipe, world, tmp_path):
    script, out_folder = recipe["evaluation_sets"], tmp_path / "out"
    code, _, error = run(script, tmp_path, "--output", out_folder)
    assert code == 2
    assert "hf download HuggingFaceH4/MATH-500" in error
    assert not out_folder.exists()
    options = ("--output", out_folder, "--only", "amc", "--place", "user")
    assert "the usual copy has 83" in must(script, world / "sets", *options)
    assert [file.name for file in out_folder.iterdir()] == ["amc.jsonl"]
    (only,) = read(out_folder / "amc.jsonl")
    assert only["problem"] == "3+3="
    assert len(only["prompt"]) == 1
    assert only["prompt"][0]["content"].endswith("\\boxed{}.\n\n3+3=")
    code, _, error = run(script, world / "sets", "--output", out_folder, "--only", "amc25")
    assert code == 2
    assert "choose from math500, minerva" in error


def test_counts_and_rows(world):
    """Counted by hand from `openr1_rows`."""
    found = json.loads((world / "data" / "counts.json").read_text())
    assert found["counts"] == {
        "problems read": 20,
        "problems dropped: no text or no answer": 1,
        "problems dropped: in an evaluation set": 1,
        "problems dropped: a copy of an earlier problem": 1,
        "problems dropped: prompt too long": 1,
        "problems dropped: no generation left": 4,
        "problems kept": 12,
        "problems for SFT": 8,
        "problems for OPD": 4,
        "generations read, of problems not dropped before": 27,
        "generations dropped: not complete": 1,
        "generations dropped: holds the stop token": 1,
        "generations dropped: too long": 1,
        "generations dropped: wrong": 11,
        "generations kept": 13,
        "generations right to us, wrong in the data": 1,
        "generations wrong to us, right in the data": 0,
    }
    assert found["settings"]["instruction"].startswith("Please reason")
    sft, opd = (read(world / "data" / f"train-{name}.jsonl") for name in ("sft", "opd"))
    assert (len(sft), len(opd)) == (8, 4)
    rows = {r["id"]: r for r in sft + opd}
    assert len(rows) == 12
    assert {"uuid-9", "uuid-18", "uuid-8"} <= set(rows)
    assert rows["uuid-9"]["prompt"][-1]["content"] == "Löse ∑ 三角形 für ½: wie groß?"
    assert rows["uuid-9"]["solution"] == thought("abc" * 9, "0.5")  # the first of two right ones
    assert rows["uuid-3"]["solution"] == thought("1", "6")  # the first one was wrong
    tokenizer = make_tokenizer()
    for r in rows.values():
        assert grade(r["solution"], r["answer"], "math", "")
        assert len(tokenizer(r["solution"])["input_ids"]) + 1 == r["num_tokens"] <= 100


def test_the_longest_generation_that_is_allowed(recipe, world, tmp_path):
    """A budget of exactly the tokens of the longest one, its stop included, keeps it."""
    rows = [r for n in ("sft", "opd") for r in read(world / "data" / f"train-{n}.jsonl")]
    longest = max(r["num_tokens"] for r in rows)
    for budget, kept in ((longest, 13), (longest - 1, 12)):
        must(
            recipe["prepare"],
            *(world / "hub", "--tokenizer", world / "base", "--output", tmp_path / str(budget)),
            *("--evaluation", world / "eval", *SMALL, "--max-tokens", budget),
        )
        counts = json.loads((tmp_path / str(budget) / "counts.json").read_text())["counts"]
        assert counts["generations kept"] == kept


def test_the_split_follows_the_seed_and_not_the_order(recipe):
    split = recipe["prepare"].split
    rows = [{"id": str(i)} for i in range(100)]
    sft, opd = split(rows, 30, 0)
    assert (len(sft), len(opd)) == (70, 30)
    assert sorted(r["id"] for r in sft + opd) == sorted(r["id"] for r in rows)
    assert split(rows[::-1], 30, 0) == (sft, opd)
    assert split(rows, 30, 1) != (sft, opd)
    with pytest.raises(DataError, match="--num-opd"):
        split(rows, 100, 0)


def test_other_choices(recipe, world, tmp_path):
    """The data's own verdict, a folder of save_to_disk, an opened thought, another instruction."""
    Dataset.from_list(openr1_rows()).save_to_disk(tmp_path / "disk")
    save_model(tmp_path / "thinking", make_llama(0), tokenizer_with(THINKING))
    (tmp_path / "ask.txt").write_text("Answer in a box.\n")
    out = must(
        recipe["prepare"],
        *(tmp_path / "disk", "--tokenizer", tmp_path / "thinking", "--output", tmp_path / "out"),
        *("--verify", "column", "--evaluation", world / "eval", *SMALL, "--place", "user"),
        *("--instruction", tmp_path / "ask.txt"),
    )
    assert "11  problems kept" in out  # without the one that the data calls wrong
    rows = {r["id"]: r for n in ("sft", "opd") for r in read(tmp_path / "out" / f"train-{n}.jsonl")}
    assert "uuid-18" not in rows
    assert rows["uuid-3"]["solution"] == "1\n</think>\nSo \\boxed{6}."
    (message,) = rows["uuid-3"]["prompt"]
    assert message == {"role": "user", "content": "Answer in a box.\n\nWhat is $3 + 3$?"}


def test_prepare_keeps_what_is_made_and_says_what_is_wrong(recipe, world, tmp_path):
    script, source, data = recipe["prepare"], world / "hub", world / "data"
    common = ("--tokenizer", world / "base", "--evaluation", world / "eval", *SMALL)
    before = {file: file.read_bytes() for file in data.iterdir()}
    assert "with the same settings" in must(script, source, *common, "--output", data)
    minerva = world / "sets" / "minerva" / "test.jsonl"
    there, new = ("--output", data), ("--output", tmp_path / "new")
    wrong = {
        "made with other settings": (source, *common, *there, "--seed", 1),
        "choose from grade, column": (source, *common, *new, "--verify", "best"),
        "choose from system, user": (source, *common, *new, "--place", "top"),
        "no such file or folder": (tmp_path / "none", *common, *new),
        "run evaluation_sets.py first": (source, *common, *new, "--evaluation", tmp_path),
        "no column 'problem'": (minerva, *common, *new),
        "make it with model_folders.py": (source, *common, *new, "--tokenizer", tmp_path / "none"),
        "--instruction": (source, *common, *new, "--instruction", tmp_path / "none"),
    }
    for message, arguments in wrong.items():
        code, _, error = run(script, *arguments)
        assert code == 2, message
        assert message in error
        assert error.count("\n") == 1
    assert before == {file: file.read_bytes() for file in data.iterdir()}
    assert not (tmp_path / "new").exists()


def test_without_counts_it_begins_again(recipe, world, tmp_path):
    """What an interruption leaves: files, but no counts.json, which is written last."""
    (tmp_path / "train-sft.jsonl").write_text('{"half a li')
    common = ("--tokenizer", world / "base", "--evaluation", world / "eval", *SMALL)
    must(recipe["prepare"], world / "hub", *common, "--output", tmp_path)
    for name in ("train-sft.jsonl", "train-opd.jsonl", "counts.json"):
        assert (tmp_path / name).read_bytes() == (world / "data" / name).read_bytes()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Find $\\dfrac{1}{2}$.", "find \\( \\frac{1}{2} \\)", True),
        ("What is $x+1$?", "What is $x-1$?", False),
        ("$\\left(a\\right)$", "$(a)$", True),
        ("\\leftarrow a", "\\left arrow a", False),
        ("x^2", "x²", False),
        ("ｘ＝１", "x=1", True),
    ],
)
def test_normalised(recipe, one, other, same):
    normalised = recipe["problem_text"].normalised
    assert (normalised(one) == normalised(other)) is same
