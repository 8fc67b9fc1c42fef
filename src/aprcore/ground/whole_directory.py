"""Directories that are there as a whole or not at all: written beside their place, then exchanged.

What a process leaves that was killed is a hidden directory beside the target, which the next writer
of that target removes; the target itself is always the old one or the new one. Where directories
cannot be exchanged, files are moved one by one, and a marker says meanwhile that it is unfinished.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from aprcore.ground.errors import TraceError
from aprcore.ground.hidden_beside import locked, name_beside, remove_dead, turn

# In a directory from its first file to its last: what has it is no whole.
UNFINISHED = ".aprtui-unfinished"
# Source: renameat2(2) and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What says that a file system, or a mount, exchanges no directories.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EBUSY, errno.EXDEV, errno.ENOTSUP, errno.EPERM)


def check_finished(directory: Path) -> None:
    """Refuse a directory whose writer was stopped on the way.

    Raises:
        TraceError: It is unfinished.
    """
    if (directory / UNFINISHED).exists():
        raise TraceError("is unfinished: what wrote it was stopped", where=directory,
                         hint="write it again")  # fmt: skip


class WholeDirectory:
    """A directory to fill, which takes the place of a target in one step.

    Files that the target has and the new one has not are kept.

    Attributes:
        target: Its place; a link is followed.
        staging: Where to write, once `begin` has made it.
    """

    def __init__(self, target: Path) -> None:
        self._named = target
        self.target = Path(os.path.realpath(target))
        self.staging: Path | None = None
        self._lock: int | None = None
        self._made: list[Path] = []
        self._is_inside = False

    def begin(self) -> Path:
        """Make the directory to write to, alone for this target; remove what the dead have left.

        Raises:
            TraceError: Another process is writing to the same target.
            OSError: It cannot be made.
        """
        if self._named.is_symlink() and not self._named.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.target))
        parent = self.target.parent
        missing = parent
        while not missing.exists():
            self._made.append(missing)
            missing = missing.parent
        parent.mkdir(parents=True, exist_ok=True)
        if self.target.exists() and not self.target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.target))
        try:
            self._stage(parent)
        except OSError as error:
            # A mount point may be written to where its parent may not.
            may_write = self.target.is_dir() and os.access(self.target, os.W_OK)
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not may_write:
                raise
            self._is_inside = True
            self._stage(self.target)
        assert self.staging is not None
        return self.staging

    def _stage(self, parent: Path) -> None:
        with turn(parent):
            if remove_dead(self.target, parent):
                raise TraceError("another process is writing there", where=self.target,
                                 hint="wait for it, or choose another directory")  # fmt: skip
            staging = parent / name_beside(self.target)
            staging.mkdir()
            self.staging = staging
            self._lock = locked(staging)
            (staging / UNFINISHED).touch()

    def commit(self) -> None:
        """Put it in the target's place.

        Raises:
            OSError: It cannot be; the target is as it was, or says that it is unfinished.
        """
        staging = self.staging
        assert staging is not None
        for folder, _, names in _walk(staging):
            for name in names:
                _synced(Path(folder, name))
            _synced(Path(folder))
        if not self.target.exists():
            (staging / UNFINISHED).unlink()
            staging.rename(self.target)
        elif self._is_inside or not self._exchanged(staging):
            self._move_files(staging)
        _synced(self.target.parent)
        self._made.clear()

    def discard(self) -> None:
        """Remove what has not come into place, and let others write."""
        if self.staging is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self.staging = self._lock = None
        for folder in self._made:  # innermost first; only those that this made
            with suppress(OSError):
                folder.rmdir()

    def _exchanged(self, staging: Path) -> bool:
        """Whether the two could change places."""
        _carry_over(self.target, staging)
        shutil.copymode(self.target, staging)
        (staging / UNFINISHED).unlink(missing_ok=True)
        try:
            _exchange(staging, self.target)
        except OSError as error:
            if error.errno in _NO_EXCHANGE:
                return False
            raise
        return True

    def _move_files(self, staging: Path) -> None:
        marker = self.target / UNFINISHED
        marker.touch()
        _synced(self.target)
        for folder, _, names in _walk(staging):
            place = self.target / Path(folder).relative_to(staging)
            place.mkdir(exist_ok=True)
            for name in names:
                if name != UNFINISHED:
                    Path(folder, name).replace(place / name)
            _synced(place)
        marker.unlink()


def _walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, which would pass over what it cannot list."""

    def fail(error: OSError) -> None:
        raise error

    return os.walk(top, onerror=fail)


def _carry_over(old: Path, new: Path) -> None:
    """Give the new directory the files of the old one that it does not have."""
    for folder, folders, names in _walk(old):
        place = new / Path(folder).relative_to(old)
        place.mkdir(exist_ok=True)
        for name in [*names, *(x for x in folders if Path(folder, x).is_symlink())]:
            if not os.path.lexists(place / name) and name != UNFINISHED:
                try:
                    os.link(Path(folder, name), place / name, follow_symlinks=False)
                except OSError:  # a file system without links
                    shutil.copy2(Path(folder, name), place / name, follow_symlinks=False)


def _exchange(a: Path, b: Path) -> None:
    """Let two directories change places in one step.

    Raises:
        OSError: They cannot; ENOSYS where the system has no such call.
    """
    call = None
    if sys.platform.startswith("linux"):
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(b))


def _synced(path: Path) -> None:
    """Have a file or directory on the disk itself before what follows is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)
