"""Text of others, made fit for a message: names of files, words of servers, values of data."""

from __future__ import annotations

import unicodedata

__all__ = ["shown"]

# Control, format (direction marks among them), surrogate, private and unassigned characters.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def shown(text: str, most: int | None = None) -> str:
    r"""Make a text safe to print: one line, and nothing that a terminal takes for a command.

    Args:
        text: Any text, such as the name of a file.
        most: Longest text in characters; None shortens nothing.

    Returns:
        The text with escapes such as "\x1b" and "\n" in place of what cannot be seen, cut off at
        `most` characters.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}..."
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in HIDDEN
        else character
        for character in text
    )
