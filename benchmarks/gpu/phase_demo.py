"""`stableopd demo` on the device, next to the README's table of a CPU."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meter import ROOT, Setting
from stableopd.demo import ARMS, table_row
from stableopd.runfolder import RunFolder

COLUMNS = ("accuracy", "TruncRate", "RepRate", "length")
# What the demo is to show, with any draws: the collapse, and the cure.
COLLAPSED = {"accuracy": (0.0, 0.3), "TruncRate": (0.5, 1.0)}
HEALTHY = {"accuracy": (0.9, 1.0), "TruncRate": (0.0, 0.1)}
EXPECTED = {"OPD, end": COLLAPSED, "StableOPD, end": HEALTHY}
TOY = ("run.steps=3", "eval.max_problems=8", "rollout.prompts_per_step=4")


def readme_table() -> dict[str, dict[str, float]]:
    """The demo's table in the README, row by row."""
    rows = re.findall(r"^\| ((?:start|\w+, end)) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    found: dict[str, dict[str, float]] = {}
    for name, cells in rows:
        values = [float(cell) for cell in cells.split("|")]
        found.setdefault(name, dict(zip(COLUMNS, values, strict=True)))
    return found


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        command = [sys.executable, "-m", "stableopd", "demo", "--output", str(output)]
        for override in (f"run.device={setting.device}", *setting.choose((), TOY)):
            command += ["--set", override]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        if done.returncode:
            raise RuntimeError(f"the demo ended with exit code {done.returncode}: {done.stderr}")
        runs = {arm: RunFolder.open(output / method).metrics() for arm, method in ARMS.items()}
    first = next(iter(runs.values()))
    found = {"start": table_row(first, is_start=True)}
    found |= {f"{arm}, end": table_row(lines) for arm, lines in runs.items()}
    cpu = readme_table()
    for name, cells in found.items():
        values = dict(zip(COLUMNS, map(float, cells), strict=True))
        row: dict[str, Any] = {"what": name, "here": values, "cpu": cpu[name]}
        if name in EXPECTED and not setting.quick:
            bounds = EXPECTED[name]
            row["ok"] = all(low <= values[key] <= high for key, (low, high) in bounds.items())
        yield row


def summary(rows: list[dict[str, Any]]) -> str:
    """What to print of the rows."""
    told = [f"{row['what']}: accuracy {row['here']['accuracy']:.2f}" for row in rows]
    return ", ".join(told)
