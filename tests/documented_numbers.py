"""Check the table of a page against runs, or print it anew from them.

    python tests/documented_numbers.py README.md runs/demo
    python tests/documented_numbers.py recipes/trl/README.md runs/trl runs/trl-stable
    python tests/documented_numbers.py --print runs/demo

One folder is a demo's, two are the arms of recipes/trl. Processors round differently, so draws
differ: cells may differ by what TOLERANCES says, and the pages say so, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stableopd.demo import ARMS, table_row
from stableopd.runfolder import RunFolder

# Three standard errors of a share of 100 answers, at the most: 3 x sqrt(.5 x .5 / 100). A rollout
# that is cut off has 96 tokens for about 28: 0.15 of them are 10 tokens of the mean length.
TOLERANCES = {
    "accuracy": 0.15,
    "TruncRate": 0.15,
    "RepRate": 0.15,
    "repetitive tokens": 0.15,
    "length": 10.0,
}
DEMO = ("accuracy", "TruncRate", "RepRate", "length")
TRL = {
    "TruncRate": "rollout/truncation_rate",
    "RepRate": "rollout/repetition_rate",
    "repetitive tokens": "rollout/repetitive_share",
    "length": "rollout/mean_length",
}

Rows = dict[str, dict[str, str]]  # row, column: cell; "" where there is no number


def of_demo(folder: Path) -> Rows:
    """The rows of the demo's table: the start, and the end of each arm."""
    lines = {name: RunFolder.open(folder / method).metrics() for name, method in ARMS.items()}
    rows = {"start": table_row(next(iter(lines.values())), is_start=True)}
    rows |= {f"{name}, end": table_row(found) for name, found in lines.items()}
    return {name: dict(zip(DEMO, cells, strict=True)) for name, cells in rows.items()}


def of_trl(plain: Path, stable: Path) -> Rows:
    """The rows of the table of recipes/trl, from what its two arms wrote."""
    ends = {"DistillationTrainer": plain, "StableOPDTrainer": stable}
    found = {n: json.loads((path / "result.json").read_text()) for n, path in ends.items()}
    before = next(iter(found.values()))["accuracy before"]
    rows: Rows = {"start": {"accuracy": f"{before:.2f}", **dict.fromkeys(TRL, "")}}
    for name, result in found.items():
        last = result["last five steps"]
        forms = {column: ".0f" if column == "length" else ".2f" for column in TRL}
        cells = {column: format(last[key], forms[column]) for column, key in TRL.items()}
        rows[f"`{name}`, end"] = {"accuracy": f"{result['accuracy after']:.2f}", **cells}
    return rows


def documented(page: str) -> Rows:
    """The rows of the first table of a page whose columns are known."""
    lines = iter(page.splitlines())
    for line in lines:
        columns = _cells(line)[1:]
        if line.startswith("| | ") and set(columns) <= TOLERANCES.keys():
            break
    else:
        sys.exit("the page has no table with these columns")
    next(lines)  # the rule below the heads
    rows: Rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = _cells(line)
        rows[name] = dict(zip(columns, cells, strict=True))
    return rows


def faults(written: Rows, found: Rows) -> list[str]:
    """What differs by more than the tolerance."""
    if written.keys() != found.keys():
        return [f"rows {sorted(written)} are written, {sorted(found)} were measured"]
    return [
        f"{row}, {column}: {one!r} is written, {other!r} was measured, the tolerance is {within:g}"
        for row, cells in written.items()
        for column, one in cells.items()
        if not _agree(one, other := found[row][column], within := TOLERANCES[column])
    ]


def _agree(one: str, other: str, within: float) -> bool:
    if not one or not other:
        return one == other
    return abs(float(one) - float(other)) <= within


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main(page: str, *folders: str) -> None:
    paths = [Path(folder) for folder in folders]
    rows = of_demo(*paths) if len(paths) == 1 else of_trl(*paths)
    columns = list(rows["start"])
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells.values())} |")
    if page != "--print" and (found := faults(documented(Path(page).read_text()), rows)):
        sys.exit(f"{page}: " + "; ".join(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
