"""Prompts from files and folders, as token ids, and in the order in which the steps use them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableopd.data.rows import Row, read_rows
from stableopd.data.templates import is_templated, run_template
from stableopd.types import DataError, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stableopd.config import DataConfig

__all__ = ["encode_prompts", "load_prompts", "prompts_of_step", "render"]

# How many problems the embedded world makes for each split.
EMBEDDED_SIZES = {"train": 20_000, "test": 512}

ROLES = ("system", "user", "assistant")


def load_prompts(
    source: str,
    data: DataConfig,
    *,
    split: str,
    needs_solution: bool,
    needs_answer: bool,
    max_rows: int = 0,
    teachers: Collection[str] = (),
) -> list[Prompt]:
    """Read and check every row of a data set.

    Args:
        source: A .jsonl, .json (one object per line) or .parquet file; a folder of such files or
            one that `datasets.save_to_disk` wrote; or "embedded".
        data: Which columns hold prompt, solution and answer. A dotted name reaches into objects;
            an empty name says that there is no such column. The column "id" is used where present.
        split: "train" or "test": which part of a folder that has parts.
        needs_solution: Whether a row without a solution is an error.
        needs_answer: Whether a row without an answer is an error.
        max_rows: Rows to read; 0 reads all.
        teachers: Names that the column of the teacher may hold; without any it is not read.

    Returns:
        The prompts, in the order of the data.

    Raises:
        DataError: The source cannot be read, holds no row, or has a row that cannot be used.
    """
    if source == "embedded":
        from stableopd.data.arithmetic import make_problems

        num = EMBEDDED_SIZES[split]
        return make_problems(min(num, max_rows) if max_rows else num, 0, split)
    path = Path(source)
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    for row in itertools.islice(read_rows(path, split), max_rows or None):
        prompt = _prompt(row, data, needs_solution, needs_answer)
        if teachers and (name := _teacher(row, data.teacher, teachers)):
            prompt = dataclasses.replace(prompt, teacher=name)
        if prompt.id in places:
            raise DataError(
                f"{row.place}: the id {prompt.id!r} was already used in {places[prompt.id]}; "
                "give every row an id of its own or leave the column 'id' out."
            )
        places[prompt.id] = row.place
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: there is no row in it; give data with at least one prompt.")
    return prompts


def _prompt(row: Row, data: DataConfig, needs_solution: bool, needs_answer: bool) -> Prompt:
    value = _reach(row.values, data.prompt)
    if value is None:
        raise DataError(
            f"{_missing(row, data.prompt)}; name the column that holds the prompt in data.prompt."
        )
    solution = _solution(row, data.solution)
    if needs_solution and solution is None:
        raise DataError(
            f"{_missing(row, data.solution)}; the golden term (objective.lambda_gold above 0) "
            "needs it: name the column in data.solution or use a method without it."
        )
    answer = _answer(row, data.answer)
    if needs_answer and answer is None:
        raise DataError(
            f"{_missing(row, data.answer)}; grading needs it: name the column in data.answer."
        )
    return Prompt(_id(row), _conversation(row, data.prompt, value), solution, answer)


def _reach(values: dict[str, Any], name: str) -> Any:
    """The value of the column of that name (dots reach into objects), or None."""
    if name in values:
        return values[name]
    head, dot, rest = name.partition(".")
    inner = values.get(head)
    return _reach(inner, rest) if dot and isinstance(inner, dict) else None


def _missing(row: Row, name: str) -> str:
    if name in row.values:
        return f"{row.place}: column {name!r} is empty"
    columns = ", ".join(map(repr, row.values)) or "none"
    return f"{row.place}: no column {name!r} (its columns are {columns})"


def _id(row: Row) -> str:
    value = row.values.get("id")
    if value is None:
        return row.fallback_id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{row.place}: column 'id' must be text or a whole number, not {value!r}.")
    return _text(row, "id", str(value))


def _solution(row: Row, name: str) -> str | None:
    value = _reach(row.values, name) if name else None
    return None if _is_blank(value) else _text(row, name, value)


def _answer(row: Row, name: str) -> str | None:
    value = _reach(row.values, name) if name else None
    if _is_blank(value):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"{row.place}: column {name!r} is {value}, which is not an answer.")
        return str(value)
    return _text(row, name, value, kind="text or a number")


def _teacher(row: Row, name: str, teachers: Collection[str]) -> str | None:
    value = _reach(row.values, name) if name else None
    if _is_blank(value):
        return None
    teacher = _text(row, name, value)
    if teacher not in teachers:
        raise DataError(
            f"{row.place}: column {name!r} names the teacher {teacher!r}, which teacher.by_name "
            f"does not have (it has {', '.join(map(repr, sorted(teachers)))}); add its address "
            "there, or leave the column empty for the default teacher."
        )
    return teacher


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(row: Row, name: str, value: Any, kind: str = "text") -> str:
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {name!r} must be {kind}, not {_kind_of(value)}.")
    if _is_blank(value):
        raise DataError(f"{row.place}: column {name!r} is empty.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{row.place}: column {name!r} holds half of a surrogate pair (such as \\ud800), which "
            "is no character."
        ) from None
    return value


def _kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _conversation(row: Row, name: str, value: Any) -> str | tuple[Message, ...]:
    if not isinstance(value, list):
        return _text(row, name, value, kind="text or a list of messages")
    messages: list[Message] = []
    for number, item in enumerate(value, start=1):
        where = f"{name}[{number}]"
        if not isinstance(item, dict):
            raise DataError(
                f'{row.place}: message {number} of column {name!r} must be {{"role": ..., '
                f'"content": ...}}, not {_kind_of(item)}.'
            )
        role = item.get("role")
        if role not in ROLES:
            raise DataError(
                f"{row.place}: message {number} of column {name!r} has the role {role!r}; choose "
                f"from {', '.join(ROLES)}."
            )
        messages.append(Message(role, _text(row, f"{where}.content", item.get("content"))))
    if not messages:
        raise DataError(f"{row.place}: column {name!r} is an empty list of messages.")
    if messages[-1].role != "user":
        raise DataError(
            f"{row.place}: column {name!r} ends with a message of the {messages[-1].role}; end it "
            "with the user's, which the student answers."
        )
    return tuple(messages)


def render(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that the model reads.

    Args:
        prompt: Plain text or messages.
        tokenizer: The student's tokenizer.
        chat_template: "auto" puts messages, and plain text as one message of the user, through the
            tokenizer's chat template where it has one; so does the path of a file, whose template
            the tokenizer has been given; "none" takes plain text as it is.
        template_kwargs: Further variables of the template.

    Returns:
        The text, up to where the assistant's answer begins.

    Raises:
        DataError: Messages without a template, or messages that the template refuses.
    """
    if not is_templated(tokenizer, chat_template):
        if isinstance(prompt.prompt, str):
            return prompt.prompt
        reason = (
            "data.chat_template is 'none'; set it to 'auto'"
            if chat_template == "none"
            else "the tokenizer has no chat template; give prompts as plain text or a tokenizer "
            "with a template"
        )
        raise DataError(f"prompt {prompt.id}: a list of messages, but {reason}.")
    messages = (
        (Message("user", prompt.prompt),) if isinstance(prompt.prompt, str) else prompt.prompt
    )
    return run_template(
        tokenizer,
        [{"role": m.role, "content": m.content} for m in messages],
        template_kwargs or {},
        f"prompt {prompt.id}",
    )


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    max_prompt_tokens: int,
    context: int | None,
    max_new_tokens: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of prompts, checked against the budget.

    A rendered chat template holds its special tokens already, so none is added; plain text gets
    what the tokenizer puts before a text (a BOS, say), but not what it puts behind.

    Args:
        prompts: What to encode.
        tokenizer: The student's tokenizer.
        chat_template: "auto", "none" or the path of a file, see `render`.
        max_prompt_tokens: The longest prompt that is allowed, in tokens.
        context: The longest sequence that the model takes, in tokens; None where it has no limit.
        max_new_tokens: The longest completion that is to follow, in tokens.
        template_kwargs: Further variables of the chat template.

    Returns:
        One tuple of token ids for each prompt.

    Raises:
        DataError: A prompt is too long, leaves too little room for its completion, or has no
            token; or `render` refuses it.
    """
    if not prompts:
        return []
    texts = [render(prompt, tokenizer, chat_template, template_kwargs) for prompt in prompts]
    bare = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    encoded: list[tuple[int, ...]] = [tuple(ids) for ids in bare]
    if not is_templated(tokenizer, chat_template):
        whole = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
        encoded = [
            _without_suffix(tuple(ids), inner) for ids, inner in zip(whole, encoded, strict=True)
        ]
    for prompt, ids in zip(prompts, encoded, strict=True):
        _check_length(prompt, len(ids), max_prompt_tokens, context, max_new_tokens)
    return encoded


def prompts_of_step(step: int, num_prompts: int, per_step: int, seed: int) -> list[int]:
    """Which prompts a step uses, as a pure function: a resumed run needs no saved position.

    Every epoch is a shuffle of all prompts, drawn from (seed, epoch); steps take the next
    `per_step` of them, and a step at the end of an epoch goes on with the next one.

    Args:
        step: The step, counted from 0.
        num_prompts: Prompts in the data set, at least 1.
        per_step: Prompts in a step; may be more than there are prompts.
        seed: Seed of the shuffles.

    Returns:
        `per_step` places in the data set, from 0. Within one epoch none comes twice.
    """
    begin = step * per_step
    return [
        _shuffled(num_prompts, seed, place // num_prompts)[place % num_prompts]
        for place in range(begin, begin + per_step)
    ]


@functools.lru_cache(maxsize=4)
def _shuffled(num: int, seed: int, epoch: int) -> tuple[int, ...]:
    places = list(range(num))
    # Text as a seed is hashed in full, so neighbouring seeds and epochs are unrelated.
    random.Random(f"prompts {seed} {epoch}").shuffle(places)
    return tuple(places)


def _without_suffix(whole: tuple[int, ...], inner: tuple[int, ...]) -> tuple[int, ...]:
    """`whole` up to the end of `inner`, the same text without special tokens around it."""
    for end in range(len(whole), len(inner) - 1, -1):
        if whole[end - len(inner) : end] == inner:
            return whole[:end]
    return whole


def _check_length(
    prompt: Prompt, length: int, max_prompt_tokens: int, context: int | None, max_new_tokens: int
) -> None:
    if length == 0:
        raise DataError(f"prompt {prompt.id}: the tokenizer makes no token of it; leave it out.")
    if length > max_prompt_tokens:
        raise DataError(
            f"prompt {prompt.id}: {length} tokens, but at most {max_prompt_tokens} are allowed; "
            "raise rollout.max_prompt_tokens or leave the prompt out."
        )
    if context is not None and length + max_new_tokens > context:
        raise DataError(
            f"prompt {prompt.id}: {length} tokens and a completion of up to {max_new_tokens} do "
            f"not fit into the model's context of {context}; lower max_new_tokens or leave the "
            "prompt out."
        )
