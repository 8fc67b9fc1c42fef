"""APR v2 model files: opening and verifying.

Opening reads the header, the metadata and the tensor index, and checks everything that can be
checked without reading weights. The checksum of the data covers the whole file, so it is left to
`verify_apr`: on a 40 GB file it takes minutes.

Source: docs/formats.md, "Models".
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any

from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import Cursor, DataFile
from aprcore.ground.errors import ChecksumError, FormatError, TruncatedError, UnsupportedError
from aprcore.ground.fields import parse_object
from aprcore.quant.types import storage_size

MAGIC = b"APR\0"
VERSION = (2, 0)
HEADER_BYTES = 64
FOOTER_BYTES = 4
ALIGNMENT_BYTES = 64
MAX_METADATA_BYTES = 16 * 1024 * 1024
MAX_NAME_BYTES = 256
MAX_DIMS = 8

_HEADER_CRC_OFFSET = 40
_RESERVED_OFFSET = 44
_SMALLEST_ENTRY_BYTES = 2 + 1 + 1 + 8 + 8  # an index entry without name and dims
_VERIFY_PIECE_BYTES = 1024 * 1024

# What an id can mean, in the order of trial: where a history of two tables made an id ambiguous,
# the byte size decides. No shape but an empty one fits both.
DTYPE_IDS: Mapping[int, tuple[str, ...]] = {
    0: ("F32",), 1: ("F16",), 30: ("BF16",),
    2: ("Q4_0",), 3: ("F64", "Q4_1"), 4: ("I32",), 5: ("I64",), 6: ("I8", "Q5_0"),
    7: ("U8", "Q5_1"), 8: ("Q8_0", "AprQ4"), 9: ("AprQ8",),
    12: ("Q4_K",), 13: ("Q5_K",), 14: ("Q6_K",), 128: ("AprQ4",), 129: ("AprQ8",),
}  # fmt: skip


class AprFlag(IntFlag):
    """The flags of the header."""

    LZ4 = 1 << 0
    ZSTD = 1 << 1
    ENCRYPTED = 1 << 2
    SIGNED = 1 << 3
    SHARDED = 1 << 4
    QUANTIZED = 1 << 5
    FILTERBANK = 1 << 6
    MODEL_CARD = 1 << 7
    STREAMING = 1 << 8
    HAS_VOCAB = 1 << 9
    ROW_MAJOR = 1 << 10
    COLUMN_MAJOR = 1 << 11


_UNREADABLE = {
    AprFlag.LZ4: "compressed with LZ4",
    AprFlag.ZSTD: "compressed with Zstandard",
    AprFlag.ENCRYPTED: "encrypted",
    AprFlag.SHARDED: "one shard of several",
}


@dataclass(frozen=True, slots=True)
class AprHeader:
    """The fixed part at the front of the file, field by field."""

    version: tuple[int, int]
    flags: AprFlag
    tensor_count: int
    metadata_offset_bytes: int
    metadata_size_bytes: int
    index_offset_bytes: int
    data_offset_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class AprFile:
    """An open .apr file.

    Attributes:
        path: As given.
        header: The fixed part.
        metadata: The JSON object; null values and unknown keys are kept.
        tensors: By name, in file order.
        file: The open file that the tensors are read from.
    """

    path: Path
    header: AprHeader
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    file: DataFile

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor."""
        return self.header.version

    @property
    def flags(self) -> AprFlag:
        """The flags of the header."""
        return self.header.flags

    def close(self) -> None:
        """Close the file; its tensors cannot be read from then on."""
        self.file.close()


def read_apr(path: str | os.PathLike[str]) -> AprFile:
    """Open a file: header, metadata and index are read and checked, weights are not.

    Raises:
        FormatError: The file does not follow the format; its branches say how.
    """
    file = DataFile(path)
    try:
        header = _read_header(file)
        metadata = _read_metadata(file, header)
        tensors = _read_index(file, header)
    except BaseException:
        file.close()
        raise
    return AprFile(Path(path), header, metadata, tensors, file)


def verify_apr(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> AprFile:
    """Check every checksum, extent and zero field of a file, reading all of it in pieces.

    Args:
        path: The file.
        progress: Called with the bytes read so far and those of the file.

    Raises:
        ChecksumError: The footer's checksum disagrees with the bytes.
        FormatError: As `read_apr`, or bytes that the format says are zero are not.
    """
    apr = read_apr(path)
    try:
        _check_zeros(apr)
        _check_footer(apr.file, progress)
    except BaseException:
        apr.close()
        raise
    return apr


def dtype_id(dtype: str) -> int | None:
    """The id under which a new file stores a type, or None if the format has none."""
    return _ID_OF_DTYPE.get(dtype)


# Of several ids the last wins: 128 and 129, not the legacy 8 and 9.
_ID_OF_DTYPE = {dtype: number for number, dtypes in DTYPE_IDS.items() for dtype in dtypes}


def align(offset_bytes: int) -> int:
    """The next multiple of the format's alignment."""
    return -(-offset_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def header_crc32(header: bytes) -> int:
    """The checksum of a header, which leaves out the field that holds it."""
    return zlib.crc32(header[_RESERVED_OFFSET:], zlib.crc32(header[:_HEADER_CRC_OFFSET]))


def _read_header(file: DataFile) -> AprHeader:
    _check_magic(file)
    cursor = Cursor(file, len(MAGIC), what="header")
    raw = file.read_bytes(0, HEADER_BYTES)
    version = cursor.u8(), cursor.u8()
    header = AprHeader(
        version=version,
        flags=AprFlag(cursor.u16()),
        tensor_count=cursor.u32(),
        metadata_offset_bytes=cursor.u64(),
        metadata_size_bytes=cursor.u32(),
        index_offset_bytes=cursor.u64(),
        data_offset_bytes=cursor.u64(),
        crc32=cursor.u32(),
    )
    found = header_crc32(raw)
    if found != header.crc32:
        raise ChecksumError(
            f"the header's checksum is {found:08x} but {header.crc32:08x} is stored",
            where=file.path,
            offset_bytes=_HEADER_CRC_OFFSET,
            hint="the file is damaged; fetch or write it again",
        )
    if version[0] != VERSION[0]:
        raise UnsupportedError(
            f"APR version {version[0]}.{version[1]} is not supported",
            where=file.path,
            hint=f"this program reads version {VERSION[0]}",
        )
    _check_flags(file, header.flags)
    return header


def _check_magic(file: DataFile) -> None:
    magic = file.read_bytes(0, min(len(MAGIC), file.size_bytes))
    if magic == MAGIC:
        if file.size_bytes < HEADER_BYTES + FOOTER_BYTES:
            raise TruncatedError(
                f"{file.size_bytes} bytes are too few for a header and a footer",
                where=file.path,
                hint="the file is cut short; fetch or write it again",
            )
        return
    if magic == b"GGUF":
        raise FormatError("is a GGUF file, not APR", where=file.path, hint="name it .gguf")
    if magic[:3] == b"APR":
        raise UnsupportedError(
            f"is an APR file of another generation (magic {magic!r})",
            where=file.path,
            hint="convert it to APR version 2",
        )
    raise FormatError(
        f"is not an APR file: it begins with {magic!r}, not {MAGIC!r}", where=file.path
    )


def _check_flags(file: DataFile, flags: AprFlag) -> None:
    for flag, words in _UNREADABLE.items():
        if flag in flags:
            raise UnsupportedError(
                f"the file is {words}, which is not supported",
                where=file.path,
                hint="write it as one plain file",
            )
    if AprFlag.COLUMN_MAJOR in flags:
        raise UnsupportedError(
            "the file is column-major: it was imported without the transpose, so its weights "
            "would be read wrongly",
            where=file.path,
            hint="import it again from the original model",
        )


def _read_metadata(file: DataFile, header: AprHeader) -> dict[str, Any]:
    offset, size = header.metadata_offset_bytes, header.metadata_size_bytes
    if size > MAX_METADATA_BYTES:
        raise FormatError(
            f"{size} bytes of metadata are more than the {MAX_METADATA_BYTES} allowed",
            where=file.path,
            offset_bytes=20,
        )
    cursor = Cursor(file, offset, file.size_bytes - FOOTER_BYTES, "metadata")
    return parse_object(cursor.take(size), file.path, "the metadata")


def _read_index(file: DataFile, header: AprHeader) -> dict[str, StoredTensor]:
    start, end = header.index_offset_bytes, header.data_offset_bytes
    if end > file.size_bytes - FOOTER_BYTES or start > end:
        raise TruncatedError(
            f"the index at byte {start} and the data at byte {end} do not lie in this order "
            f"within {file.size_bytes} bytes",
            where=file.path,
        )
    if header.tensor_count * _SMALLEST_ENTRY_BYTES > end - start:
        raise FormatError(
            f"{header.tensor_count} tensors do not fit into an index of {end - start} bytes",
            where=file.path,
            offset_bytes=start,
        )
    cursor = Cursor(file, start, end, "tensor index")
    tensors: dict[str, StoredTensor] = {}
    previous: str | None = None
    for _ in range(header.tensor_count):
        entry_offset = cursor.offset_bytes
        tensor = _read_entry(cursor, header)
        # Code points sort as their UTF-8 bytes do.
        if previous is not None and tensor.name <= previous:
            fault = "is there twice" if tensor.name == previous else f"follows {previous!r}"
            raise FormatError(
                f"the index is not sorted by name: {tensor.name!r} {fault}",
                where=file.path,
                offset_bytes=entry_offset,
            )
        tensors[tensor.name] = tensor
        previous = tensor.name
    return tensors


def _read_entry(cursor: Cursor, header: AprHeader) -> StoredTensor:
    file, entry_offset = cursor.file, cursor.offset_bytes
    name_size = cursor.u16()
    if name_size > MAX_NAME_BYTES:
        raise FormatError(
            f"a tensor's name of {name_size} bytes is longer than {MAX_NAME_BYTES}",
            where=file.path,
            offset_bytes=entry_offset,
        )
    name = cursor.text(name_size)
    number, ndim = cursor.u8(), cursor.u8()
    if ndim > MAX_DIMS:
        raise FormatError(
            f"tensor {name!r} has {ndim} dimensions; at most {MAX_DIMS} are allowed",
            where=file.path,
            offset_bytes=entry_offset,
        )
    shape = tuple(cursor.u64() for _ in range(ndim))
    offset, size = cursor.u64(), cursor.u64()
    end = header.data_offset_bytes + offset + size
    if end > file.size_bytes - FOOTER_BYTES:
        raise TruncatedError(
            f"tensor {name!r} ends at byte {end} but the data ends at "
            f"{file.size_bytes - FOOTER_BYTES}",
            where=file.path,
            hint="the file is cut short or damaged; fetch or write it again",
        )
    dtype = _resolve_dtype(file, name, number, shape, size)
    return StoredTensor(name, shape, dtype, file, header.data_offset_bytes + offset, size)


def _resolve_dtype(
    file: DataFile, name: str, number: int, shape: tuple[int, ...], size_bytes: int
) -> str:
    """The type that an id means for a tensor of this shape and size."""
    names = DTYPE_IDS.get(number)
    if names is None:
        raise UnsupportedError(
            f"tensor {name!r} has the unknown type id {number}",
            where=file.path,
            hint=f"known are {', '.join(map(str, sorted(DTYPE_IDS)))}",
        )
    sizes = []
    for dtype in names:
        try:
            expected = storage_size(dtype, shape)
        except UnsupportedError as error:
            sizes.append(f"cannot be {dtype} ({error.what})")
            continue
        if expected == size_bytes:
            return dtype
        sizes.append(f"takes {expected} bytes as {dtype}")
    raise FormatError(
        f"tensor {name!r} of shape {'x'.join(map(str, shape)) or 'scalar'} has {size_bytes} "
        f"bytes but {' and '.join(sizes)}",
        where=file.path,
    )


def _check_zeros(apr: AprFile) -> None:
    """The bytes that the format says are zero: reserved ones and those after the metadata."""
    header = apr.header
    metadata_end = header.metadata_offset_bytes + header.metadata_size_bytes
    for start, end, what in (
        (_RESERVED_OFFSET, HEADER_BYTES, "reserved bytes of the header"),
        (metadata_end, min(align(metadata_end), header.index_offset_bytes), "metadata padding"),
    ):
        if any(apr.file.read_bytes(start, max(0, end - start))):
            raise FormatError(f"the {what} are not zero", where=apr.path, offset_bytes=start)


def _check_footer(file: DataFile, progress: Callable[[int, int], None] | None) -> None:
    buffer = memoryview(bytearray(_VERIFY_PIECE_BYTES))
    end, crc = file.size_bytes - FOOTER_BYTES, 0
    for offset in range(0, end, _VERIFY_PIECE_BYTES):
        piece = buffer[: min(_VERIFY_PIECE_BYTES, end - offset)]
        file.read_into(offset, piece)
        crc = zlib.crc32(piece, crc)
        if progress is not None:
            progress(offset + len(piece), end)
    stored = int.from_bytes(file.read_bytes(end, FOOTER_BYTES), "little")
    if crc != stored:
        raise ChecksumError(
            f"the file's checksum is {crc:08x} but {stored:08x} is stored",
            where=file.path,
            offset_bytes=end,
            hint="the file is damaged; fetch or write it again",
        )
