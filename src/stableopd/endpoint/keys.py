"""The key of a server: where it is read, and how it is kept out of every message."""

from __future__ import annotations

import base64
import html
import os
import re

from stableopd.types import ConfigError

__all__ = ["Mask", "key_text_fault", "read_key"]

# Characters of a key in a row that are taken out of a message (design): fewer tell little.
LEAST = 8

# One character in another spelling: of an address, of JSON, of Python, of a page.
SPELLING = re.compile(
    r"%(?P<address>[0-9a-fA-F]{2})"
    r"|\\+(?:u(?P<json>[0-9a-fA-F]{4})|x(?P<python>[0-9a-fA-F]{2})|[nrtfb]|(?P<quoted>.))"
    r"|(?P<page>&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|quot|amp|lt|gt|apos);)"
    r"|\\",
    re.DOTALL,
)


def read_key(variable: str, whose: str) -> str | None:
    """The key in an environment variable.

    Args:
        variable: Its name; "" is none.
        whose: Whose key it is, such as "the teacher's server", for messages.

    Returns:
        The key without the white space around it; None without a name.

    Raises:
        ConfigError: The variable is not set, or does not hold a key.
    """
    if not variable:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {variable!r}, which is to hold the key of {whose}, is not "
            "set; set it, or name none."
        )
    if fault := key_text_fault(key):
        raise ConfigError(
            f"the environment variable {variable!r}, which is to hold the key of {whose}, {fault}; "
            "write the key in it, and nothing else."
        )
    return key


def key_text_fault(key: str) -> str:
    """What makes a text no key, without repeating any of it.

    Args:
        key: The text.

    Returns:
        The rest of a sentence, or "".
    """
    if not key.isascii():
        return "holds a character outside ASCII"
    if not key.isprintable():
        return "holds a line end or another control character"
    return "" if key == key.strip() else "begins or ends with a space"


class Mask:
    """Takes a key out of texts, in every spelling in which a server may repeat it.

    What is taken out: eight or more characters of the key in a row (all of them, where there are
    fewer), also quoted for an address, escaped for JSON (once or more), for Python or for a page,
    broken over lines, and as base64 or hexadecimal digits of it or of a text around it.

    Args:
        key: The key; None takes nothing out.
    """

    def __init__(self, key: str | None) -> None:
        # A key with a backslash or a percent sign may be unescaped on the way, too.
        forms = [] if not key else [key, _decoded(key)[0]]
        if key and len(key) >= LEAST:
            raw = key.encode()
            forms += [raw.hex()]
            for offset in range(3):  # base64 reads three bytes at a time
                coded = base64.b64encode(b"\0" * offset + raw).decode()
                # The first and last characters hold bits of what stands around the key.
                inner = coded[-(-offset * 8 // 6) : (len(raw) + offset) * 8 // 6]
                forms += [inner, inner.replace("+", "-").replace("/", "_")]
        self._runs: dict[int, set[str]] = {}
        for form in forms:
            bare = "".join(form.split()).lower()
            length = min(LEAST, len(bare))
            if not bare:
                continue
            runs = {bare[i : i + length] for i in range(len(bare) - length + 1)}
            self._runs.setdefault(length, set()).update(runs)

    def __repr__(self) -> str:
        return "Mask()"

    def __call__(self, text: str) -> str:
        """The text with "***" in place of the key."""
        if not self._runs:
            return text
        spans = [(place, place + 1) for place in range(len(text))]
        view, hidden = text, set[int]()
        for _ in range(4):  # as it is, and unescaped once, twice and three times
            hidden |= self._found(view, spans)
            decoded, places = _decoded(view)
            if decoded == view:
                break
            spans = [(spans[first][0], spans[last][1]) for first, last in places]
            view = decoded
        parts: list[str] = []
        for place, character in enumerate(text):
            if place not in hidden:
                parts.append(character)
            elif place - 1 not in hidden:
                parts.append("***")
        return "".join(parts)

    def _found(self, view: str, spans: list[tuple[int, int]]) -> set[int]:
        """Places in the text whose spelling, without white space, holds a run of the key."""
        kept = [place for place, character in enumerate(view) if character.isprintable()]
        kept = [place for place in kept if not view[place].isspace()]
        bare = "".join(view[place] for place in kept)
        bare = "".join(c.lower() if c.isascii() else c for c in bare)
        hidden: set[int] = set()
        for length, runs in self._runs.items():
            for i in range(len(bare) - length + 1):
                if bare[i : i + length] in runs:
                    hidden.update(range(spans[kept[i]][0], spans[kept[i + length - 1]][1]))
        return hidden


def _decoded(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text with spellings replaced by what they stand for, and first and last place of each."""
    made: list[str] = []
    places: list[tuple[int, int]] = []
    end = 0
    for found in SPELLING.finditer(text):
        made += text[end : found.start()]
        places += [(place, place) for place in range(end, found.start())]
        end = found.end()
        made.append(_meant(found))
        places.append((found.start(), end - 1))
    made += text[end:]
    places += [(place, place) for place in range(end, len(text))]
    return "".join(made), places


def _meant(found: re.Match[str]) -> str:
    """The one character that a spelling stands for; a space for white space and the like."""
    for name in ("address", "json", "python"):
        if found[name]:
            return chr(int(found[name], 16))
    if found["page"]:
        return (html.unescape(found["page"]) or " ")[0]
    return found["quoted"] or " "
