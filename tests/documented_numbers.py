"""Check the table of a page against the runs of a demo, or print it anew from them.

    python tests/documented_numbers.py README.md runs/demo
    python tests/documented_numbers.py --print runs/demo

Processors round differently, so draws differ: cells may differ by what TOLERANCES says, and the
page says so, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stableopd.demo import ARMS, table_row
from stableopd.runfolder import RunFolder

COLUMNS = ("accuracy", "TruncRate", "RepRate", "length")
# Three standard errors of a share of 100 answers, at the most: 3 x sqrt(.5 x .5 / 100). A rollout
# that is cut off has 96 tokens for about 28: 0.15 of them are 10 tokens of the mean length.
TOLERANCES = (0.15, 0.15, 0.15, 10.0)


def measured(folder: Path) -> dict[str, list[str]]:
    """The rows of the demo's table: the start, and the end of each arm."""
    lines = {name: RunFolder.open(folder / method).metrics() for name, method in ARMS.items()}
    rows = {"start": table_row(next(iter(lines.values())), is_start=True)}
    return rows | {f"{name}, end": table_row(found) for name, found in lines.items()}


def documented(page: str) -> dict[str, list[str]]:
    """The rows of the first table with the demo's columns."""
    below = page.split(f"| | {' | '.join(COLUMNS)} |\n", 1)[1].splitlines()[1:]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in below[: 1 + len(ARMS)]
    ]
    return {name: cells for name, *cells in rows}


def faults(written: dict[str, list[str]], found: dict[str, list[str]]) -> list[str]:
    """What differs by more than the tolerance."""
    if written.keys() != found.keys():
        return [f"rows {sorted(written)} are written, {sorted(found)} were measured"]
    return [
        f"{row}, {column}: {one} is written, {other} was measured, the tolerance is {tolerance:g}"
        for row, cells in written.items()
        for column, one, other, tolerance in zip(
            COLUMNS, cells, found[row], TOLERANCES, strict=True
        )
        if not abs(float(one) - float(other)) <= tolerance
    ]


def main(page: str, folder: str) -> None:
    rows = measured(Path(folder))
    print(f"| | {' | '.join(COLUMNS)} |\n|---|---|---|---|---|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")
    if page != "--print" and (found := faults(documented(Path(page).read_text()), rows)):
        sys.exit(f"{page}: " + "; ".join(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
