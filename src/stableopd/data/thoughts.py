"""A thought and an answer that a server gave apart, as the one text that the model wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stableopd.data.answers import THOUGHTS, opens_thought
from stableopd.data.messages import THOUGHT_FIELDS
from stableopd.data.prompts import render
from stableopd.data.templates import is_templated, run_template
from stableopd.types import DataError, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["join_thought"]


def join_thought(
    prompt: Prompt,
    thought: str,
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """What follows the prompt where a model thought and then answered, by its chat template.

    Args:
        prompt: The prompt.
        thought: The thought, without marks around it.
        answer: The answer after it.
        tokenizer: The model's tokenizer.
        chat_template: See `render`.
        template_kwargs: Further variables of the template.

    Returns:
        The completion, from the end of the prompt to the end of the answer.

    Raises:
        DataError: The template writes no thought.
    """
    before = render(prompt, tokenizer, chat_template, template_kwargs)
    if is_templated(tokenizer, chat_template):
        turns = prompt.prompt
        messages = (Message("user", turns),) if isinstance(turns, str) else turns
        said = {"role": "assistant", "content": answer, **dict.fromkeys(THOUGHT_FIELDS, thought)}
        told = run_template(
            tokenizer,
            [*(m.as_dict() for m in messages), said],
            template_kwargs or {},
            f"prompt {prompt.id}",
            has_generation_prompt=False,
        )
        after = told[len(before) :] if told.startswith(before) else ""
        begin, end = after.find(thought.strip()), after.rfind(answer.strip())
        if 0 <= begin < end:
            return after[: end + len(answer.strip())]
    if opens_thought(before):
        closed = next(c for opened, c in THOUGHTS if before.rstrip().endswith(opened))
        return f"{thought.strip()}\n{closed}\n\n{answer.strip()}"
    raise DataError(
        f"prompt {prompt.id}: the server gives thought and answer apart, and the tokenizer's chat "
        "template does not say how to join them; start the server without --reasoning-parser."
    )
