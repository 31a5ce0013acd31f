"""Run every benchmark and write docs/benchmarks.md from what they print.

    python benchmarks/report.py [--runs N] [--quick] [--only opd_step loss] [--stitch]

What each script prints is kept under work/bench/outputs; `--only` runs some of them and `--stitch`
none, and the page is written from all that is kept. The text around the numbers is template.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import common

HERE = Path(__file__).resolve().parent
# Quick ones first, so that what is broken shows early.
NAMES = (
    "token_labels",
    "repetition_rate",
    "startup",
    "opd_step",
    "loss",
    "distillation_step",
    "rollouts",
    "update_rate",
    "smollm2_step",
)
MARK = re.compile(r"<!-- output: (\w+) -->")
TOOK = re.compile(r"^Took ([\d.]+) minutes\.$", re.MULTILINE)
NOT_RUN = "(not run)"


def run(name: str, arguments: list[str], folder: Path) -> float:
    """Run one script and keep what it prints; seconds that it took.

    Raises:
        SystemExit: The script failed; what it printed before is kept beside.
    """
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(HERE / f"bench_{name}.py"), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(common.num_threads())},
    )
    seconds = time.monotonic() - start
    folder.mkdir(parents=True, exist_ok=True)
    if done.returncode:
        (folder / f"{name}.failed.md").write_text(done.stdout)
        raise SystemExit(f"bench_{name}.py failed; it printed:\n{done.stdout}")
    print(done.stdout, flush=True)
    text = f"{done.stdout.rstrip()}\n\nTook {seconds / 60:.1f} minutes.\n"
    (folder / f"{name}.md").write_text(text)
    return seconds


def stitch(template: str, folder: Path) -> str:
    """The template with what each script printed in the place of its mark."""

    def output(match: re.Match[str]) -> str:
        file = folder / f"{match[1]}.md"
        return file.read_text().rstrip() if file.exists() else NOT_RUN

    return MARK.sub(output, template)


def verdicts(folder: Path) -> str:
    """All rows that have a target, from all tables"""
    lines = common.Row.HEADER.splitlines()
    for name in NAMES:
        file = folder / f"{name}.md"
        for line in file.read_text().splitlines() if file.exists() else []:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) == 7 and cells[6] in ("yes", "**no**"):
                lines.append(line)
    return "\n".join(lines) if len(lines) > 2 else NOT_RUN


def minutes(folder: Path) -> str:
    """What all scripts took together, as they say."""
    files = [folder / f"{name}.md" for name in NAMES]
    taken = [TOOK.findall(file.read_text()) for file in files if file.exists()]
    return f"{sum(float(value) for values in taken for value in values):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, help="runs of each side")
    parser.add_argument("--quick", action="store_true", help="one tiny run of each")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--stitch", action="store_true", help="run nothing, write the page")
    parser.add_argument("--output", type=Path, help="the page; docs/benchmarks.md")
    chosen = parser.parse_args()
    folder = common.FOLDER / ("outputs-quick" if chosen.quick else "outputs")
    arguments = ["--quick"] if chosen.quick else []
    if chosen.runs:
        arguments += ["--runs", str(chosen.runs)]
    names = [] if chosen.stitch else [name for name in NAMES if name in chosen.only]
    total = sum(run(name, arguments, folder) for name in names)
    page = chosen.output or common.ROOT / "docs" / "benchmarks.md"
    if chosen.quick and not chosen.output:
        # Numbers that mean nothing do not go into the docs.
        page = folder / "benchmarks.md"
    template = (HERE / "template.md").read_text()
    text = stitch(template, folder).replace("<!-- verdicts -->", verdicts(folder))
    page.write_text(text.replace("<!-- minutes -->", minutes(folder)))
    print(f"{page} is written; {len(names)} benchmarks took {total / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
