"""The steps of a dump: what the names of its files tell, and which attempt at a step counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from stableopd.types import DataError

__all__ = ["NO_STEPS", "STEPS_OF_FILES", "StepAttempts", "name_steps", "step_in_name"]

# What may stand for a column in `--map step=COLUMN`.
STEPS_OF_FILES = "@file"
NO_STEPS = "@none"

# Several processes, or pieces, may write a file each for one step.
_PIECE = (
    r"(?:[_.-](?:dp|tp|pp)?[_-]?(?:rank|shard|part|piece|worker|proc|process|gpu|node)[_-]?\d+)"
)
STEP_STEM = re.compile(
    r"(?:^|[a-z_-])(?:step|rollouts?|iter(?:ation)?|completions|data|batch)[_-]?(\d+)"
    rf"{_PIECE}*$",
    re.IGNORECASE,
)
NUMBER_OF_PIECE = re.compile(rf"(\d+){_PIECE}+", re.IGNORECASE)
STEP_FOLDER = re.compile(r"(?:global_)?step[_-]?(\d+)", re.IGNORECASE)
# Folders that may stand between that of a step and its files.
INNER_FOLDERS = re.compile(r"train|eval|all|effective|rollouts?|traces?", re.IGNORECASE)

MOST_STEP = 2**53
MOST_PIECES = 1024

# More turns back than these are no resumes: rows that are not in the order of their steps.
MOST_TURNS = 16
# Shares of the earlier steps, and of their rollouts, that a resumed run makes again.
REMADE_STEPS, REMADE_ROLLOUTS = 0.5, 0.5
# Share of the usual number of rollouts that the earlier attempt had of these steps.
FULL_STEPS = 0.6


def step_in_name(path: Path) -> int | None:
    """The step that a file's name (12.jsonl, rollout_12.jsonl) or folder (step_12/) gives."""
    stem, folder = _stem(path), _step_folder(path)
    if stem.isdecimal() and not folder:
        digits = stem
    elif found := NUMBER_OF_PIECE.fullmatch(stem) or STEP_STEM.search(stem) or folder:
        digits = found[1]
    else:
        return None
    return step if (step := int(digits)) <= MOST_STEP else None


def name_steps(
    files: Sequence[Path], source: str, is_generic: bool
) -> tuple[dict[Path, int | None], str]:
    """The steps that the names of a dump's files give.

    Args:
        files: The files.
        source: `STEPS_OF_FILES` or `NO_STEPS` where the user says so, else "".
        is_generic: Whether the files are of no known framework, and name no steps within.

    Returns:
        The step of each file, and what the user should know of them, "" for nothing.

    Raises:
        DataError: The names may be those of steps as well as of the parts of one.
    """
    steps = {file: step_in_name(file) for file in files}
    if source == NO_STEPS:
        return dict.fromkeys(files), ""
    bare = [f for f in files if _stem(f).isdecimal() and not _step_folder(f)]
    if source == STEPS_OF_FILES or not bare:
        return steps, ""
    if len({f.parent for f in bare}) > 1 and all(f.parent.name.isdecimal() for f in bare):
        return steps | dict.fromkeys(bare), (
            f"The files are named by two numbers, as {bare[0].parent.name}/{bare[0].name}, so that "
            "their names give no step: say which column does, --map step=COLUMN, or "
            f"--map step={STEPS_OF_FILES} where the second number is the step."
        )
    numbers = sorted(int(_stem(f)) for f in bare)
    many = len(numbers)
    if not is_generic:
        return steps, ""
    said = f"The steps are those in the names of the files, {numbers[0]} to {numbers[-1]}"
    no_steps = f"--map step={NO_STEPS}"
    # Steps begin at 0 and end below a power of two seldom, ranks do always.
    if 2 <= many <= MOST_PIECES and many & (many - 1) == 0 and numbers == list(range(many)):
        raise DataError(
            f"{bare[0].parent}: its files are numbered 0 to {many - 1}, as steps may be, and as "
            f"the ranks or shards of one step; say --map step={STEPS_OF_FILES} for steps, or "
            f"{no_steps}."
        )
    return steps, f"{said}; where these are no steps, say {no_steps}." if many > 1 else ""


@dataclass
class _File:
    """What was seen of a file: its stretches of steps that do not fall, each step's rollouts."""

    stretches: list[dict[int, int]] = field(default_factory=list[dict[int, int]])
    last: int = -1
    is_ordered: bool = True


class StepAttempts:
    """Finds the steps that a resumed run wrote again into the same file.

    A file whose steps fall back, a few times, and rise again from there over steps that were
    there, with about as many rollouts each, holds several attempts at them: the last one counts.
    A file that begins anew at its first step rather holds several runs, or the ranks of one.
    """

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}

    @property
    def has_several_runs(self) -> bool:
        """Whether a file begins anew at its first step."""
        return any(
            min(stretch) <= min(seen.stretches[0]) and len(stretch) > 1
            for seen in self._files.values()
            for stretch in seen.stretches[1:]
        )

    def see(self, file: int, step: int | None) -> int:
        """Take a rollout in; returns the stretch of its file that it belongs to."""
        seen = self._files.setdefault(file, _File())
        if step is None or not seen.is_ordered:
            return -1
        if step < seen.last or not seen.stretches:
            if len(seen.stretches) > MOST_TURNS:
                seen.is_ordered, seen.stretches = False, []
                return -1
            seen.stretches.append({})
        seen.last = step
        stretch = seen.stretches[-1]
        stretch[step] = stretch.get(step, 0) + 1
        return len(seen.stretches) - 1

    def cuts(self) -> Mapping[tuple[int, int], int]:
        """By file and stretch, the step from which on a later attempt takes its place."""
        found: dict[tuple[int, int], int] = {}
        for file, seen in self._files.items():
            for place in range(1, len(seen.stretches)):
                before, stretch = seen.stretches[:place], seen.stretches[place]
                kept = [
                    {s: n for s, n in old.items() if s < found.get((file, i), MOST_STEP + 1)}
                    for i, old in enumerate(before)
                ]
                if _is_resumed(kept, stretch):
                    first = min(stretch)
                    for i in range(place):
                        found[file, i] = min(first, found.get((file, i), MOST_STEP + 1))
        return found


def _is_resumed(before: Sequence[Mapping[int, int]], stretch: Mapping[int, int]) -> bool:
    """Whether a stretch of steps makes those again that were there before it."""
    old: dict[int, int] = {}
    for each in before:
        for step, number in each.items():
            old[step] = old.get(step, 0) + number
    first, last = min(stretch), max(stretch)
    if first <= min(old, default=first):  # a resumed run has steps that it does not make again
        return False
    covered = [step for step in old if first <= step <= last]
    again = [step for step in covered if step in stretch]
    if len(again) < 2 or len(again) < REMADE_STEPS * len(covered):
        return False
    made, had = (sum(each[step] for step in again) for each in (stretch, old))
    # Where the rollouts of two steps come by turns, the first stretch has only a part of each.
    usual = median(number for step, number in old.items() if step < first)
    return made >= REMADE_ROLLOUTS * had and had >= FULL_STEPS * usual * len(again)


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _step_folder(path: Path) -> re.Match[str] | None:
    for folder in path.parents:
        if found := STEP_FOLDER.fullmatch(folder.name):
            return found
        if not INNER_FOLDERS.fullmatch(folder.name):
            return None
    return None
