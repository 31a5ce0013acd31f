"""The problems of the embedded world: right, disjoint, reproducible, and graded as documented."""

import itertools
import random
import subprocess
import sys

import pytest

from stableopd.data.arithmetic import (
    ALPHABET,
    ANSWER_MARKER,
    DocumentStyle,
    make_document,
    make_problems,
)
from stableopd.data.grading import grade
from stableopd.types import DataError


def evaluate(expression: str) -> int:
    """Another way to the result than the one that wrote the solution."""
    return eval(expression, {"__builtins__": {}})


@pytest.mark.parametrize("split", ["train", "test"])
def test_solutions_are_correct(split):
    for problem in make_problems(500, 3, split):
        expression = problem.prompt.removesuffix(":")
        lines = problem.solution.split(";")
        assert problem.answer == str(evaluate(expression))
        assert lines[-1] == f"#{problem.answer}"
        assert len(lines) == 4
        left = expression[:2]
        for i, line in enumerate(lines[:-1]):
            step = f"{left}{expression[2 + 2 * i : 4 + 2 * i]}"
            assert line == f"{step}={evaluate(step)}"
            left = line.split("=")[1]
        assert grade(problem.solution, problem.answer, "exact", ANSWER_MARKER)


def test_shapes_that_the_settings_rely_on():
    problems = make_problems(2000, 0, "train")
    assert {len(p.prompt) for p in problems} == {9}
    assert max(len(p.solution) for p in problems) == 27
    assert set("".join(p.prompt + p.solution for p in problems)) == set(ALPHABET)
    assert len(set(ALPHABET)) == len(ALPHABET)


def test_splits_are_disjoint_and_free_of_repeats():
    train = [p.prompt for p in make_problems(20_000, 0, "train")]
    test = [p.prompt for p in make_problems(5_000, 0, "test")]
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)
    held_out = set(test)
    rng = random.Random(0)
    assert not any(make_document(rng, DocumentStyle(), 96).prompt in held_out for _ in range(5_000))


def test_the_seed_decides_and_a_smaller_number_is_a_prefix():
    assert make_problems(50, 1, "test") == make_problems(80, 1, "test")[:50]
    assert make_problems(50, 1, "test") != make_problems(50, 2, "test")
    assert make_problems(0, 1, "test") == []
    assert len({p.id for p in make_problems(50, 1, "test") + make_problems(50, 1, "train")}) == 100


@pytest.mark.parametrize(("num", "split"), [(-1, "train"), (20_001, "train"), (3, "valid")])
def test_what_cannot_be_drawn_is_refused(num, split):
    with pytest.raises(DataError):
        make_problems(num, 0, split)


def test_documents_end_or_fill_the_budget():
    rng = random.Random(5)
    plain = [make_document(rng, DocumentStyle(), 96) for _ in range(50)]
    assert all(d.is_terminated and d.completion.count("#") == 1 for d in plain)
    endless = [make_document(rng, DocumentStyle(repeat=(1.0,)), 96) for _ in range(50)]
    assert all(not d.is_terminated and len(d.completion) == 96 for d in endless)


def test_repeats_follow_their_probabilities():
    rng = random.Random(6)
    style = DocumentStyle(repeat=(0.5, 0.0))
    copies = [make_document(rng, style, 96).completion.count("#") for _ in range(2000)]
    assert set(copies) == {1, 2}
    assert 0.45 < copies.count(2) / len(copies) < 0.55


def test_a_slip_is_wrong_and_is_carried_on():
    rng = random.Random(7)
    for _ in range(200):
        document = make_document(rng, DocumentStyle(slip=1.0), 96)
        *steps, last = document.completion.split(";")
        for step in steps:
            left, right = step.split("=")
            assert evaluate(left) != int(right)
            assert 0 <= int(right) <= 99
        assert last == f"#{steps[-1].split('=')[1]}"


@pytest.mark.parametrize("style", [{"slip": 1.5}, {"repeat": ()}, {"repeat": (0.1, -0.1)}])
def test_probabilities_are_checked(style):
    with pytest.raises(DataError):
        DocumentStyle(**style)


def test_a_loop_is_wrong_wherever_it_is_cut():
    problem = make_problems(1, 0, "test")[0]
    looped = problem.solution + f"#{problem.answer}" * 3
    for end in range(len(problem.solution) + 1, len(looped) + 1):
        assert not grade(looped[:end], problem.answer, "exact", ANSWER_MARKER)


def test_the_standard_library_is_enough():
    code = (
        "import sys; import stableopd.data.arithmetic; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_prompts_are_distinct_across_seeds_of_one_split_only_by_chance():
    seeds = [{p.prompt for p in make_problems(200, seed, "train")} for seed in range(3)]
    assert all(a != b for a, b in itertools.combinations(seeds, 2))
