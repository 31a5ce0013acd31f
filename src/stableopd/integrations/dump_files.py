"""The files of a dump: which of a folder's they are, and their rows, read one by one."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from stableopd.types import DataError

__all__ = ["RawRow", "binary_columns", "find_files", "is_beside", "read_rows", "step_in_name"]

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

STEP_STEM = re.compile(
    r"(?:^|[a-z_-])(?:step|rollouts?|iter(?:ation)?|completions|data|batch)[_-]?(\d+)$",
    re.IGNORECASE,
)
STEP_FOLDER = re.compile(r"(?:global_)?step[_-]?(\d+)", re.IGNORECASE)

PROGRESS_BYTES = 1 << 20
MOST_STEP = 2**53

# A row's line (from 1) and either its columns or what is wrong with it.
RawRow = tuple[int, dict[str, Any] | str]


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
        try:
            if path.is_dir():
                here, others = _search(path)
                left_out += others
            elif path.exists():
                _refuse_unreadable(path)
                here = [path]
            else:
                raise DataError(f"{path}: no such file or folder.")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None
        for file in here:
            found.setdefault(file.resolve(), file)
    if not found:
        raise DataError("No file was named; give the files or folders of the dump.")
    return list(found.values()), left_out


def step_in_name(path: Path) -> int | None:
    """The step that a file's name (12.jsonl, rollout_12.jsonl) or folder (step_12/) gives."""
    stem, folder = path.name.partition(".")[0], STEP_FOLDER.fullmatch(path.parent.name)
    if stem.isdecimal() and not folder:
        digits = stem
    elif found := STEP_STEM.search(stem) or folder:
        digits = found[1]
    else:
        return None
    return step if (step := int(digits)) <= MOST_STEP else None


def is_beside(path: Path) -> bool:
    """Whether a file is by its name what lies beside rollouts: a log or an evaluation."""
    return not _is_train(path.name)


def binary_columns(path: Path) -> list[str]:
    """The columns of bytes in a parquet file, which are not read: images and the like."""
    import pyarrow.parquet as parquet

    return [field.name for field in parquet.read_schema(path) if _is_binary(field.type)]


def read_rows(path: Path, on_bytes: Callable[[int], None]) -> Iterator[RawRow]:
    """Read a file row by row.

    Args:
        path: A parquet file, or one with a JSON object a line, plain or gzipped.
        on_bytes: Is told, now and then, how many bytes more of the file were read; the numbers
            add up to the file's size.

    Yields:
        The line (row) number from 1, and the columns or, for a damaged line, what is wrong.
        Blank lines are passed over. A file that breaks off is a damaged line where it does.

    Raises:
        DataError: The file cannot be opened.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path, on_bytes)
        else:
            yield from _line_rows(path, on_bytes)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None


def _line_rows(path: Path, on_bytes: Callable[[int], None]) -> Iterator[RawRow]:
    number = 0
    with path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else io.BufferedReader(raw.raw)
        told = 0
        try:
            for number, line in enumerate(lines, start=1):
                if (place := raw.tell()) - told >= PROGRESS_BYTES:
                    on_bytes(place - told)
                    told = place
                if row := _parse(line, number):
                    yield number, row
        except (EOFError, gzip.BadGzipFile) as error:
            yield number + 1, f"the gzip file breaks off here ({error})"
        on_bytes(os.fstat(raw.fileno()).st_size - told)


def _parse(line: bytes, number: int) -> dict[str, Any] | str:
    """The object of a line, what is wrong with it, or "" for a blank line."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if not text.strip():
            return ""
        row: Any = json.loads(text.rstrip())
    except UnicodeDecodeError as error:
        return f"not valid UTF-8 at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the line is cut off"
        return f"not valid JSON ({error.msg}, at character {error.pos + 1}){cut}"
    except (ValueError, RecursionError) as error:
        return f"JSON that is too large ({str(error).partition(';')[0]})"
    if not isinstance(row, dict):
        return f"JSON, but not an object ({type(row).__name__})"
    return cast(dict[str, Any], row) or "an empty object"


def _parquet_rows(path: Path, on_bytes: Callable[[int], None]) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet as parquet

    size, told, number = path.stat().st_size, 0, 0
    try:
        # Without pre_buffer a row group is not held in memory as a whole.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            rows = max(file.metadata.num_rows, 1)
            names = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
            for batch in file.iter_batches(batch_size=256, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
                on_bytes(size * number // rows - told)
                told = size * number // rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        yield number + 1, f"not readable as parquet from here on ({reason})"
    on_bytes(size - told)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


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
    for wanted in (KNOWN.fullmatch, _is_train, lambda name: not JUNK.fullmatch(name)):
        files = [f for f in every if wanted(f.name)]
        nearest = min((len(f.parts) for f in files if not _is_step(f.parent)), default=None)
        if nearest is not None:
            # What lies nearest is what was meant; folders of single steps count as one place.
            files = [f for f in files if len(f.parts) == nearest or _is_step(f.parent)]
        if files:
            return files, [f for f in every if f not in set(files)]
    raise DataError(_nothing_in(folder, every))


def _is_train(name: str) -> bool:
    return not JUNK.fullmatch(name) and not EVALUATIONS.fullmatch(name)


def _is_step(folder: Path) -> bool:
    return STEP_FOLDER.fullmatch(folder.name) is not None


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file() and (folder / "rollouts").is_dir()


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
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
    source, target = shlex.quote(str(path)), shlex.quote(str(path.with_suffix(".jsonl")))
    return (
        f"{path}: a pickle, which can run any code when it is loaded and is never opened here; "
        "where you trust it, make lines of it: python -c 'import json, sys, torch; "
        "[print(json.dumps(s, default=str)) for s in torch.load(sys.argv[1], weights_only=False)"
        f'["samples"]]\' {source} > {target}'
    )
