"""Golden solutions as token sequences that end in a stop."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

from stableopd.data.vocabulary import encode_texts
from stableopd.types import DataError, Prompt, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_after", "encode_golden", "golden_sequences", "num_too_long"]


def encode_golden(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
    stop_ids: Collection[int] = (),
    text: str = "",
) -> tuple[int, ...]:
    """Token ids of a solution as the completion that follows its prompt.

    Prompt and solution are encoded in one, where the prompt's tokens stay what they are by
    themselves: a tokenizer of sentencepiece's kind puts a space before a text that stands by
    itself, which no rollout begins with. Elsewhere a line end stands in for the prompt. No special
    token is added but the stop at its end. A solution whose text already ends in a stop token
    keeps that one.

    Args:
        prompt: A problem with a solution.
        tokenizer: The student's tokenizer.
        stop_id: Token id that is added as the stop.
        stop_ids: All ids that end a completion, where there are more.
        text: The prompt as the student reads it; "" where it is not known.

    Returns:
        The token ids; the last one, and only that one, is a stop.

    Raises:
        DataError: There is no solution, or a stop token stands within it.
    """
    if prompt.solution is None:
        raise DataError(f"prompt {prompt.id}: no solution; name its column in data.solution.")
    ids = encode_after(text, prompt.solution, tokenizer)
    stops = {stop_id, *stop_ids}
    if ids and ids[-1] in stops:
        ids, stop_id = ids[:-1], ids[-1]
    if within := [i for i in ids if i in stops]:
        raise DataError(
            f"prompt {prompt.id}: the stop token {tokenizer.decode(within[:1])!r} (id {within[0]}) "
            "stands within the solution; a solution is one answer, so cut it there."
        )
    return (*ids, stop_id)


def encode_after(text: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a completion that follows a text, whose own ids stay what they are.

    Args:
        text: The prompt as the model reads it; "" where it is not known.
        completion: What follows it.
        tokenizer: The tokenizer.

    Returns:
        The ids, without special tokens around them.
    """

    def encode(part: str) -> tuple[int, ...]:
        return tuple(encode_texts(tokenizer, [part], "a solution")[0])

    for before in (text, "\n"):
        ids = encode(before) if before else ()
        both = encode(before + completion) if ids else ()
        if ids and both[: len(ids)] == ids and len(both) > len(ids):
            return both[len(ids) :]
    return encode(completion)


def golden_sequences(
    prompts: Items[Prompt],
    prompt_ids: Items[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int,
    max_tokens: int,
    stop_ids: Collection[int] = (),
    texts: Items[str] = (),
) -> list[Sequence | None]:
    """The golden sequence of every prompt, where there is one that fits.

    A solution that is too long is left out and not cut: cut off, it would teach not to stop.

    Args:
        prompts: All prompts of the data set.
        prompt_ids: Their token ids.
        tokenizer: The student's tokenizer.
        stop_id: Token id that is added as the stop.
        max_tokens: The longest completion, with its stop, in tokens.
        stop_ids: All ids that end a completion, where there are more.
        texts: The prompts as the student reads them; () where they are not known.

    Returns:
        For each prompt its sequence (`index` is the prompt's place), or None where it has no
        solution or one of more than `max_tokens` tokens.

    Raises:
        DataError: No prompt has a solution, none fits, or `encode_golden` refuses one.
    """
    sequences: list[Sequence | None] = []
    shortest: int | None = None
    for index, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        if prompt.solution is None:
            sequences.append(None)
            continue
        text = texts[index] if texts else ""
        completion = encode_golden(prompt, tokenizer, stop_id, stop_ids, text)
        shortest = min(len(completion), shortest or len(completion))
        fits = len(completion) <= max_tokens
        sequences.append(Sequence(ids, completion, True, index) if fits else None)
    if shortest is None:
        raise DataError(
            "no prompt has a solution, which the golden term (objective.lambda_gold above 0) "
            "needs; name the column in data.solution or use a method without it."
        )
    if shortest > max_tokens:
        raise DataError(
            f"no golden solution fits into {max_tokens} tokens, the shortest has {shortest} with "
            "its stop; raise rollout.max_new_tokens or give shorter solutions."
        )
    return sequences


def num_too_long(prompts: Items[Prompt], sequences: Items[Sequence | None]) -> int:
    """How many solutions `golden_sequences` left out because they are too long.

    Args:
        prompts: The prompts that it was given.
        sequences: What it returned.

    Returns:
        The number of prompts with a solution but no sequence.
    """
    return sum(
        prompt.solution is not None and sequence is None
        for prompt, sequence in zip(prompts, sequences, strict=True)
    )
