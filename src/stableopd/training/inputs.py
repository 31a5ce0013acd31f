"""What a run was made of, as checksums: a resumed run must find the same, or be told to go on.

A file that changed, another base of an adapter, a teacher that was replaced, a template that writes
today's date: all of these train another student than the one that was begun.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from stableopd.teacher.server import TOLERANCE, ServedTeachers
from stableopd.training.data import Problems
from stableopd.types import ConfigError

__all__ = [
    "ALLOWABLE",
    "allowed_names",
    "changed_inputs",
    "differs",
    "inputs_of",
    "served_scores",
    "weights_sum",
]

# Name of each checksum: what --allow-changed calls it, and what to say where it differs.
WORDS: dict[str, tuple[str, str]] = {
    "prompts": ("data", "data.train has other prompts"),
    "prompt_ids": (
        "data",
        "the same prompts are now other tokens, as after a change of the tokenizer or the chat "
        "template, or where a template writes the date",
    ),
    "golden": ("data", "the golden solutions are others"),
    "answers": ("data", "the answers are others"),
    "held_out": ("eval", "the problems of eval.data are others"),
    "student": ("student", "the weights of student.model are others"),
    "teacher": (
        "teacher",
        'the weights of teacher.model are others, or of another type (teacher.dtype = "auto" '
        "follows the device)",
    ),
    "teacher_stops": ("teacher", "the teacher's stop ids are others"),
    "served": ("teacher", "the served teacher scores the same tokens otherwise"),
}
ALLOWABLE = tuple(dict.fromkeys(name for name, _ in WORDS.values()))


def weights_sum(model: Any) -> str:
    """SHA-256 of a model's parameters: names, types, shapes and bits.

    Args:
        model: A transformers model whose weights are not sharded.

    Returns:
        Hexadecimal digits.
    """
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        bits = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(bits.numpy())
    return total.hexdigest()


def inputs_of(
    train: Problems,
    held_out: Problems | None,
    weights: Mapping[str, str],
    teacher_stop_ids: tuple[int, ...] | None,
) -> dict[str, str]:
    """The checksums of what a run is made of.

    Args:
        train: The problems to train on.
        held_out: Those of the evaluation.
        weights: `weights_sum` of the models that were read, by role.
        teacher_stop_ids: What the teacher stops with, where that is known.

    Returns:
        A text for each name in WORDS; what is not at hand is left out.
    """
    found = {
        "prompts": _sum((p.id, p.prompt, p.teacher) for p in train.prompts),
        "prompt_ids": _sum(train.prompt_ids),
        "answers": _sum(p.answer for p in train.prompts),
        **weights,
    }
    if any(s is not None for s in train.golden):
        found["golden"] = _sum(s and s.completion_ids for s in train.golden)
    if held_out is not None:
        answers = [p.answer for p in held_out.prompts]
        found["held_out"] = _sum(zip(held_out.prompt_ids, answers, strict=True))
    if teacher_stop_ids is not None:
        found["teacher_stops"] = " ".join(map(str, teacher_stop_ids))
    return found


def served_scores(teachers: ServedTeachers) -> str:
    """What served teachers say of their probes, as a text that `differs` compares.

    Args:
        teachers: The teachers, after the self-test.

    Returns:
        A line for each teacher: a checksum of its name and the tokens, and their log-probs.
    """
    lines = [
        " ".join([_sum([name, *ids]), *(f"{logp:.4f}" for logp in logps)])
        for name, teacher in teachers.by_name.items()
        for ids, logps in list(teacher.probes.values())[:1]  # replicas agree
    ]
    return "\n".join(lines)


def differs(name: str, before: str, now: str) -> bool:
    """Whether a checksum is of something else.

    Args:
        name: Its name in WORDS. Scores of served teachers differ by more than rounding, or not;
            those of other tokens say nothing.
        before: The one that was written down.
        now: The one of now.

    Returns:
        Whether the two are of different things.
    """
    if name != "served":
        return before != now
    try:
        old, new = ({k: list(map(float, v)) for k, *v in _words(text)} for text in (before, now))
    except ValueError:
        return True
    gaps = [
        sum(abs(a - b) for a, b in zip(old[key], new[key], strict=False)) / max(1, len(new[key]))
        for key in old.keys() & new.keys()
    ]
    return not all(gap <= TOLERANCE for gap in gaps)


def _words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()]


def changed_inputs(
    before: Mapping[str, Any], now: Mapping[str, str], allowed: Collection[str], folder: Path
) -> list[str]:
    """Refuse to go on with a run whose data or models are others.

    Args:
        before: The checksums that the run wrote down; those of an earlier version had none.
        now: Those of what was read now.
        allowed: Names in ALLOWABLE of what may have changed.
        folder: The run folder, for the message.

    Returns:
        A sentence for the user for each change that is allowed.

    Raises:
        ConfigError: Something changed that is not allowed.
    """
    # What is not read now, such as a reference that no term needs, cannot be compared.
    names = [n for n in WORDS if n in before and n in now and differs(n, before[n], now[n])]
    if "prompts" in names:
        names = [name for name in names if name != "prompt_ids"]
    refused = [name for name in names if WORDS[name][0] not in allowed]
    if refused:
        what = "; ".join(WORDS[name][1] for name in refused)
        needed = ",".join(dict.fromkeys(WORDS[name][0] for name in refused))
        raise ConfigError(
            f"--resume: what the run in {folder} began with has changed: {what}. Put the former "
            f"back, start a new run in another run.output, or go on with --allow-changed {needed}."
        )
    return [f"Allowed, and different from now on: {WORDS[name][1]}." for name in names]


def allowed_names(given: Iterable[str], resume: bool) -> tuple[str, ...]:
    """The names of `--allow-changed`, each of which may hold several, with commas.

    Args:
        given: As typed.
        resume: Whether a run is resumed.

    Returns:
        Names in ALLOWABLE.

    Raises:
        ConfigError: One is unknown, or nothing is resumed.
    """
    names = tuple(name.strip() for text in given for name in text.split(",") if name.strip())
    for name in names:
        if name not in ALLOWABLE:
            raise ConfigError(f"--allow-changed {name}: choose from {', '.join(ALLOWABLE)}.")
    if names and not resume:
        raise ConfigError("--allow-changed is for --resume: a new run has nothing to differ from.")
    return names


def _sum(items: Iterable[Any]) -> str:
    total = hashlib.sha256()
    for item in items:
        total.update(f"{item!r}\n".encode("utf-8", errors="backslashreplace"))
    return total.hexdigest()
