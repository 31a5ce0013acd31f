"""One writer to a folder: a lock that its process holds, and that ends with it.

The lock is POSIX's on a file of its own (`fcntl.lockf`): the kernel frees it when the process ends,
however it ends; children that are forked do not inherit it; and NFS knows it. It keeps out other
processes, not other threads of this one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from stableopd.runfolder.files import writing
from stableopd.types import RunFolderError

__all__ = ["LOCK", "hold", "release"]

LOCK = ".lock"  # its ending, or its name in a folder

# What a file system says that has no locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# Of this process: a lock file and its descriptor. A forked child holds none of its parent's.
_held: dict[tuple[int, Path], int] = {}


def hold(path: Path, what: Path) -> str:
    """Take a lock for the life of this process, or until `release`.

    Args:
        path: The lock file; its folder is there. A kill leaves it, which does no harm.
        what: What it guards, for messages.

    Returns:
        "", or a sentence for the user where the file system has no locks.

    Raises:
        RunFolderError: Another process holds it, or the file cannot be made.
    """
    key = _key(path)
    while key not in _held:
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in WITHOUT_LOCKS:
                return (
                    f"{what}: its file system has no locks ({error.strerror}); see to it that no "
                    "other process writes there."
                )
            by = f"process {holder}" if holder.isdecimal() else "another process"
            raise RunFolderError(
                f"{what}: {by} is writing there; wait until it has ended, or choose another output."
            ) from None
        if _is_current(path, descriptor):
            _held[key] = descriptor
            _sign(descriptor)
        else:
            os.close(descriptor)  # its last holder has just removed it
    return ""


def release(path: Path) -> None:
    """Give a lock back, and remove its file; does nothing where this process does not hold it.

    Args:
        path: The lock file.
    """
    descriptor = _held.pop(_key(path), None)
    if descriptor is not None:
        with contextlib.suppress(OSError):
            # The folder may have been moved or replaced meanwhile.
            if _is_current(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _key(path: Path) -> tuple[int, Path]:
    return os.getpid(), Path(os.path.abspath(path))


def _is_current(path: Path, descriptor: int) -> bool:
    """Whether a descriptor is of the file that a path names now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write this process's number into its lock file, for the message to others."""
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
