"""Which n-grams of a sequence occurred before: hashed and sorted fast, then verified."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "as_hashes",
    "equal_neighbours",
    "join_hashes",
    "join_ranks",
    "nearest_equal",
    "same_windows",
    "window_hashes",
    "window_ranks",
]

# Odd and without pattern (fractions of the golden ratio, as in splitmix64 and xxHash). A hash is
# then a sum of ids times such numbers modulo 2^64, whose high bits depend on every id.
_MULTIPLIERS = tuple(
    np.uint64(value)
    for value in (
        0x9E3779B97F4A7C15,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x27D4EB2F165667C5,
    )
)


def nearest_equal(
    tokens: NDArray[np.uint64], ngram: int, row_stops: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair every n-gram with its nearest earlier occurrence; exact.

    Args:
        tokens: (T,) ids, T >= `ngram`, of one row or of rows laid end to end.
        ngram: n, in tokens.
        row_stops: Where each row ends, where there are several; a pair is then of one row.

    Returns:
        (later, earlier): places at which the two n-grams of every pair begin, in no order.
        N-grams that did not occur before are in no pair as the later one.
    """
    hashes = window_hashes(tokens, ngram)
    later, earlier = equal_neighbours(hashes, row_stops=row_stops, ngram=ngram)
    if not same_windows(tokens, ngram, later, earlier):
        hashes = as_hashes(window_ranks(tokens, ngram))
        return equal_neighbours(hashes, row_stops=row_stops, ngram=ngram)
    return later, earlier


def window_hashes(tokens: NDArray[np.uint64], ngram: int) -> NDArray[np.uint64]:
    """Hash every n-gram; equal n-grams have equal hashes, the reverse must be verified.

    Args:
        tokens: (T,) ids, T >= `ngram`.
        ngram: n, in tokens.

    Returns:
        (T - n + 1,) hashes, one for the n-gram that begins at each place; the high bits are the
        better ones.
    """
    hashes = tokens * _MULTIPLIERS[0]
    width, level = 1, 1
    while width < ngram:
        step = min(width, ngram - width)
        hashes = join_hashes(hashes, step, level)
        width, level = width + step, level + 1
    return hashes


def join_hashes(hashes: NDArray[np.uint64], step: int, level: int) -> NDArray[np.uint64]:
    """Hash pairs of windows that begin `step` places apart: (H,) hashes become (H - step,)."""
    joined = hashes[: len(hashes) - step] * _MULTIPLIERS[level % len(_MULTIPLIERS)]
    joined += hashes[step:]
    return joined


def window_ranks(tokens: NDArray[np.uint64], ngram: int) -> NDArray[np.uint64]:
    """Number every n-gram without collisions: what `window_hashes` does, slower.

    Args:
        tokens: (T,) ids, T >= `ngram`.
        ngram: n, in tokens.

    Returns:
        (T - n + 1,) numbers below T, equal exactly where the n-grams are.
    """
    ranks = np.unique(tokens, return_inverse=True)[1].astype(np.uint64)
    width = 1
    while width < ngram:
        step = min(width, ngram - width)
        ranks = join_ranks(ranks, step)
        width += step
    return ranks


def join_ranks(ranks: NDArray[np.uint64], step: int) -> NDArray[np.uint64]:
    """Number pairs of windows as `join_hashes` hashes them, but without collisions: slower.

    Args:
        ranks: (R,) numbers below 2^31 that are equal exactly where the windows are.
        step: How far apart the windows of a pair begin. They may overlap.

    Returns:
        (R - step,) numbers below R that are equal exactly where the pairs are.
    """
    pairs = (ranks[: len(ranks) - step] << np.uint64(32)) | ranks[step:]
    return np.unique(pairs, return_inverse=True)[1].astype(np.uint64)


def as_hashes(ranks: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Move ranks to the high bits, where `equal_neighbours` looks: (R,) to (R,)."""
    return ranks << np.uint64(64 - _place_bits(len(ranks)))


def equal_neighbours(
    hashes: NDArray[np.uint64],
    places: NDArray[np.int64] | None = None,
    row_stops: NDArray[np.int64] | None = None,
    ngram: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair every window with the nearest earlier one of the same hash.

    One sort of (row, high bits of the hash, place), packed into 64 bits: about 6 ns a token.

    Args:
        hashes: (H,) hashes.
        places: Look only at these, in increasing order; None for all.
        row_stops: Where each row ends, in tokens, when `hashes` are of n-grams of rows laid end
            to end; a pair is then of one row, and n-grams across rows are left out.
        ngram: n, needed with `row_stops` alone.

    Returns:
        (later, earlier): places of the two windows of every pair, in no order.
    """
    mask = np.uint64(2 ** _place_bits(len(hashes)) - 1)
    if row_stops is not None:
        keys, valid = _row_keys(hashes, row_stops, ngram, mask)
    else:
        keys = (hashes if places is None else hashes[places]) & ~mask
        keys |= np.arange(len(keys), dtype=np.uint64) if places is None else places.view(np.uint64)
        valid = len(keys)
    keys.sort()
    keys = keys[:valid]
    first = np.flatnonzero((keys[1:] ^ keys[:-1]) <= mask)
    keys &= mask
    found = keys.view(np.int64)
    return found[first + 1], found[first]


def _row_keys(
    hashes: NDArray[np.uint64], row_stops: NDArray[np.int64], ngram: int, mask: np.uint64
) -> tuple[NDArray[np.uint64], int]:
    """Keys that sort by row first, n-grams across rows last, and the number of the others."""
    row_bits = np.uint64(len(row_stops).bit_length())
    sizes = np.diff(row_stops, prepend=0)
    rows = np.repeat(np.arange(len(sizes), dtype=np.uint64) << (np.uint64(64) - row_bits), sizes)
    keys = hashes >> row_bits
    keys &= ~mask
    keys |= rows[: len(keys)]
    keys |= np.arange(len(keys), dtype=np.uint64)
    across = (row_stops[:-1, None] - np.arange(1, ngram)).ravel()
    keys[across[(across >= 0) & (across < len(keys))]] = np.uint64(2**64 - 1)
    return keys, int(np.maximum(sizes - ngram + 1, 0).sum())


def same_windows(
    tokens: NDArray[np.uint64],
    ngram: int,
    later: NDArray[np.int64],
    earlier: NDArray[np.int64],
) -> bool:
    """Whether the n-grams of every pair are really equal, id by id.

    As many ids as fit are packed into a 64-bit word, so that few words are compared: 8 ids below
    2^16 are two words, 8 ids below 2^21 three.
    """
    if not len(later):
        return True
    bits = max(1, int(tokens.max()).bit_length())
    width = max(1, min(ngram, 64 // bits))
    words, packed = tokens, 1
    while packed < width:
        step = min(packed, width - packed)
        words = (words[: len(words) - step] << np.uint64(bits * step)) | words[step:]
        packed += step
    places = [*range(0, ngram - width, width), ngram - width]
    return all(
        np.array_equal(words[place:].take(later), words[place:].take(earlier)) for place in places
    )


def _place_bits(num_places: int) -> int:
    return max(1, (num_places - 1).bit_length())
