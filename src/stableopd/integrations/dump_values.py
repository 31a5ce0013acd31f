"""The values of a dump's rows: texts, chats, token ids, log-probs and reasons, however spelled.

A function here raises ValueError, with what is wrong in words, for a value that it cannot use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from stableopd.types import StopReason

__all__ = [
    "chat_text",
    "completion_text",
    "fits_text",
    "flag",
    "ids",
    "logprobs",
    "number",
    "numbers",
    "prompt_text",
    "split_chat",
    "stop_reason",
    "whole",
]

MOST = 2**53  # above, a float is not every whole number

# Design: the longest text, and the most tokens, of one rollout: a few times the longest contexts.
# Measuring takes up to 90 bytes a character. docs/dumps.md states them.
MOST_CHARACTERS, MOST_TOKENS = 2**23, 2**21

# Log-probs of nearly certain tokens may come out this far above 0 by rounding; as from a server.
MOST_LOGP = 1e-3

CUT_OFF = {
    *("length", "truncated", "truncate", "clipped", "overlong", "max_tokens", "max_new_tokens"),
    *("max_length", "max_output_tokens", "max_total_tokens", "max_completion_length"),
    *("max_completion_tokens", "token_limit", "max_model_len", "model_length", "incomplete"),
}
STOPPED = {
    *("stop", "stopped", "stop_token", "stop_sequence", "completed", "complete", "finished"),
    *("done", "eos", "eos_token", "end_turn", "tool_calls", "tool_call", "tool_use"),
}
NEITHER = {"", "abort", "aborted", "pending", "failed", "error", "none", "null", "unknown"}
# Which of the two a column of yes and no means by yes.
CUT_OFF_NAME = re.compile(r"trunc|clip|overlong|cut|length|cap", re.IGNORECASE)
STOPPED_NAME = re.compile(r"finish|complet|stop|eos|terminat|done", re.IGNORECASE)


def chat_text(content: Any) -> str:
    """The text of a message's content: text, or a list of parts with a text each."""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        parts = cast(Sequence[Any], content)
        texts = [p if isinstance(p, str) else p.get("text") for p in parts if p]
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def fits_text(text: str) -> str:
    """The same text; ValueError for one that is too long to be measured."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a text of {len(text):,} characters; {MOST_CHARACTERS:,} are the most")
    return text


def completion_text(value: Any) -> str:
    """A completion as text.

    Args:
        value: Text, one message, or the messages of a chat; of a chat all turns of the assistant
            count, joined by line ends, each with its reasoning first where that is kept apart.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"the completion is {_kind(value)}, neither text nor messages")
    messages = _messages(cast(Sequence[Any], value), "completion")
    turns = [_turn(m) for m in messages if m.get("role") in ("assistant", "model", "gpt")]
    if not turns:
        raise ValueError("the completion has no message of the assistant")
    return "\n".join(turns)


def prompt_text(value: Any) -> str:
    """A prompt as text: one message alone, several with their roles; "" for none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"the prompt is {_kind(value)}, neither text nor messages")
    messages = _messages(cast(Sequence[Any], value), "prompt")
    if len(messages) == 1:
        return chat_text(messages[0].get("content"))
    return "\n".join(f"{m.get('role')}: {chat_text(m.get('content'))}" for m in messages)


def split_chat(value: Any) -> tuple[Any, Any]:
    """Split a whole chat into the prompt and what the assistant wrote after it."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"the messages are {_kind(value)}, not a list")
    messages = _messages(cast(Sequence[Any], value), "chat")
    asked = [i for i, m in enumerate(messages) if m.get("role") in ("user", "human")]
    start = asked[-1] + 1 if asked else 0
    return messages[:start], messages[start:]


def stop_reason(
    value: Any, column: str = "", meanings: Mapping[str, StopReason] | None = None
) -> StopReason | None:
    """Why a rollout ended.

    Args:
        value: A word (also one of an enumeration, or in an object with "type"), or yes and no.
        column: Its column, which tells what yes means.
        meanings: What words in lower case mean, as the user says; they go before the known ones.

    Returns:
        The reason; None where the value says neither, as for an aborted rollout.
    """
    if isinstance(value, Mapping):
        value = cast(Mapping[str, Any], value).get("type")
    if value is None or value != value:  # nan is how tables write that there is none
        return None
    if isinstance(value, StopReason):
        return value
    if meanings and (known := meanings.get(str(value).strip().lower())):
        return known
    name = column.rpartition(".")[2]
    if isinstance(value, bool | int | float) and value in (0, 1):
        if CUT_OFF_NAME.search(name):
            return StopReason.LENGTH if value else StopReason.STOP
        if STOPPED_NAME.search(name):
            return StopReason.STOP if value else StopReason.LENGTH
        raise ValueError(f"column {name!r} does not say what {value} means")
    word = str(value).rpartition(".")[2].strip().lower()
    if word in ("true", "false"):
        return stop_reason(word == "true", column)
    if word in CUT_OFF:
        return StopReason.LENGTH
    if word in STOPPED:
        return StopReason.STOP
    if word in NEITHER:
        return None
    raise ValueError(f"{_short(value)} is no known reason for the end of a rollout")


def whole(value: Any) -> int | None:
    """A whole number from 0 to 2**53 (all of which a float can be), also from text."""
    if value is None:
        return None
    found = math.nan if isinstance(value, bool) else number(value)
    if found is None or not found.is_integer() or not 0 <= found <= MOST:
        raise ValueError(f"{_short(value)} is not a whole number from 0 to 2**53")
    return int(found)


def number(value: Any) -> float | None:
    """A finite number, also from text; None for null and nan."""
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{_short(value)} is not a number") from None
    if math.isinf(found):
        raise ValueError(f"{_short(value)} is not a finite number")
    return None if math.isnan(found) else found


def flag(value: Any) -> bool | None:
    """Yes or no, also as 0 and 1 or a word; None for null."""
    if value is None or isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "yes", "1", "1.0", "correct"):
        return True
    if word in ("false", "no", "0", "0.0", "incorrect", "wrong", "-1", "-1.0"):
        return False
    if word in ("", "none", "null", "nan"):
        return None
    raise ValueError(f"{_short(value)} is neither yes nor no")


def ids(value: Any) -> NDArray[np.int64] | None:
    """Token ids as an array (T,)."""
    if value is None:
        return None
    _refuse_many(value)
    try:
        # Of lists with a text in it numpy would make one array of texts, all as long as that one.
        found = np.asarray(value if not _has_others(value) else None)
        if found.ndim == 1 and (found.dtype.kind in "iu" or not found.size):
            if not found.size or found.max() <= MOST:
                return found.astype(np.int64, copy=False)
        elif found.ndim == 1 and found.dtype.kind == "f" and _are_whole(found):
            return found.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("not a list of token ids")


def numbers(value: Any) -> NDArray[np.float64] | None:
    """Numbers as an array (T,); null and "NaN" in it become nan."""
    if value is None:
        return None
    _refuse_many(value)
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("not a list of numbers") from None
    if found.ndim > 1:
        raise ValueError("not a list of numbers")
    return found


def logprobs(value: Any) -> NDArray[np.float64] | None:
    """Log-probs in nats as an array (T,); null in it is unknown and becomes nan.

    A value above 0, or nan, is none: all of them are refused then, as those of a server are.
    """
    found = numbers(value)
    if found is None:
        return None
    unknown = np.isnan(found)
    highest = np.max(found, where=~unknown, initial=-math.inf)
    if highest > MOST_LOGP:
        raise ValueError(f"{highest:g} is above 0, and no log-prob")
    if unknown.any():
        nulls = cast(Sequence[Any], value).count(None) if isinstance(value, list | tuple) else 0
        if np.count_nonzero(unknown) != nulls:
            raise ValueError("nan is no log-prob")
    return found


def _refuse_many(value: Any) -> None:
    if isinstance(value, list | tuple) and len(cast(Sequence[Any], value)) > MOST_TOKENS:
        many = len(cast(Sequence[Any], value))
        raise ValueError(f"a list of {many:,}; {MOST_TOKENS:,} tokens are the most")


def _has_others(value: Any) -> bool:
    """Whether a list holds something else than numbers."""
    items = cast(Sequence[Any], value) if isinstance(value, list | tuple) else ()
    return not set(map(type, items)) <= {int, float}


def _are_whole(found: NDArray[np.float64]) -> bool:
    return bool((np.abs(found) <= MOST).all()) and np.array_equal(found, found.round())


def _messages(items: Sequence[Any], what: str) -> list[Mapping[str, Any]]:
    messages: list[Mapping[str, Any]] = []
    for item in items:
        if not isinstance(item, Mapping):
            raise ValueError(f"the {what} is a list of {_kind(item)}, not of messages")
        message = cast(Mapping[str, Any], item)
        if not {"role", "from", "content"} & set(message):
            raise ValueError(f"the {what} is an object that is no message")
        if "role" not in message and "from" in message:  # the names of ShareGPT
            message = {"role": message["from"], "content": message.get("value")}
        messages.append(message)
    return messages


def _turn(message: Mapping[str, Any]) -> str:
    thought = message.get("reasoning_content") or message.get("reasoning")
    said = chat_text(message.get("content"))
    return f"{thought}\n{said}" if isinstance(thought, str) and thought else said


def _kind(value: Any) -> str:
    names = {str: "text", bool: "yes or no", int: "a number", float: "a number"}
    if isinstance(value, Mapping):
        return "an object"
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
