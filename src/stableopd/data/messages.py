"""Messages of chats, as rows hold them and as chat templates take them.

A message is a role and a text. What else it holds (calls of tools, a thought, the call that it
answers) is kept for the template. A template drops what it does not know, without a word: so
`require_written` looks for it in what the template wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from stableopd.data.rows import Row
from stableopd.text import quoted
from stableopd.types import DataError, Message

__all__ = [
    "THOUGHT_FIELDS",
    "conversation",
    "is_blank",
    "kind_of",
    "parts_of_chat",
    "require_written",
    "solution_text",
    "text_of",
    "tools_of",
]

ROLES = ("system", "developer", "user", "assistant", "tool")
# What a thought of the assistant is called, by the servers and data sets that keep it apart.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
# What templates read of a message next to its role and content.
KEPT = ("tool_calls", "tool_call_id", "name", *THOUGHT_FIELDS)


def is_blank(value: Any) -> bool:
    """Whether a column holds nothing: null, or text of white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def kind_of(value: Any) -> str:
    """The kind of a value, for messages."""
    return "null" if value is None else type(value).__name__


def text_of(row: Row, name: str, value: Any, kind: str = "text") -> str:
    """A text that can be encoded.

    Args:
        row: The row, for messages.
        name: The column.
        value: What it holds.
        kind: What it may hold, for messages.

    Returns:
        The text.

    Raises:
        DataError: It is no text, is empty, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {name!r} must be {kind}, not {kind_of(value)}.")
    if is_blank(value):
        raise DataError(f"{row.place}: column {name!r} is empty.")
    _require_utf8(row, name, value)
    return value


def _require_utf8(row: Row, name: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{row.place}: column {name!r} holds half of a surrogate pair (such as \\ud800), which "
            "is no character."
        ) from None


def conversation(
    row: Row, name: str, value: Any, must_end_open: bool = True
) -> str | tuple[Message, ...]:
    """A prompt: text, or messages, also where these are written as JSON text.

    Args:
        row: The row, for messages.
        name: The column.
        value: What it holds.
        must_end_open: Whether the last message must be one that the assistant answers.

    Returns:
        The text, or the messages.

    Raises:
        DataError: It is neither, or a message cannot be used.
    """
    items = _unpacked(value)
    if not isinstance(items, list):
        return text_of(row, name, value, kind="text or a list of messages")
    messages = tuple(
        _message(row, name, number, item) for number, item in enumerate(items, start=1)
    )
    if not messages:
        raise DataError(f"{row.place}: column {name!r} is an empty list of messages.")
    if must_end_open and messages[-1].role == "assistant":
        raise DataError(
            f"{row.place}: column {name!r} ends with a message of the assistant; end it with the "
            f'user\'s, or set data.solution = "{name}" to take the last one as the solution.'
        )
    if must_end_open and messages[-1].role not in ("user", "tool"):
        raise DataError(
            f"{row.place}: column {name!r} ends with a message of the {messages[-1].role}; end it "
            "with the user's, which the student answers."
        )
    return messages


def parts_of_chat(row: Row, name: str, value: Any) -> tuple[tuple[Message, ...], str | None]:
    """Prompt and solution of one column of messages, whose last one may be the solution.

    Args:
        row: The row, for messages.
        name: The column.
        value: What it holds.

    Returns:
        The messages before the solution, and the solution; None where the last message is not
        the assistant's.

    Raises:
        DataError: It is no list of messages, or one cannot be used.
    """
    items = _unpacked(value)
    if not isinstance(items, list):
        raise DataError(
            f"{row.place}: column {name!r} is named as prompt and as solution, so it must be a "
            f"list of messages that ends with the assistant's, not {kind_of(value)}."
        )
    last = cast(Any, items[-1]) if items else None
    if not isinstance(last, dict) or cast(Any, last).get("role") != "assistant":
        return cast(tuple[Message, ...], conversation(row, name, items)), None
    solution = solution_text(row, name, [last])
    return cast(tuple[Message, ...], conversation(row, name, items[:-1])), solution


def solution_text(row: Row, name: str, value: Any) -> str:
    """A golden solution: text, or one message of the assistant.

    Args:
        row: The row, for messages.
        name: The column.
        value: What it holds.

    Returns:
        The text of the solution.

    Raises:
        DataError: It is neither, or the message holds more than a text.
    """
    items = _unpacked(value)
    if not isinstance(items, list):
        return text_of(row, name, value, kind="text or one message of the assistant")
    messages = [_message(row, name, n, item) for n, item in enumerate(items, start=1)]
    if len(messages) != 1 or messages[0].role != "assistant":
        raise DataError(
            f"{row.place}: column {name!r} must be text or one message of the assistant; write "
            "earlier turns into the prompt."
        )
    if messages[0].more:
        more = ", ".join(json.loads(messages[0].more))
        raise DataError(
            f"{row.place}: column {name!r} holds {more}; write the solution as one text, just as "
            "the student is to write it, thought and calls of tools among it."
        )
    return messages[0].content


def tools_of(row: Row, name: str = "tools") -> str:
    """The descriptions of tools that a row holds.

    Args:
        row: The row.
        name: The column.

    Returns:
        A list as JSON text; "" where there is none.

    Raises:
        DataError: They are no list of objects.
    """
    value = _unpacked(row.values.get(name))
    if value is None or value == [] or is_blank(value):
        return ""
    if not isinstance(value, list) or not all(
        isinstance(tool, dict) for tool in cast(list[Any], value)
    ):
        raise DataError(
            f"{row.place}: column {name!r} must be a list of descriptions of tools (objects), not "
            f"{kind_of(value)}; rename it if it is something else."
        )
    return _as_json(row, name, _without_nulls(value))


def _unpacked(value: Any) -> Any:
    """A list of objects that is written as JSON text; any other value as it is."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return value
    try:
        found: Any = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_list = isinstance(found, list)
    return found if is_list and all(isinstance(x, dict) for x in cast(list[Any], found)) else value


def _message(row: Row, column: str, number: int, item: Any) -> Message:
    name, where = f"{column}[{number}]", f"{row.place}: message {number} of column {column!r}"
    if not isinstance(item, dict):
        raise DataError(f'{where} must be {{"role": ..., "content": ...}}, not {kind_of(item)}.')
    fields = cast(dict[str, Any], item)
    role = fields.get("role")
    if role not in ROLES:
        told = f"has the role {role!r}; choose from {', '.join(ROLES)}"
        if role == "function":
            told = "has the role 'function'; write \"tool\""
        if "from" in fields and "value" in fields:
            told = 'has "from" and "value"; write "role" (user, assistant, ...) and "content"'
        raise DataError(f"{where} {told}.")
    more = {
        key: _without_nulls(value)
        for key, value in fields.items()
        if key in KEPT and value is not None and value != [] and value != ""
    }
    if fields.get("function_call"):
        raise DataError(f"{where} has a function_call; write it as tool_calls.")
    if "tool_calls" in more:
        more["tool_calls"] = _calls(row, name, more["tool_calls"])
    content = _content(row, f"{name}.content", fields.get("content"), "tool_calls" in more)
    return Message(role, content, _as_json(row, name, more) if more else "")


def _content(row: Row, name: str, value: Any, has_calls: bool) -> str:
    """Text, joined parts of text, or nothing next to calls of tools."""
    if isinstance(value, list):
        texts: list[str] = []
        for part in cast(list[Any], value):
            fields = cast(dict[str, Any], part) if isinstance(part, dict) else {}
            text = part if isinstance(part, str) else fields.get("text")
            if not isinstance(text, str) or fields.get("type", "text") != "text":
                kind = fields.get("type") or kind_of(part)
                raise DataError(
                    f"{row.place}: {name} has a part of the kind {kind!r}; only parts of text can "
                    "be used."
                )
            texts.append(text)
        value = "".join(texts)
    if has_calls and is_blank(value):
        return ""
    return text_of(row, name, value)


def _calls(row: Row, name: str, value: Any) -> list[Any]:
    """Calls of tools, with arguments that servers write as JSON text made objects again."""
    calls = cast(list[Any], value) if isinstance(value, list) else []
    told: list[Any] = []
    for call in calls:
        fields = cast(dict[str, Any], call) if isinstance(call, dict) else {}
        function = fields.get("function", fields)
        if not isinstance(function, dict) or not isinstance(
            cast(dict[str, Any], function).get("name"), str
        ):
            calls = []
            break
        function = dict(cast(dict[str, Any], function))
        if isinstance(function.get("arguments"), str):
            try:
                parsed: Any = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                parsed = None
            if isinstance(parsed, dict):
                function["arguments"] = parsed
        told.append({**fields, "function": function} if "function" in fields else function)
    if not calls:
        raise DataError(
            f"{row.place}: {name}.tool_calls must be a list of calls, each with a function and "
            "its name."
        )
    return told


def _without_nulls(value: Any) -> Any:
    """A value without the empty fields that tables put where other rows have one."""
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        return {k: _without_nulls(v) for k, v in fields.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in cast(list[Any], value)]
    return value


def _as_json(row: Row, name: str, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise DataError(
            f"{row.place}: {name} holds what JSON cannot (a date, bytes, or a number that is not "
            "finite); write it as text."
        ) from None
    _require_utf8(row, name, text)
    return text


def require_written(
    messages: Sequence[Message], tools: str, text: str, template: str, where: str
) -> None:
    """Refuse a prompt of which the chat template drops a part.

    Args:
        messages: What the template was given.
        tools: Descriptions of tools as JSON text; "" without any.
        text: What it wrote.
        template: The template itself.
        where: Names the prompt, for messages.

    Raises:
        DataError: A text, a call of a tool, a thought or a tool's description is not in the text.
    """
    lost = next(_lost(messages, tools, text, template), "")
    if lost:
        raise DataError(
            f"{where}: the chat template does not write {lost}; leave it out of the data, write "
            "it into a message's content, or give a template that knows it (data.chat_template)."
        )


def _lost(messages: Sequence[Message], tools: str, text: str, template: str) -> Any:
    squeezed = ""

    def has(part: str) -> bool:
        """Whether the text holds a part, perhaps trimmed, indented, or as a JSON string."""
        nonlocal squeezed
        if part.strip() in text:
            return True
        squeezed = squeezed or _squeeze(text)
        return any(_squeeze(p) in squeezed for p in (part, json.dumps(part, ensure_ascii=False)))

    for number, message in enumerate(messages, start=1):
        said = message.content.rpartition("</think>")[2]
        if message.role == "developer" and "developer" not in template:
            yield f'the role "developer" of message {number} (write "system" instead)'
        if not has(said):
            yield f"message {number} ({message.role}): {quoted(said.strip())}"
        more: Mapping[str, Any] = json.loads(message.more) if message.more else {}
        for call in more.get("tool_calls", ()):
            if not has(call.get("function", call)["name"]):
                yield f"the tool_calls of message {number}"
        for field in THOUGHT_FIELDS:
            # A template that names it may leave it out by design, as of earlier turns.
            thought = more.get(field)
            if isinstance(thought, str) and field not in template and not has(thought):
                yield f"the {field} of message {number}"
    for tool in json.loads(tools) if tools else ():
        named = tool.get("function", tool)
        if isinstance(named, dict) and not has(str(cast(Any, named).get("name", ""))):
            yield "the tools"


def _squeeze(text: str) -> str:
    return "".join(text.split())
