"""What a heat map is made from: which maps a stage has, parts of one, and single cells of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from aprtui.pictures import Ask, OpenTensor
from aprtui.ramp import DECADES, LEVELS, VALUE_DECADES

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout
    from aprcore.pictures import CellValue, Grid, HeatMap, MapKind, MapView
    from aprcore.records.report import StageReport


@dataclass(frozen=True, slots=True)
class SubjectAsk(Ask):
    """What maps of a stage there are: every kind, with the views of each."""

    def make(
        self, tensor: OpenTensor, is_cancelled: Callable[[], bool]
    ) -> dict[MapKind, tuple[MapView, ...]]:
        """Find them out; those that differ in their kind may differ in their layout."""
        from aprcore.pictures import map_kinds, map_layout, views

        layouts: dict[MapKind, Layout] = {
            kind: map_layout(tensor.pair, kind) for kind in map_kinds(tensor.pair)
        }
        return {kind: views(layout) for kind, layout in layouts.items()}


@dataclass(frozen=True, slots=True)
class GridAsk(Ask):
    """A rectangle of a map; the fields as in `aprcore.pictures.HeatMap.grid`."""

    kind: MapKind
    view: MapView
    top: int
    left: int
    cell_rows: int
    cell_columns: int
    rows: int
    columns: int

    def make(self, tensor: OpenTensor, is_cancelled: Callable[[], bool]) -> Shades:
        """Put it together."""
        grid = _open_map(tensor, self.kind, self.view, is_cancelled).grid(
            self.top, self.left, self.cell_rows, self.cell_columns, self.rows, self.columns
        )
        return _shade(grid, tensor.report)

    def waits_for(self, before: Ask) -> bool:
        """Another part of the same map waits its turn.

        While a key is held down, every picture would else be given up for the next.
        """
        if not isinstance(before, GridAsk):
            return False
        return (self.kind, self.view) == (before.kind, before.view)


@dataclass(frozen=True, slots=True)
class CellAsk(Ask):
    """What is behind one cell of a map; the fields as in `aprcore.pictures.HeatMap.peak`."""

    kind: MapKind
    view: MapView
    top: int
    left: int
    rows: int
    columns: int

    def make(self, tensor: OpenTensor, is_cancelled: Callable[[], bool]) -> CellValue:
        """Look it up."""
        shown = _open_map(tensor, self.kind, self.view, is_cancelled)
        return shown.peak(self.top, self.left, self.rows, self.columns, is_cancelled)


@dataclass(frozen=True, slots=True, eq=False)
class Shades:
    """The answer to `GridAsk`.

    Attributes:
        grid: The values.
        levels: Their levels (`aprtui.ramp`), row by row.
        top: Where the scale ends.
        decades: Powers of ten that it spans.
    """

    grid: Grid
    levels: list[list[int]]
    top: float
    decades: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return len(self.levels), len(self.levels[0]) if self.levels else 0

    def cell_of(self, row: int, column: int) -> tuple[int, int] | None:
        """Row and column of the cell that has a value, if it is one of these."""
        grid = self.grid
        down = (row - grid.top) // grid.cell_rows
        across = (column - grid.left) // grid.cell_columns
        rows, columns = self.shape
        return (down, across) if 0 <= down < rows and 0 <= across < columns else None

    def place_of(self, down: int, across: int) -> tuple[int, int]:
        """Row and column of the first value of a cell."""
        grid = self.grid
        return grid.top + down * grid.cell_rows, grid.left + across * grid.cell_columns


def is_head(view: MapView) -> bool:
    """Whether a view is one head of several."""
    return view.rows == "query" and not view.is_reduced


def gutter_of(view: MapView | None) -> int:
    """Cells before a map for the numbers of its rows."""
    if view is None or view.num_rows == 1:
        return 0
    return len(str((view.num_rows - 1) * max(1, view.fold))) + 1


def place_in(view: MapView, layout: Layout, index: int) -> tuple[int, int] | None:
    """Row and column of a flat index, if a view has it as a value of its own."""
    if view.is_reduced:
        return None
    row, column = divmod(index, view.fold or max(1, layout.shape[-1]))
    row -= view.first_row
    return (row, column) if 0 <= row < view.num_rows else None


def _open_map(
    tensor: OpenTensor, kind: MapKind, view: MapView, is_cancelled: Callable[[], bool]
) -> HeatMap:
    from aprcore.pictures import HeatMap

    return tensor.keep((kind, view), partial(HeatMap, tensor.pair, kind, view, is_cancelled))


def _shade(grid: Grid, report: StageReport) -> Shades:
    """A grid in levels.

    A difference is seen against the size of the oracle's values, so that rounding looks dark and a
    fault bright at every stage; only a larger one widens the scale.
    """
    from aprcore.pictures import MapKind, levels_of

    top = 1.0 if grid.kind is MapKind.RATIO else grid.largest
    if grid.kind is MapKind.DIFF and report.comparison is not None:
        top = max(top, report.comparison.rms_b)
    decades = VALUE_DECADES if grid.kind in (MapKind.TRACE, MapKind.ORACLE) else DECADES
    return Shades(grid, levels_of(grid, top, decades, LEVELS).tolist(), top, decades)
