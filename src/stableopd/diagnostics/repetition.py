"""Repetition in rollouts: of whole texts (by compression) and of single tokens (by n-grams)."""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from stableopd.diagnostics.ngrams import nearest_equal
from stableopd.types import ConfigError

__all__ = [
    "is_repetitive",
    "label_rows",
    "repetition_flags",
    "repetition_rate",
    "repetitive_tokens",
]

# A piece of this many tokens is labelled in one go: its arrays stay in a core's cache.
_PIECE_TOKENS = 16_384
# Below this many characters to compress a thread pool costs more than it saves.
_POOL_CHARS = 200_000


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


def repetition_flags(
    texts: Sequence[str],
    window_chars: int = 10_000,
    ratio: float = 10.0,
    num_threads: int = 0,
) -> NDArray[np.bool_]:
    """Label many texts by `is_repetitive`, on all cores: zlib compresses outside Python's lock.

    Args:
        texts: Completions without special tokens.
        window_chars: L of `is_repetitive`, in characters.
        ratio: tau of `is_repetitive`.
        num_threads: Number of threads; 0 for one a core. Few or short texts take one anyway.

    Returns:
        (len(texts),) booleans, in the order of the texts. (arXiv 2604.08527.)
    """
    flags = np.zeros(len(texts), dtype=np.bool_)
    places = [place for place, text in enumerate(texts) if len(text) > window_chars]
    threads = min(num_threads or _num_cores(), len(places))
    if threads < 2 or len(places) * window_chars < _POOL_CHARS:
        flags[places] = [is_repetitive(texts[place], window_chars, ratio) for place in places]
        return flags

    # One task a thread would wait for the slowest; one a text would pay for a queue each time.
    size = max(1, min(64, math.ceil(len(places) / (4 * threads))))
    parts = [places[start : start + size] for start in range(0, len(places), size)]

    def label(part: list[int]) -> list[bool]:
        return [is_repetitive(texts[place], window_chars, ratio) for place in part]

    with ThreadPoolExecutor(threads) as pool:
        for part, found in zip(parts, pool.map(label, parts), strict=True):
            flags[part] = found
    return flags


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
    return float(repetition_flags(texts, window_chars, ratio).mean())


def repetitive_tokens(
    ids: Sequence[int] | NDArray[np.integer], ngram: int = 8, min_run: int = 0
) -> NDArray[np.bool_]:
    """Label the tokens of one rollout that continue something said before.

    Token t is repetitive when the n-gram that ends at t also ended at an earlier position; the
    two may overlap. The paper (arXiv 2604.08527) gives no rule; this one is the project's. Exact:
    n-grams are found by hash and then compared.

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
    return label_rows([np.asarray(ids, dtype=np.int64).reshape(-1)], ngram, min_run)[0]


def label_rows(
    rows: Sequence[NDArray[np.int64]], ngram: int = 8, min_run: int = 0
) -> list[NDArray[np.bool_]]:
    """Label the tokens of many rollouts at once, each by itself.

    The same labels as `repetitive_tokens` of each row, but short rows share the work of a call.

    Args:
        rows: Token ids of one completion each.
        ngram: n, in tokens.
        min_run: Shortest run that counts, as in `repetitive_tokens`.

    Returns:
        One array of booleans a row, as long as the row.

    Raises:
        ConfigError: `ngram` is less than 1.
    """
    if ngram < 1:
        raise ConfigError(f"ngram must be at least 1, not {ngram}; the default is 8.")
    labels: list[NDArray[np.bool_]] = []
    piece: list[NDArray[np.int64]] = []
    size = 0
    for row in rows:
        if piece and size + len(row) > _PIECE_TOKENS:
            labels += _label_piece(piece, ngram, min_run)
            piece, size = [], 0
        piece.append(row)
        size += len(row)
    return labels + _label_piece(piece, ngram, min_run) if piece else labels


def _label_piece(
    rows: list[NDArray[np.int64]], ngram: int, min_run: int
) -> list[NDArray[np.bool_]]:
    stops = np.cumsum([len(row) for row in rows])
    # "unsafe": an empty list among the rows is an array of floats.
    tokens = np.concatenate(rows, dtype=np.int64, casting="unsafe").view(np.uint64)
    labels = np.zeros(len(tokens), dtype=np.bool_)
    if len(tokens) >= ngram:
        several = stops if len(rows) > 1 else None
        later, _ = nearest_equal(tokens, ngram, several)
        labels[later + (ngram - 1)] = True
        if min_run > 1:
            labels = _long_runs(labels, min_run)
    if len(rows) == 1:
        return [labels]
    return [labels[stop - len(row) : stop] for row, stop in zip(rows, stops.tolist(), strict=True)]


def _num_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _long_runs(labels: NDArray[np.bool_], min_run: int) -> NDArray[np.bool_]:
    edges = np.diff(np.concatenate(([0], labels.astype(np.int8), [0])))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    long = ends - starts >= min_run
    depth = np.zeros(len(labels) + 1, dtype=np.int64)
    depth[starts[long]] = 1
    depth[ends[long]] -= 1
    return np.cumsum(depth[:-1]) > 0
