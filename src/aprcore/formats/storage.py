"""A tensor on disk that is read and expanded a few rows at a time."""

from __future__ import annotations

import math
import struct
import threading
from dataclasses import dataclass

import numpy as np

from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import FormatError, TruncatedError, UnsupportedError, Where
from aprcore.network.weights import Float32
from aprcore.quant.steps import join_rows, step_squares
from aprcore.quant.types import (
    SCALE_BYTES,
    BlockFormat,
    BlockLayout,
    Bytes,
    dequantize,
    find_format,
    locate,
    row_bytes,
    rows_have_bytes,
    storage_size,
)

# Stored bytes are expanded in pieces of about this size: they stay in a core's cache, and the
# scratch buffer that each thread keeps stays small.
PIECE_BYTES = 512 * 1024

_SCRATCH_BYTES = PIECE_BYTES + 64  # a piece that starts inside a block takes one block more

# numpy cannot even shape an empty array whose other axes multiply to more than it can address.
_MOST_VALUES = 1 << 60


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: a `Weight` that is read and expanded a few rows at a time.

    Attributes:
        name: As the reader spells it.
        shape: Sizes, row-major.
        dtype: A name in `aprcore.quant.types.FORMATS`.
        file: Where it is.
        offset_bytes: Its first byte in the file.
        size_bytes: Its bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: DataFile
    offset_bytes: int
    size_bytes: int

    def __post_init__(self) -> None:
        """Check the size against shape and type, and the extent against the file.

        Raises:
            UnsupportedError: The type is unknown.
            FormatError: The size does not fit the shape.
            TruncatedError: The file ends before the tensor does.
        """
        try:
            expected = storage_size(self.dtype, self.shape)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"tensor {self.name!r}: {error.what}", where=self.file.path, hint=error.hint
            ) from None
        if math.prod(size for size in self.shape if size) >= _MOST_VALUES:
            raise FormatError(f"tensor {self.name!r} has an absurd shape", where=self.file.path)
        if expected != self.size_bytes:
            raise size_error(self.file.path, self.name, self.shape, self.dtype, expected,
                             self.size_bytes)  # fmt: skip
        end = self.offset_bytes + self.size_bytes
        if self.offset_bytes < 0 or end > self.file.size_bytes:
            raise TruncatedError(
                f"tensor {self.name!r} ends at byte {end} but the file has "
                f"{self.file.size_bytes} bytes",
                where=self.file.path,
                hint="the file is cut short; fetch or write it again",
            )

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """Rows `start` to `stop` (along the first axis) as float32, dequantised. Thread-safe.

        Args:
            start, stop: Rows; a tensor without axes counts as one row.
            out: Flat, C-contiguous, at least as many values as the rows have.

        Returns:
            Shape (stop - start, *shape[1:]); a view of `out` where it is given.

        Raises:
            IndexError: The rows are out of range.
            ValueError: `out` cannot take the rows.
            TruncatedError: The file has shrunk since it was opened.
        """
        total_rows = self.shape[0] if self.shape else 1
        if not 0 <= start <= stop <= total_rows:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {total_rows}")
        row_values = math.prod(self.shape[1:])
        count = (stop - start) * row_values
        values = np.empty(count, np.float32) if out is None else _take(out, count)
        if self.dtype == "F32":
            self.file.read_into(self.offset_bytes + 4 * start * row_values, values)
        elif count and self._is_vector_of_blocks:
            self._expand_vector(start, values)
        elif count:
            self._expand(start * row_values, values)
        return values.reshape((stop - start, *self.shape[1:]))

    def read_raw(self, start: int, stop: int) -> Bytes:
        """The stored bytes of rows of blocks or of plain numbers, uint8.

        Raises:
            IndexError: The rows are out of range.
            ValueError: Blocks do not start anew at every row; see `rows_have_bytes`.
        """
        if not rows_have_bytes(self.dtype, self.shape):
            kind = "vector" if len(self.shape) == 1 else "tensor"
            raise ValueError(
                f"rows of the {self.dtype} {kind} {self.name!r} have no bytes of their own"
            )
        total_rows = self.shape[0] if self.shape else 1
        if not 0 <= start <= stop <= total_rows:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {total_rows}")
        stride = self.size_bytes // total_rows if total_rows else 0
        raw = np.empty((stop - start) * stride, np.uint8)
        self.file.read_into(self.offset_bytes + start * stride, raw)
        return raw

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """See `Weight.step_squares`."""
        total_rows = self.shape[0] if self.shape else 1
        if not 0 <= start <= stop <= total_rows:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {total_rows}")
        row, row_values = find_format(self.dtype), math.prod(self.shape[1:])
        if row.layout not in (BlockLayout.ROWS, BlockLayout.PADDED_ROWS):
            return self._row_steps(start * row_values, (stop - start) * row_values, row_values)
        row_length = self.shape[-1] if self.shape else 1
        if len(self.shape) < 2:  # its blocks span its rows, so they are read from the first on
            squares, group = self._row_steps(0, row_length, row_length)
            return join_rows(squares, group, row_length, 1)[0][start:stop], 1
        squares, group = self._row_steps(
            start * row_values, (stop - start) * row_values, row_length
        )
        if row_values == row_length:
            return squares, group
        return join_rows(squares, group, row_length, row_values)

    def _row_steps(self, first: int, count: int, row_length: int) -> tuple[Float32, int]:
        row = find_format(self.dtype)
        span = locate(row, row_length, first, count)
        raw = np.empty(span.size_bytes, np.uint8)
        self.file.read_into(self.offset_bytes + span.offset_bytes, raw)
        return step_squares(
            self.dtype,
            raw,
            count,
            row_length=row_length,
            skip_values=span.skip_values,
            scale=self._scale(),
        )

    @property
    def _is_vector_of_blocks(self) -> bool:
        layout = find_format(self.dtype).layout
        return len(self.shape) == 1 and layout in (BlockLayout.ROWS, BlockLayout.PADDED_ROWS)

    def _scale(self) -> float:
        """The scale of an AprQ8 tensor; 1 for every other."""
        if find_format(self.dtype).layout is not BlockLayout.SCALED:
            return 1.0
        scale: float = struct.unpack("<f", self.file.read_bytes(self.offset_bytes, SCALE_BYTES))[0]
        return scale

    def _expand_vector(self, first: int, values: Float32) -> None:
        """Read and expand part of a vector in blocks, which need not begin or end at a block."""
        row = find_format(self.dtype)
        block, skip = divmod(first, row.block_values)
        raw = np.empty(row_bytes(row, skip + values.size), np.uint8)
        self.file.read_into(self.offset_bytes + block * row.block_bytes, raw)
        whole = np.empty(raw.size // row.block_bytes * row.block_values, np.float32)
        dequantize(self.dtype, raw, whole)
        values[:] = whole[skip : skip + values.size]

    def _expand(self, first: int, values: Float32) -> None:
        """Read and expand the values from the flat index `first`, piece by piece."""
        row = find_format(self.dtype)
        row_length = self.shape[-1] if self.shape else 1
        scale = self._scale()
        step = _piece_values(row, row_length)
        for done in range(0, values.size, step):
            piece = values[done : done + step]
            span = locate(row, row_length, first + done, piece.size)
            raw = _scratch(span.size_bytes)
            self.file.read_into(self.offset_bytes + span.offset_bytes, raw)
            dequantize(
                self.dtype,
                raw,
                piece,
                row_length=row_length,
                skip_values=span.skip_values,
                scale=scale,
            )


def size_error(
    path: Where, name: str, shape: tuple[int, ...], dtype: str, expected: int, found: int
) -> FormatError:
    """The error for a tensor whose bytes do not fit its shape."""
    shape_text = "x".join(map(str, shape)) or "scalar"
    return FormatError(
        f"tensor {name!r} ({dtype}, {shape_text}) takes {expected} bytes but {found} are stored",
        where=path,
    )


def _take(out: Float32, count: int) -> Float32:
    if out.dtype != np.float32 or not out.flags.c_contiguous or out.size < count:
        raise ValueError(f"need {count} contiguous float32 values, got {out.dtype} {out.shape}")
    return out.reshape(-1)[:count]


def _piece_values(row: BlockFormat, row_length: int) -> int:
    """How many values to expand at once: whole rows for types in rows of blocks."""
    if row.layout in (BlockLayout.ROWS, BlockLayout.PADDED_ROWS):
        return max(1, PIECE_BYTES // max(1, row_bytes(row, row_length))) * row_length
    return PIECE_BYTES // row.block_bytes * row.block_values


_threads = threading.local()


def _scratch(size_bytes: int) -> Bytes:
    """A buffer of this thread, valid until the next call; a larger one is not kept."""
    if size_bytes > _SCRATCH_BYTES:
        return np.empty(size_bytes, np.uint8)
    buffer: Bytes | None = getattr(_threads, "buffer", None)
    if buffer is None:
        buffer = _threads.buffer = np.empty(_SCRATCH_BYTES, np.uint8)
    return buffer[:size_bytes]
