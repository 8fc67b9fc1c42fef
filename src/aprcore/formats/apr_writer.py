"""Writing APR v2 model files, piece by piece.

The whole layout follows from the tensors' names, types and shapes, so header and index are written
first and the weights stream through: nothing larger than a piece is held. The file appears under
its name only when it is complete.

Source: docs/formats.md, "Models".
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from aprcore.formats.apr import (
    HEADER_BYTES,
    MAGIC,
    MAX_DIMS,
    MAX_METADATA_BYTES,
    MAX_NAME_BYTES,
    VERSION,
    AprFlag,
    align,
    dtype_id,
    header_crc32,
)
from aprcore.ground.errors import AprError, FormatError
from aprcore.quant.types import FLOAT_TYPES, storage_size

Data = bytes | bytearray | memoryview | NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a new file will hold under a name.

    Attributes:
        name: The tensor's name.
        dtype: A type for which `aprcore.formats.apr.dtype_id` has an id.
        shape: Sizes, row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes."""
        return storage_size(self.dtype, self.shape)


class AprWriter:
    """A context in which the tensors of a new file are written in the order of `entries`.

    On leaving it normally the file takes its name, replacing one that is there; after any
    exception nothing is left behind.

    Example:
        >>> entries = [TensorEntry("model.norm.weight", "F32", (64,))]
        >>> with AprWriter("model.apr", {"hidden_size": 64}, entries) as writer:  # doctest: +SKIP
        ...     for entry in writer.entries:
        ...         writer.write(entry.name, np.ones(64, np.float32))

    Attributes:
        path: The name of the file.
        entries: The tensors, sorted as they must be written.
        size_bytes: The size of the finished file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        entries: Iterable[TensorEntry],
    ) -> None:
        """Lay the file out; nothing is written yet.

        Raises:
            FormatError: The format cannot hold the metadata or a tensor.
        """
        self.path = Path(path)
        self.entries = tuple(sorted(entries, key=lambda entry: entry.name))
        _check_entries(self.path, self.entries)
        self._front = _encode_front(self.path, metadata, self.entries)
        self._sizes = [entry.size_bytes for entry in self.entries]
        data_bytes = sum(align(size) for size in self._sizes)
        self.size_bytes = len(self._front) + data_bytes + 4
        self._temporary = self.path.with_name(f".{secrets.token_hex(8)}.apr-partial")
        self._stream: BinaryIO | None = None
        self._crc = 0
        self._tensor = 0  # the entry that is written now
        self._written = 0  # its bytes so far

    def __enter__(self) -> AprWriter:
        """Create the temporary file beside the target.

        Raises:
            AprError: The folder cannot be written, or the target is not a regular file.
        """
        if self.path.exists() and not self.path.is_file():
            raise AprError("is not a regular file", where=self.path, hint="choose another name")
        try:
            # Not a NamedTemporaryFile: that would be readable by its owner alone for good.
            self._stream = self._temporary.open("xb", buffering=1 << 20)
        except OSError as error:
            raise _write_error(self.path, error) from error
        try:
            self._emit(self._front)
            self._skip_finished()
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, data: Data) -> None:
        """Append bytes to a tensor, which must be the next unfinished one of `entries`.

        Raises:
            ValueError: It is another tensor's turn, or these are more bytes than it takes.
            AprError: The file system refuses.
        """
        if self._tensor >= len(self.entries) or self.entries[self._tensor].name != name:
            raise ValueError(f"it is not the turn of {name!r}")
        view = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else memoryview(data)
        size = self._sizes[self._tensor]
        if self._written + view.nbytes > size:
            raise ValueError(f"{name!r} takes {size} bytes, not {self._written + view.nbytes}")
        if view.nbytes:
            self._emit(view.cast("B"))
        self._written += view.nbytes
        if self._written == size:
            self._emit(bytes(align(size) - size))
            self._tensor, self._written = self._tensor + 1, 0
            self._skip_finished()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file, or remove it after an exception.

        Raises:
            ValueError: A tensor is not complete.
            AprError: The file system refuses.
        """
        if kind is not None:
            self._discard()
            return
        try:
            if self._tensor < len(self.entries):
                raise ValueError(f"{self.entries[self._tensor].name!r} is not complete")
            self._emit(struct.pack("<I", self._crc))
            self._publish()
        except BaseException:
            self._discard()
            raise

    def _skip_finished(self) -> None:
        """Step over tensors without values, for which no write will come."""
        while self._tensor < len(self.entries) and self._sizes[self._tensor] == 0:
            self._tensor += 1

    def _emit(self, data: bytes | memoryview) -> None:
        if self._stream is None:
            raise ValueError(f"{self.path} is not being written")
        self._crc = zlib.crc32(data, self._crc)
        try:
            self._stream.write(data)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def _publish(self) -> None:
        """Make the bytes durable, then the name: a crash leaves the old file or the new one."""
        stream, self._stream = self._stream, None
        assert stream is not None
        try:
            with stream:
                stream.flush()
                os.fsync(stream.fileno())
            self._temporary.replace(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def _discard(self) -> None:
        # Closing flushes, which fails again on a full disk; the first error is the one to tell.
        with suppress(OSError):
            if self._stream is not None:
                self._stream.close()
        self._stream = None
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _check_entries(path: Path, entries: tuple[TensorEntry, ...]) -> None:
    previous: str | None = None
    for entry in entries:
        if entry.name == previous:
            raise FormatError(f"tensor {entry.name!r} is given twice", where=path)
        if len(entry.name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
            raise FormatError(
                f"the name {entry.name!r} is longer than {MAX_NAME_BYTES} bytes", where=path
            )
        if len(entry.shape) > MAX_DIMS:
            raise FormatError(
                f"tensor {entry.name!r} has more than {MAX_DIMS} dimensions", where=path
            )
        if dtype_id(entry.dtype) is None:
            raise FormatError(
                f"tensor {entry.name!r}: the format has no id for {entry.dtype}", where=path
            )
        previous = entry.name


def _encode_front(
    path: Path, metadata: Mapping[str, Any], entries: tuple[TensorEntry, ...]
) -> bytes:
    """Everything before the data: header, metadata and index, each padded."""
    try:
        json_bytes = json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
        index = _encode_index(entries)
    except (ValueError, TypeError) as error:
        raise FormatError(f"the metadata cannot be written: {error}", where=path) from error
    if len(json_bytes) > MAX_METADATA_BYTES:
        raise FormatError(
            f"{len(json_bytes)} bytes of metadata are more than the {MAX_METADATA_BYTES} allowed",
            where=path,
        )
    index_offset = align(HEADER_BYTES + len(json_bytes))
    data_offset = align(index_offset + len(index))
    header = struct.pack(
        "<4sBBHIQIQQ",
        MAGIC,
        *VERSION,
        _flags_for(metadata, entries),
        len(entries),
        HEADER_BYTES,
        len(json_bytes),
        index_offset,
        data_offset,
    )
    crc = header_crc32(header + bytes(HEADER_BYTES - len(header)))
    front = (header + struct.pack("<I", crc)).ljust(HEADER_BYTES, b"\0")
    front = (front + json_bytes).ljust(index_offset, b"\0")
    return (front + index).ljust(data_offset, b"\0")


def _encode_index(entries: tuple[TensorEntry, ...]) -> bytes:
    parts, offset = [], 0
    for entry in entries:
        name, number = entry.name.encode(), dtype_id(entry.dtype)
        size = entry.size_bytes
        parts.append(struct.pack("<H", len(name)) + name)
        parts.append(struct.pack("<BB", number, len(entry.shape)))
        parts.append(struct.pack(f"<{len(entry.shape)}Q", *entry.shape))
        parts.append(struct.pack("<QQ", offset, size))
        offset += align(size)
    return b"".join(parts)


def _flags_for(metadata: Mapping[str, Any], entries: tuple[TensorEntry, ...]) -> AprFlag:
    flags = AprFlag.ROW_MAJOR
    if metadata.get("tokenizer.vocabulary"):
        flags |= AprFlag.HAS_VOCAB
    if any(entry.dtype not in FLOAT_TYPES and math.prod(entry.shape) for entry in entries):
        flags |= AprFlag.QUANTIZED
    return flags


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_error(path: Path, error: OSError) -> AprError:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return AprError("the disk is full", where=path, hint="free space or write elsewhere")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AprError(
                f"the folder cannot be written: {error.strerror}",
                where=path,
                hint="write elsewhere",
            )
        case errno.ENOENT:
            return AprError("there is no such folder", where=path, hint="create it first")
    return AprError(f"cannot be written: {error.strerror}", where=path)
