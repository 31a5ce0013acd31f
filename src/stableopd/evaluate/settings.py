"""What decides an evaluation, and what of it is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableopd.config_checks import DTYPES
from stableopd.types import ConfigError

__all__ = ["MAX_SAMPLES", "Settings", "check", "names_of"]

# Where the user gives no budget: what the context leaves, and at most this (design).
MAX_NEW_TOKENS = 4096

# Design: all answers to a problem are held at once, and pass@k needs no more.
MAX_SAMPLES = 65_536

CHOICES = {
    "--grader": ("auto", "math", "exact"),
    "--dtype": DTYPES,
    "--device": ("auto", "cpu", "cuda", "mps"),
}


@dataclass(frozen=True)
class Settings:
    """The options of `stableopd eval`.

    Attributes:
        model: A model folder, a LoRA adapter's folder, a hub name, "embedded" or
            "embedded-teacher".
        data: Files or folders of problems, or "embedded".
        num_samples: k, completions of each problem.
        gguf_file: Name of a GGUF file in the model's folder.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Of sampling.
        max_new_tokens: Longest completion; 0 takes what the context leaves, at most 4096.
        max_problems: Problems of each data set, from its beginning; 0 takes all.
        seed: Of sampling.
        batch_size: Completions generated at once.
        grader: "math", "exact", or "auto", see `stableopd.data.grading.grader_of`.
        answer_marker: What stands before the answer, for "exact".
        chat_template: "auto" puts prompts through the tokenizer's chat template, where it has one;
            "none" does not; the path of a file takes the template from there.
        chat_template_kwargs: Further variables of the template.
        prompt_column: Column with the prompt.
        answer_column: Column with the answer.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: Type of the weights; "auto" is bfloat16 on CUDA, float32 elsewhere.
        time_limit: Seconds for the grading of one answer.
        window_chars: L of RepRate, characters.
        ratio: tau of RepRate.
    """

    model: str
    data: tuple[str, ...]
    num_samples: int = 1
    gguf_file: str = ""
    temperature: float = 0.6  # paper
    top_p: float = 1.0
    max_new_tokens: int = 0
    max_problems: int = 0
    seed: int = 0
    batch_size: int = 64
    grader: str = "auto"
    answer_marker: str = ""
    chat_template: str = "auto"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    device: str = "auto"
    dtype: str = "auto"
    time_limit: float = 10.0
    window_chars: int = 10_000  # paper
    ratio: float = 10.0  # paper


def check(settings: Settings) -> None:
    """Refuse what cannot work.

    Args:
        settings: The options as they were given.

    Raises:
        ConfigError: A value is not possible, or two data sets have one name.
    """
    for option, value in (
        ("--grader", settings.grader),
        ("--dtype", settings.dtype),
        ("--device", settings.device),
    ):
        if value not in CHOICES[option]:
            raise ConfigError(f"{option} {value}: choose from {', '.join(CHOICES[option])}.")
    for option, value, least in (
        ("--temperature", settings.temperature, 0.0),
        ("--time-limit", settings.time_limit, 0.1),
        ("--ratio", settings.ratio, 1.0),
    ):
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{option} {value}: give a number from {least:g} on.")
    if settings.num_samples > MAX_SAMPLES:
        raise ConfigError(f"-k {settings.num_samples}: at most {MAX_SAMPLES} answers each.")
    if not 0 < settings.top_p <= 1:
        raise ConfigError(f"--top-p {settings.top_p}: give a number above 0 and up to 1.")
    if not settings.temperature and settings.num_samples > 1:
        raise ConfigError(
            f"--temperature 0 writes the same answer {settings.num_samples} times; give -k 1 or "
            "a temperature above 0."
        )
    names_of(settings.data)


def names_of(sources: Sequence[str]) -> dict[str, str]:
    """A name for each data set: its file's or folder's, without the ending.

    Args:
        sources: Files, folders or "embedded".

    Returns:
        The sources by their names.

    Raises:
        ConfigError: Two have the same name.
    """
    named: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        name = path.stem if path.suffix in (".jsonl", ".json", ".parquet") else path.name
        if name in named:
            raise ConfigError(
                f"--data {named[name]} and --data {source} would both be called {name!r}; rename "
                "one, or evaluate them into two folders."
            )
        if name in ("", "settings", "summary"):
            raise ConfigError(f"--data {source}: rename it; {name!r} is not a name for its file.")
        named[name] = source
    return named
