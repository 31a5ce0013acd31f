"""The archive of the runs behind docs/results.md: what is in it, and that it counts as finished."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes" / "collapse-and-cure"))

import archive  # noqa: E402
import experiments  # noqa: E402
import outcomes  # noqa: E402
import phase  # noqa: E402
import reproduce  # noqa: E402

pytestmark = pytest.mark.recipe


def test_the_shipped_runs_are_finished(tmp_path):
    archive.unpack(tmp_path)
    runs = {arm.name: outcomes.read_arm(arm, tmp_path) for arm in experiments.main_arms()}
    assert [run.seed for run in runs["stable_opd"]] == [0, 1, 2, 3, 4]
    assert all(run.collapsed for run in runs["opd"])
    assert not any(run.collapsed for run in runs["stable_opd"])
    assert all(0.9 < run.final_accuracy < 1 for run in runs["stable_opd"])
    arms, cells = experiments.all_arms(list(experiments.groups())), phase.cells()
    assert reproduce.jobs_of(arms, cells, 99, tmp_path, 0) == []
    assert reproduce.finals_of(arms, 99, tmp_path, 0) == []
    assert reproduce.models_needed(arms, cells, 99, tmp_path, 0) == []
    (tmp_path / "runs/A/opd/s1/seconds.json").unlink()
    needed = ["teacher-loops-0", "different-plain-teacher", "different-student"]
    assert reproduce.models_needed(arms, cells, 99, tmp_path, 0) == needed


def test_packing_is_repeatable_and_leaves_out_what_is_not_finished(tmp_path):
    whole = tmp_path / "whole"
    archive.unpack(whole)
    for run in (whole / "runs").glob("*/*/s*"):  # three runs are enough to pack and quick
        if run.relative_to(whole / "runs").as_posix() not in {"B/opd/s0", "B/opd/s1", "B/sft/s0"}:
            shutil.rmtree(run)
    (whole / "runs/B/opd/s0/seconds.json").unlink()
    (whole / "runs/B/sft/s0/extra.txt").write_text("not a part of it")
    first, second = tmp_path / "a.tar.xz", tmp_path / "b.tar.xz"
    archive.pack(whole, first)
    archive.pack(whole, second)
    assert first.read_bytes() == second.read_bytes()
    again = tmp_path / "again"
    archive.unpack(again, first)
    assert not (again / "runs/B/opd/s0").exists()
    assert not (again / "runs/B/sft/s0/extra.txt").exists()
    assert (again / "runs/B/opd/s1/metrics.jsonl").is_file()
    changed = again / "commits.txt"
    changed.write_text("mine\n")
    archive.unpack(again, first)
    assert changed.read_text() == "mine\n"
