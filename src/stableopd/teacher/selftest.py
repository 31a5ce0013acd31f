"""A self-test of served teachers: one tokenizer, one vocabulary, and replicas that agree.

A teacher that reads other tokens, or one replica with other weights, trains a wrong student without
any error. A few requests before the first step tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stableopd.teacher.server import ServedTeacher, ServedTeachers
from stableopd.types import ModelError

__all__ = ["self_test"]

# Mean difference of log-probs between replicas in nats that is no rounding (design): bfloat16 on
# different batches moves single log-probs by some 0.01, and advantages are about 0.1 a token.
TOLERANCE = 0.05

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
    probe = [token for ids in prompt_ids[:16] for token in ids[:MAX_PROMPT_TOKENS]][:MAX_TOKENS]
    if len(probe) < 2:
        probe = (probe * 2)[:2]
    notes: list[str] = []
    for teacher in teachers.by_name.values():
        for url in teacher.endpoint.urls:
            _require_same_text(teacher, url, tokenizer)
            _require_same_ids(teacher, url, tokenizer)
        notes.append(_require_same_scores(teacher, probe))
    return notes


def _require_same_text(teacher: ServedTeacher, url: str, tokenizer: Any) -> None:
    """The server must make the tokens of a text that the student's tokenizer makes of it."""
    mine = tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    answer = teacher.endpoint.post("/completions", teacher.body(TEXT, 0), url)
    # Of the first token nothing is said. With one log-prob a position, its id is the token's.
    theirs = [next(iter(entry or {"": None})) for entry in teacher.entries(answer, None)[1:]]
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
    answer = teacher.endpoint.post("/completions", teacher.body(chosen, 0), url)
    for token, entry in zip(chosen[1:], teacher.entries(answer, chosen)[1:], strict=True):
        teacher.entry(entry, token)
        theirs, mine = entry[str(token)].get("decoded_token"), tokenizer.decode([token])
        # A part of a character cannot be compared, and some servers leave special tokens out.
        if not theirs or "\ufffd" in theirs + mine:
            continue
        if theirs.strip() != mine.strip():
            raise ModelError(
                f"{teacher.endpoint.name}: {url} has another vocabulary than the student: id "
                f"{token} is {mine!r} to the student and {theirs!r} to the server; use models that "
                "share one tokenizer."
            )


def _require_same_scores(teacher: ServedTeacher, probe: list[int]) -> str:
    """All replicas must score the same tokens alike; a sentence that says how much so."""
    endpoint, first = teacher.endpoint, list[float]()
    largest = 0.0
    for url in endpoint.urls:
        answer = endpoint.post("/completions", teacher.body(probe, 0), url)
        entries = teacher.entries(answer, probe)[1:]
        found = [teacher.entry(e, token) for e, token in zip(entries, probe[1:], strict=True)]
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
