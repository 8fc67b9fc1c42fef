"""Rows of a weight as the bytes that kernels take: as stored where they can, else as float32.

A weight may be a tensor in a file, some rows of one, or one with its rows in another order
(`aprcore.models.names`). Kernels see rows of equal length that begin at whole bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aprcore.formats.storage import StoredTensor
from aprcore.models.names import RowSlice, SplitHalves
from aprcore.network.weights import Weight, row_values
from aprcore.quant.types import SCALE_BYTES, BlockLayout, Bytes, find_format, row_bytes

FLOAT_FORMATS = ("F32", "F16", "BF16", "AprQ8")
BLOCK_FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "AprQ4")

Reader = Callable[[int, int, Bytes], None]


@dataclass(frozen=True, eq=False)
class RowSource:
    """A weight's rows in the form that kernels take.

    Attributes:
        weight: The weight.
        dtype: One of `FLOAT_FORMATS` or `BLOCK_FORMATS`.
        row_bytes: Bytes of a row.
        scale: The scale of an AprQ8 tensor; 1 for every other.
        read_into: Called as `read_into(start, stop, buffer)`, fills a flat uint8 buffer with
            those rows; may raise TruncatedError. Thread-safe.
    """

    weight: Weight
    dtype: str
    row_bytes: int
    scale: float
    read_into: Reader

    @property
    def num_rows(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.row_bytes


def row_source(weight: Weight) -> RowSource:
    """How to read a weight's rows for the device.

    Raises:
        TruncatedError: The file no longer holds the tensor's scale.
    """
    if isinstance(weight, SplitHalves):
        inner = _stored_source(weight.inner)
        if inner is not None:
            return RowSource(weight, inner.dtype, inner.row_bytes, inner.scale,
                             _gathered(weight, inner))  # fmt: skip
    elif isinstance(weight, (RowSlice, StoredTensor)):
        stored = _stored_source(weight)
        if stored is not None:
            return stored
    return _expanded_source(weight)


def _expanded_source(weight: Weight) -> RowSource:
    """Rows expanded on the host: types without a kernel, blocks that begin inside a row."""

    def read_into(start: int, stop: int, buffer: Bytes) -> None:
        weight.read(start, stop, buffer.view(np.float32))

    return RowSource(weight, "F32", 4 * row_values(weight), 1.0, read_into)


def _stored_source(weight: RowSlice | StoredTensor) -> RowSource | None:
    """The stored bytes of consecutive rows, or None if rows have no bytes of their own."""
    first, tensor = (
        (weight.first_row, weight.inner) if isinstance(weight, RowSlice) else (0, weight)
    )
    if tensor.dtype not in (*FLOAT_FORMATS, *BLOCK_FORMATS) or len(tensor.shape) != 2:
        return None
    row, width = find_format(tensor.dtype), tensor.shape[1]
    if row.layout is BlockLayout.FLAT and width % row.block_values:
        return None
    stride = row_bytes(row, width)
    start_bytes, scale = tensor.offset_bytes, 1.0
    if row.layout is BlockLayout.SCALED:
        scale = struct.unpack("<f", tensor.file.read_bytes(start_bytes, SCALE_BYTES))[0]
        start_bytes += SCALE_BYTES

    def read_into(start: int, stop: int, buffer: Bytes) -> None:
        size_bytes = (stop - start) * stride
        tensor.file.read_into(start_bytes + (first + start) * stride, buffer[:size_bytes])

    return RowSource(weight, tensor.dtype, stride, scale, read_into)


def _gathered(weight: SplitHalves, inner: RowSource) -> Reader:
    """Reads stored rows in another order."""

    def read_into(start: int, stop: int, buffer: Bytes) -> None:
        rows = weight.stored_rows(start, stop)
        first, last = int(rows.min()), int(rows.max()) + 1
        stored = np.empty((last - first) * inner.row_bytes, np.uint8)
        inner.read_into(first, last, stored)
        out = buffer[: rows.size * inner.row_bytes].reshape(rows.size, -1)
        np.take(stored.reshape(last - first, -1), rows - first, axis=0, out=out, mode="clip")

    return read_into
