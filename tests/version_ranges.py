"""The ranges of pyproject.toml: python tests/version_ranges.py torch oldest|newest."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOWEST = ">="


def ranges() -> dict[str, str]:
    """Name and range of each direct dependency, those of the extras among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    parts = {line: line.index(LOWEST) for line in lines}
    return {line[:place]: line[place:] for line, place in parts.items()}


def main(name: str, which: str) -> None:
    """Print what pip is to install."""
    wanted = ranges()[name]
    print(name + (wanted.split(",")[0].replace(LOWEST, "==") if which == "oldest" else wanted))


if __name__ == "__main__":
    main(*sys.argv[1:])
