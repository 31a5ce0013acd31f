"""Texts as token ids, and those whose tokens the models do not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stableopd.model_files import guarded
from stableopd.types import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode_texts", "require_rows"]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], where: str, has_special: bool = False
) -> list[list[int]]:
    """Token ids of texts.

    Args:
        tokenizer: The tokenizer.
        texts: What to encode.
        where: Names the texts, for messages.
        has_special: Whether it puts its special tokens around them.

    Returns:
        A list of ids for each text.

    Raises:
        ModelError: The tokenizer fails, such as one without an unknown token.
    """
    if not texts:
        return []
    with guarded(where, "the tokenizer cannot encode it"):
        return tokenizer(texts, add_special_tokens=has_special, verbose=False)["input_ids"]


def require_rows(
    texts: Iterable[tuple[str, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
) -> None:
    """Refuse a text with a token that has no row in the models' embeddings.

    A tokenizer may have more ids than a model has rows, as that of a text-only Gemma 3 has one for
    images. Only ids that are used must be there.

    Args:
        texts: For each text what it is, such as "prompt a.jsonl:3", and its token ids.
        tokenizer: What encoded them.
        num_tokens: How many ids the models have rows for.

    Raises:
        DataError: A text uses an id from `num_tokens` on; names the first.
    """
    for name, ids in texts:
        if ids and (largest := max(ids)) >= num_tokens:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{name}: its token {token!r} (id {largest}) has no row in the embeddings, which "
                f"have {num_tokens}; leave it out, or use models whose embeddings hold it."
            )
