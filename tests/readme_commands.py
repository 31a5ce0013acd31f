"""Run the commands of a page that are marked as checked, in order, from the repository's root.

    python tests/readme_commands.py README.md

A block is checked when `<!-- checked -->` stands right above its opening fence. Run folders named
in the commands are removed first, so that the page can be checked again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"<!-- checked -->\n```bash\n(.*?)```", re.DOTALL)


def main(page: str) -> None:
    blocks = BLOCK.findall(Path(page).read_text())
    if not blocks:
        sys.exit(f"{page}: no checked block")
    for folder in {
        name for block in blocks for name in re.findall(r"run\.output=(runs/[\w-]+)", block)
    }:
        shutil.rmtree(folder, ignore_errors=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks:
        print(f"$ {block.strip()}", flush=True)
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], check=True, env={**os.environ, "PATH": path}
        )
    print(f"{len(blocks)} blocks of {page} ran.")


if __name__ == "__main__":
    main(sys.argv[1])
