"""The files of a dump: which of a folder's they are."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from stableopd.integrations.dump_rows import looking_at
from stableopd.integrations.dump_steps import step_in_name
from stableopd.types import DataError

__all__ = ["find_files", "free_name", "is_beside"]

LINE_ENDINGS = (".jsonl", ".jsonl.gz")
ENDINGS = (*LINE_ENDINGS, ".parquet")
TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".arrow", ".feather")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")

# Logs, indices and settings that lie beside rollouts and are none.
JUNK = re.compile(r"(metrics|logs?|logging|trainer_log|index|args|config|environment)\.jsonl")
EVALUATIONS = re.compile(r"(eval|val|validation|test)[_-].*|.*_eval\.jsonl", re.IGNORECASE)
JUNK_FOLDERS = re.compile(
    r"\..*|__pycache__|checkpoints?([-_].*)?|weights?|wandb|tensorboard"
    r"|trackio|swanlab|failed|live|annotations|broadcasts?",
)
# Where a folder has files of such a name, its other files are something else.
KNOWN = re.compile(
    r"completions_\d+\.parquet|completions\.jsonl|train_rollouts\.jsonl(\.gz)?"
    r"|train_data_step\d+\.jsonl"
)

# Folders of what is no training, and of what is a part of their sibling `all` (prime-rl).
EVALUATION_FOLDERS = re.compile(r"eval(s|uations?)?|val(idation)?", re.IGNORECASE)
PART_FOLDER, ALL_FOLDER = "effective", "all"


def find_files(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Find the files of a dump.

    Args:
        paths: Files and folders. A run folder of ours stands for its rollouts; a folder of
            another framework for its dumps, with checkpoints, logs and evaluations left out.

    Returns:
        The files, each once, in the order of the paths and within a folder by the numbers in
        their names (2 before 10); and the files of rows that were left out.

    Raises:
        DataError: A path does not exist, a folder has no dump, or a file is of no known kind.
    """
    found: dict[Path, Path] = {}
    left_out: list[Path] = []
    for path in paths:
        with looking_at(path):
            if path.is_dir():
                here, others = _search(path)
                left_out += others
            elif path.is_file():
                _refuse_unreadable(path)
                here = [path]
            elif path.exists():
                raise DataError(f"{path}: a pipe or a device; write it to a file first.")
            else:
                what = "a link to nothing" if path.is_symlink() else "no such file or folder"
                raise DataError(f"{path}: {what}.")
        for file in here:
            found.setdefault(_identity(file), file)
    if not found:
        raise DataError("No file was named; give the files or folders of the dump.")
    return list(found.values()), left_out


def _identity(file: Path) -> Path:
    """What tells a file from others, whatever links lead to it."""
    try:
        return file.resolve()
    except (RuntimeError, OSError):  # a link to itself
        return file.absolute()


def is_beside(path: Path) -> bool:
    """Whether a file is by its name what lies beside rollouts: a log or an evaluation."""
    return not _is_train(path.name) or path.parent.name == PART_FOLDER


def free_name(path: Path) -> Path:
    """A name for the lines of a file, for commands that we print: they write over nothing."""
    names = (path.with_suffix(".jsonl"), *(path.with_name(f"{path.name}.{i}.jsonl") for i in "123"))
    return next((name for name in names if not os.path.lexists(name)), names[-1])


def _search(folder: Path) -> tuple[list[Path], list[Path]]:
    """The dump's files in a folder, and those of rows that were left out."""
    if _is_run(folder):
        files = _natural(f for f in (folder / "rollouts").glob("*.jsonl"))
        if not files:
            raise DataError(f"{folder}: a run folder without rollouts; let it make a step.")
        return files, []
    every = _natural(_walk(folder))
    runs = sorted({f.parent.parent for f in every if _is_run(f.parent.parent)})
    if runs:
        if len(runs) > 1:
            names = ", ".join(str(run) for run in runs[:3]) + (", ..." if len(runs) > 3 else "")
            raise DataError(f"{folder}: holds {len(runs)} run folders ({names}); name one of them.")
        return _search(runs[0])
    parts = _parts_of_others(every)
    rollouts = [f for f in every if f not in parts]
    trained = [f for f in rollouts if not _is_evaluated(f.relative_to(folder))]
    for files in (
        [f for f in trained if KNOWN.fullmatch(f.name)],
        [f for f in trained if _is_train(f.name)],
        [f for f in rollouts if not JUNK.fullmatch(f.name)],
    ):
        nearest = min((len(f.parts) for f in files if not _is_step(f.parent)), default=None)
        if nearest is not None:
            # What lies nearest is what was meant; folders of single steps count as one place.
            files = [f for f in files if len(f.parts) == nearest or _is_step(f.parent)]
        if files:
            chosen = set(files)
            return files, [f for f in every if f not in chosen]
    raise DataError(_nothing_in(folder, every))


def _parts_of_others(files: Sequence[Path]) -> set[Path]:
    """Files whose rows stand in the file of the same name in the folder `all` as well."""
    every = set(files)
    return {
        f
        for f in files
        if f.parent.name == PART_FOLDER and f.parent.parent / ALL_FOLDER / f.name in every
    }


def _is_evaluated(path: Path) -> bool:
    return any(EVALUATION_FOLDERS.fullmatch(folder.name) for folder in path.parents)


def _is_train(name: str) -> bool:
    return not JUNK.fullmatch(name) and not EVALUATIONS.fullmatch(name)


def _is_step(folder: Path) -> bool:
    return step_in_name(folder / "rollouts.jsonl") is not None


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file() and (folder / "rollouts").is_dir()


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be listed may hold half of the dump

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not JUNK_FOLDERS.fullmatch(name)]
        for name in names:
            if name.endswith(ENDINGS) and not name.startswith("."):
                yield Path(place, name)


def _natural(files: Iterator[Path]) -> list[Path]:
    """The files with the numbers in their names in order: 2 before 10."""

    def key(path: Path) -> list[tuple[int, str]]:
        pieces = re.split(r"(\d+)", str(path))
        return [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]

    return sorted(files, key=key)


def _nothing_in(folder: Path, every: Sequence[Path]) -> str:
    pickles = sorted(f for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        return _conversion(pickles[0])
    packed = sorted(folder.rglob("*.zst"))
    if packed:
        return _packed(packed[0])
    tables = sorted(f for f in folder.iterdir() if f.suffix.lower() in TABLES)
    if tables and not every:
        return _table(tables[0])
    seen = f" ({every[0].name} is a log)" if every else ""
    return (
        f"{folder}: no rollouts in it{seen}; give a folder of {', '.join(ENDINGS)} files, such as "
        "TRL's output_dir, verl's trainer.rollout_data_dir or a run folder."
    )


def _refuse_unreadable(path: Path) -> None:
    if path.suffix in PICKLES:
        raise DataError(_conversion(path))
    if path.suffix == ".zst":
        raise DataError(_packed(path))
    if path.suffix.lower() in TABLES:
        raise DataError(_table(path))


def _table(path: Path) -> str:
    kind = path.suffix[1:].lower()
    return f"{path}: a {kind} file, which is not read here; convert it to JSONL or parquet."


def _packed(path: Path) -> str:
    return f"{path}: compressed with zstd; unpack it with: zstd -d {shlex.quote(str(path))}"


def _conversion(path: Path) -> str:
    source, target = shlex.quote(str(path)), shlex.quote(str(free_name(path)))
    return (
        f"{path}: a pickle, which can run any code when it is loaded and is never opened here; "
        "where you trust it, make lines of it: python -c 'import json, sys, torch; "
        "[print(json.dumps(s, default=str)) for s in torch.load(sys.argv[1], weights_only=False)"
        f'["samples"]]\' {source} > {target}'
    )
