"""Run the commands of a page that are marked as checked, in order, from the repository's root.

    python tests/readme_commands.py README.md

A block is checked when `<!-- checked -->` stands right above its opening fence, and expects exit
code 0; `<!-- checked: 1 -->` expects 1. Run folders named in the commands are removed first, so
that the page can be checked again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"<!-- checked(?:: (\d+))? -->\n```bash\n(.*?)```", re.DOTALL)


def main(page: str) -> None:
    blocks = BLOCK.findall(Path(page).read_text())
    if not blocks:
        sys.exit(f"{page}: no checked block")
    outputs = re.compile(r"(?:run\.output=|--output )(runs/[\w-]+)")
    for folder in {name for _, block in blocks for name in outputs.findall(block)}:
        shutil.rmtree(folder, ignore_errors=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for code, block in blocks:
        print(f"$ {block.strip()}", flush=True)
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, check=False, env={**os.environ, "PATH": path})
        if done.returncode != int(code or 0):
            sys.exit(f"{page}: exit code {done.returncode}, not {code or 0}:\n{block}")
    print(f"{len(blocks)} blocks of {page} ran.")


if __name__ == "__main__":
    main(sys.argv[1])
