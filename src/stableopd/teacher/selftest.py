"""A self-test of served teachers: one tokenizer, one vocabulary, and replicas that agree.

A teacher that reads other tokens, or one replica with other weights, trains a wrong student without
any error. A few requests before the first step tell. What replicas say of some tokens there is kept
and compared later, so that a replica with other weights is noticed in the midst of a run, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stableopd.endpoint import RefusedError
from stableopd.teacher.server import TOLERANCE, ServedTeacher, ServedTeachers
from stableopd.types import ModelError

__all__ = ["probe_of", "self_test"]

# Tokens that are compared, so few that a short context holds them; of each prompt its first ones.
MAX_TOKENS, MAX_PROMPT_TOKENS = 96, 64
NUM_IDS = 48

# Digits, case, spaces, code, accents, other scripts and a character outside the first plane.
TEXT = "In 2024 we had 3.14 apples?  def f(x):\n\treturn x**2  # naïve\n\\boxed{42}; Привет 你 😀"


def self_test(
    teachers: ServedTeachers, tokenizer: Any, prompt_ids: Sequence[Sequence[int]]
) -> list[str]:
    """Compare every replica of every teacher with the student's tokenizer, and with the first.

    Args:
        teachers: The teachers.
        tokenizer: The student's tokenizer.
        prompt_ids: Prompts of the run, of which a few are scored.

    Returns:
        A sentence for each teacher, for the user.

    Raises:
        ModelError: The first difference that was found, and at which address.
        ServerError: One does not answer, or not with log-probs.
    """
    probe = probe_of(prompt_ids)
    notes: list[str] = []
    for teacher in teachers.by_name.values():
        for url in teacher.endpoint.urls:
            _require_same_text(teacher, url, tokenizer)
            _require_same_ids(teacher, url, tokenizer)
        notes.append(_require_same_scores(teacher, probe))
    return notes


def probe_of(prompt_ids: Sequence[Sequence[int]]) -> list[int]:
    """Token ids that are scored again and again.

    Args:
        prompt_ids: Prompts, at least one of them with a token.

    Returns:
        Two ids or more.
    """
    probe = [token for ids in prompt_ids[:16] for token in ids[:MAX_PROMPT_TOKENS]][:MAX_TOKENS]
    return probe if len(probe) > 1 else (probe * 2)[:2]


def _require_same_text(teacher: ServedTeacher, url: str, tokenizer: Any) -> None:
    """The server must make the tokens of a text that the student's tokenizer makes of it."""
    mine = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    entries = teacher.entries(teacher.score(TEXT, url), None)[1:]
    # Of the first token nothing is said. With one log-prob a position, its id is the token's.
    ids = [next(iter(entry), "") if isinstance(entry, dict) else "" for entry in entries]
    theirs = [teacher.endpoint.told(i, 40) for i in ids]
    for place, (a, b) in enumerate(zip(map(str, mine[1:]), theirs, strict=False), start=1):
        if a != b:
            raise ModelError(
                f"{teacher.endpoint.name}: {url} has another tokenizer than the student: of a test "
                f"text, token {place} is {a} ({tokenizer.convert_ids_to_tokens(int(a))!r}) to the "
                f"student and {b} to the server; distillation compares token by token, so use "
                "models that share one tokenizer."
            )
    if len(mine) != len(theirs) + 1:
        raise ModelError(
            f"{teacher.endpoint.name}: {url} has another tokenizer than the student: a test text "
            f"has {len(mine)} tokens to the student and {len(theirs) + 1} to the server; use "
            "models that share one tokenizer."
        )


def _require_same_ids(teacher: ServedTeacher, url: str, tokenizer: Any) -> None:
    """Ids all over the vocabulary, special ones among them, must stand for the same texts."""
    ids = sorted(tokenizer.get_vocab().values())
    spread = [ids[place * len(ids) // NUM_IDS] for place in range(NUM_IDS)]
    # The first is not scored: it stands there for the others.
    chosen = [ids[0], *sorted({*spread, *tokenizer.all_special_ids, ids[-1]})]
    answer = teacher.score(chosen, url)
    for token, entry in zip(chosen[1:], teacher.entries(answer, chosen)[1:], strict=True):
        teacher.entry(entry, token)
        theirs, mine = teacher.text_of(entry, token), tokenizer.decode([token])
        # A part of a character cannot be compared, and some servers leave special tokens out.
        if not theirs or "\ufffd" in theirs + mine:
            continue
        if theirs.strip() != mine.strip():
            raise ModelError(
                f"{teacher.endpoint.name}: {url} has another vocabulary than the student: id "
                f"{token} is {mine!r} to the student and {teacher.endpoint.told(repr(theirs))} to "
                "the server; use models that "
                "share one tokenizer."
            )


def _require_same_scores(teacher: ServedTeacher, probe: list[int]) -> str:
    """All replicas must score the same tokens alike; a sentence that says how much so."""
    endpoint, first = teacher.endpoint, list[float]()
    largest = 0.0
    for url in endpoint.urls:
        found = teacher.remember(url, probe)
        _require_likeliest(teacher, url, probe)
        first = first or found
        gap = sum(abs(a - b) for a, b in zip(first, found, strict=True)) / len(found)
        largest = max(largest, gap)
        if gap > TOLERANCE:
            raise ModelError(
                f"{endpoint.name}: {endpoint.urls[0]} and {url} score the same {len(found)} tokens "
                f"differently, by {gap:.3f} nats on average (at most {TOLERANCE} can be rounding); "
                "serve the same weights in the same precision everywhere."
            )
    told = f"{endpoint.name}: {teacher.model!r} at {', '.join(endpoint.urls)}; same tokenizer"
    if len(endpoint.urls) > 1:
        told += f", replicas agree to {largest:.1g} nats over {len(first)} tokens"
    return f"{told}."


def _require_likeliest(teacher: ServedTeacher, url: str, probe: list[int]) -> None:
    """The server must give as many likeliest tokens as the run will ask for.

    It has scored the same tokens before, so that this number is all that it can refuse.
    """
    if not teacher.top_k:
        return
    try:
        answer = teacher.score(probe, url, teacher.top_k)
    except RefusedError as error:
        raise ModelError(
            f"{teacher.endpoint.name}: {url} does not give the {teacher.top_k} likeliest tokens of "
            "each position that objective.top_k needs, with the stop ids; start it with "
            f"--max-logprobs {teacher.top_k} or lower objective.top_k ({error})."
        ) from None
    for entry in teacher.entries(answer, probe)[1:]:
        teacher.likeliest(entry)
