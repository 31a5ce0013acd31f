"""What a checkpoint is made of, so that a damaged one is known before its weights are used.

    trainer/manifest.json     the step, and the size and SHA-256 of each other file

It is written last. Checkpoints of earlier versions have none.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from stableopd.runfolder.files import read_object, reading
from stableopd.types import RunFolderError

__all__ = ["require_intact", "write_manifest"]

MANIFEST = "trainer/manifest.json"


def write_manifest(folder: Path, step: int) -> None:
    """Write down what a checkpoint holds.

    Args:
        folder: The checkpoint, complete but for this file.
        step: Its step.
    """
    files = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    file = folder / MANIFEST
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"format": 1, "step": step, "files": files}, indent=2) + "\n")


def require_intact(folder: Path, step: int) -> bool:
    """Refuse a checkpoint whose files are not those that were written.

    Args:
        folder: The checkpoint.
        step: The step that its name says.

    Returns:
        Whether it has a manifest; without one nothing is known.

    Raises:
        RunFolderError: A file is missing or was changed, or the checkpoint is of another step.
    """
    file = folder / MANIFEST
    if not file.exists():
        return False
    found = read_object(file)
    files: Any = found.get("files")
    if found.get("step") != step or not isinstance(files, dict):
        raise _damaged(folder, f"{MANIFEST} is not of step {step}")
    for name, entry in cast(dict[str, Any], files).items():
        path = folder / name
        with reading(path):
            if not path.is_file():
                raise _damaged(folder, f"{name} is missing")
            if entry != _entry(path):
                raise _damaged(folder, f"{name} is not what was written")
    return True


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _damaged(folder: Path, fault: str) -> RunFolderError:
    return RunFolderError(
        f"{folder}: the run cannot go on from here ({fault}); remove the folder {folder} to go on "
        "from the checkpoint before it."
    )
