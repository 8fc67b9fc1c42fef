"""An array in an archive, as `numpy.save` writes it.

Source: numpy.lib.format, "Format Version 1.0" and "2.0".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.archive import Archive

HEADER_LIMIT_BYTES = 10_000  # numpy's own


@dataclass(frozen=True, slots=True)
class NpyMember:
    """An array in an .npz file, whose size is what its shape and type take.

    Attributes:
        shape: As stored, a batch axis included.
        begin: Where in the member the values begin, in bytes.
        fortran: Whether the first axis is the innermost one.
    """

    archive: Archive
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    begin: int
    fortran: bool

    @classmethod
    def find(cls, archive: Archive, name: str) -> NpyMember | None:
        """A member by its header; None if its values are no numbers and no text.

        Raises:
            FormatError: The header is malformed or the member has another size.
        """
        text, begin = _read_npy_header(archive, name)
        shape, dtype, fortran = _parse_npy_header(archive, name, text)
        if dtype is None:
            return None
        found, expected = (
            archive.members[name].size_bytes,
            begin + math.prod(shape) * dtype.itemsize,
        )
        if found != expected:
            raise archive.broken(f"{name} has {found} bytes where {expected} are due")
        return cls(archive, name, shape, dtype, begin, fortran)

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def read(self) -> NDArray[Any]:
        """The values, in their shape and stored type."""
        data = self.archive.read(self.name)
        flat = np.frombuffer(data, self.dtype, self.count, self.begin)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")

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
            raise self.archive.broken(f"{self.name} holds no Unicode") from error
        return whole


def _read_npy_header(archive: Archive, name: str) -> tuple[str, int]:
    """The header of a member and where the values begin.

    Source: numpy.lib.format.

    Raises:
        FormatError: It has none.
    """
    start = archive.read_start(name, HEADER_LIMIT_BYTES)
    length_bytes = {b"\1\0": 2, b"\2\0": 4}.get(start[6:8])
    if start[:6] != b"\x93NUMPY" or length_bytes is None:
        raise archive.broken(f"{name} is no array of version 1 or 2")
    begin = 8 + length_bytes
    end = begin + int.from_bytes(start[8:begin], "little")
    if end > len(start):
        raise archive.broken(f"the header of {name} claims {end} bytes")
    return start[begin:end].decode("latin-1"), end


_NPY_ITEM = re.compile(
    r"""\s*['"](descr|fortran_order|shape)['"]\s*:\s*"""
    r"""(?:['"]([^'"\s]{1,40})['"]|(True|False)|\(([\d,L ]{0,1300})\)|\[.*\])\s*(?:,|(?=\}))"""
)
# Text, numbers, and bytes of no type. An object would be a pickle.
_NPY_TYPE = re.compile(r"[<>|=]?[biufcSUV]\d{1,9}")


def _parse_npy_header(
    archive: Archive, name: str, text: str
) -> tuple[tuple[int, ...], np.dtype[Any] | None, bool]:
    """Shape, type (None: of another kind) and order.

    Not by numpy, which hands the text to Python's own parser.

    Raises:
        FormatError: It is not what `numpy.save` writes.
    """
    values: dict[str, re.Match[str]] = {}
    at = text.find("{") + 1
    while at and (item := _NPY_ITEM.match(text, at)):
        values[item[1]] = item
        at = item.end()
    shape, order, kind = (values.get(key) for key in ("shape", "fortran_order", "descr"))
    is_whole = text[at:].strip() == "}"
    if not is_whole or shape is None or shape[4] is None or order is None or order[3] is None:
        raise archive.broken(f"the header of {name} is not what numpy.save writes")
    sizes = [size.strip().removesuffix("L") for size in shape[4].split(",") if size.strip()]
    if len(sizes) > 64 or not all(size.isdigit() and len(size) <= 18 for size in sizes):
        raise archive.broken(f"{name} has no shape but ({shape[4]})")
    dtype = None
    if kind is not None and kind[2] is not None and _NPY_TYPE.fullmatch(kind[2]):
        try:
            dtype = np.dtype(kind[2])
        except (TypeError, ValueError):
            raise archive.broken(f"{name} has no type but {kind[2]!r}") from None
    return tuple(map(int, sizes)), dtype, order[3] == "True"
