"""Prompts from files and folders, as token ids, and in the order in which the steps use them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stableopd.data.messages import (
    conversation,
    is_blank,
    kind_of,
    parts_of_chat,
    require_written,
    solution_text,
    text_of,
    tools_of,
)
from stableopd.data.rows import Row, read_rows
from stableopd.data.templates import is_templated, run_template
from stableopd.data.vocabulary import encode_texts
from stableopd.types import DataError, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stableopd.config import DataConfig

__all__ = ["encode_prompts", "load_prompts", "prompts_of_step", "refuse_long", "render", "too_long"]

MAX_NAMED = 5  # in a message about many prompts

# How many problems the embedded world makes for each split.
EMBEDDED_SIZES = {"train": 20_000, "test": 512}


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
    missing = _named_columns(data, bool(teachers))
    columns: dict[str, None] = {}
    for row in itertools.islice(read_rows(path, split), max_rows or None):
        if missing:
            columns |= dict.fromkeys(row.values)
            missing = {f: name for f, name in missing.items() if not _has(row.values, name)}
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
    for field, name in missing.items():
        raise DataError(
            f"{path}: no row has the column {name!r} that data.{field} names (the columns are "
            f'{", ".join(map(repr, columns))}); correct the name, or set data.{field} = "".'
        )
    return prompts


def _named_columns(data: DataConfig, has_teachers: bool) -> dict[str, str]:
    """Columns that may be empty, by field, where the user has named them: they must exist."""
    fields = {f.name: f.default for f in dataclasses.fields(data)}
    names = {name: getattr(data, name) for name in ("solution", "answer")}
    if has_teachers:
        names["teacher"] = data.teacher
    return {field: name for field, name in names.items() if name and name != fields[field]}


def _prompt(row: Row, data: DataConfig, needs_solution: bool, needs_answer: bool) -> Prompt:
    value = _reach(row.values, data.prompt)
    if value is None:
        raise DataError(
            f"{_missing(row, data.prompt)}; name the column that holds the prompt in data.prompt."
        )
    if data.prompt == data.solution:
        chat, solution = parts_of_chat(row, data.prompt, value)
    else:
        chat, solution = conversation(row, data.prompt, value), _solution(row, data.solution)
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
    return Prompt(_id(row), chat, solution, answer, tools=tools_of(row))


def _reach(values: dict[str, Any], name: str) -> Any:
    """The value of the column of that name (dots reach into objects), or None."""
    if name in values:
        return values[name]
    head, dot, rest = name.partition(".")
    inner = values.get(head)
    return _reach(inner, rest) if dot and isinstance(inner, dict) else None


def _has(values: dict[str, Any], name: str) -> bool:
    """Whether there is a column of that name, empty or not."""
    if name in values:
        return True
    head, dot, rest = name.partition(".")
    inner = values.get(head)
    return bool(dot) and (inner is None or (isinstance(inner, dict) and _has(inner, rest)))


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
        raise DataError(
            f"{row.place}: column 'id' must be text or a whole number, not {_shown(value)}."
        )
    try:
        told = str(value)
    except ValueError:
        raise DataError(
            f"{row.place}: column 'id' is a number of too many digits; write it as text."
        ) from None
    return text_of(row, "id", told)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float | bool) else kind_of(value)


def _solution(row: Row, name: str) -> str | None:
    value = _reach(row.values, name) if name else None
    return None if is_blank(value) else solution_text(row, name, value)


def _answer(row: Row, name: str) -> str | None:
    value = _reach(row.values, name) if name else None
    if isinstance(value, list):
        items = cast(list[Any], value)
        if len(items) != 1:
            raise DataError(
                f"{row.place}: column {name!r} is a list of {len(items)} answers; write the right "
                "one as text or a number."
            )
        value = items[0]
    if is_blank(value):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"{row.place}: column {name!r} is {value}, which is not an answer.")
        try:
            told = str(value)
        except ValueError:
            raise DataError(
                f"{row.place}: column {name!r} is a number of too many digits; write it as text."
            ) from None
        return told
    return text_of(row, name, value, kind="text or a number")


def _teacher(row: Row, name: str, teachers: Collection[str]) -> str | None:
    value = _reach(row.values, name) if name else None
    if is_blank(value):
        return None
    teacher = text_of(row, name, value)
    if teacher not in teachers:
        raise DataError(
            f"{row.place}: column {name!r} names the teacher {teacher!r}, which teacher.by_name "
            f"does not have (it has {', '.join(map(repr, sorted(teachers)))}); add its address "
            "there, or leave the column empty for the default teacher."
        )
    return teacher


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
        DataError: Messages without a template, or messages that the template refuses or drops a
            part of.
    """
    if not is_templated(tokenizer, chat_template):
        if isinstance(prompt.prompt, str) and not prompt.tools:
            return prompt.prompt
        reason = (
            "data.chat_template is 'none'; set it to 'auto'"
            if chat_template == "none"
            else "the tokenizer has no chat template; give prompts as plain text or a tokenizer "
            "with a template"
        )
        what = "a list of messages" if not isinstance(prompt.prompt, str) else "tools"
        raise DataError(f"prompt {prompt.id}: {what}, but {reason}.")
    messages = (
        (Message("user", prompt.prompt),) if isinstance(prompt.prompt, str) else prompt.prompt
    )
    where = f"prompt {prompt.id}"
    tools = {"tools": json.loads(prompt.tools)} if prompt.tools else {}
    told = [message.as_dict() for message in messages]
    text = run_template(tokenizer, told, {**(template_kwargs or {}), **tools}, where)
    require_written(messages, prompt.tools, text, str(tokenizer.chat_template), where)
    return text


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
    first = f"prompts from {prompts[0].id} on"
    bare = encode_texts(tokenizer, texts, first)
    encoded: list[tuple[int, ...]] = [tuple(ids) for ids in bare]
    if not is_templated(tokenizer, chat_template):
        whole = encode_texts(tokenizer, texts, first, has_special=True)
        encoded = [
            _without_suffix(tuple(ids), inner) for ids, inner in zip(whole, encoded, strict=True)
        ]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise DataError(
                f"prompt {prompt.id}: the tokenizer makes no token of it; leave it out."
            )
    refuse_long(prompts, encoded, max_prompt_tokens, context, max_new_tokens)
    return encoded


def too_long(
    prompt_ids: Sequence[tuple[int, ...]],
    max_prompt_tokens: int,
    context: int | None,
    max_new_tokens: int,
) -> list[int]:
    """Places of the prompts that are too long, or leave too little room for a completion.

    Args:
        prompt_ids: Token ids of the prompts.
        max_prompt_tokens: The longest prompt that is allowed, in tokens.
        context: The longest sequence that the model takes, in tokens; None where it has no limit.
        max_new_tokens: The longest completion that is to follow, in tokens.

    Returns:
        Places in `prompt_ids`, in order.
    """
    limit = max_prompt_tokens
    if context is not None:
        limit = min(limit, context - max_new_tokens)
    return [place for place, ids in enumerate(prompt_ids) if len(ids) > limit]


def refuse_long(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[tuple[int, ...]],
    max_prompt_tokens: int,
    context: int | None,
    max_new_tokens: int,
    where: str = "",
    budget_name: str = "max_new_tokens",
) -> None:
    """Refuse prompts that are `too_long`: how many there are, and the first few.

    Args:
        prompts: The prompts.
        prompt_ids: Their token ids.
        max_prompt_tokens: See `too_long`.
        context: See `too_long`.
        max_new_tokens: See `too_long`.
        where: What stands before the message.
        budget_name: What the user calls `max_new_tokens`.

    Raises:
        DataError: There is one.
    """
    long = too_long(prompt_ids, max_prompt_tokens, context, max_new_tokens)
    if not long:
        return
    named = ", ".join(f"{prompts[i].id} ({len(prompt_ids[i])} tokens)" for i in long[:MAX_NAMED])
    more = ", ..." if len(long) > MAX_NAMED else ""
    longest = max(len(prompt_ids[i]) for i in long)
    if longest > max_prompt_tokens:
        why = f"at most {max_prompt_tokens} tokens are allowed"
        fix = f"raise rollout.max_prompt_tokens to {longest}"
    else:
        why = (
            f"with a completion of up to {max_new_tokens} tokens they do not fit into the model's "
            f"context of {context}"
        )
        fix = f"lower {budget_name}"
    raise DataError(
        f"{where}{len(long)} of {len(prompts)} prompts are too long: {named}{more}; {why}: {fix}, "
        "or leave them out (train does with data.skip_long = true)."
    )


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
