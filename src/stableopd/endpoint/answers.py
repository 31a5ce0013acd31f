"""The typed reader of what servers answer: every value has the type that was asked for, or none.

An answer is JSON from another machine, and may hold anything. `parsed` makes it an object; the
others take values out of it. Each of them raises `AnswerError`, and nothing else.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["AnswerError", "answer_bytes", "at", "listed", "number", "parsed", "table", "words"]

# The largest answer that is read (design): one token's entry with its text is some 100 bytes.
BASE_BYTES, ENTRY_BYTES = 2**20, 512


class AnswerError(Exception):
    """What is wrong with an answer, as the rest of a sentence: "choices is a text, not a list"."""


def answer_bytes(num_tokens: int, num_logprobs: int = 0) -> int:
    """The largest size that an honest answer can have, with room to spare.

    Args:
        num_tokens: Tokens that it tells about.
        num_logprobs: Log-probs of other tokens at each of them.

    Returns:
        Bytes.
    """
    return BASE_BYTES + ENTRY_BYTES * num_tokens * (1 + num_logprobs)


def parsed(raw: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of an answer; empty bytes are an empty object.

    Args:
        raw: The bytes.

    Returns:
        The object.

    Raises:
        AnswerError: It is no JSON object, or too deep to read.
    """
    try:
        found: Any = json.loads(raw.decode("utf-8-sig") or "{}")
    except RecursionError:
        raise AnswerError("is nested too deep to be read") from None
    except ValueError:
        raise AnswerError("is not JSON") from None
    if not isinstance(found, dict):
        raise AnswerError("is no JSON object")
    return found


def at(value: Any, *path: str | int) -> Any:
    """A value inside an answer.

    Args:
        value: The answer.
        *path: Names of fields, and places in lists.

    Returns:
        What is there, of any type.

    Raises:
        AnswerError: There is nothing there.
    """
    for key in path:
        inner: Any = None
        is_there = False
        if isinstance(value, dict):
            inner, is_there = value.get(key), key in value
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            inner, is_there = value[key], True
        if not is_there:
            raise AnswerError(f"has no {'.'.join(map(str, path))}")
        value = inner
    return value


def listed(value: Any, what: str) -> list[Any]:
    """A list.

    Args:
        value: A value of an answer.
        what: Its name, for the message.

    Returns:
        The list, its items of any type.

    Raises:
        AnswerError: It is none.
    """
    if not isinstance(value, list):
        raise AnswerError(f"has {_kind(value)} as {what}, not a list")
    return value


def table(value: Any, what: str) -> dict[str, Any]:
    """An object.

    Args:
        value: A value of an answer.
        what: Its name, for the message.

    Returns:
        The object, its values of any type.

    Raises:
        AnswerError: It is none.
    """
    if not isinstance(value, dict):
        raise AnswerError(f"has {_kind(value)} as {what}, not an object")
    return value


def words(value: Any, what: str) -> str:
    """A text.

    Args:
        value: A value of an answer.
        what: Its name, for the message.

    Returns:
        The text.

    Raises:
        AnswerError: It is none.
    """
    if not isinstance(value, str):
        raise AnswerError(f"has {_kind(value)} as {what}, not a text")
    return value


def number(value: Any, what: str) -> float:
    """A number, which may be infinite or nan: JSON from Python has both.

    Args:
        value: A value of an answer.
        what: Its name, for the message.

    Returns:
        The number.

    Raises:
        AnswerError: It is none, or too large for one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AnswerError(f"has {_kind(value)} as {what}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise AnswerError(f"has too large a number as {what}") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")
