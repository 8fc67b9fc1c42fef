"""Ways to see a tensor as a matrix, and what there is to show of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aprcore.judging.layouts import Layout
from aprcore.pictures.plane import READ_VALUES, Plane, TensorPair, matrix_shape
from aprcore.pictures.records import MapKind, MapView

# A vector of fewer values is one row of a screen.
FOLDED_VALUES = 64


def views(layout: Layout) -> tuple[MapView, ...]:
    """What there is to see of a tensor of this layout, the most telling first."""
    rows, columns = matrix_shape(layout)
    match layout.axes:
        case ("head", "token", "position"):
            heads, queries, keys = layout.factors
            return (
                MapView("all heads", "head, query", "key", rows, columns),
                MapView("head × token", "head", "token", heads, queries, is_reduced=True),
                *(
                    MapView(f"head {head}", "query", "key", queries, keys, head * queries)
                    for head in range(heads)
                ),
            )
        case ("token", "head", "dim"):
            tokens, heads, _ = layout.factors
            return (
                MapView("token × dim", "token", "dim", rows, columns),
                MapView("head × token", "head", "token", heads, tokens, is_reduced=True),
            )
        case ("token", other):
            flat = MapView(f"token × {other}", "token", other, rows, columns)
        case _:
            last = layout.axes[-1]
            flat = MapView(last, "token" if last == "token id" else "", last, rows, columns)
    if rows != 1 or columns < FOLDED_VALUES:
        return (flat,)
    fold, name = fold_width(columns), flat.columns
    folded = MapView(f"{name}, {fold} a line", "", name, -(-columns // fold), fold, fold=fold)
    return folded, flat


def map_kinds(pair: TensorPair) -> tuple[MapKind, ...]:
    """What maps of a pair can show."""
    kinds = [MapKind.DIFF] if pair.comparable else []
    kinds += [MapKind.TRACE] if pair.trace is not None else []
    kinds += [MapKind.ORACLE] if pair.oracle is not None else []
    return (*kinds, *([MapKind.RATIO] if pair.comparable else []))


def map_layout(pair: TensorPair, kind: MapKind) -> Layout:
    """The layout of what a kind of map shows.

    Raises:
        ValueError: The pair has no such map.
    """
    side = {MapKind.TRACE: pair.trace, MapKind.ORACLE: pair.oracle}.get(kind)
    if side is not None:
        return side.layout
    if kind in (MapKind.TRACE, MapKind.ORACLE):
        raise ValueError(f"{pair.key} has no {kind.value}")
    return pair.both()[0].layout


def fold_width(count: int) -> int:
    """Values per row of a folded vector: the least power of two that leaves it no taller."""
    return 1 << -(-(max(1, count) - 1).bit_length() // 2)


class FoldedPlane:
    """A vector as a matrix of rows of `width` values; zeros fill the last.

    Attributes:
        layout: The vector's own.
    """

    def __init__(self, plane: Plane, width: int) -> None:
        self.layout = plane.layout
        self._plane = plane
        self._width = width
        self._count = matrix_shape(plane.layout)[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and values per row."""
        return -(-self._count // self._width), self._width

    def read(
        self, row_start: int, row_stop: int, col_start: int, col_stop: int
    ) -> NDArray[np.float32]:
        """A window, [row_stop - row_start, col_stop - col_start]; it must lie inside."""
        width = self._width
        if width - (col_stop - col_start) <= READ_VALUES:
            whole = self._read_padded(row_start * width, row_stop * width)
            return whole.reshape(-1, width)[:, col_start:col_stop]
        starts = range(row_start * width, row_stop * width, width)
        return np.stack([self._read_padded(at + col_start, at + col_stop) for at in starts])

    def read_flat(self, start: int, stop: int) -> NDArray[np.float32]:
        """Consecutive values of the vector."""
        return self._plane.read_flat(start, stop)

    def _read_padded(self, start: int, stop: int) -> NDArray[np.float32]:
        """Consecutive values, zeros behind the last."""
        found = self._plane.read_flat(min(start, self._count), min(stop, self._count))
        if found.size == stop - start:
            return found
        return np.concatenate([found, np.zeros(stop - start - found.size, np.float32)])
