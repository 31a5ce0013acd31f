"""What a configuration or a command may say of the chat template: a file, and variables for it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from stableopd.types import ConfigError

__all__ = [
    "chosen_template",
    "kwargs_fault",
    "parse_kwargs",
    "read_template",
    "template_fault",
    "told_template",
    "with_template_value",
]

# The settings that are no file.
MODES = ("auto", "none")

# Set by the program, or arguments of `apply_chat_template` that are no variables of a template.
RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}

# Design: the largest templates of published models have some 20 kB.
MAX_TEMPLATE_BYTES = 2**20


def kwargs_fault(kwargs: dict[str, Any]) -> str:
    """What is wrong with variables for a chat template, or "".

    Args:
        kwargs: Names and values.

    Returns:
        A sentence that follows the name of the setting.
    """
    for name, value in kwargs.items():
        if not name.isidentifier():
            return f"names {name!r}, which no template can read; give a name such as thinking."
        if name in RESERVED:
            return f"names {name!r}, which is set for each prompt; leave it out."
        try:
            is_plain = _is_plain(value)
        except RecursionError:
            return f"gives {name} a value that is nested too deep; give text or numbers."
        if not is_plain:
            return f"gives {name} a value that JSON cannot hold; give text, numbers, true or false."
    return ""


def template_fault(setting: str) -> str:
    """What is wrong with the choice of a template, or "".

    Args:
        setting: "auto", "none" or the path of a file.

    Returns:
        A sentence that follows the name and value of the setting.
    """
    if setting in MODES or Path(setting).is_file():
        return ""
    return "there is no such file; give auto, none, or a file with a Jinja template."


def read_template(setting: str) -> str:
    """The text of the template that a setting names.

    Args:
        setting: "auto", "none" or the path of a file.

    Returns:
        The text; "" where the setting is not a file.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    if setting in MODES:
        return ""
    if fault := template_fault(setting):
        raise ConfigError(f"chat template {setting!r}: {fault}")
    try:
        with Path(setting).open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {setting!r}: cannot be read ({error}).") from None
    if len(data) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"chat template {setting!r}: larger than 1 MiB; give a Jinja template.")
    if not text.strip():
        raise ConfigError(f"chat template {setting!r}: the file is empty; give a Jinja template.")
    return text


def chosen_template(setting: str, is_off: bool) -> str:
    """The template that the options `--chat-template` and `--no-chat-template` stand for.

    Args:
        setting: "auto", "none" or the path of a file.
        is_off: Whether `--no-chat-template` was given.

    Returns:
        "auto", "none" or the path of a file that is there.

    Raises:
        ConfigError: There is no such file, or the two options contradict each other.
    """
    if is_off and setting not in MODES:
        raise ConfigError("--chat-template and --no-chat-template: give one of the two.")
    if fault := template_fault(setting):
        raise ConfigError(f"--chat-template {setting}: {fault}")
    return "none" if is_off else setting


def with_template_value(arguments: Sequence[str]) -> list[str]:
    """Arguments of the command line, "auto" filled in where `--chat-template` has no value.

    Args:
        arguments: Those that were given. The option was a flag once.
    """
    found: list[str] = []
    for place, argument in enumerate(arguments):
        found.append(argument)
        following = arguments[place + 1 : place + 2]
        if argument == "--chat-template" and (not following or following[0].startswith("-")):
            found.append("auto")
    return found


def told_template(setting: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a file of settings says of the template, by which a later call knows it again.

    Args:
        setting: "auto", "none" or the path of a file.
        kwargs: Variables of the template.

    Returns:
        `chat_template`: true, false, or the file with a hash of its text; and
        `chat_template_kwargs` where there are any.

    Raises:
        ConfigError: The file cannot be read.
    """
    told: dict[str, Any] = {"chat_template": setting == "auto"}
    if text := read_template(setting):
        told["chat_template"] = f"{setting} {hashlib.sha256(text.encode()).hexdigest()}"
    return {**told, "chat_template_kwargs": kwargs} if kwargs else told


def parse_kwargs(values: Sequence[str]) -> dict[str, Any]:
    """Read `--chat-template-kwargs`.

    Args:
        values: JSON objects, or "name=value" with a value that is JSON or plain text.

    Returns:
        Names and values; a later one replaces an earlier one.

    Raises:
        ConfigError: A value is neither of the two, or names what a template cannot be given.
    """
    found: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            read = _json(text, None)
            if not isinstance(read, dict):
                raise ConfigError(f"--chat-template-kwargs {text}: not a JSON object.")
            found |= cast(dict[str, Any], read)
        elif equals:
            found[name.strip()] = _json(value, value)
        else:
            raise ConfigError(
                f"--chat-template-kwargs {text}: write it as name=value, or as a JSON object."
            )
    if fault := kwargs_fault(found):
        raise ConfigError(f"--chat-template-kwargs {fault}")
    return found


def _json(text: str, otherwise: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, cast(Sequence[Any], value)))
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value).items()
        return all(isinstance(key, str) and _is_plain(item) for key, item in items)
    return isinstance(value, str | int)
