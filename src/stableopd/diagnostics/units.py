"""Units of text, for rollouts without token ids: words or characters, numbered like tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_WORD", "NGRAM_OF_CHARACTERS", "NGRAM_OF_WORDS", "Units", "characters", "words"]

# Origin: design. A token of English or of mathematics is about 4 characters, and close to a word
# or a sign, so these compare with n-grams of 8 tokens.
NGRAM_OF_WORDS = 8
NGRAM_OF_CHARACTERS = 32

# Longer runs of letters come in pieces, as tokenizers cut them too: else a loop of a thousand
# zeros would be one word. Eight bytes are also one number.
MAX_WORD = 8

_SPACE, _LETTER, _SINGLE = 0, 1, 2

# Chinese characters and Japanese kana stand without spaces between words: each is a unit.
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


@dataclass(frozen=True, slots=True)
class Units:
    """A text as a sequence of numbered units.

    Attributes:
        ids: (U,) numbers, equal exactly where the units are, within this text alone.
        starts: (U,) first character of each unit.
        stops: (U,) one past its last character.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


def words(text: str) -> Units:
    """Cut a text into words: runs of letters and digits, and every other character by itself.

    White space separates and is no unit. A run longer than 8 characters is cut into pieces of 8;
    Chinese characters and Japanese kana are units of one character. Use with `NGRAM_OF_WORDS`.

    Args:
        text: Any text, lone surrogates included.

    Returns:
        The words, in order; equal words have equal ids, upper and lower case differ.
    """
    codes = _codes(text)
    kinds, letters = _classify(codes)
    is_letter = kinds == _LETTER
    inner = np.zeros(len(codes) + 1, dtype=np.bool_)  # between two characters of a run
    inner[1:-1] = is_letter[1:] & is_letter[:-1]
    filled = kinds != _SPACE
    starts, stops = np.flatnonzero(filled & ~inner[:-1]), np.flatnonzero(filled & ~inner[1:]) + 1
    starts, stops = _cut_long(starts, stops)
    if letters is None:
        return Units(_number_words(text, starts, stops), starts, stops)
    # The low byte of a word is its first letter, which is never 1.
    eight = np.ndarray((len(codes),), "<u8", np.pad(letters, (0, 8)), strides=(1,))
    unused = ((MAX_WORD - (stops - starts)) * 8).astype(np.uint64)
    ids = eight[starts] & (np.uint64(2**64 - 1) >> unused)
    single = kinds[starts] == _SINGLE
    ids[single] = codes[starts[single]].astype(np.uint64) << np.uint64(8) | np.uint64(1)
    return Units(ids.view(np.int64), starts, stops)


def characters(text: str) -> Units:
    """Cut a text into characters (code points), white space included.

    Args:
        text: Any text, lone surrogates included. Use with `NGRAM_OF_CHARACTERS`.

    Returns:
        The characters; ids are code points.
    """
    starts = np.arange(len(text), dtype=np.int64)
    return Units(_codes(text).astype(np.int64), starts, starts + 1)


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def _classify(codes: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """The kind of every character, and a byte for each letter; None where 256 do not suffice."""
    low = np.minimum(codes, 128).astype(np.uint8)
    kinds, letters = _ASCII_KINDS[low], low
    high = np.flatnonzero(low == 128)
    if len(high):
        different, places = np.unique(codes[high], return_inverse=True)
        kind = np.array([_kind(chr(code)) for code in different.tolist()], dtype=np.uint8)
        kinds[high] = kind[places]
        numbers = np.cumsum(kind == _LETTER) + 127
        if numbers[-1] > 255:
            return kinds, None
        letters[high] = numbers[places]
    return kinds, letters


def _kind(character: str) -> int:
    if character.isspace():
        return _SPACE
    if not character.isalnum() or any(a <= ord(character) <= b for a, b in _UNSPACED):
        return _SINGLE
    return _LETTER


_ASCII_KINDS = np.array([*(_kind(chr(code)) for code in range(128)), _SINGLE], dtype=np.uint8)


def _cut_long(
    starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    sizes = stops - starts
    if not len(sizes) or sizes.max() <= MAX_WORD:
        return starts, stops
    pieces = -(-sizes // MAX_WORD)
    last = np.cumsum(pieces)
    # Place of each piece in its run: 0 for the first.
    place = np.arange(int(last[-1]), dtype=np.int64) - np.repeat(last - pieces, pieces)
    starts = np.repeat(starts, pieces) + MAX_WORD * place
    return starts, np.minimum(starts + MAX_WORD, np.repeat(stops, pieces))


def _number_words(
    text: str, starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number words by a table, for texts of very many different letters, as Korean is."""
    table: dict[str, int] = {}
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    ids = [table.setdefault(text[start:stop], len(table)) for start, stop in spans]
    return np.array(ids, dtype=np.int64)
