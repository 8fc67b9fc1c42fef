"""Bytes on disk: an open file, and a cursor for headers.

Files are read with `pread`, never mapped: a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aprcore.ground.errors import FormatError, TruncatedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CURSOR_BYTES = 64 * 1024


class DataFile:
    """An open regular file that is read by position. Any number of threads may read at once.

    Attributes:
        path: As given.
        size_bytes: Its length when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, may_be_empty: bool = False) -> None:
        """Open `path`; the descriptor is closed by `close` or with the last reference.

        Raises:
            FormatError: The file is missing, unreadable, not a regular file, or empty where that
                says nothing.
        """
        self.path = Path(path)
        descriptor = _open_regular(self.path)
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        self.size_bytes = os.fstat(descriptor).st_size
        if self.size_bytes == 0 and not may_be_empty:
            self.close()
            raise FormatError("the file is empty", where=path, hint="fetch or write it again")

    def read_into(self, offset_bytes: int, buffer: memoryview | NDArray[Any]) -> None:
        """Fill `buffer` (C-contiguous) with the bytes from `offset_bytes`.

        Raises:
            TruncatedError: The file ends before the buffer is full.
            FormatError: The system reports a read error.
        """
        if buffer.nbytes == 0:
            return
        if not self._finalizer.alive:
            raise ValueError(f"{self.path} is closed")
        view = (buffer if isinstance(buffer, memoryview) else buffer.data).cast("B")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset_bytes + done)
            except OSError as error:
                raise FormatError(
                    f"cannot be read: {error.strerror}", where=self.path, offset_bytes=offset_bytes
                ) from error
            if count == 0:
                raise TruncatedError(
                    f"the file ends {len(view) - done} bytes early",
                    where=self.path,
                    offset_bytes=offset_bytes + done,
                    hint="the file may have been truncated or replaced while open",
                )
            done += count

    def read_bytes(self, offset_bytes: int, size_bytes: int) -> bytes:
        """The bytes at a position; the size is checked against the file before allocating.

        Raises:
            TruncatedError: The file ends before them.
        """
        if offset_bytes + size_bytes > self.size_bytes:
            raise TruncatedError(
                f"{size_bytes} bytes are promised but the file has {self.size_bytes} bytes in all",
                where=self.path,
                offset_bytes=offset_bytes,
            )
        buffer = bytearray(size_bytes)
        self.read_into(offset_bytes, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Close the file. Reading from it is an error from then on."""
        self._finalizer()

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; never blocks on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL inside the name
        raise FormatError("not a file name", where=repr(str(path))) from error
    except OSError as error:
        raise _open_error(path, error) from error
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise FormatError("is a directory", where=path, hint="name a file in it")
    raise FormatError("is not a regular file", where=path)


def _open_error(path: Path, error: OSError) -> FormatError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return FormatError("no such file", where=path, hint="check the path")
        case errno.EACCES | errno.EPERM:
            return FormatError(
                "permission denied", where=path, hint="make the file readable for this user"
            )
    return FormatError(f"cannot be opened: {error.strerror}", where=path)


def read_small(path: Path, limit_bytes: int, *, may_be_empty: bool = False) -> bytes:
    """All of a file that is held whole.

    Raises:
        FormatError: As `DataFile`, or it is larger than `limit_bytes`.
    """
    with DataFile(path, may_be_empty=may_be_empty) as file:
        if file.size_bytes > limit_bytes:
            raise FormatError(f"{file.size_bytes} bytes are too many for such a file", where=path)
        return file.read_bytes(0, file.size_bytes)


class Cursor:
    """Reads little-endian numbers and text one after the other, never past its end.

    Attributes:
        offset_bytes: The position in the file of what is read next.
        end_bytes: The position that nothing is read beyond.
    """

    def __init__(
        self, file: DataFile, offset_bytes: int = 0, end_bytes: int | None = None, what: str = ""
    ) -> None:
        """Start at `offset_bytes`; `what` names the part of the file in error messages."""
        self.file = file
        self.offset_bytes = offset_bytes
        self.end_bytes = file.size_bytes if end_bytes is None else min(end_bytes, file.size_bytes)
        self._what = what or "header"
        self._window = b""
        self._window_start = offset_bytes

    @property
    def path(self) -> Path:
        """The file that is read."""
        return self.file.path

    @property
    def remaining_bytes(self) -> int:
        """Bytes left before the end."""
        return max(0, self.end_bytes - self.offset_bytes)

    def take(self, size_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            TruncatedError: Fewer are left.
        """
        if size_bytes > self.remaining_bytes:
            raise TruncatedError(
                f"the {self._what} needs {size_bytes} bytes where {self.remaining_bytes} are left",
                where=self.path,
                offset_bytes=self.offset_bytes,
            )
        start = self.offset_bytes - self._window_start
        if start + size_bytes > len(self._window):
            window_bytes = min(max(size_bytes, _CURSOR_BYTES), self.remaining_bytes)
            self._window = self.file.read_bytes(self.offset_bytes, window_bytes)
            self._window_start, start = self.offset_bytes, 0
        self.offset_bytes += size_bytes
        return self._window[start : start + size_bytes]

    def u8(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """The next unsigned 16-bit number."""
        return int.from_bytes(self.take(2), "little")

    def u32(self) -> int:
        """The next unsigned 32-bit number."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """The next unsigned 64-bit number."""
        return int.from_bytes(self.take(8), "little")

    def text(self, size_bytes: int) -> str:
        """The next bytes as UTF-8.

        Raises:
            TruncatedError: Fewer are left.
            FormatError: They are not UTF-8.
        """
        start = self.offset_bytes
        try:
            return self.take(size_bytes).decode()
        except UnicodeDecodeError as error:
            raise FormatError(
                f"text in the {self._what} is not UTF-8", where=self.path, offset_bytes=start
            ) from error
