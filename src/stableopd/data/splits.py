"""Whether two tokenizers with the same ids split texts in the same way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from stableopd.data.vocabulary import encode_texts
from stableopd.models import LanguageModel
from stableopd.text import quoted

__all__ = ["PROBES", "split_differently", "why_split"]

# Encoded with the user's own texts: spaces, numbers, code, marks, other scripts.
PROBES = (
    "Hello, world!",
    "x = 3.14 * (y + 2)\n\n\tif x > 10:\n        return None",
    "  two  spaces, then 1234567890",
    "Größe, naïve, 東京, Привет, 🙂",
)


def split_differently(
    student: LanguageModel, teacher: LanguageModel, texts: Sequence[str]
) -> list[str]:
    """Texts of which the two tokenizers make other ids.

    Args:
        student: The student.
        teacher: The teacher, whose ids mean the same.
        texts: What to encode.
    """
    both = [encode_texts(m.tokenizer, list(texts), f"{m.name!r}") for m in (student, teacher)]
    return [text for text, mine, theirs in zip(texts, *both, strict=True) if mine != theirs]


def why_split(student: LanguageModel, teacher: LanguageModel, text: str) -> tuple[str, str]:
    """What may be the cause that a text is split differently, and what to do.

    Args:
        student: The student.
        teacher: The teacher.
        text: A text that is split differently.

    Returns:
        A clause, and a sentence.
    """
    mine, theirs = _class_of(student), _class_of(teacher)
    files = [m.tokenizer_files.get("tokenizer.json") for m in (student, teacher)]
    if files[0] and files[0] == files[1] and mine != theirs:
        return (
            f"such as {quoted(text)}: their tokenizer.json is the same, but the student's is read "
            f"as {mine} and the teacher's as {theirs}",
            "set tokenizer_class in both tokenizer_config.json to the class with which the models "
            "were trained.",
        )
    return (
        f"such as {quoted(text)}: the teacher is not used to the student's splits",
        "use the student's own tokenizer files with the teacher, or another pair.",
    )


def _class_of(model: LanguageModel) -> str:
    """The class that reads a tokenizer; where its files name another one, that one too."""
    kind = type(model.tokenizer).__name__
    settings: Any = json.loads(model.tokenizer_files.get("tokenizer_config.json") or b"{}")
    named = settings.get("tokenizer_class")
    return kind if named in (None, kind) else f"{kind} ({named})"
