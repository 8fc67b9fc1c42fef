"""Pooling: a matrix in coarser cells, each with its value of largest magnitude.

A map of a large tensor is drawn from cells that were pooled once. One size of cell would not do:
a picture of [65536, 2048] has cells that are tall, one of [7, 152064] cells that are wide. So there
is one level of coarse cells per proportion, all of the same area.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

# Rows and columns of a coarse cell, by proportion: 64 values each, so that four levels of a tensor
# of 128 Mi values take 40 MB with their counts.
BLOCKS = ((1, 64), (4, 16), (16, 4), (64, 1))
BLOCK_ROWS, BLOCK_COLUMNS = 64, 64

# Up to as many columns per cell, whole strided columns are combined; above, runs within a row.
_STRIDED_COLUMNS = 16


class NonFinite(NamedTuple):
    """Where the values of a matrix are not finite, or how many of each cell's values are not.

    Attributes:
        all: NaN and infinities.
        nan: Those that are NaN.
    """

    all: NDArray[Any]
    nan: NDArray[Any]

    @classmethod
    def none(cls, shape: tuple[int, ...], dtype: DTypeLike = np.int64) -> Self:
        """Counts of what is finite everywhere."""
        return cls(np.zeros(shape, dtype), np.zeros(shape, dtype))


@dataclass(slots=True)
class Level:
    """Pooled cells of a whole matrix.

    Attributes:
        rows, columns: Values per cell; cells at the edges have fewer.
        values: Per cell the finite value of largest magnitude, 0 where there is none.
        bad: Per cell how many values are not finite.
        has_nonfinite: Whether any is.
        signed: Whether there may be negative values.
    """

    rows: int
    columns: int
    values: Float32
    bad: NonFinite
    has_nonfinite: bool = False
    signed: bool = True

    def window(
        self, top: int, left: int, cell_rows: int, cell_columns: int, rows: int, columns: int
    ) -> tuple[Float32, NonFinite]:
        """Values and counts of cells, [rows, columns], that are multiples of this level's.

        Args:
            top, left: Row and column of the matrix, multiples of the level's.
            cell_rows, cell_columns: Values per cell, multiples of the level's.
            rows, columns: How many cells.
        """
        tall, wide = cell_rows // self.rows, cell_columns // self.columns
        first_row, first_column = top // self.rows, left // self.columns
        part = (
            slice(first_row, first_row + rows * tall),
            slice(first_column, first_column + columns * wide),
        )
        values = pool_farthest(self.values[part], tall, wide, signed=self.signed)
        if not self.has_nonfinite:
            return values, NonFinite.none(values.shape)
        counts = (pool_counts(count[part], tall, wide) for count in self.bad)
        return values, NonFinite(*counts)


def pool_farthest(x: Float32, rows: int, columns: int, *, signed: bool) -> Float32:
    """The value of largest magnitude of every cell of a finite matrix; of equals the positive.

    Args:
        x: The matrix.
        rows, columns: Values per cell.
        signed: Whether it may hold negative values.
    """
    if rows == 1 and columns == 1:
        return np.array(x, dtype=np.float32)
    high = pool_columns(pool_rows(x, rows, np.maximum), columns, np.maximum)
    if not signed:
        return high
    low = pool_columns(pool_rows(x, rows, np.minimum), columns, np.minimum)
    return _farther(high, low)


def pool_counts(counts: NDArray[Any], rows: int, columns: int) -> Int64:
    """The sum of every cell, of small numbers or of truth values."""
    tall = pool_rows(counts, rows, np.add)  # which widens them, all at once would take memory
    return pool_columns(tall.astype(np.int64), columns, np.add)


def pool_rows(x: NDArray[Any], rows: int, combine: np.ufunc) -> NDArray[Any]:
    """Every `rows` rows combined into one; the last may have fewer."""
    if rows == 1:
        return x
    whole = x.shape[0] // rows * rows
    parts = []
    if whole:
        parts.append(combine.reduce(x[:whole].reshape(-1, rows, x.shape[1]), axis=1))
    if whole < x.shape[0]:
        parts.append(combine.reduce(x[whole:], axis=0)[None])
    return parts[0] if len(parts) == 1 else np.concatenate([x[:0], *parts])


def pool_columns(x: NDArray[Any], columns: int, combine: np.ufunc) -> NDArray[Any]:
    """Every `columns` columns combined into one; the last may have fewer."""
    if columns == 1:
        return x
    whole = x.shape[1] // columns * columns
    parts = []
    if whole and columns <= _STRIDED_COLUMNS:
        joined = x[:, :whole:columns].copy()
        for column in range(1, columns):
            combine(joined, x[:, column:whole:columns], out=joined)
        parts.append(joined)
    elif whole:
        parts.append(combine.reduce(x[:, :whole].reshape(x.shape[0], -1, columns), axis=2))
    if whole < x.shape[1]:
        parts.append(combine.reduce(x[:, whole:], axis=1)[:, None])
    return parts[0] if len(parts) == 1 else np.concatenate([x[:, :0], *parts], axis=1)


class Levels:
    """Coarse cells of a matrix at every proportion of `BLOCKS`, filled piece by piece.

    Pieces may be added from several threads at once.
    """

    def __init__(self, shape: tuple[int, int], *, signed: bool) -> None:
        """Start empty.

        Args:
            shape: R and C of the matrix.
            signed: Whether it has negative values.
        """
        self.levels = []
        for rows, columns in BLOCKS:
            cells = -(-shape[0] // rows), -(-shape[1] // columns)
            # Zeros cost no memory until something is written.
            values, bad = np.zeros(cells, np.float32), NonFinite.none(cells, np.uint8)
            self.levels.append(Level(rows, columns, values, bad, signed=signed))
        self._signed = signed

    def add(self, top: int, left: int, x: Float32, bad: NonFinite | None) -> float:
        """Pool a piece of the matrix; returns its largest magnitude.

        Args:
            top, left: Where it lies: multiples of `BLOCK_ROWS` and `BLOCK_COLUMNS`.
            x: Its values; it ends at a multiple of the same or at the edge of the matrix.
            bad: Where it is not finite (x is 0 there); None for nowhere.
        """
        highest = _pool_all(x, np.maximum)
        lowest = _pool_all(x, np.minimum) if self._signed else highest
        for level, high, low in zip(self.levels, highest, lowest):
            part = level.values[top // level.rows :, left // level.columns :]
            part[: high.shape[0], : high.shape[1]] = _farther(high, low)
        largest = float(np.abs(_farther(highest[-1], lowest[-1])).max(initial=0))
        if bad is None:
            return largest
        for level in self.levels:
            level.has_nonfinite = True
            for total, where in zip(level.bad, bad):
                counts = pool_columns(pool_rows(where.view(np.uint8), level.rows, np.add),
                                      level.columns, np.add)  # fmt: skip
                part = total[top // level.rows :, left // level.columns :]
                part[: counts.shape[0], : counts.shape[1]] = counts
        return largest

    def finest(self, cell_rows: int, cell_columns: int) -> Level:
        """The level whose cells make up cells of about this size with the least rounding up."""

        def area(level: Level) -> int:
            return _round_up(cell_rows, level.rows) * _round_up(cell_columns, level.columns)

        return min(self.levels, key=area)


def round_cell(level: Level, cell_rows: int, cell_columns: int) -> tuple[int, int]:
    """A cell's size rounded up to whole cells of a level."""
    return _round_up(cell_rows, level.rows), _round_up(cell_columns, level.columns)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _farther(high: Float32, low: Float32) -> Float32:
    """Of the largest and the smallest value the one farther from zero."""
    return high if high is low else np.where(high >= -low, high, low)


def _pool_all(x: Float32, combine: np.ufunc) -> list[Float32]:
    """A piece at every proportion of `BLOCKS`; taller cells are made of less tall ones."""
    pooled = []
    tall = x
    done_rows = 1
    for rows, columns in BLOCKS:
        tall = pool_rows(tall, rows // done_rows, combine)
        done_rows = rows
        pooled.append(pool_columns(tall, columns, combine))
    return pooled
