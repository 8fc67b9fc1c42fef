"""A map as it is drawn: its blocks, what stands around them, and what is under the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.segment import Segment
from rich.text import Text
from textual.strip import Strip

from aprcore.records.telling import format_position, format_ratio, format_value
from aprtui.formatting import format_compact
from aprtui.map_blocks import MapBlocks
from aprtui.map_pictures import GridAsk, Shades, gutter_of, is_head
from aprtui.map_window import FIGURE_COLUMNS, FIGURE_HALVES, MapWindow, Scale
from aprtui.ramp import INFINITE_GLYPH, LEVELS, NAN_GLYPH
from aprtui.widgets.bars import ramp_text
from aprtui.widgets.picture_view import PictureView, both_sides

if TYPE_CHECKING:
    from aprcore.pictures import CellValue

# Cells from which what is under the cursor takes one line.
WIDE_CELLS = 76
LEGEND_CELLS, SHORT_LEGEND_CELLS = 16, 6
# Cells between the marks of the columns' axis.
TICK_CELLS = 10


class DrawnMap:
    """A part of a map of |diff|, of a side or of the ratio, as a pane of pictures shows it.

    Two values per character where there are colours.

    Attributes:
        shades: The values.
        scale: How large their cells are.
    """

    def __init__(self, pane: PictureView, ask: GridAsk, shades: Shades, scale: Scale) -> None:
        self.shades = shades
        self.scale = scale
        self._pane = pane
        self._kind, self._view = ask.kind, ask.view
        self._is_signed = ask.kind.name in ("TRACE", "ORACLE")
        self._gutter = gutter_of(ask.view)
        self._lines: dict[int, Strip] = {}
        self._blocks: MapBlocks | None = None
        self._drawn_in: tuple[str, int] | None = None

    def cell_at(self, x: int, y: int) -> tuple[int, int] | None:
        """Row and column of the map's first value in what is drawn at a cell of the screen."""
        down, across = y * 2 // self.scale.tall, (x - self._gutter) // self.scale.wide
        rows, columns = self.shades.shape
        is_inside = 0 <= down < rows and 0 <= across < columns
        return self.shades.place_of(down, across) if is_inside else None

    def lines_of(self, window: MapWindow) -> range:
        """The lines that the cursor of a window is on."""
        first = (window.row - window.top) // self.scale.rows * self.scale.tall
        return range(first // 2, (first + self.scale.tall - 1) // 2 + 1)

    def line(self, y: int, cursor: tuple[int, int] | None) -> Strip:
        """A line of the map itself.

        Args:
            y: Which one.
            cursor: Row and column of the cell that the cursor is on, where it is shown.
        """
        scale, width = self.scale, self._pane.outer_size.width
        rows = [half // scale.tall for half in (2 * y, 2 * y + 1)]
        marked = cursor if cursor is not None and cursor[0] in rows else None
        blocks = self._block_painter()
        strip = self._lines.get(y)
        if strip is None or marked is not None:
            gutter = self._row_label(y, marked is not None)
            pieces = self._pieces(blocks, rows, y)
            cells = len(gutter.text) + self.shades.shape[1] * scale.wide * bool(pieces)
            strip = Strip([gutter, *pieces], cells)
        if marked is not None:
            start = self._gutter + marked[1] * scale.wide
            before, cell, after = strip.divide([start, start + scale.wide, strip.cell_length])
            halves = [row == marked[0] for row in rows]
            other = self._row(rows[1 if halves[0] else 0])[marked[1]]
            block = blocks.cursor(cell.text, halves, other, is_figure=self._has_figures)
            strip = Strip([*before, block, *after], strip.cell_length)
        if strip.cell_length != width:
            strip = strip.adjust_cell_length(width, self._pane.ground)
        if marked is None:
            self._lines[y] = strip
        return strip

    def _block_painter(self) -> MapBlocks:
        """The blocks of this theme; lines of another, or of another width, are dropped."""
        pane = self._pane
        drawn_in = pane.app.theme, pane.outer_size.width
        if self._blocks is None or drawn_in != self._drawn_in:
            self._lines.clear()
            self._drawn_in = drawn_in
            self._blocks = MapBlocks(pane.ramp, pane.paint, pane.ground, is_signed=self._is_signed)
        return self._blocks

    def _row_label(self, y: int, is_marked: bool) -> Segment:
        cells, grid, tall = self._gutter, self.shades.grid, self.scale.tall
        row = -(-2 * y // tall)  # the first row that begins in this line
        begins = 2 * y <= row * tall <= 2 * y + 1 and row < self.shades.shape[0]
        # Every row of a small map; of a large one so many that they can be read.
        if not cells or not begins or not (tall >= FIGURE_HALVES or y % 4 == 0 or is_marked):
            return Segment(" " * cells, self._pane.ground)
        label = (grid.top + row * grid.cell_rows) * max(1, grid.fold)
        style = self._pane.paint("ink-oracle" if is_marked else "ink-quiet", bold=is_marked)
        return Segment(f"{label}".rjust(cells - 1) + " ", self._pane.ground + style)

    def _pieces(self, blocks: MapBlocks, rows: list[int], y: int) -> list[Segment]:
        """The blocks of a line; none below the last row."""
        shades, scale = self.shades, self.scale
        if rows[0] >= shades.shape[0]:
            return []
        if self._has_figures:
            row, is_first = rows[0], 2 * y == rows[0] * scale.tall
            values = shades.grid.values[row].tolist()
            return blocks.figures(shades.levels[row], values, scale.wide, is_first=is_first)
        return blocks.line(self._row(rows[0]), self._row(rows[1]), scale.wide)

    def _row(self, row: int) -> list[int] | list[None]:
        """Levels of a row of the grid; those below its last are None."""
        rows, columns = self.shades.shape
        return self.shades.levels[row] if row < rows else [None] * columns

    @property
    def _has_figures(self) -> bool:
        """Whether cells are large enough to have their figures written into them."""
        return self.scale.wide >= FIGURE_COLUMNS and self.scale.tall >= FIGURE_HALVES

    # Around it

    def heading(self, waiting: str, is_roomy: bool) -> Text:
        """What is shown, and how much of it a cell is.

        Args:
            waiting: What is said in place of the cell's size while another part is made.
            is_roomy: Whether the legend has a line of its own.
        """
        pane, view, grid = self._pane, self._view, self.shades.grid
        quiet, width = pane.paint("ink-quiet"), pane.line_width
        ink = {"TRACE": "ink-trace", "ORACLE": "ink-oracle"}.get(self._kind.name)
        line = Text.assemble((self._kind.value, pane.paint(ink, bold=True) if ink else "bold"))
        line.append(f"  {view.name}", "bold" if is_head(view) else "")
        size = f"{view.num_rows:,} × {view.num_columns:,}"
        if grid.cell_rows * grid.cell_columns == 1:
            said = "every value"
        else:
            said = f"a cell: {grid.cell_rows:,} × {grid.cell_columns:,}"
        for extra in (size, waiting or said):
            if line.cell_len + len(extra) + 2 <= width:
                line.append(f"  {extra}", quiet)
        if not is_roomy:
            legend = self._ramp(SHORT_LEGEND_CELLS)
            if line.cell_len + legend.cell_len + 2 <= width:
                line.append("  ").append_text(legend)
        line.truncate(width)
        return line

    def axis(self, cursor: tuple[int, int] | None, column: int) -> Text:
        """Columns of the matrix below the map; the cursor's stands out where it is shown."""
        pane, grid, wide = self._pane, self.shades.grid, self.scale.wide
        line, width, quiet = "", pane.line_width, pane.paint("ink-quiet")
        for cell in range(0, self.shades.shape[1], max(1, TICK_CELLS // wide)):
            label, at = str(grid.left + cell * grid.cell_columns), self._gutter + cell * wide
            if at + len(label) <= width and len(line) <= at:
                line = line.ljust(at) + f"{label} "
        line = line.rstrip()
        if len(line) + len(grid.columns) + 2 <= width:
            line += f"  {grid.columns}"
        if cursor is None:
            return Text(line, quiet)
        label, at = str(column), self._gutter + cursor[1] * wide
        at = max(0, min(at, width - len(label)))
        plain = line.ljust(width)
        text = Text.assemble(
            (plain[: max(0, at - 1)].ljust(at), quiet),
            (label, pane.paint("ink-oracle", bold=True)),
            (f" {plain[at + len(label) + 1 :]}", quiet),
        )
        text.truncate(width)
        return text

    def legend(self) -> Text:
        """What the colours say, and how large the largest value is."""
        line, largest = self._ramp(LEGEND_CELLS), self.shades.grid.largest
        said = f"  largest {format_ratio(largest)}"
        if largest and line.cell_len + len(said) <= self._pane.line_width:
            line.append(said)
        return line

    def _ramp(self, cells: int) -> Text:
        """The colours, and how many values have none."""
        pane, grid, top = self._pane, self.shades.grid, self.shades.top
        quiet, has_signs = pane.paint("ink-quiet"), self._is_signed and not pane.ramp.is_dense
        if grid.largest == 0:
            line = Text("all zero", quiet)
        else:
            low = format_ratio(top / 10**self.shades.decades)
            line = Text("0", quiet)
            if has_signs:
                line = Text("− ", quiet)
                for cell in range(cells // 2):
                    level = LEVELS - cell * LEVELS // (cells // 2)
                    line.append(" ", pane.ramp.text_style(-level, is_signed=True))
                cells //= 2
            line.append_text(
                ramp_text(pane.ramp, cells, is_signed=self._is_signed, low=low, quiet=quiet)
            )
            sign = " +" if has_signs else ""
            line.append(f"{sign} {format_ratio(top)}", quiet)
            if self._is_signed and pane.ramp.is_dense:
                negative = pane.paint("ink-oracle")
                line.append("  −", quiet).append(pane.ramp.density(LEVELS) * 2, negative)
        nan = int(grid.nan.sum())
        infinite = int(grid.nonfinite.sum()) - nan
        for glyph, count, word in ((NAN_GLYPH, nan, "NaN"), (INFINITE_GLYPH, infinite, "Inf")):
            if count:
                line.append(f"  {glyph} {count:,} {word}", pane.paint("verdict-nonfinite"))
        return line

    def readout(self, cell: CellValue | None, number: int) -> Text:
        """What is under the cursor, in one line or two: the place, and what both sides have there.

        Args:
            cell: What it is; None while that is not known.
            number: Which line.
        """
        if cell is None:
            return Text("")
        paint, grid, is_wide = self._pane.paint, self.shades.grid, is_wide_pane(self._pane)
        where = Text(format_position(list(cell.position), list(cell.position.values())))
        if grid.cell_rows * grid.cell_columns > 1:
            where = Text.assemble(("farthest: ", paint("ink-quiet")), where)
        figures = Text("")
        for name, ink, value in both_sides(cell.trace, cell.oracle):
            said = format_value(value) if is_wide else format_compact(value, 7)
            figures.append(f"{name} ", paint(ink)).append(f"{said}  ")
        figures.rstrip()
        lines = [where.append("   ").append_text(figures)] if is_wide else [where, figures]
        line = lines[number] if number < len(lines) else Text("")
        line.truncate(self._pane.line_width, overflow="ellipsis")
        return line


def is_wide_pane(pane: PictureView) -> bool:
    """Whether what is under the cursor fits in one line."""
    return pane.line_width >= WIDE_CELLS
