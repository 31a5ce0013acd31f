import random
import re

import numpy as np
import pytest

from stableopd.diagnostics.loops import find_loops
from stableopd.diagnostics.repetition import repetitive_tokens
from stableopd.diagnostics.units import NGRAM_OF_CHARACTERS, NGRAM_OF_WORDS, characters, words

UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]{{1,8}}|\S")
ALPHABET = [
    *"abZ09_.,\n\t $\\",
    *"\x00\x01\x1f\x85\xa0éßπжκ中国かが한국אع\u3000\u200b\u0301अा²½😀\ud800\udfff",
]


def check(text):
    """Units, their places, and their ids, against a regular expression and a table."""
    units = words(text)
    assert units.ids.dtype == units.starts.dtype == units.stops.dtype == np.int64
    places = list(zip(units.starts.tolist(), units.stops.tolist(), strict=True))
    found = [text[start:stop] for start, stop in places]
    assert found == WORD.findall(text)
    assert places == [match.span() for match in WORD.finditer(text)]
    ids = units.ids.tolist()
    assert len(set(ids)) == len(set(found)) == len(set(zip(ids, found, strict=True)))


@pytest.mark.parametrize("length", [0, 1, 2, 30, 400])
def test_words_of_made_text(length):
    rng = random.Random(length)
    for _ in range(200 if length < 100 else 20):
        check("".join(rng.choices(ALPHABET, k=length)))
        check("".join(rng.choices("abcde 1", k=length)))


def test_words_of_any_characters():
    rng = random.Random(0)
    for _ in range(100):
        check("".join(chr(rng.randrange(0x110000)) for _ in range(50)))
        check("".join(chr(rng.randrange(0x300)) for _ in range(500)))


def test_words_of_more_letters_than_fit_a_byte():
    rng = random.Random(1)
    korean = "".join(rng.choice([" ", chr(rng.randrange(0xAC00, 0xD7A4))]) for _ in range(2_000))
    check(korean)
    check(korean + "and English " + korean)


def test_words_by_hand():
    text = "It's 3.14,\n\tisn't it? internationally 数学 x_1"
    units = words(text)
    found = [text[a:b] for a, b in zip(units.starts, units.stops, strict=True)]
    expected = "It ' s 3 . 14 , isn ' t it ? internat ionally 数 学 x _ 1"
    assert found == expected.split()
    assert units.ids[1] == units.ids[8]  # both are '
    assert units.ids[0] != units.ids[10]  # It and it
    assert len(words(" \n ").ids) == len(words("").ids) == 0


def test_characters():
    units = characters("aé\ud800 a")
    assert units.ids.tolist() == [97, 233, 0xD800, 32, 97]
    assert units.starts.tolist() == [0, 1, 2, 3, 4]
    assert units.stops.tolist() == [1, 2, 3, 4, 5]
    assert len(characters("").ids) == 0


def test_a_loop_of_text_is_found_in_words_and_in_characters():
    lead = "So the total is 42, which was to be shown in the first place."
    loop = " Wait, let me check that again: 6 * 7 = 42."
    text = lead + loop * 6
    units = words(text)
    (found,) = find_loops(units.ids, NGRAM_OF_WORDS)
    assert (
        text[units.starts[found.start] : units.starts[found.start + found.period]].strip()
        in (text[len(lead) - 1 :])
    )
    assert abs(int(units.starts[found.start]) - len(lead)) <= 1
    assert int(units.stops[found.stop - 1]) == len(text)
    assert repetitive_tokens(units.ids, NGRAM_OF_WORDS)[-1]
    (found,) = find_loops(characters(text).ids, NGRAM_OF_CHARACTERS)
    assert (found.period, found.stop) == (len(loop), len(text))


def test_a_run_without_spaces_is_a_loop_too():
    for run in ("0" * 1_000, "ab" * 500, "abc" * 400):
        units = words("x = " + run)
        assert find_loops(units.ids, NGRAM_OF_WORDS)[-1].stop == len(units.ids)
