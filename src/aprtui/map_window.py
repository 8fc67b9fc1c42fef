"""Which part of a map is in view, how large its cells are, and where the cursor is.

Pure functions of plain numbers. Lengths on screen are in half lines and columns: where there are
colours, a character holds two half lines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

# Columns and half lines of a single value: from so many its figure is written into it.
FIGURE_COLUMNS, FIGURE_HALVES = 9, 2
# Half lines that a value of a small tensor takes at most.
TALLEST = 4


class Scale(NamedTuple):
    """How values become blocks of the screen.

    Attributes:
        rows, columns: Values per cell.
        tall, wide: Half lines and columns per cell; more than the least only for single values.
    """

    rows: int
    columns: int
    tall: int
    wide: int


def scales_for(
    num_rows: int, num_columns: int, halves: int, columns: int, unit: int = 1
) -> tuple[Scale, ...]:
    """The zooms, from the whole matrix in view to single values with their figures.

    Args:
        num_rows, num_columns: The matrix.
        halves, columns: Half lines and columns of the area.
        unit: Half lines that a cell takes at least: 2 where a character holds one value.
    """
    rows = max(1, -(-num_rows // max(1, halves // unit)))
    across = max(1, -(-num_columns // max(1, columns)))
    tall = wide = 1
    if rows == 1:
        tall = max(1, min(TALLEST, halves // max(1, num_rows)))
        tall = tall if tall < FIGURE_HALVES else tall // FIGURE_HALVES * FIGURE_HALVES
    if across == 1:
        wide = max(1, min(FIGURE_COLUMNS, columns // max(1, num_columns)))
    found = [Scale(rows, across, max(tall, unit), wide)]
    while (last := found[-1]) != (finest := _finer(last)):
        found.append(finest)
    return tuple(found)


def _finer(scale: Scale) -> Scale:
    """Half the values per cell, or larger cells once they are single values."""
    rows, columns, tall, wide = scale
    if rows > 1 or columns > 1:
        return Scale(-(-rows // 2), -(-columns // 2), tall, wide)
    wide = next((step for step in (2, 4, FIGURE_COLUMNS) if step > wide), wide)
    return Scale(1, 1, max(tall, FIGURE_HALVES), wide)


@dataclass(frozen=True, slots=True)
class MapWindow:
    """A window onto a matrix.

    Attributes:
        num_rows, num_columns: The matrix.
        halves, columns: The area on screen.
        unit: Half lines that a cell takes at least.
        zoom: Number of the scale, from 0 for the whole matrix.
        top, left: The first row and column in view.
        row, column: The cursor.
    """

    num_rows: int
    num_columns: int
    halves: int
    columns: int
    unit: int = 1
    zoom: int = 0
    top: int = 0
    left: int = 0
    row: int = 0
    column: int = 0

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Every zoom."""
        return scales_for(self.num_rows, self.num_columns, self.halves, self.columns, self.unit)

    @property
    def scale(self) -> Scale:
        """The present zoom."""
        return self.scales[self.zoom]

    @property
    def cells(self) -> tuple[int, int]:
        """How many cells there is room for, down and across."""
        return max(1, self.halves // self.scale.tall), max(1, self.columns // self.scale.wide)

    def move(self, down: int, across: int) -> Self:
        """The cursor so many cells on; the window follows it."""
        scale = self.scale
        return self.point(self.row + down * scale.rows, self.column + across * scale.columns)

    def point(self, row: int, column: int) -> Self:
        """The cursor at a value, and the window where that is in view."""
        row = max(0, min(row, self.num_rows - 1))
        column = max(0, min(column, self.num_columns - 1))
        (down, across), scale = self.cells, self.scale
        top = _follow(row // scale.rows, self.top // scale.rows, down) * scale.rows
        left = _follow(column // scale.columns, self.left // scale.columns, across) * scale.columns
        return replace(self, row=row, column=column, top=top, left=left)._settled()

    def pan(self, down: int, across: int) -> Self:
        """The window so many cells on, and the cursor with it."""
        scale = self.scale
        moved = replace(
            self, top=self.top + down * scale.rows, left=self.left + across * scale.columns
        )._settled()
        return moved.point(self.row + moved.top - self.top, self.column + moved.left - self.left)

    def zoomed(self, step: int) -> Self:
        """Nearer or farther by so many zooms; the cursor stays where it is on screen."""
        before = self.scale
        zoomed = replace(self, zoom=max(0, min(self.zoom + step, len(self.scales) - 1)))
        after = zoomed.scale
        y = (self.row - self.top) // before.rows * before.tall // after.tall
        x = (self.column - self.left) // before.columns * before.wide // after.wide
        top = (self.row // after.rows - y) * after.rows
        left = (self.column // after.columns - x) * after.columns
        return replace(zoomed, top=top, left=left)._settled().point(self.row, self.column)

    def resized(self, halves: int, columns: int, unit: int) -> Self:
        """The same in another area, about as near."""
        before = self.scale
        resized = replace(self, halves=halves, columns=columns, unit=unit, zoom=0)
        if self.zoom:  # else the whole matrix stays in view
            far = [n for n, s in enumerate(resized.scales) if _depth(s) <= _depth(before)]
            resized = replace(resized, zoom=max(far, default=0))
        return resized._settled().point(self.row, self.column)

    def _settled(self) -> Self:
        """Aligned to its cells and inside the matrix."""
        (down, across), scale = self.cells, self.scale
        return replace(
            self,
            top=_aligned(self.top, scale.rows, self.num_rows, down),
            left=_aligned(self.left, scale.columns, self.num_columns, across),
        )


def _depth(scale: Scale) -> float:
    return scale.tall * scale.wide / (scale.rows * scale.columns)


def _follow(cell: int, first: int, count: int) -> int:
    """The first cell in view, moved as little as shows `cell`."""
    return min(cell, max(first, cell - count + 1))


def _aligned(start: int, size: int, total: int, count: int) -> int:
    last = max(0, -(-total // size) - count)
    return max(0, min(start // size, last)) * size
