"""Files that are there as a whole or not at all: written beside their place, then moved there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from aprcore.ground.errors import AprError

HINT = "choose another place"


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` if the block ends without an exception.

    Raises:
        AprError: The file cannot be written.
    """
    temporary = _beside(path)
    try:
        # Not a NamedTemporaryFile: that would be readable by its owner alone for good.
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    return path.with_name(f".{secrets.token_hex(8)}.partial")


def _unwritable(path: Path, error: OSError) -> AprError:
    return AprError(f"cannot be written ({error.strerror or error})", where=path, hint=HINT)
