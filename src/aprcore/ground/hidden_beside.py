"""Hidden files and directories that are written beside their place, and whose writer may die."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".partial"


def name_beside(target: Path) -> str:
    """A new hidden name for what will be a target, of which others of that target are known."""
    return f"{_prefix(target)}{secrets.token_hex(4)}{_SUFFIX}"


def _prefix(target: Path) -> str:
    # A name of any length is told by its digest, and the hidden one is no longer than that.
    return f".aprtui-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def remove_dead(target: Path, parent: Path) -> bool:
    """Remove what writers of a target have left that are no more; whether one is alive.

    To be called in one's `turn`.
    """
    is_alive = False
    for other in parent.glob(f"{_prefix(target)}*{_SUFFIX}"):
        held = locked(other)
        if held is None:
            is_alive = True
            continue
        if other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
        else:
            with suppress(OSError):
                other.unlink()
        os.close(held)
    return is_alive


@contextmanager
def turn(parent: Path) -> Iterator[None]:
    """One writer in a directory looks around and settles in at a time."""
    held = locked(parent, wait=True)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def locked(path: Path, *, wait: bool = False) -> int | None:
    """A descriptor that holds a file's or directory's lock; None where another has it.

    The lock goes with the process, however it ends. Where nothing locks, it is given at once.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except (ImportError, OSError):  # not a POSIX system, a file system without locks
        return descriptor
    return descriptor
