"""The GPU check at toy size on the CPU, its limits and errors, and the page made of its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "benchmarks" / "gpu"
sys.path.append(str(CHECK))

import check as gpu_check  # noqa: E402
import page  # noqa: E402
import phase_profile  # noqa: E402
import plan  # noqa: E402


def check(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK / "check.py"), "--quick", "--device", "cpu"]
    bench = {"STABLEOPD_BENCH_FOLDER": str(folder / "bench"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--output", str(folder / "out"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **bench, **variables},
        cwd=folder,
    )


def results(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("out/*.json")}


@pytest.mark.recipe
def test_every_phase_runs(tmp_path):
    done = check(tmp_path)
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "check.log").read_text()
    found = results(tmp_path)
    assert set(found) == set(plan.LIMITS)
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == list(plan.LIMITS)
    assert {content["state"] for content in found.values()} == {"done"}
    assert all(content["environment"]["packages"]["torch"] for content in found.values())
    assert all("error_text" not in row for row in found["correct"]["rows"])
    sides = {row["side"]: row for row in found["loss"]["rows"]}
    assert set(sides) == {"ours", "dense", "compiled", "liger", "trl"}
    assert all("ms" in row or "not installed" in row["error_text"] for row in sides.values())
    steps = {row["method"]: row for row in found["step"]["rows"] if "wall_s" in row}
    assert set(steps) == {*plan.METHODS, plan.PEER}
    step = steps["stable_opd"]
    parts = step["rollout_s"] + step["score_s"] + step["update_s"]
    assert 0.3 * step["wall_s"] < parts <= step["wall_s"]
    kernels = [row["kernels"] for row in found["profile"]["rows"] if "kernels" in row]
    assert [len(five) for five in kernels] == [5, 5]
    # What comes back from a machine that is lent: few files, and small ones.
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert sum(file.stat().st_size for file in files) < 2**20
    # Every cell of the page has a place in this data.
    text = page.render(found)
    assert page.NOT_RUN not in text


@pytest.mark.recipe
def test_a_phase_that_hangs_or_fails_is_told_and_the_next_one_runs(tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text(
        "import sys, types\n"
        "hang, fail = types.ModuleType('phase_rollouts'), types.ModuleType('phase_demo')\n"
        "exec('import time\\ndef run(s):\\n yield {\"n\": 1}\\n time.sleep(600)', vars(hang))\n"
        'exec(\'def run(s):\\n yield {"n": 1}\\n raise ValueError("no demo")\', vars(fail))\n'
        "sys.modules |= {'phase_rollouts': hang, 'phase_demo': fail}\n"
    )
    chosen = ("--phases", "rollouts,demo", "--limit", "5")
    done = check(tmp_path, *chosen, PYTHONPATH=str(fake))
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(tmp_path)
    assert {name: content["state"] for name, content in found.items()} == {
        "rollouts": "cut off",
        "demo": "failed",
    }
    assert found["rollouts"]["rows"] == found["demo"]["rows"] == [{"n": 1}]
    assert "5 s" in found["rollouts"]["error"]
    assert found["demo"]["error"] == "ValueError: no demo"


def wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    """A wheel with one empty module."""
    file, info = folder / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return file


@pytest.mark.recipe
def test_what_is_missing_is_installed_into_a_folder_of_its_own(tmp_path, monkeypatch):
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    wheel(wheels, "torch")
    assert gpu_check.install(wheels, target) == []
    assert not target.exists()
    wheel(wheels, "gpu_probe")
    wheel(wheels, "gpu_other", "cp27-none-any")
    probe, *rest = sorted(gpu_check.install(wheels, target), reverse=True)
    assert probe == "gpu-probe"
    assert [line.split(" (")[0] for line in rest] == ["gpu-other"]
    assert "gpu-other" in rest[0].split(" (")[1]
    assert {file.name for file in target.glob("*.py")} == {"gpu_probe.py"}
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(target), "before"]


def test_kernels_are_counted_without_the_ranges_around_them():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(name, device, us, annotation=False):
        spent = types.SimpleNamespace(elapsed_us=lambda: us)
        return types.SimpleNamespace(
            name=name,
            device_type=device,
            is_user_annotation=annotation,
            time_range=spent,
            self_cpu_time_total=us,
        )

    events = [event("gemm", cuda, 3_000), event("copy", cuda, 500), event("gemm", cuda, 3_500)]
    events += [event("AdamW", cuda, 7_000, True), event("aten::mm", cpu, 9_000)]
    found = phase_profile.dearest(events, on_gpu=True)
    assert (found["launches"], found["device_ms"]) == (3, 7.0)
    assert [k["name"] for k in found["kernels"]] == ["gemm", "copy"]
    assert (found["kernels"][0]["ms"], found["kernels"][0]["launches"]) == (6.5, 2)
    assert phase_profile.dearest(events, on_gpu=False)["launches"] == 4
    assert phase_profile.dearest([], on_gpu=True) == {"launches": 0, "device_ms": 0, "kernels": []}


@pytest.mark.parametrize(
    "arguments", [["--phases", "loss,lost"], ["--phases", ""], ["--limit", "0"]]
)
def test_wrong_arguments(tmp_path, arguments):
    done = check(tmp_path, *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert not (tmp_path / "out").exists()


def test_all_limits_fit_into_ten_minutes_with_the_start():
    assert sum(plan.LIMITS.values()) <= 570
    assert set(page.SECTIONS) == set(plan.LIMITS)
    assert {file.stem for file in CHECK.glob("phase_*.py")} == {f"phase_{p}" for p in plan.LIMITS}


def test_the_page_is_that_of_the_results_that_are_kept():
    assert page.PAGE.read_text() == page.render(page.read(page.RESULTS))


def made_up(phase, rows, **changes):
    environment = {
        "card": "Card 9",
        "memory_gb": 80.0,
        "cuda": "13.0",
        "python": "3.12",
        "commit": "abc",
        "packages": {"torch": "2.11.0", "trl": None},
    }
    content = {"phase": phase, "date": "2026-11-28", "quick": False, "state": "done"}
    content |= {"error": None, "seconds": 12.5, "environment": environment, "rows": rows}
    return content | changes


def line_of(text, *starts):
    (line,) = [x for x in text.splitlines() if x.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_ours_over_theirs_and_cells_say_what_is_missing():
    size = {"tokens": 4_096, "width": 1_536}
    rows = [
        {"side": "ours", **size, "ms": 10.0, "memory_mb": 100.0},
        {"side": "dense", **size, "ms": 40.0, "memory_mb": 1_000.0},
        {"side": "liger", **size, "error_text": "not installed: liger_kernel"},
        {"side": "trl", **size, "error_text": "out of memory"},
    ]
    cut = {"state": "cut off", "error": "stopped at its limit of 90 s"}
    text = page.render({"loss": made_up("loss", rows, **cut)})
    assert "Card 9 (80.0 GB), 2026-11-28" in text
    assert "trl missing" in text
    assert "**Cut off**: stopped at its limit of 90 s" in text
    tables = text.split("Milliseconds")[1].split("Peak memory above inputs")
    times, memory = (line_of(part.split("\n## ")[0], "4,096", "1,536") for part in tables)
    assert times[2:4] == ["10.0", "40.0 (0.25)"]
    assert times[4:] == [page.MISSING, "not installed: liger_kernel", "out of memory"]
    assert memory[2:4] == ["100", "1,000 (0.10)"]
    assert set(line_of(tables[0], "32,768", "2,048")[2:]) == {page.MISSING}
    # The other phases have not run.
    assert set(line_of(text, "256")[1:]) == {page.NOT_RUN}


def test_the_other_tables_take_their_own_numbers():
    rollouts = [
        {"side": "both", "same_greedy": 0.5},
        {"side": "ours", "budget": 256, "tokens_per_s": 3_000.0, "memory_mb": 10.0},
        {"side": "generate", "budget": 256, "tokens_per_s": 1_500.0, "memory_mb": 40.0},
    ]
    one = {"rollout_s": 1.0, "score_s": 0.5, "update_s": 0.25}
    steps = [
        {"side": "compared", "method": "gkd", "ours": 1.0, "theirs": 1.01, "error": 0.01},
        {"side": "ours", "method": "gkd", "wall_s": 2.0, "process_mb": 30.0, **one},
        {"side": "peer", "method": plan.PEER, "wall_s": 4.0, "process_mb": 60.0},
    ]
    right = {"what": "step, sweep", "dtype": "float32", "error": 2e-3, "bound": 1e-3}
    correct = [right | {"worst": "gradient", "ok": False}]
    text = page.render(
        {
            "rollouts": made_up("rollouts", rollouts),
            "step": made_up("step", steps),
            "correct": made_up("correct", correct),
        }
    )
    assert line_of(text, "256")[1:] == ["3,000", "1,500 (2.00)", "10", "40 (0.25)"]
    assert "bfloat16: 50%" in text
    assert line_of(text, "`gkd`", "2.00")[2:] == ["1.00", "0.50", "0.25", "30", "0.50", "0.50"]
    assert line_of(text, "`opd`")[1] == page.MISSING
    assert "**wrong**" in line_of(text, "step, sweep")[1]
    assert "3 of 6 phases have run" in text


def test_toy_runs_do_not_get_onto_the_page(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match="no JSON"):
        page.take(tmp_path / "run", tmp_path / "results")
    file = tmp_path / "run" / "demo.json"
    file.write_text(json.dumps(made_up("demo", [], quick=True)))
    with pytest.raises(SystemExit, match="quick"):
        page.take(tmp_path / "run", tmp_path / "results")
    assert not (tmp_path / "results").exists()
    file.write_text(json.dumps(made_up("demo", [])))
    assert page.take(tmp_path / "run", tmp_path / "results") == ["demo"]
    assert page.read(tmp_path / "results") == page.read(tmp_path / "run")
