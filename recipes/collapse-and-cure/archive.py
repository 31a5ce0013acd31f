"""The runs behind docs/results.md as one small file, and back.

    python recipes/collapse-and-cure/archive.py unpack --output work/reproduce
    python recipes/collapse-and-cure/archive.py pack --output work/reproduce

`runs.tar.xz` beside this file holds what the page is made of: configurations, metrics, seconds,
cells and evaluations, without models, checkpoints and rollouts. Unpacked, these runs count as
finished: the page can be made again in a minute, and `make reproduce` adds what is missing, such as
more seeds.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Annotated

import typer

FILE = Path(__file__).with_name("runs.tar.xz")
# Of each run, of its last student's evaluation, the cells, and the rest.
PATTERNS = (
    "runs/*/*/s*/config.toml",
    "runs/*/*/s*/environment.json",
    "runs/*/*/s*/metrics.jsonl",
    "runs/*/*/s*/seconds.json",
    "runs/*/*/s*/ended-collapsed",
    "finals/**/summary.json",
    "cells/*.json",
    "commits.txt",
    "confidence.json",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Output = Annotated[Path, typer.Option(help="The folder of `make reproduce`.")]
File = Annotated[Path, typer.Option(help="The archive.")]


@app.command()
def pack(output: Output = Path("work/reproduce"), file: File = FILE) -> None:
    """Write the archive from all finished runs of a folder."""
    found = sorted({path for pattern in PATTERNS for path in output.glob(pattern)})
    part = file.with_name(f"{file.name}.part")
    with tarfile.open(part, "w:xz", preset=9) as archive:
        for path in found:
            run = path.parent if path.is_relative_to(output / "runs") else None
            if run is None or (run / "seconds.json").is_file():
                archive.add(path, path.relative_to(output), filter=_nobody)
    part.rename(file)
    print(f"{file}: {len(found)} files, {file.stat().st_size / 1e6:.1f} MB.")


@app.command()
def unpack(output: Output = Path("work/reproduce"), file: File = FILE) -> None:
    """Put the archive's runs into a folder; what is there already stays as it is."""
    num = 0
    with tarfile.open(file) as archive:
        for member in archive.getmembers():
            if not (output / member.name).exists():
                archive.extract(member, output, filter="data")
                num += 1
    print(f"{output}: {num} files.")


def _nobody(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same runs give the same archive."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    app()
