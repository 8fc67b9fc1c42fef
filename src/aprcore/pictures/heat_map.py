"""Maps: a tensor as a matrix of colours, from the whole of it down to single values."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.parallel import available_threads, for_each
from aprcore.pictures.map_views import FoldedPlane, map_layout, views
from aprcore.pictures.plane import TensorPair, matrix_shape, ranges
from aprcore.pictures.pooling import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    Level,
    Levels,
    NonFinite,
    pool_counts,
    pool_farthest,
    round_cell,
)
from aprcore.pictures.records import (
    PIECE_VALUES,
    CellValue,
    Grid,
    IsCancelled,
    MapKind,
    MapView,
    check,
    never,
)

Float32 = NDArray[np.float32]

# A window of up to as many values is read and pooled on the spot, exactly as asked for: two sides
# of it are 16 MB, and take some 20 ms. A smaller tensor is kept whole.
DIRECT_VALUES = 2 * 1024 * 1024

# A row of a window in a file costs as much as so many values.
_ROW_VALUES = 256

# Pieces and threads that build coarse cells: together they hold some 10 MB.
_BUILD_VALUES = 128 * 1024
_BUILD_THREADS = 4

_LARGEST = np.float32(np.finfo(np.float32).max)


class HeatMap:
    """A map of a pair that can be looked at from near and far.

    Making it reads the tensor once, and keeps a small one whole and of a large one coarse cells:
    40 MB for 128 Mi values. Any rectangle of it at any zoom then comes within some 20 ms. May be
    used from any thread.

    Attributes:
        kind: What it shows.
        view: How the tensor is seen as a matrix.
        shape: Rows and columns of the matrix.
        largest: The largest finite magnitude in it.
    """

    def __init__(
        self,
        pair: TensorPair,
        kind: MapKind = MapKind.DIFF,
        view: MapView | None = None,
        is_cancelled: IsCancelled = never,
    ) -> None:
        """Read the tensor once.

        Args:
            pair: Both sides.
            kind: One of `map_kinds(pair)`.
            view: One of `views(map_layout(pair, kind))`; default: the first.
            is_cancelled: Asked between pieces, maybe from several threads.

        Raises:
            Cancelled: It was given up.
            ValueError: The pair has no such map.
            AprError: A file is gone or has changed.
        """
        self.kind = kind
        self._layout = map_layout(pair, kind)
        self.view = views(self._layout)[0] if view is None else view
        self.shape = self.view.num_rows, self.view.num_columns
        self._pair = pair
        self._signed = kind in (MapKind.TRACE, MapKind.ORACLE)
        self._shown = tuple(
            FoldedPlane(side, self.view.fold) if side is not None and self.view.fold else side
            for side in (
                None if kind is MapKind.ORACLE else pair.trace,
                None if kind is MapKind.TRACE else pair.oracle,
            )
        )
        self._whole: Level | None = None
        self._levels: Levels | None = None
        if self.view.is_reduced:
            self._whole = self._reduce(is_cancelled)
        elif self.shape[0] * self.shape[1] <= DIRECT_VALUES:
            self._whole = self._read_whole(is_cancelled)
        if self._whole is not None:
            self.largest = float(np.abs(self._whole.values).max(initial=0))
        else:
            self.largest = self._build_levels(is_cancelled)

    def grid(
        self, top: int, left: int, cell_rows: int, cell_columns: int, rows: int, columns: int
    ) -> Grid:
        """A rectangle of the map.

        Its cells are as large as asked for and begin where asked for, unless the rectangle covers
        more than `DIRECT_VALUES` values of a large tensor: then cells grow to multiples of the
        coarse ones (`aprcore.pictures.pooling.BLOCKS`), and the beginning moves back to one. So pan
        by what the grid says, not by what was asked for.

        Args:
            top, left: Row and column of the matrix at which it begins; moved inside.
            cell_rows, cell_columns: Values per cell, at least 1.
            rows, columns: How many cells there is room for; beyond the matrix there are none.

        Raises:
            AprError: A file is gone or has changed.
        """
        height, width = self.shape
        top, left = (min(max(0, at), max(0, end - 1)) for at, end in ((top, height), (left, width)))
        cell_rows, cell_columns = max(1, cell_rows), max(1, cell_columns)
        tall, wide = min(rows * cell_rows, height - top), min(columns * cell_columns, width - left)
        level = self._whole
        if level is None and tall * max(wide, _ROW_VALUES) > DIRECT_VALUES:
            assert self._levels is not None
            level = self._levels.finest(cell_rows, cell_columns)
        if level is not None:
            cell_rows, cell_columns = round_cell(level, cell_rows, cell_columns)
            top, left = top - top % level.rows, left - left % level.columns
        rows = min(max(0, rows), -(-(height - top) // cell_rows))
        columns = min(max(0, columns), -(-(width - left) // cell_columns))
        rectangle = top, left, cell_rows, cell_columns, rows, columns
        shown, bad = self._pool(*rectangle) if level is None else level.window(*rectangle)
        return Grid(
            self.kind, self.view.rows, self.view.columns, top, left, cell_rows, cell_columns,
            shown, bad.all, bad.nan, self.largest, self.view.fold,
        )  # fmt: skip

    def overview(self, max_rows: int, max_columns: int) -> Grid:
        """The whole map in at most so many cells."""
        height, width = self.shape
        cell_rows, cell_columns = -(-height // max(1, max_rows)), -(-width // max(1, max_columns))
        return self.grid(0, 0, cell_rows, cell_columns, max_rows, max_columns)

    def value(self, row: int, column: int) -> CellValue:
        """Both sides at a place of the matrix; where it stands for several values, the farthest.

        Raises:
            AprError: A file is gone or has changed.
        """
        if not self.view.is_reduced:
            length = matrix_shape(self._layout)[1]
            if self.view.fold:
                return self._at(min(row * self.view.fold + column, length - 1))
            return self._at((self.view.first_row + row) * length + column)
        length = self._layout.factors[-1]
        by_token = self._layout.axes[0] == "token"
        tokens, heads = self.shape[1], self.shape[0]
        group = column * heads + row if by_token else row * tokens + column
        start = group * length
        shown, bad = self._show_flat(start, start + length)
        return self._at(start + _farthest(shown, bad))

    def peak(
        self, top: int, left: int, rows: int, columns: int, is_cancelled: IsCancelled = never
    ) -> CellValue:
        """The value that a cell shows: the first that is not finite, else the farthest from zero.

        Args:
            top, left, rows, columns: The cell in rows and columns of the matrix, at least partly
                inside: a cell at (i, j) of a grid begins at (top + i * cell_rows,
                left + j * cell_columns).
            is_cancelled: Asked between pieces; a cell may be the whole tensor.

        Raises:
            Cancelled: It was given up.
            AprError: A file is gone or has changed.
        """
        bottom, right = min(top + rows, self.shape[0]), min(left + columns, self.shape[1])
        best, place = -1.0, (top, left)
        for first, last in ranges(bottom - top, max(1, PIECE_VALUES // max(1, right - left))):
            check(is_cancelled)
            window = top + first, top + last, left, right
            if self._whole is None:
                shown, bad = self._show(*window)
            else:
                part = slice(*window[:2]), slice(*window[2:])
                shown = self._whole.values[part]
                bad = NonFinite(*(count[part] > 0 for count in self._whole.bad))
            row, column = divmod(_farthest(shown, bad), right - left)
            found = float(abs(shown[row, column]))
            if bad is not None and bad.all[row, column]:
                return self.value(top + first + row, left + column)
            if found > best:
                best, place = found, (top + first + row, left + column)
        return self.value(*place)

    def _at(self, index: int) -> CellValue:
        found = []
        for side in (self._pair.trace, self._pair.oracle):
            same = side is not None and side.layout == self._layout
            found.append(float(side.read_flat(index, index + 1)[0]) if side and same else None)
        position = dict(zip(self._layout.axes, self._layout.position(index)))
        return CellValue(found[0], found[1], position, index)

    def _show(
        self, row_start: int, row_stop: int, col_start: int, col_stop: int
    ) -> tuple[Float32, NonFinite | None]:
        """What is shown in a window of the matrix, as `_shown_values`."""
        first = self.view.first_row
        a, b = (
            None if side is None
            else side.read(first + row_start, first + row_stop, col_start, col_stop)
            for side in self._shown
        )  # fmt: skip
        return _shown_values(self.kind, a, b)

    def _show_flat(self, start: int, stop: int) -> tuple[Float32, NonFinite | None]:
        """What is shown of consecutive values, as `_shown_values`."""
        a, b = (None if side is None else side.read_flat(start, stop) for side in self._shown)
        return _shown_values(self.kind, a, b)

    def _pool(
        self, top: int, left: int, cell_rows: int, cell_columns: int, rows: int, columns: int
    ) -> tuple[Float32, NonFinite]:
        """Cells of a window straight from the tensor, and what of each is not finite."""
        shown = np.zeros((rows, columns), np.float32)
        counts = NonFinite.none((rows, columns))
        bottom = min(top + rows * cell_rows, self.shape[0])
        right = min(left + columns * cell_columns, self.shape[1])
        step = max(1, PIECE_VALUES // max(1, cell_rows * (right - left)))
        for first, last in ranges(rows, step):
            stop = min(top + last * cell_rows, bottom)
            x, bad = self._show(top + first * cell_rows, stop, left, right)
            shown[first:last] = pool_farthest(x, cell_rows, cell_columns, signed=self._signed)
            if bad is not None:
                for total, part in zip(counts, bad):
                    total[first:last] = pool_counts(part, cell_rows, cell_columns)
        return shown, counts

    def _read_whole(self, is_cancelled: IsCancelled) -> Level:
        height, width = self.shape
        values = np.empty(self.shape, np.float32)
        level = Level(1, 1, values, NonFinite.none(self.shape, np.uint8))
        for first, last in ranges(height, max(1, PIECE_VALUES // max(1, width))):
            check(is_cancelled)
            level.values[first:last], bad = self._show(first, last, 0, width)
            if bad is not None:
                for where, part in zip(level.bad, bad):
                    where[first:last] = part
                level.has_nonfinite = True
        return level

    def _reduce(self, is_cancelled: IsCancelled) -> Level:
        """Heads by tokens: of every run along the last axis the value of largest magnitude."""
        *outer, length = self._layout.factors
        groups = math.prod(outer)
        shown = np.zeros(groups, np.float32)
        counts = NonFinite.none((groups,))
        for first, last in ranges(groups, max(1, PIECE_VALUES // max(1, length))):
            check(is_cancelled)
            x, bad = self._show_flat(first * length, last * length)
            if length == 0:
                continue
            x = x.reshape(-1, length)
            shown[first:last] = pool_farthest(x, 1, length, signed=self._signed)[:, 0]
            if bad is not None:
                for total, part in zip(counts, bad):
                    total[first:last] = part.reshape(-1, length).sum(axis=1)
        matrices = [x.reshape(outer) for x in (shown, *counts)]
        if self._layout.axes[0] == "token":
            matrices = [np.ascontiguousarray(x.T) for x in matrices]
        matrix, *lost = matrices
        return Level(1, 1, matrix, NonFinite(*lost), bool(counts.all.any()))

    def _build_levels(self, is_cancelled: IsCancelled) -> float:
        """Fill the levels of a large tensor; its largest magnitude."""
        height, width = self.shape
        levels = Levels(self.shape, signed=self._signed)
        tall = max(1, _BUILD_VALUES // (BLOCK_ROWS * max(1, width))) * BLOCK_ROWS
        wide = max(BLOCK_COLUMNS, _BUILD_VALUES // tall // BLOCK_COLUMNS * BLOCK_COLUMNS)
        pieces = [
            (rows, columns) for rows in ranges(height, tall) for columns in ranges(width, wide)
        ]
        peaks = []

        def add(piece: tuple[tuple[int, int], tuple[int, int]]) -> None:
            check(is_cancelled)
            rows, columns = piece
            shown, bad = self._show(*rows, *columns)
            peaks.append(levels.add(rows[0], columns[0], shown, bad))

        for_each(add, pieces, min(available_threads(), _BUILD_THREADS))
        self._levels = levels
        return max(peaks, default=0.0)


def _farthest(shown: Float32, bad: NonFinite | None) -> int:
    """The flat index of the first value that is not finite, else of the largest magnitude."""
    if bad is not None and bad.all.any():
        return int(bad.all.argmax())
    return int(np.abs(shown).argmax()) if shown.size else 0


def _shown_values(
    kind: MapKind, a: Float32 | None, b: Float32 | None
) -> tuple[Float32, NonFinite | None]:
    """What a map shows, with 0 for what is not finite, and where that is (None: nowhere).

    Args:
        kind: What to show.
        a, b: Trace and oracle, of one shape, as far as the kind needs them.
    """
    if kind in (MapKind.TRACE, MapKind.ORACLE):
        side = a if kind is MapKind.TRACE else b
        assert side is not None
        return _without_nonfinite(side, side)
    assert a is not None and b is not None
    with np.errstate(all="ignore"):
        shown = np.subtract(a, b)
        np.abs(shown, out=shown)
        if kind is MapKind.RATIO:
            equal = shown == 0
            np.divide(shown, np.abs(b), out=shown)
            np.copyto(shown, 0, where=equal)
        if shown.size and not np.isfinite(shown.max()):
            _clamp_overflow(kind, a, b, shown)
    return _without_nonfinite(shown, a, b)


def _clamp_overflow(kind: MapKind, a: Float32, b: Float32, shown: Float32) -> None:
    """Replace what only float32's range made infinite: by its value, or the largest there is."""
    over = np.isinf(shown) & np.isfinite(a) & np.isfinite(b)
    true = np.abs(a[over].astype(np.float64) - b[over])
    if kind is MapKind.RATIO:
        true /= np.abs(b[over])  # of a zero it stays infinite
    shown[over] = np.where(np.isinf(true), true, np.minimum(true, _LARGEST))


def _without_nonfinite(x: Float32, *sides: Float32) -> tuple[Float32, NonFinite | None]:
    """`x` with 0 for what is not finite, and where that is; NaN where one of the sides is."""
    # NaN and infinities pass through a maximum or a minimum: no mask for sound tensors.
    if x.size == 0 or (np.isfinite(x.max()) and np.isfinite(x.min())):
        return x, None
    bad = ~np.isfinite(x)
    # Not of `x`: the difference of two infinities is NaN, too.
    nan = np.logical_or.reduce([np.isnan(side) for side in sides])
    return np.where(bad, np.float32(0), x), NonFinite(bad, nan)
