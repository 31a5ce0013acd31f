"""Repetition in rollouts: of whole texts (by compression) and of single tokens (by n-grams)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stableopd.types import ConfigError

__all__ = ["is_repetitive", "repetition_rate", "repetitive_tokens"]


def is_repetitive(text: str, window_chars: int = 10_000, ratio: float = 10.0) -> bool:
    """Whether the end of a text compresses so well that it must repeat itself.

    True where `len(text) > L` and, with b the UTF-8 bytes of the last L characters,
    `len(b) / len(zlib.compress(b)) > tau`.

    Args:
        text: A completion without special tokens.
        window_chars: L, in characters. A text of L characters or fewer is never repetitive.
        ratio: tau, bytes before compression to bytes after it.

    Returns:
        The label. (arXiv 2604.08527, with its L = 10,000 and tau = 10, zlib's default level.)
    """
    if len(text) <= window_chars:
        return False
    # A lone surrogate can come out of a JSON file; strict UTF-8 would refuse the whole rollout.
    window = text[len(text) - window_chars :].encode("utf-8", errors="surrogatepass")
    return len(window) / len(zlib.compress(window)) > ratio


def repetition_rate(texts: Sequence[str], window_chars: int = 10_000, ratio: float = 10.0) -> float:
    """RepRate: the share of all texts, short ones included, that are repetitive.

    Args:
        texts: Completions without special tokens.
        window_chars: L of `is_repetitive`, in characters.
        ratio: tau of `is_repetitive`.

    Returns:
        A share from 0 to 1; nan where there is no text. (arXiv 2604.08527.)
    """
    if not texts:
        return math.nan
    return sum(is_repetitive(text, window_chars, ratio) for text in texts) / len(texts)


def repetitive_tokens(
    ids: Sequence[int] | NDArray[np.integer], ngram: int = 8, min_run: int = 0
) -> NDArray[np.bool_]:
    """Label the tokens of one rollout that continue something said before.

    Token t is repetitive when the n-gram that ends at t also ended at an earlier position; the
    two may overlap. The paper (arXiv 2604.08527) gives no rule; this one is the project's.

    Args:
        ids: (T,) token ids of one completion.
        ngram: n, in tokens.
        min_run: Keep labels only inside runs of at least this many consecutive repetitive
            tokens; 0 keeps all.

    Returns:
        (T,) booleans, False at the first n - 1 tokens.

    Raises:
        ConfigError: `ngram` is less than 1.
    """
    if ngram < 1:
        raise ConfigError(f"ngram must be at least 1, not {ngram}; the default is 8.")
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    labels = np.zeros(len(tokens), dtype=np.bool_)
    if len(tokens) < ngram:
        return labels
    _, first, rank = np.unique(_window_ranks(tokens, ngram), return_index=True, return_inverse=True)
    starts = np.arange(len(rank))
    labels[ngram - 1 :] = first[rank] < starts
    return _long_runs(labels, min_run) if min_run > 1 else labels


def _window_ranks(tokens: NDArray[np.int64], ngram: int) -> NDArray[np.int64]:
    """Number every n-gram, so that two numbers are equal exactly where the n-grams are.

    Widths double: a window of 2k tokens is a pair of windows of k. The last step joins two
    windows that overlap, which together still fix all n tokens. Numbers stay below T, so a pair
    packs into one int64 without loss.
    """
    rank = _dense(tokens)
    width = 1
    while width < ngram:
        step = min(width, ngram - width)
        left, right = rank[: len(rank) - step], rank[step:]
        rank = _dense(left * (len(tokens) + 1) + right)
        width += step
    return rank


def _dense(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _long_runs(labels: NDArray[np.bool_], min_run: int) -> NDArray[np.bool_]:
    edges = np.diff(np.concatenate(([0], labels.astype(np.int8), [0])))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    long = ends - starts >= min_run
    depth = np.zeros(len(labels) + 1, dtype=np.int64)
    depth[starts[long]] = 1
    depth[ends[long]] -= 1
    return np.cumsum(depth[:-1]) > 0
