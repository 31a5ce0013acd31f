"""Texts whose tokens the models do not know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stableopd.types import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["require_rows"]


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
