"""What a command may write over: files that it wrote itself, and names that are free.

Every command that takes a name for its output asks `choose_output` before it reads anything, so
that hours of work do not end at a name that cannot be written, and so that no input, no file of
the user's and no device is ever replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from stableopd.runfolder.files import TEMPORARY
from stableopd.types import ConfigError

__all__ = ["PAGE_MARK", "check_output", "choose_output", "is_our_page"]

# Stands in the head of every page, so that it is known again.
PAGE_MARK = '<meta name="generator" content="stableopd">'

# How pages began before they had the mark, up to their title, and the style after it.
OLDER_PAGE = (
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
    b'content="width=device-width, initial-scale=1">\n<meta name="color-scheme" '
    b'content="light dark">\n<title>'
)
OLDER_STYLE = b"<style>\n:root {\n  color-scheme: light dark; --page: "

HEAD_BYTES = 1 << 16  # a page's title may be long

REASONS = {
    errno.EACCES: "its folder cannot be written; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "it is a link to itself; choose another name",
    errno.ENOTDIR: "a part of its path is a file; choose another place",
    errno.EEXIST: "a part of its path is a file; choose another place",
}


def choose_output(
    path: Path, inputs: Iterable[Path], is_ours: Callable[[Path], bool], what: str
) -> Path:
    """Check that a file may be written, and make its folder; arguments as in `check_output`.

    Returns:
        The file itself, without links.

    Raises:
        ConfigError: As `check_output`, and where its folder cannot be written.
    """
    target = check_output(path, inputs, is_ours, what)
    with _refusing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "")
    return target


def check_output(
    path: Path, inputs: Iterable[Path], is_ours: Callable[[Path], bool], what: str
) -> Path:
    """Check that nothing is lost where a file is written.

    Args:
        path: As the user named it. Links are followed, so that a link stays one.
        inputs: Files and folders that the command reads.
        is_ours: Whether a regular file that is not empty is one that we wrote.
        what: What is written, as "page".

    Returns:
        The file itself, without links.

    Raises:
        ConfigError: It is an input, a folder, a device, a pipe, a file that we did not write, or
            no name that a file can have.
    """
    with _refusing(path):
        target = path.resolve()
        _refuse_inputs(path, inputs)
        _refuse_others(path, is_ours, what)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            # Its name while it is made is longer.
            os.lstat(target.with_name(f".{target.name}{TEMPORARY}"))
        return target


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what pathlib and the operating system say of a path into one sentence."""
    try:
        yield
    except RuntimeError:  # pathlib's word for a link to itself
        raise _cannot(path, OSError(errno.ELOOP, "")) from None
    except OSError as error:
        raise _cannot(path, error) from None
    except ValueError as error:  # a null byte
        raise ConfigError(f"{str(path)!r}: cannot be written ({error}).") from None


def is_our_page(path: Path) -> bool:
    """Whether a file is a page that this program wrote, in this version or before."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return PAGE_MARK.encode() in head.partition(b"<style>")[0] or (
        head.startswith(OLDER_PAGE) and OLDER_STYLE in head
    )


def _refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    for given in inputs:
        # By file and not by name: one file may have several.
        if given.exists() and path.exists() and os.path.samefile(given, path):
            raise ConfigError(f"{path}: is read by this command; choose another file to write.")


def _refuse_others(path: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path}: is a folder; name the file to write.")
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: is a device or a pipe, not a file; choose another name.")
    if found.st_size and not is_ours(path):
        raise ConfigError(
            f"{path}: is there and is no {what} that stableopd wrote, so it is left as it is; "
            "choose another name."
        )


def _cannot(path: Path, error: OSError) -> ConfigError:
    reason = REASONS.get(error.errno or 0, f"{error.strerror or error}; choose another place")
    return ConfigError(f"{path}: cannot be written: {reason}.")
