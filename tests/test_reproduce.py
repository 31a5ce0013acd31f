"""The experiments behind docs/results.md: their arms, their arithmetic, and a short run of each."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stableopd import config, embedded
from stableopd.data.arithmetic import make_problems
from stableopd.data.prompts import load_prompts
from stableopd.embedded.make_models import PHASES
from stableopd.runfolder import RunFolder

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "collapse-and-cure"
sys.path.insert(0, str(RECIPE))

import claims  # noqa: E402
import experiments  # noqa: E402
import maps  # noqa: E402
import outcomes  # noqa: E402
import phase  # noqa: E402
import reproduce  # noqa: E402
import tables  # noqa: E402
import worlds  # noqa: E402
from experiments import Arm  # noqa: E402
from outcomes import Outcome  # noqa: E402

pytestmark = pytest.mark.recipe


def made(truncation, accuracy=(0.2, 0.5), seed=0, final=0.5, **metrics):
    """An outcome of made series: TruncRate from step 1 on, accuracy at even distances."""
    num = len(truncation)
    lines = [{"step": 0, "eval/accuracy": accuracy[0]}]
    for step, rate in enumerate(truncation, start=1):
        line = {"step": step, "rollout/truncation_rate": rate}
        line |= {name.replace("__", "/"): series[step - 1] for name, series in metrics.items()}
        lines.append(line)
    for k, value in enumerate(accuracy[1:], start=1):
        lines[round(k * num / (len(accuracy) - 1))]["eval/accuracy"] = value
    return Outcome(seed, tuple(lines), {"accuracy": final}, 1.0)


def rising(num=60, start=30, width=10):
    """TruncRate that goes from 0 to 1 over some steps."""
    return [min(max((step - start) / width, 0.0), 1.0) for step in range(1, num + 1)]


def test_every_arm_is_a_configuration():
    for group in experiments.groups().values():
        for arm in group:
            for seed in arm.seeds:
                given = arm.overrides(seed, Path("runs/x"), Path("models"))
                read = config.load(embedded.path("demo"), given)
                assert (read.run.seed, read.run.steps) == (seed, arm.steps)
                other = arm.world in ("A", "AB")
                assert read.student.model == ("models/different-student" if other else "embedded")


def test_one_folder_is_one_experiment():
    found: dict[str, dict] = {}
    for arm in itertools.chain.from_iterable(experiments.groups().values()):
        settings = found.setdefault(arm.folder, arm.settings)
        assert settings == arm.settings, arm.folder


def test_the_arms_that_are_asked_for():
    main = {arm.name: arm for arm in experiments.main_arms()}
    assert {"sft", "grpo", "gkd", "opd", "opd-golden", "stable_opd"} < set(main)
    assert all(len(arm.seeds) >= 5 for name, arm in main.items() if name != "opd-kl-0.01")
    sweep = {
        (arm.settings["objective.lambda_gold"], arm.settings["objective.beta_reference"])
        for arm in experiments.sweep()
        if "objective.lambda_gold" in arm.settings and "objective.beta_reference" in arm.settings
    }
    assert len(experiments.sweep()) == 16 + 4
    assert {(1.0, 0.1), (0.01, 0.001), (0.1, 0.01)} < sweep
    # The preset and the arm of the same name are the same numbers.
    preset = config.PRESETS["stable_opd"]
    arm = main["stable_opd"].settings
    assert arm["objective.lambda_gold"] == preset["lambda_gold"]
    assert arm["objective.beta_reference"] == preset["beta_reference"]


def test_models_are_made_before_those_that_are_made_of_them():
    models = experiments.models_of(experiments.all_arms(list(experiments.groups())))
    assert models.index("teacher-loops-0") < models.index("different-plain-teacher")
    assert {"different-student", "different-teacher"} < set(models)
    for name in (*models, *phase.models_of(phase.cells())):
        if not name.startswith(("different", "problems")):
            worlds.phases_of(name)


def test_names_of_models_are_pretrainings():
    (teacher,) = worlds.phases_of("teacher-loops-0.02")
    assert teacher.style.repeat == (0.02, 0.85, 1.0)
    assert teacher.num_steps == PHASES["teacher"][0].num_steps
    clean, sloppy = worlds.phases_of("student-steps-300")
    assert (clean.num_steps, sloppy) == (300, PHASES["student"][1])
    assert [p.style.repeat for p in worlds.phases_of("student-loops-0.3")] == [(0.3,), (0.3,)]
    assert [p.style.slip for p in worlds.phases_of("student-loops-0.3")] == [0.0, 0.42]


def test_problems_are_written(tmp_path):
    worlds.main("problems-5.jsonl", tmp_path)
    assert worlds.is_made("problems-5.jsonl", tmp_path)
    settings = config.load(embedded.path("demo")).data
    read = load_prompts(str(tmp_path / "problems-5.jsonl"), settings, split="train",
                        needs_solution=True, needs_answer=True)  # fmt: skip
    assert read == make_problems(5, 0, "train")


def test_the_jump_and_the_collapse():
    run = made(rising())
    # Below .2 until step 31 (.1), above .8 from step 39 (.9) on.
    assert run.jump == (31, 39)
    assert run.collapsed
    assert run.end("rollout/truncation_rate") == 1.0
    assert not made([0.0] * 30 + [0.6] * 8 + [0.0] * 30).collapsed  # ten steps: .48
    assert made([0.6] * 40).collapsed is False  # it was so from the start on
    assert made([0.5] * 10 + [0.7] * 20).collapsed
    never = made([0.1] * 40)
    assert (never.jump, never.collapsed) == (None, False)
    assert math.isnan(Outcome(0, ({"step": 0},), {}, 1.0).end("rollout/truncation_rate"))


def test_the_bootstrap_is_that_of_all_resamples():
    values = [0.91, 0.95, 0.97, 0.93, 0.9]
    means = sorted(fmean(drawn) for drawn in itertools.product(values, repeat=5))
    found = outcomes.spread(values)
    assert found.mean == pytest.approx(0.932)
    assert found.bootstrap == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.002)
    # t(.975, 4) = 2.776
    half = 2.776 * np.std(values, ddof=1) / math.sqrt(5)
    assert found.student == pytest.approx((0.932 - half, 0.932 + half), abs=1e-4)


def test_the_bootstrap_of_little():
    assert outcomes.spread([]) is None
    assert outcomes.spread([math.nan]) is None
    assert outcomes.spread([0.5, 0.5]).bootstrap == (0.5, 0.5)
    one = outcomes.spread([0.5, math.nan])
    assert one.values == (0.5,)
    assert one.student == (-math.inf, math.inf)


def test_differences_are_paired_by_seed():
    one = [made([0.0], seed=s, final=f) for s, f in ((0, 0.9), (1, 0.8), (3, 0.1))]
    other = [made([0.0], seed=s, final=f) for s, f in ((1, 0.5), (0, 0.7), (2, 0.0))]
    found = outcomes.paired(one, other, lambda run: run.final_accuracy)
    assert found.values == pytest.approx((0.2, 0.3))


def credit(num, regular, repetitive, share):
    return {
        "advantage__regular_mean": [regular] * num,
        "advantage__repetitive_mean": [repetitive] * num,
        "rollout__repetitive_share": share,
    }


def world(**changes):
    """Arms with which every claim holds."""
    share = [0.0] * 20 + [0.2] * 11 + [0.6] * 29
    bad = [
        made(rising(), (0.2, 0.5, 0.0), s, 0.0, **credit(60, -0.3, -0.02, share)) for s in range(5)
    ]
    long = [made(rising(120), (0.2, 0.5, 0.0, 0.0, 0.0), s, 0.0) for s in range(3)]

    def good(final):
        return [made([0.0] * 60, (0.2, 0.9), s, final + 0.001 * s) for s in range(5)]

    arms = {
        "opd": bad,
        "opd-kl-0.01": bad,
        "opd-kl-0.1": bad,
        "opd-golden": good(0.90),
        "stable_opd": [made([0.0] * 60, (0.2, 0.9), s, 0.95 + 0.002 * s) for s in range(5)],
        "sft": good(0.80),
        "grpo": good(0.70),
        "opd-300": long,
    }
    return {**arms, **changes}


def verdicts(arms):
    return [claim.verdict for claim in claims.judge(arms)]


def test_claims_that_hold():
    found = claims.judge(world())
    assert [claim.verdict for claim in found] == ["reproduced"] * 10
    assert "width 8 to 8 steps (median 8), from step 31 to 31 on" in found[1].evidence
    assert "-0.020 nats against -0.300" in found[3].evidence
    assert "+0.152 (95%: +0.151 to +0.153, 5 seeds)" not in found[8].evidence
    assert found[8].evidence.startswith("+0.152 (95%: +0.150 to +0.154, 5 seeds)")


def test_claims_that_do_not_hold():
    share = [0.5] * 60
    slow = [made(rising(60, 5, 50), (0.2, 0.1, 0.0), s, 0.0, **credit(60, -0.1, -0.3, share))
            for s in range(5)]  # fmt: skip
    healed = [made(rising(60) + [0.0] * 60, (0.2, 0.5, 0.0, 0.4), s) for s in range(3)]
    fine = [made([0.0] * 60, (0.2, 0.9), s, 0.99) for s in range(5)]
    arms = world(**{
        "opd": slow, "opd-300": healed, "opd-kl-0.01": fine, "opd-kl-0.1": fine,
        "opd-golden": [made(rising(), (0.2, 0.9), s, 0.99 - 0.001 * s) for s in range(5)],
        "stable_opd": [made(rising(), (0.2, 0.9), s, 0.5 + 0.002 * s) for s in range(5)],
        "sft": fine, "grpo": fine,
    })  # fmt: skip
    assert verdicts(arms) == ["contradicted"] * 10


def test_claims_that_cannot_be_decided():
    mixed = [made(rising() if s < 2 else [0.0] * 60, (0.2, 0.5), s) for s in range(5)]
    same = [made([0.0] * 60, (0.2, 0.9), s, 0.95 + 0.01 * (s % 2)) for s in range(5)]
    arms = world(**{"opd-kl-0.1": mixed, "stable_opd": same, "sft": same})
    found = verdicts(arms)
    assert found[5] == "undecided"
    assert found[8] == "undecided"
    assert claims.judge({}) == []


def test_what_an_arm_prevents():
    bad, good = [made(rising())] * 3, [made([0.0] * 60)] * 3
    assert tables.prevents(good, good) == "both"
    assert tables.prevents(good, bad) == "A"
    assert tables.prevents(bad, good) == "B"
    assert tables.prevents(bad, bad) == "neither"
    assert tables.prevents([*bad[:1], *good], bad) == "A in part"


def cell_results():
    results = []
    for cell in phase.cells():
        ends = cell.method == "opd" and float(cell.loops) >= 0.02
        rates = [1.0] * 40 if ends else [0.0] * cell.steps
        results.append({**vars(cell), "is_collapsed": ends, "truncation_rate": rates,
                        "accuracy_start": 0.25, "accuracy_end": None if ends else 0.75,
                        "cpu_s": 1.0})  # fmt: skip
    return results


def test_the_map_counts_collapses():
    figure = maps.map_figure(cell_results())
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    seeds = len(phase.SEEDS)
    row = [f"{seeds if float(loops) >= 0.02 else 0}/{seeds}" for loops in phase.LOOPS]
    assert texts[0] == row * len(phase.STRENGTHS)
    assert texts[1] == [f"0/{seeds}"] * len(phase.LOOPS) * len(phase.STRENGTHS)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "100 (0.25)"


def test_slices_and_gains_are_read_from_cells():
    results = cell_results()
    table = maps.slice_table(results, "budget", phase.BUDGETS).splitlines()
    assert table[2] == "| 28 | 0.25 | 80 | 2 of 2 | 40, 40 | - | 0 of 2 | - | 0.75 |"
    rates = maps.slice_table(results, "rate", phase.RATES).splitlines()
    assert rates[2].startswith("| 0.0004 | 0.25 | 160 | 2 of 2 |")
    own = maps.slice_table(results, "own_loops", phase.OWN_LOOPS).splitlines()
    assert [row.split(" | ")[0] for row in own[2:]] == ["| 0", "| 0.05", "| 0.15", "| 0.3"]
    gains = maps.strength_table(results).splitlines()
    assert gains[2] == "| 100 | 0.25 | 0.75" + " | collapse" * 4 + " |"


def test_a_cell_ends_when_it_has_collapsed():
    assert not phase.is_collapsed([1.0] * 9)
    assert phase.is_collapsed([0.0] * 30 + [1.0] * 6 + [0.9] * 4)
    assert not phase.is_collapsed([1.0] * 30 + [0.0] * 5 + [1.0] * 5)


def test_a_cell_is_run(tmp_path):
    cell = phase.Cell(budget=32, method="stable_opd", steps=2)
    phase.make_cell(cell, tmp_path)
    (result,) = (json.loads(file.read_text()) for file in (tmp_path / "cells").iterdir())
    assert result["budget"] == 32
    assert len(result["truncation_rate"]) == 2
    assert 0 < result["accuracy_start"] < 1
    assert result["accuracy_end"] is not None
    assert result["cpu_s"] > 0


def test_last_students_are_evaluated(tmp_path):
    folder = tmp_path / "finals" / "B" / "opd" / "s1"
    reproduce.make_final("embedded", folder, 1)
    final = outcomes.read_final(folder)
    rows = [json.loads(line) for line in (folder / "embedded.jsonl").read_text().splitlines()]
    assert final["accuracy"] == fmean(sum(row["correct"]) / 8 for row in rows)
    assert final["pass_at_8"] == fmean(any(row["correct"]) for row in rows)
    assert len(rows) == 8
    assert outcomes.read_final(tmp_path) == {}
    # All runs of the two comparisons, and the student that they start from.
    arms = [*experiments.main_arms(), *experiments.groups()["scarce"], *experiments.cures("A")]
    jobs = [name for name, _, _ in reproduce.finals_of(arms, 1, tmp_path, 0)]
    assert {"start", "B/sft s0", "scarce/sft s0"} <= set(jobs)
    assert not any(name.startswith("A/") for name in jobs)


def test_a_model_is_made_once(tmp_path):
    command = [sys.executable, str(RECIPE / "worlds.py"), "student-steps-20", "--out"]
    command += [str(tmp_path), "--scale", "0.05"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    weights = tmp_path / "student-steps-20" / "model.safetensors"
    first = weights.stat().st_mtime_ns
    assert len(AutoTokenizer.from_pretrained(weights.parent)) == 18
    assert AutoModelForCausalLM.from_pretrained(weights.parent).config.hidden_size == 64
    assert not list(tmp_path.glob("*.part"))
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert weights.stat().st_mtime_ns == first


def test_the_comparison_comes_first_then_seed_by_seed(tmp_path):
    arms = experiments.all_arms(["main", "cures", "recovery"])
    jobs = [name for name, _, _ in reproduce.jobs_of(arms, phase.cells(), 99, tmp_path, 0)]
    main = [f"B/{arm.name} s{seed}" for arm in experiments.main_arms() for seed in arm.seeds]
    assert sorted(jobs[: len(main)]) == sorted(main)
    seeds = [int(name[-1]) for name in jobs[len(main) :]]
    assert seeds == sorted(seeds)
    assert len(jobs) == len(set(jobs)) == sum(len(arm.seeds) for arm in arms) + len(phase.cells())
    few = [name for name, _, _ in reproduce.jobs_of(arms, phase.cells(), 1, tmp_path, 0)]
    assert set(few) == {name for name in jobs if name.endswith("s0")}


def test_a_collapsed_run_ends_and_another_goes_on_with_a_finished_one(tmp_path):
    settings = {"objective.method": "opd", "rollout.max_new_tokens": 8, "eval.max_problems": 4}
    settings |= {"rollout.prompts_per_step": 2}
    ending = Arm("B", "ending", settings, (0,), 14)
    reproduce.make_run(ending, 0, tmp_path, 0)
    (run,) = outcomes.read_arm(ending, tmp_path)
    # A budget of 8 tokens cuts everything off; the loop asks before it yields the tenth line.
    assert run.truncation == [1.0] * 11
    assert math.isnan(run.cpu_s)  # it says nothing about a run of 14 steps
    whole = Arm("B", "whole", settings, (0,), 2, ends=False)
    reproduce.make_run(whole, 0, tmp_path, 0)
    longer = Arm("B", "longer", settings, (0,), 3, ends=False, goes_on="whole")
    assert not longer.is_finished(0, tmp_path)
    reproduce.make_run(longer, 0, tmp_path, 0)
    assert longer.is_finished(0, tmp_path)
    lines = [RunFolder.open(arm.path(0, tmp_path)).metrics() for arm in (whole, longer)]
    assert lines[1][:2] == lines[0][:2]
    assert [line["step"] for line in lines[1]] == [0, 1, 2, 3]


def test_runs_are_made_skipped_and_continued(tmp_path):
    def make(steps):
        command = [sys.executable, str(RECIPE / "reproduce.py"), "--output", str(tmp_path)]
        command += ["--group", "recovery", "--num-seeds", "1", "--workers", "1"]
        done = subprocess.run(
            [*command, "--steps", str(steps)], check=True, capture_output=True, text=True
        )
        return done.stdout

    assert "B/opd-300 s0: done" in make(1)
    path = tmp_path / "runs" / "B" / "opd-300" / "s0"
    assert json.loads((path / "seconds.json").read_text())["is_whole"] is True
    assert make(1) == ""
    assert "B/opd-300 s0: done" in make(2)
    lines = RunFolder.open(path).metrics()
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert json.loads((path / "seconds.json").read_text())["is_whole"] is False
    assert (tmp_path / "commits.txt").read_text().strip()
    arm = Arm("B", "opd-300", {}, (0,), 2)
    (run,) = outcomes.read_arm(arm, tmp_path)
    assert math.isnan(run.cpu_s)
    assert len(run.truncation) == 2
