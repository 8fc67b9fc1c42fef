"""GGUF model files, whole or split.

The `gguf` package gives the types and block sizes; the header is read with our own cursor,
because the package's reader maps the file, does not check counts against its size, and takes 7.8 s
for a vocabulary of 152,000 tokens (this one 0.3 s).

Source: ggml's specification of GGUF.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import Cursor, DataFile
from aprcore.ground.errors import FormatError, TruncatedError, UnsupportedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT_BYTES = 32
MAX_DIMS = 4  # ggml's own limit
MAX_TEXT_BYTES = 64 * 1024 * 1024  # of one string: chat templates are the longest

# The smallest records: a key-value is an empty key, a type and one byte; a tensor an empty name,
# no dimensions, a type and an offset.
_KEY_VALUE_BYTES = 8 + 4 + 1
_TENSOR_INFO_BYTES = 8 + 4 + 4 + 8

_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)

# How GGUF's scalar types are stored, by the name of the type in `gguf.GGUFValueType`.
_SCALARS = {"UINT8": "<u1", "INT8": "<i1", "UINT16": "<u2", "INT16": "<i2", "UINT32": "<u4",
            "INT32": "<i4", "FLOAT32": "<f4", "BOOL": "?", "UINT64": "<u8", "INT64": "<i8",
            "FLOAT64": "<f8"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF file, or all parts of a split one.

    Attributes:
        path: As given.
        metadata: The key-values, of the first part where there are several.
        tensors: By stored name; shapes are row-major, the reverse of the file's.
        files: The open parts.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: tuple[DataFile, ...]


def read_gguf(path: Path) -> GgufFile:
    """Open a file, and the other parts if it is one of several.

    Raises:
        FormatError: A part is missing or does not follow the format; its branches say how.
    """
    file = DataFile(path)
    metadata, tensors = _read_part(file)
    count = metadata.get("split.count", 0)
    if type(count) is not int or count <= 1:
        return GgufFile(path, metadata, tensors, (file,))
    return _read_parts(path, count)


def _read_parts(path: Path, count: int) -> GgufFile:
    """All parts of a split model, whichever of them was named.

    Raises:
        FormatError: A part is missing, is another model's, or repeats a tensor.
    """
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise FormatError(
            f"split.count is {count}, but the name does not end in -NNNNN-of-{count:05}.gguf",
            where=path, hint="restore the name that the file was published with",
        )  # fmt: skip
    metadata: dict[str, Any] = {}
    tensors: dict[str, StoredTensor] = {}
    files = []
    for number in range(count):
        part = path.with_name(f"{match[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not part.exists():
            raise FormatError(f"part {number + 1} of {count} is missing", where=part,
                              hint="download it into the same directory")  # fmt: skip
        file = DataFile(part)
        files.append(file)
        values, held = _read_part(file)
        found = (values.get("split.no"), values.get("split.count"))
        if found != (number, count):
            raise FormatError(
                f"split.no and split.count are {found[0]} and {found[1]}, expected {number} and "
                f"{count}", where=part,
            )  # fmt: skip
        twice = tensors.keys() & held.keys()
        if twice:
            raise FormatError(f"tensor {min(twice)!r} is also in an earlier part", where=part)
        tensors.update(held)
        metadata = metadata or values
    total = metadata.get("split.tensors.count")
    if total not in (None, len(tensors)):
        raise FormatError(
            f"the parts hold {len(tensors)} tensors, split.tensors.count says {total}", where=path
        )
    return GgufFile(path, metadata, tensors, tuple(files))


def _read_part(file: DataFile) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Key-values and tensors of one file.

    Raises:
        FormatError: It does not follow the format.
    """
    cursor = Cursor(file, what="GGUF header")
    if cursor.take(4) != MAGIC:
        raise FormatError("the file does not begin with GGUF", where=file.path, offset_bytes=0)
    _check_version(file, cursor.u32())
    tensor_count, value_count = cursor.u64(), cursor.u64()
    _check_count(cursor, tensor_count, _TENSOR_INFO_BYTES, "tensors")
    _check_count(cursor, value_count, _KEY_VALUE_BYTES, "key-values")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = _read_text(cursor)
        if key in metadata:
            raise FormatError(f"the key {key!r} appears twice", where=file.path)
        metadata[key] = _read_value(cursor, cursor.u32())
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = _read_text(cursor)
        if name in infos:
            raise FormatError(f"tensor {name!r} appears twice", where=file.path)
        infos[name] = _read_dims(cursor, name), cursor.u32(), cursor.u64()
    alignment = _find_alignment(file, metadata)
    data_bytes = -(-cursor.offset_bytes // alignment) * alignment
    tensors = {
        name: _locate_tensor(file, name, shape, kind, data_bytes, offset, alignment)
        for name, (shape, kind, offset) in infos.items()
    }
    return metadata, tensors


def _check_version(file: DataFile, version: int) -> None:
    if version in VERSIONS:
        return
    if version & 0xFFFF == 0:
        raise UnsupportedError("the file is big-endian", where=file.path, offset_bytes=4,
                               hint="convert it with gguf's gguf_convert_endian.py")  # fmt: skip
    raise UnsupportedError(f"GGUF version {version}", where=file.path, offset_bytes=4,
                           hint="versions 2 and 3 are read")  # fmt: skip


def _check_count(cursor: Cursor, count: int, least_bytes: int, what: str) -> None:
    """Refuse a count that the rest of the file cannot hold, before a loop believes it.

    Raises:
        TruncatedError: It cannot.
    """
    if count * least_bytes > cursor.remaining_bytes:
        raise TruncatedError(
            f"the header promises {count} {what}, which cannot fit in the "
            f"{cursor.remaining_bytes} bytes that follow",
            where=cursor.path, offset_bytes=cursor.offset_bytes,
        )  # fmt: skip


def _read_text(cursor: Cursor) -> str:
    size_bytes = cursor.u64()
    if size_bytes > MAX_TEXT_BYTES:
        raise FormatError(f"a text claims {size_bytes} bytes", where=cursor.path,
                          offset_bytes=cursor.offset_bytes)  # fmt: skip
    return cursor.text(size_bytes)


def _read_value(cursor: Cursor, kind: int) -> Any:
    """A scalar, a text or a list of either.

    Raises:
        FormatError: The type is unknown or the value does not fit.
    """
    name = _type_name(cursor, kind)
    if name == "STRING":
        return _read_text(cursor)
    if name != "ARRAY":
        value = _read_numbers(cursor, name, 1)[0]
        # The shortest decimal that names a float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if name == "FLOAT32" else value
    item = _type_name(cursor, cursor.u32())
    count = cursor.u64()
    if item == "ARRAY":
        raise UnsupportedError("an array of arrays", where=cursor.path,
                               offset_bytes=cursor.offset_bytes)  # fmt: skip
    if item != "STRING":
        return _read_numbers(cursor, item, count)
    _check_count(cursor, count, 8, "texts")
    return [_read_text(cursor) for _ in range(count)]


def _type_name(cursor: Cursor, kind: int) -> str:
    from gguf import GGUFValueType

    try:
        name: str = GGUFValueType(kind).name
    except ValueError:
        raise FormatError(f"{kind} is no type of a value", where=cursor.path,
                          offset_bytes=cursor.offset_bytes) from None  # fmt: skip
    return name


def _read_numbers(cursor: Cursor, type_name: str, count: int) -> list[Any]:
    dtype = np.dtype(_SCALARS[type_name])
    _check_count(cursor, count, dtype.itemsize, "numbers")
    values: list[Any] = np.frombuffer(cursor.take(count * dtype.itemsize), dtype).tolist()
    return values


def _read_dims(cursor: Cursor, name: str) -> tuple[int, ...]:
    count = cursor.u32()
    if count > MAX_DIMS:
        raise FormatError(f"tensor {name!r} has {count} dimensions, more than {MAX_DIMS}",
                          where=cursor.path, offset_bytes=cursor.offset_bytes)  # fmt: skip
    innermost_first = struct.unpack(f"<{count}Q", cursor.take(8 * count))
    return innermost_first[::-1]


def _find_alignment(file: DataFile, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise FormatError(f"general.alignment is {alignment!r}, not a power of two",
                          where=file.path)  # fmt: skip
    return alignment


def _locate_tensor(
    file: DataFile,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    data_bytes: int,
    offset_bytes: int,
    alignment: int,
) -> StoredTensor:
    """A tensor's record, checked against its type and the file.

    Raises:
        FormatError: The type is unknown, rows are not whole blocks, or the offset is not aligned.
        TruncatedError: The file ends before the tensor does.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        dtype = GGMLQuantizationType(kind)
    except ValueError:
        raise UnsupportedError(f"tensor {name!r} has the unknown type {kind}",
                               where=file.path) from None  # fmt: skip
    block_values, block_bytes = GGML_QUANT_SIZES[dtype]
    row_length = shape[-1] if shape else 1
    if row_length % block_values:
        raise FormatError(
            f"tensor {name!r} has rows of {row_length}, not whole {dtype.name} blocks of "
            f"{block_values}", where=file.path,
        )  # fmt: skip
    if offset_bytes % alignment:
        raise FormatError(f"tensor {name!r} begins at {offset_bytes}, not a multiple of the "
                          f"alignment {alignment}", where=file.path)  # fmt: skip
    size_bytes = math.prod(shape) // block_values * block_bytes
    return StoredTensor(name, shape, dtype.name, file, data_bytes + offset_bytes, size_bytes)
