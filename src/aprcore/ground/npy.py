"""An array as `numpy.save` writes it: a file, a member of an archive, or some bytes.

Source: numpy.lib.format, "Format Version 1.0" and "2.0".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.archive import Archive
from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import FormatError

HEADER_LIMIT_BYTES = 10_000  # numpy's own

Fault = Callable[[str], FormatError]


@dataclass(frozen=True, slots=True)
class NpyArray:
    """An array of numbers or text whose size is what its shape and type take; not read yet.

    Attributes:
        shape: As stored, a batch axis included.
        dtype: The stored type.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _begin: int
    _fortran: bool
    _load: Callable[[], bytes]
    _broken: Fault

    @classmethod
    def in_archive(cls, archive: Archive, name: str) -> NpyArray | None:
        """A member of an archive; None if its values are no numbers and no text.

        Raises:
            FormatError: The header is malformed or the member has another size.
        """
        start = archive.read_start(name, HEADER_LIMIT_BYTES)
        size_bytes = archive.members[name].size_bytes
        return cls._parsed(
            start, size_bytes, lambda: archive.read(name),
            lambda fault: archive.broken(f"{name} {fault}"),
        )  # fmt: skip

    @classmethod
    def in_file(cls, path: Path) -> NpyArray | None:
        """A file; None if its values are no numbers and no text.

        Raises:
            FormatError: It is missing, malformed or of another size.
        """

        def broken(fault: str) -> FormatError:
            return FormatError(f"is no readable .npy file: it {fault}", where=path,
                               hint="dump it again")  # fmt: skip

        def load() -> bytes:
            with DataFile(path) as file:
                return file.read_bytes(0, size_bytes)

        with DataFile(path) as file:
            size_bytes = file.size_bytes
            start = file.read_bytes(0, min(HEADER_LIMIT_BYTES, size_bytes))
        return cls._parsed(start, size_bytes, load, broken)

    @classmethod
    def in_bytes(cls, data: bytes, broken: Fault) -> NpyArray | None:
        """Some bytes; None if their values are no numbers and no text.

        Args:
            data: A whole .npy file.
            broken: The error for what is wrong with them, of a clause such as "has 3 bytes".

        Raises:
            FormatError: They are malformed.
        """
        return cls._parsed(data[:HEADER_LIMIT_BYTES], len(data), lambda: data, broken)

    @classmethod
    def _parsed(
        cls, start: bytes, size_bytes: int, load: Callable[[], bytes], broken: Fault
    ) -> NpyArray | None:
        text, begin = _read_header(start, broken)
        shape, dtype, fortran = _parse_header(text, broken)
        if dtype is None:
            return None
        # Where one size is zero the others may say anything, and numpy counts them all.
        if math.prod(n or 1 for n in shape) * max(1, dtype.itemsize) >= 2**63:
            raise broken(f"has the shape {shape}")
        expected = begin + math.prod(shape) * dtype.itemsize
        if size_bytes != expected:
            raise broken(f"has {size_bytes} bytes where {expected} are due")
        return cls(shape, dtype, begin, fortran, load, broken)

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def read(self) -> NDArray[Any]:
        """The values, in their shape and stored type."""
        flat = np.frombuffer(self._load(), self.dtype, self.count, self._begin)
        return flat.reshape(self.shape, order="F" if self._fortran else "C")

    def read_text(self) -> str:
        """The text of an array of one.

        Raises:
            FormatError: It is no Unicode.
        """
        try:
            text = self.read().item()
            whole = text.decode() if isinstance(text, bytes) else str(text)
            whole.encode()  # half a character is no text that could be passed on
        except ValueError as error:
            raise self._broken("holds no Unicode") from error
        return whole


def _read_header(start: bytes, broken: Fault) -> tuple[str, int]:
    """The header, and where the values begin."""
    length_bytes = {b"\1\0": 2, b"\2\0": 4}.get(start[6:8])
    if start[:6] != b"\x93NUMPY" or length_bytes is None:
        raise broken("is no array of version 1 or 2")
    begin = 8 + length_bytes
    end = begin + int.from_bytes(start[8:begin], "little")
    if end > len(start):
        raise broken(f"has a header of {end} bytes")
    return start[begin:end].decode("latin-1"), end


_ITEM = re.compile(
    r"""\s*['"](descr|fortran_order|shape)['"]\s*:\s*"""
    r"""(?:['"]([^'"\s]{1,40})['"]|(True|False)|\(([\d,L ]{0,1300})\)|\[.*\])\s*(?:,|(?=\}))"""
)
# Text, numbers, and bytes of no type. An object would be a pickle.
_TYPE = re.compile(r"[<>|=]?[biufcSUV]\d{1,9}")


def _parse_header(
    text: str, broken: Fault
) -> tuple[tuple[int, ...], np.dtype[Any] | None, bool]:  # fmt: skip
    """Shape, type (None: of another kind) and order.

    Not by numpy, which hands the text to Python's own parser.
    """
    values: dict[str, re.Match[str]] = {}
    at = text.find("{") + 1
    while at and (item := _ITEM.match(text, at)):
        values[item[1]] = item
        at = item.end()
    shape, order, kind = (values.get(key) for key in ("shape", "fortran_order", "descr"))
    is_whole = text[at:].strip() == "}"
    if not is_whole or shape is None or shape[4] is None or order is None or order[3] is None:
        raise broken("has a header that is not what numpy.save writes")
    sizes = [size.strip().removesuffix("L") for size in shape[4].split(",") if size.strip()]
    if len(sizes) > 64 or not all(size.isdigit() and len(size) <= 18 for size in sizes):
        raise broken(f"has the shape ({shape[4]})")
    dtype = None
    if kind is not None and kind[2] is not None and _TYPE.fullmatch(kind[2]):
        try:
            dtype = np.dtype(kind[2])
        except (TypeError, ValueError):
            raise broken(f"has the type {kind[2]!r}") from None
    return tuple(map(int, sizes)), dtype, order[3] == "True"
