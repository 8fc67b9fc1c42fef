"""Files that are there as a whole or not at all: written beside their place, then moved there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from aprcore.ground.errors import AprError
from aprcore.ground.hidden_beside import locked, name_beside, remove_dead, turn

HINT = "choose another place"


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` if the block ends without an exception.

    Raises:
        AprError: The file cannot be written.
    """
    temporary = _beside(path)
    held: int | None = None
    try:
        with turn(path.parent):
            remove_dead(path, path.parent)
            # Not a NamedTemporaryFile: that would be readable by its owner alone for good.
            file = temporary.open("xb")
            held = locked(temporary)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if held is not None:
            os.close(held)


def check_writable(path: Path) -> None:
    """Find out before a long run whether its result can be written; leaves nothing behind.

    Raises:
        AprError: It cannot.
    """
    probe = _beside(path)
    try:
        if path.exists() and not path.is_file():
            raise AprError("is not a regular file", where=path, hint="choose another name")
        if not path.parent.is_dir():
            raise AprError("there is no such directory", where=path.parent, hint="create it first")
        # Asking for permissions does not tell of a file system that is read-only.
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:  # a name that is too long is one, too
        raise _unwritable(path, error) from error


def _beside(path: Path) -> Path:
    return path.with_name(name_beside(path))


def _unwritable(path: Path, error: OSError) -> AprError:
    return AprError(f"cannot be written ({error.strerror or error})", where=path, hint=HINT)
