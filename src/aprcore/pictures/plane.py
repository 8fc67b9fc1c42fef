"""A tensor seen as a matrix, read a window at a time: from its file, or from memory.

A tensor of [32, 2048, 2048] is 512 MB, and two sides of it are held against each other; what is
looked at is a few thousand values. So a file in canonical layout is read by position and never
whole. Files are never mapped: a mapped file that shrinks under the reader kills the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.data_file import DataFile
from aprcore.ground.errors import TraceError
from aprcore.judging.layouts import Layout, is_masked
from aprcore.network.operations import Operation
from aprcore.network.stages import StageKey

Float32 = NDArray[np.float32]

# What a read costs, in values that could have been read along: rows of which less would be thrown
# away are read whole, many at once (in pieces of `SPAN_VALUES`), and cut; others one by one.
READ_VALUES = 4096
SPAN_VALUES = 256 * 1024


class Plane(Protocol):
    """One side's tensor as a matrix [R, C]: C is its last axis on disk, R all others.

    May be read from several threads at once.
    """

    @property
    def layout(self) -> Layout:
        """The tensor's canonical layout."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        ...

    def read(self, row_start: int, row_stop: int, col_start: int, col_stop: int) -> Float32:
        """A window, [row_stop - row_start, col_stop - col_start]; it must lie inside.

        Raises:
            AprError: The file is gone or has changed.
        """
        ...

    def read_flat(self, start: int, stop: int) -> Float32:
        """Consecutive values by flat index; they must lie inside.

        Raises:
            AprError: The file is gone or has changed.
        """
        ...


def matrix_shape(layout: Layout) -> tuple[int, int]:
    """R and C of a layout."""
    return math.prod(layout.shape[:-1]), layout.shape[-1]


@dataclass(frozen=True, slots=True, eq=False)
class MemoryPlane:
    """A tensor held in memory.

    Attributes:
        values: Its values, flat, in canonical order.
        layout: Its canonical layout.
    """

    values: Float32
    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        return matrix_shape(self.layout)

    def read(self, row_start: int, row_stop: int, col_start: int, col_stop: int) -> Float32:
        """A window; a view of the values."""
        return self.values.reshape(self.shape)[row_start:row_stop, col_start:col_stop]

    def read_flat(self, start: int, stop: int) -> Float32:
        """Consecutive values; a view."""
        return self.values[start:stop]


class FilePlane:
    """A tensor in a file of float32 in canonical layout, read by position.

    Attributes:
        layout: Its canonical layout.
    """

    def __init__(
        self, path: Path, operation: Operation | None, layout: Layout, offset_bytes: int
    ) -> None:
        """Open a file that holds the tensor behind `offset_bytes`, and nothing after it.

        Raises:
            FormatError: The file is missing or unreadable.
            TraceError: It has another size than the tensor.
        """
        self.layout = layout
        self._offset_bytes = offset_bytes
        self._is_masked = is_masked(operation) and len(layout.factors) == 3
        self._file = DataFile(path)
        expected = offset_bytes + 4 * math.prod(layout.shape)
        if self._file.size_bytes != expected:
            found = self._file.size_bytes
            self._file.close()
            raise changed(path, f"{found} bytes where {expected} are due")

    @property
    def shape(self) -> tuple[int, int]:
        """R and C."""
        return matrix_shape(self.layout)

    def read(self, row_start: int, row_stop: int, col_start: int, col_stop: int) -> Float32:
        """A window, read by position."""
        width = self.shape[1]
        rows, columns = row_stop - row_start, col_stop - col_start
        if columns == width:
            values = self._read_values(row_start * width, rows * width).reshape(rows, width)
        else:
            values = np.empty((rows, columns), dtype="<f4")
            step = max(1, SPAN_VALUES // width) if width - columns <= READ_VALUES else 1
            for first, last in ranges(rows, step):
                start = (row_start + first) * width
                if step == 1:
                    self._read_into(start + col_start, values[first])
                else:
                    span = self._read_values(start, (last - first) * width).reshape(-1, width)
                    values[first:last] = span[:, col_start:col_stop]
        if self._is_masked:
            _, queries, keys = self.layout.factors
            query = np.arange(row_start, row_stop)[:, None] % queries
            above = np.arange(col_start, col_stop)[None, :] > query + (keys - queries)
            np.copyto(values, 0, where=above)
        return values

    def read_flat(self, start: int, stop: int) -> Float32:
        """Consecutive values, read by position."""
        values = self._read_values(start, stop - start)
        if self._is_masked:
            _, queries, keys = self.layout.factors
            row, key = np.divmod(np.arange(start, stop), keys)
            values[key > row % queries + (keys - queries)] = 0
        return values

    def close(self) -> None:
        """Close the file; it closes with the last reference, too."""
        self._file.close()

    def _read_values(self, start: int, count: int) -> Float32:
        values = np.empty(count, dtype="<f4")
        self._read_into(start, values)
        return values

    def _read_into(self, start: int, values: Float32) -> None:
        self._file.read_into(self._offset_bytes + 4 * start, values)


def changed(path: Path, how: str) -> TraceError:
    """The error for a file that is not what the run saw."""
    return TraceError(f"has changed since the run: {how}", where=path, hint="run again")


@dataclass(frozen=True, slots=True, eq=False)
class TensorPair:
    """Both sides of one stage.

    Attributes:
        key: Which stage.
        trace, oracle: The sides; None for one that lacks the tensor. Sides of different sizes have
            a layout each.
    """

    key: StageKey
    trace: Plane | None
    oracle: Plane | None

    @property
    def layout(self) -> Layout | None:
        """The layout of what there is: of the trace, else of the oracle; None of neither."""
        side = self.trace if self.trace is not None else self.oracle
        return None if side is None else side.layout

    @property
    def comparable(self) -> bool:
        """Whether there is a difference to show: both sides are there, in one layout."""
        if self.trace is None or self.oracle is None:
            return False
        return self.trace.layout == self.oracle.layout

    def both(self) -> tuple[Plane, Plane]:
        """Both sides of a pair that is comparable.

        Raises:
            ValueError: It is not.
        """
        if self.trace is None or self.oracle is None or not self.comparable:
            raise ValueError(f"{self.key} has no two sides of one layout")
        return self.trace, self.oracle


def ranges(count: int, length: int) -> Iterator[tuple[int, int]]:
    """Consecutive pieces (start, stop) of at most `length`."""
    for start in range(0, count, length):
        yield start, min(start + length, count)
