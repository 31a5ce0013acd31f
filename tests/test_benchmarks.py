"""The benchmarks: every script in its smallest form, and that its judgements can come out wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import report  # noqa: E402

pytestmark = pytest.mark.recipe

# Rows of a quick run's tables, heads left out.
ROWS = {
    "distillation_step": 8,
    "loss": 6,  # two tables
    "opd_step": 4,
    "repetition_rate": 3,
    "rollouts": 4,
    "smollm2_step": 4,
    "startup": 3,
    "token_labels": 4,
    "update_rate": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def test_every_script_is_in_the_report_and_in_this_test() -> None:
    scripts = {file.stem.removeprefix("bench_") for file in BENCHMARKS.glob("bench_*.py")}
    assert set(report.NAMES) == scripts == set(ROWS)
    marks = report.MARK.findall((BENCHMARKS / "template.md").read_text())
    assert sorted(marks) == sorted(scripts)


@pytest.mark.parametrize("name", ROWS)
def test_script_runs(name, folder) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), "--quick"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STABLEOPD_BENCH_FOLDER": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    # RepRate is measured with one thread and on all cores.
    expected = ROWS[name] * (2 if name == "repetition_rate" and cores > 1 else 1)
    assert len(lines) == 1 + expected, done.stdout
    assert "not measured" not in done.stdout
    assert "torch 2" in done.stdout


def test_a_row_takes_ratios_run_by_run_and_is_judged_as_shown() -> None:
    row = common.Row("step", "s", [1.0, 2.0, 6.0], [4.0, 4.0, 4.0], 1, 0.5)
    expected = "| step | s | 2.0 (1.0-6.0) | 4.0 (4.0-4.0) | 0.50 (0.25-1.50) | ≤ 0.5 | yes |"
    assert row.markdown() == expected
    assert common.judged(0.51, 0.5) == ["≤ 0.5", "**no**"]
    assert common.judged(1.99, 2.0, at_least=True) == ["≥ 2", "**no**"]
    assert common.judged(2.0, 2.0, at_least=True)[1] == "yes"
    assert common.judged(9.0, None) == ["", ""]
    limited = common.Row("help", "s", [0.4], [9.0], 1, None, limit_s=0.3).markdown()
    assert limited.endswith("| ≤ 0.3 s | **no** |")


@pytest.mark.parametrize(
    ("ours", "peer"),
    [([1.0, 2.0], [1.0, 2.0001]), ([float("nan")], [1.0]), ([], []), ([1.0], [-1.0])],
)
def test_sides_that_disagree_are_not_timed(ours, peer) -> None:
    with pytest.raises(SystemExit, match="disagree on the loss"):
        common.require_close("the loss", ours, peer, 1e-5)
    common.require_close("the loss", [1.0, 2.0], [1.000009, 2.0], 1e-5)


def test_memory_is_the_peak_above_the_level() -> None:
    before = common.Memory()
    block = bytearray(64_000_000)
    del block
    assert 60 < before.grown()["memory_mb"] < 90
    # What was held and given back before does not count.
    assert common.Memory().grown()["memory_mb"] < 20


def test_the_page_is_stitched_from_what_is_kept(tmp_path) -> None:
    row = common.Row("step", "CPU s", [1.0], [4.0], 1, 0.5).markdown()
    (tmp_path / "opd_step.md").write_text(f"machine\n\n{common.Row.HEADER}\n{row}\n")
    page = report.stitch("a\n<!-- output: opd_step -->\nb\n<!-- output: loss -->\n", tmp_path)
    assert page == f"a\nmachine\n\n{common.Row.HEADER}\n{row}\nb\n{report.NOT_RUN}\n"
    (tmp_path / "startup.md").write_text("row\n\nTook 1.6 minutes.\n")
    (tmp_path / "rollouts.md").write_text("row\n\nTook 12.0 minutes.\n")
    assert report.minutes(tmp_path) == "14"
    untold = common.Row("step", "wall s", [1.0], [4.0], 1, None).markdown()
    (tmp_path / "loss.md").write_text(f"{common.Row.HEADER}\n{untold}\n")
    assert report.verdicts(tmp_path).splitlines()[2:] == [row]


def test_the_stop_has_the_probability_that_was_asked_for() -> None:
    import torch

    import pairs

    for asked in (0.0, 0.05):
        model = pairs._llama(512, 32, 0)
        pairs._set_stop(model, asked)
        with torch.no_grad():
            logits = model(torch.randint(2, 512, (8, 32))).logits
        found = logits.softmax(-1)[..., pairs.STOP].mean().item()
        assert found == pytest.approx(asked, rel=0.25, abs=1e-20)
        spread = logits[..., pairs.FIRST :].std()
        assert spread == pytest.approx(2.0, rel=0.5) or not asked
