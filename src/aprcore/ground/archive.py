"""Zip archives that a stranger wrote: .npz, .pt and .aprx files.

Only what these are made of is read: members that are stored or deflated. What a member claims is
held against the file before it is unpacked, and everything that the library raises on a damaged
archive is one of our errors.
"""

from __future__ import annotations

import errno
import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import AprError, FormatError

Result = TypeVar("Result")

# All members together may be that many times larger than the file. What an engine computes
# compresses to a third at best, float32 that hold bfloat16 under a mask to a sixth; a file that is
# made to fill the memory, to a thousandth. Below the size nothing is filled.
EXPANSION_LIMIT = 10
HARMLESS_BYTES = 32 * 1024 * 1024
# More than any model has stages; each takes about a kilobyte to list.
MOST_MEMBERS = 200_000

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, lengths of the name and of the extra field


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive.

    Attributes:
        name: As stored.
        size_bytes: Unpacked.
        is_stored: Whether it is there as it is, so that a part of it can be read.
    """

    name: str
    size_bytes: int
    is_stored: bool


class Archive:
    """An open zip archive. Any number of threads may read at once.

    Attributes:
        path: As given.
        members: By name, in the order of the archive's directory.
        size_bytes: Of the archive.
    """

    def __init__(self, path: Path, fault: str, hint: str) -> None:
        """Read the archive's directory.

        Args:
            path: The file.
            fault: How errors begin: "is no readable .npz file".
            hint: What the user can do about a damaged one.

        Raises:
            FormatError: The file is missing or damaged, is no regular file, holds a name twice or
                a member that is packed in another way, or expands beyond reason.
        """
        self.path = path
        self._fault, self._hint = fault, hint
        self._file = DataFile(path)
        self.size_bytes = self._file.size_bytes
        try:
            self._archive = self._guard(lambda: zipfile.ZipFile(_Stream(self._file)))
            self._infos = self._list()
            self._check_sizes()
        except BaseException:
            self._file.close()
            raise
        self.members: Mapping[str, Member] = {
            name: Member(name, info.file_size, info.compress_type == zipfile.ZIP_STORED)
            for name, info in self._infos.items()
        }

    def read(self, name: str) -> bytes:
        """All of a member, held against its checksum.

        Raises:
            FormatError: There is no such member, or it is damaged.
        """
        info = self._find(name)

        def unpack() -> bytes:
            with self._archive.open(info) as stream:
                # Never `read()`: that unpacks what is there, whatever the directory says.
                return stream.read(info.file_size)

        data = self._guard(unpack)
        if len(data) != info.file_size:
            raise self.broken(f"{name} has {len(data)} bytes, not {info.file_size}")
        return data

    def read_start(self, name: str, size_bytes: int) -> bytes:
        """The first bytes of a member, or all of it if it is smaller; damage behind is not noticed.

        Raises:
            FormatError: There is no such member, or its beginning is damaged.
        """
        info = self._find(name)

        def unpack() -> bytes:
            with self._archive.open(info) as stream:
                return stream.read(min(size_bytes, info.file_size))

        return self._guard(unpack)

    def read_part(self, name: str, start_bytes: int, size_bytes: int) -> bytes:
        """Some bytes of a member; one that is stored is read no further.

        Raises:
            FormatError: As `read`; of a part that is not whole, damage is not noticed.
        """
        info = self._find(name)
        if not self.members[name].is_stored or (start_bytes, size_bytes) == (0, info.file_size):
            return self.read(name)[start_bytes : start_bytes + size_bytes]
        header = self._file.read_bytes(info.header_offset, _LOCAL_HEADER.size)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\3\4":
            raise self.broken(f"{name} is not where the directory says")
        begin = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        return self._file.read_bytes(begin + start_bytes, size_bytes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def broken(self, fault: str) -> FormatError:
        """The error for what is wrong with the archive."""
        return FormatError(f"{self._fault}: {fault}", where=self.path, hint=self._hint)

    def _find(self, name: str) -> zipfile.ZipInfo:
        info = self._infos.get(name)
        if info is None:
            raise self.broken(f"it lacks {name}")
        return info

    def _list(self) -> dict[str, zipfile.ZipInfo]:
        infos = self._archive.infolist()
        if len(infos) > MOST_MEMBERS:
            raise self.broken(f"it has {len(infos)} members")
        found: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = info.filename
            if name in found:
                raise self.broken(f"{name} is there twice")
            found[name] = info
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise self.broken(f"{name} is packed by method {info.compress_type}; only stored"
                                  " and deflated members are read")  # fmt: skip
            if info.flag_bits & 1:
                raise self.broken(f"{name} is encrypted")
            is_stored = info.compress_type == zipfile.ZIP_STORED
            if info.compress_size > self.size_bytes or (
                is_stored and info.compress_size != info.file_size
            ):
                raise self.broken(f"{name} claims {info.compress_size} bytes for"
                                  f" {info.file_size}")  # fmt: skip
        return found

    def _check_sizes(self) -> None:
        unpacked = sum(info.file_size for info in self._infos.values())
        if unpacked > max(HARMLESS_BYTES, EXPANSION_LIMIT * self.size_bytes):
            raise FormatError(
                f"expands from {self.size_bytes} to {unpacked} bytes", where=self.path,
                hint="if that is meant, write it without compression",
            )  # fmt: skip

    def _guard(self, action: Callable[[], Result]) -> Result:
        """What the library makes of a file, which fails in any way at all when it is damaged."""
        try:
            return action()
        except AprError:
            raise
        except Exception as error:
            raise self.broken(str(error) or type(error).__name__) from error


class _Stream(io.RawIOBase):
    """A file as `zipfile` wants it: reads of any length take no more memory than there is file."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size_bytes}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "a position before the file")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size_bytes - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = self._file.read_bytes(self._at, count)
        self._at += count
        return data
