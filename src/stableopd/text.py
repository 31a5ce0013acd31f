"""Text of others, made fit for a message: names of files, words of servers, values of data."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["one_line", "quoted", "shown", "without_folders"]

# Control, format (direction marks among them), surrogate, private and unassigned characters.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")

# What Python adds where a number has too many digits; it is for who writes the program.
ADVICE_ON_DIGITS = "; use sys.set_int_max_str_digits() to increase the limit"


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


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says.

    Args:
        error: The exception.
        most: Longest text in characters.

    Returns:
        One line; the name of its class where it says nothing.
    """
    if isinstance(error, RecursionError):
        return "nested too deep"
    said = " ".join(str(error).split()).removesuffix(ADVICE_ON_DIGITS)
    return said[:most] or type(error).__name__


def quoted(text: str, most: int = 40) -> str:
    """The beginning of a text of the data, in quotes.

    Args:
        text: Any text, such as a completion.
        most: Longest text in characters.

    Returns:
        One line.
    """
    return repr(text if len(text) <= most else f"{text[:most]}...")


# An absolute path of Linux, macOS or Windows, up to its last part; not the path of a URL.
FOLDERS = re.compile(
    r"""(?<![\w.:/\\~…-])(?:(?:file://)?~?/|[A-Za-z]:[\\/])"""
    r"""(?:[^\s"'<>|:/\\]+[/\\])+(?=[^\s"'<>|/\\])"""
)


def without_folders(text: str) -> str:
    """Take the folders of this machine out of a text that other people will read.

    Args:
        text: Any text, such as a configuration.

    Returns:
        The text with "…/train.jsonl" in place of "/home/me/data/train.jsonl". Relative paths and
        URLs stay.
    """
    return FOLDERS.sub("…/", text)
