"""A map as it is drawn: its blocks, what stands around them, and what is under the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.segment import Segment
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip

from aprcore.records.telling import format_position, format_ratio, format_value
from aprtui.formatting import format_compact
from aprtui.map_blocks import MapBlocks
from aprtui.map_window import FIGURE_COLUMNS, FIGURE_HALVES, MapWindow, Scale
from aprtui.ramp import INFINITE_GLYPH, LEVELS, NAN_GLYPH
from aprtui.widgets.bars import ramp_text
from aprtui.widgets.picture_view import COMPUTING, PictureView

if TYPE_CHECKING:
    from aprcore.pictures import CellValue, MapKind, MapView
    from aprtui.pictures import Shades

# Lines from which the legend and the axis of the columns have lines of their own.
ROOMY_LINES = 10
# Cells from which what is under the cursor takes one line.
WIDE_CELLS = 76
LEGEND_CELLS = 16
# Cells between the marks of the columns' axis.
TICK_CELLS = 10


class DrawnMap(PictureView):
    """A map of |diff|, of a side or of the ratio; two values per character where there are colours.

    Attributes:
        kind, view: What is shown; None before the first tensor is open.
        window: Which part of it, and the cursor.
        cell: What is under the cursor, once it is known.
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.kind: MapKind | None = None
        self.view: MapView | None = None
        self.window: MapWindow | None = None
        self.cell: CellValue | None = None
        # What is drawn, which lags behind what is wanted.
        self._shades: Shades | None = None
        self._scale: Scale | None = None
        self._lines: dict[int, Strip] = {}
        self._blocks: MapBlocks | None = None
        self._drawn_in: tuple[str, bool, int] | None = None

    def refresh_cursor(self, *windows: MapWindow) -> None:
        """Draw anew only what a move of the cursor changes.

        Args:
            windows: The same part of the map before and after.
        """
        if self._scale is None:
            return
        width, (lines, _) = self.size.width, self._area
        changed = {lines + 1} if self._is_roomy else set()
        for window in windows:
            first = (window.row - window.top) // self._scale.rows * self._scale.tall
            changed.update(range(first // 2, (first + self._scale.tall - 1) // 2 + 1))
        # The map begins below the heading.
        regions = [Region(0, y + 1, width, 1) for y in changed if y < lines]
        regions += [Region(0, y, width, 1) for y in changed if y > lines]
        self.refresh(*regions)

    @property
    def _unit(self) -> int:
        return FIGURE_HALVES if self.ramp.is_dense else 1

    @property
    def _is_roomy(self) -> bool:
        return self.size.height >= ROOMY_LINES

    @property
    def _lines_below(self) -> int:
        """The axis and the legend, and what is under the cursor."""
        return (2 if self._is_roomy else 0) + (1 if self.line_width >= WIDE_CELLS else 2)

    @property
    def _gutter(self) -> int:
        if self.view is None or self.view.num_rows == 1:
            return 0
        return len(str((self.view.num_rows - 1) * max(1, self.view.fold))) + 1

    @property
    def _area(self) -> tuple[int, int]:
        """Lines and columns of the map itself."""
        lines = self.size.height - 1 - self._lines_below
        return max(1, lines), max(1, self.line_width - self._gutter)

    @property
    def _is_signed(self) -> bool:
        return self.kind is not None and self.kind.name in ("TRACE", "ORACLE")

    def draw(self, y: int) -> Strip:
        """The heading, the map, the axis, the legend, what is under the cursor."""
        shades, scale = self._shades, self._scale
        if shades is None or scale is None or self.view is None:
            return self.strip(Text(""))
        if y == 0:
            return self.strip(self._heading(shades))
        lines, _ = self._area
        if y <= lines:
            return self._map_line(y - 1, shades, scale)
        number = y - lines - 1
        if self._is_roomy and number == 0:
            return self.strip(self._axis(shades, scale))
        if self._is_roomy and number == 1:
            return self.strip(self._legend(shades, LEGEND_CELLS))
        return self.strip(self._readout(number - (2 if self._is_roomy else 0)))

    # The map itself

    def _map_line(self, y: int, shades: Shades, scale: Scale) -> Strip:
        cursor = self._cursor_cell(shades)
        rows = [half // scale.tall for half in (2 * y, 2 * y + 1)]
        is_marked = self.has_focus and cursor is not None and cursor[0] in rows
        blocks = self._block_painter()
        strip = self._lines.get(y)
        if strip is None or is_marked:
            gutter = self._row_label(y, shades, scale, is_marked)
            pieces = self._pieces(blocks, rows, y, shades, scale)
            width = len(gutter.text) + shades.shape[1] * scale.wide * bool(pieces)
            strip = Strip([gutter, *pieces], width)
        if is_marked and cursor is not None:
            start = self._gutter + cursor[1] * scale.wide
            before, cell, after = strip.divide([start, start + scale.wide, strip.cell_length])
            halves = [row == cursor[0] for row in rows]
            other = _row(shades, rows[1 if halves[0] else 0])[cursor[1]]
            marked = blocks.cursor(cell.text, halves, other, is_figure=_has_figures(scale))
            strip = Strip([*before, marked, *after], strip.cell_length)
        if strip.cell_length != self.outer_size.width:
            strip = strip.adjust_cell_length(self.outer_size.width, self.ground)
        if not is_marked:
            self._lines[y] = strip
        return strip

    def _block_painter(self) -> MapBlocks:
        """The blocks of this theme; lines of another, or of another width, are dropped."""
        drawn_in = self.app.theme, self._is_signed, self.outer_size.width
        if self._blocks is None or drawn_in != self._drawn_in:
            self._lines.clear()
            self._drawn_in = drawn_in
            self._blocks = MapBlocks(self.ramp, self.paint, self.ground, is_signed=self._is_signed)
        return self._blocks

    def _row_label(self, y: int, shades: Shades, scale: Scale, is_marked: bool) -> Segment:
        cells, grid = self._gutter, shades.grid
        row = -(-2 * y // scale.tall)  # the first row that begins in this line
        begins = 2 * y <= row * scale.tall <= 2 * y + 1 and row < shades.shape[0]
        # Every row of a small map; of a large one so many that they can be read.
        if not cells or not begins or not (scale.tall >= FIGURE_HALVES or y % 4 == 0 or is_marked):
            return Segment(" " * cells, self.ground)
        label = (grid.top + row * grid.cell_rows) * max(1, grid.fold)
        style = self.paint("ink-oracle" if is_marked else "ink-quiet", bold=is_marked)
        return Segment(f"{label}".rjust(cells - 1) + " ", self.ground + style)

    def _pieces(
        self, blocks: MapBlocks, rows: list[int], y: int, shades: Shades, scale: Scale
    ) -> list[Segment]:
        """The blocks of a line; none below the last row."""
        if rows[0] >= shades.shape[0]:
            return []
        if _has_figures(scale):
            row, is_first = rows[0], 2 * y == rows[0] * scale.tall
            values = shades.grid.values[row].tolist()
            return blocks.figures(shades.levels[row], values, scale.wide, is_first=is_first)
        return blocks.line(_row(shades, rows[0]), _row(shades, rows[1]), scale.wide)

    def _cursor_cell(self, shades: Shades) -> tuple[int, int] | None:
        """Row and column of the grid under the cursor, if that is in view."""
        if self.window is None:
            return None
        row = (self.window.row - shades.grid.top) // shades.grid.cell_rows
        column = (self.window.column - shades.grid.left) // shades.grid.cell_columns
        rows, columns = shades.shape
        return (row, column) if 0 <= row < rows and 0 <= column < columns else None

    # Around it

    def _heading(self, shades: Shades) -> Text:
        """What is shown, and how much of it a cell is."""
        assert self.kind is not None and self.view is not None
        quiet, view, grid = self.paint("ink-quiet"), self.view, shades.grid
        ink = {"TRACE": "ink-trace", "ORACLE": "ink-oracle"}.get(self.kind.name)
        line = Text.assemble((self.kind.value, self.paint(ink, bold=True) if ink else "bold"))
        line.append(f"  {view.name}", "bold" if is_head(view) else "")
        size = f"{view.num_rows:,} × {view.num_columns:,}"
        if grid.cell_rows * grid.cell_columns == 1:
            said = "every value"
        else:
            said = f"a cell: {grid.cell_rows:,} × {grid.cell_columns:,}"
        for extra in (size, COMPUTING if self._is_waiting else said):
            if line.cell_len + len(extra) + 2 <= self.line_width:
                line.append(f"  {extra}", quiet)
        if not self._is_roomy:
            legend = self._legend(shades, 6)
            if line.cell_len + legend.cell_len + 2 <= self.line_width:
                line.append("  ").append_text(legend)
        line.truncate(self.line_width)
        return line

    def _axis(self, shades: Shades, scale: Scale) -> Text:
        """Columns of the matrix below the map."""
        line, grid = "", shades.grid
        gutter, cells = self._gutter, shades.shape[1]
        step = max(1, TICK_CELLS // scale.wide)
        for column in range(0, cells, step):
            label = str(grid.left + column * grid.cell_columns)
            at = gutter + column * scale.wide
            if at + len(label) <= self.line_width and len(line) <= at:
                line = line.ljust(at) + f"{label} "
        text = Text(line.rstrip(), self.paint("ink-quiet"))
        name = grid.columns
        if text.cell_len + len(name) + 2 <= self.line_width:
            text.append(f"  {name}", self.paint("ink-quiet"))
        cursor = self._cursor_cell(shades)
        if cursor is not None and self.has_focus and self.window is not None:
            label, at = str(self.window.column), gutter + cursor[1] * scale.wide
            at = max(0, min(at, self.line_width - len(label)))
            plain = text.plain.ljust(self.line_width)
            quiet, bold = self.paint("ink-quiet"), self.paint("ink-oracle", bold=True)
            text = Text.assemble(
                (plain[: max(0, at - 1)].ljust(at), quiet), (label, bold),
                (f" {plain[at + len(label) + 1 :]}", quiet),
            )  # fmt: skip
            text.truncate(self.line_width)
        return text

    def _legend(self, shades: Shades, cells: int) -> Text:
        """What the colours say."""
        quiet = self.paint("ink-quiet")
        grid, top = shades.grid, shades.top
        if grid.largest == 0:
            line = Text("all zero", quiet)
        else:
            low = format_ratio(top / 10**shades.decades)
            line = Text("0", quiet)
            if self._is_signed and not self.ramp.is_dense:
                line = Text("− ", quiet)
                for cell in range(cells // 2):
                    level = LEVELS - cell * LEVELS // (cells // 2)
                    line.append(" ", self.ramp.text_style(-level, is_signed=True))
                cells //= 2
            line.append_text(
                ramp_text(self.ramp, cells, is_signed=self._is_signed, low=low, quiet=quiet)
            )
            sign = " +" if self._is_signed and not self.ramp.is_dense else ""
            line.append(f"{sign} {format_ratio(top)}", quiet)
            if self._is_signed and self.ramp.is_dense:
                negative = self.paint("ink-oracle")
                line.append("  −", quiet).append(self.ramp.density(LEVELS) * 2, negative)
        nan = int(grid.nan.sum())
        infinite = int(grid.nonfinite.sum()) - nan
        for glyph, count, word in ((NAN_GLYPH, nan, "NaN"), (INFINITE_GLYPH, infinite, "Inf")):
            if count:
                line.append(f"  {glyph} {count:,} {word}", self.paint("verdict-nonfinite"))
        largest = f"  largest {format_ratio(grid.largest)}"
        if grid.largest and line.cell_len + len(largest) <= self.line_width and self._is_roomy:
            line.append(largest)
        return line

    def _readout(self, number: int) -> Text:
        """What is under the cursor: the place, and what both sides have there."""
        cell, shades = self.cell, self._shades
        if cell is None or shades is None:
            return Text("")
        quiet = self.paint("ink-quiet")
        axes, place = list(cell.position), list(cell.position.values())
        where = Text(format_position(axes, place))
        if shades.grid.cell_rows * shades.grid.cell_columns > 1:
            where = Text.assemble(("farthest: ", quiet), where)
        figures = Text("")
        is_wide = self.line_width >= WIDE_CELLS
        pairs = [("trace", "ink-trace", cell.trace), ("oracle", "ink-oracle", cell.oracle)]
        if cell.trace is not None and cell.oracle is not None:
            pairs.append(("|d|", "ink-quiet", abs(cell.trace - cell.oracle)))
        for name, ink, value in pairs:
            if value is not None:
                said = format_value(value) if is_wide else format_compact(value, 7)
                figures.append(f"{name} ", self.paint(ink)).append(f"{said}  ")
        figures.rstrip()
        if is_wide:
            line = where.append("   ").append_text(figures) if number == 0 else Text("")
        else:
            line = (where, figures)[number] if number < 2 else Text("")
        line.truncate(self.line_width, overflow="ellipsis")
        return line


def is_head(view: MapView) -> bool:
    """Whether a view is one head of several."""
    return view.rows == "query" and not view.is_reduced


def _has_figures(scale: Scale) -> bool:
    """Whether cells are large enough to have their figures written into them."""
    return scale.wide >= FIGURE_COLUMNS and scale.tall >= FIGURE_HALVES


def _row(shades: Shades, row: int) -> list[int] | list[None]:
    """Levels of a row of the grid; those below its last are None."""
    rows, columns = shades.shape
    return shades.levels[row] if row < rows else [None] * columns
