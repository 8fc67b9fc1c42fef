"""Values as they are drawn: both sides of one per line, or one side in lines of several."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from rich.style import Style
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip

from aprcore.records.telling import format_position, format_ratio, format_value
from aprtui.formatting import format_compact, format_short
from aprtui.pictures import WINDOW_VALUES
from aprtui.widgets.divergence_table import SHORT_AXES
from aprtui.widgets.picture_view import PictureView

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout
    from aprcore.pictures import ValueWindow

# Cells from which values have all their decimals.
WIDE_CELLS = 56
# A value of one side, "-3.31e-01", and the gap before it.
CELL = 10
# Of the largest differences so many stand out among the values of one side.
MARKED = 10
# Lines from which what is under the cursor has one of its own.
ROOMY_LINES = 5


class Sight(Enum):
    """What is shown of every value. The value is what the headings call it."""

    BOTH = "both"
    TRACE = "trace"
    ORACLE = "oracle"
    DIFF = "|diff|"


INKS = {Sight.TRACE: "ink-trace", Sight.ORACLE: "ink-oracle"}


class DrawnValues(PictureView):
    """Values under headings that stay.

    Attributes:
        sight: What is shown of them.
        index: The cursor.
        total: Values of the longer side.
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.sight = Sight.BOTH
        self.index = 0
        self.total = 0
        self._windows: dict[int, ValueWindow] = {}
        self._layout_shown: Layout | None = None
        self._ranks: dict[int, int] = {}
        self._lines: dict[int, Strip] = {}
        self._drawn_in: tuple[object, ...] = ()

    def refresh_cursor(self, *indices: int) -> None:
        """Draw anew only what a move of the cursor changes: its lines, and what is under it."""
        top, width = self.scroll_offset.y, self.size.width
        lines = {index // self.per_line - top for index in indices}
        regions = [Region(0, y + 1, width, 1) for y in lines if 0 <= y < self._page]
        self.refresh(*regions, Region(0, self.size.height - 1, width, 1))

    @property
    def per_line(self) -> int:
        """Values of a line: a power of two, so that places are easy to find."""
        if self.sight is Sight.BOTH:
            return 1
        room = max(1, (self.line_width - self._index_cells) // CELL)
        return 1 << (room.bit_length() - 1)

    @property
    def _page(self) -> int:
        """Lines of values in view."""
        return max(1, self.size.height - 1 - self._lines_below)

    @property
    def _lines_below(self) -> int:
        return int(self.sight is not Sight.BOTH and self.size.height >= ROOMY_LINES)

    @property
    def _line_count(self) -> int:
        return -(-self.total // self.per_line)

    @property
    def _is_wide(self) -> bool:
        return self.line_width >= WIDE_CELLS

    @property
    def _index_cells(self) -> int:
        return max(len(str(self.total - 1)), *(len(sight.value) for sight in Sight))

    def draw(self, y: int) -> Strip:
        """The headings, values, or what is under the cursor."""
        if not self._windows:
            return self.strip(Text(""))
        if y == 0:
            return self.strip(self._headings())
        if self._lines_below and y == self.size.height - 1:
            return self.strip(self._readout())
        number = y - 1 + self.scroll_offset.y
        if number >= self._line_count:
            return self.strip(Text(""))
        drawn_in = self.app.theme, self.outer_size.width, self.sight, self._layout_shown
        if drawn_in != self._drawn_in:
            self._lines.clear()
            self._drawn_in = drawn_in
        if number == self.index // self.per_line and self.has_focus:
            return self._marked_line(number)
        strip = self._lines.get(number)
        if strip is None:
            strip = self._lines[number] = self.strip(self._line(number))
        return strip

    def _line(self, number: int) -> Text:
        is_pair = self.sight is Sight.BOTH
        return self._pair_line(number) if is_pair else self._grid_line(number)

    def _marked_line(self, number: int) -> Strip:
        """The cursor's line."""
        style = Style(bgcolor=self.app.theme_variables["panel"], bold=True)
        line = self._line(number)
        if self.sight is not Sight.BOTH:
            start = self._index_cells + (self.index % self.per_line) * CELL
            ink, ground = (
                self.paint(f"block-cursor-{part}").color for part in ("foreground", "background")
            )
            line.stylize(Style(color=ink, bgcolor=ground), start + 1, start + CELL)
        return self.strip(line, style)

    def _headings(self) -> Text:
        if self.sight is not Sight.BOTH:
            ink = self.paint(INKS.get(self.sight, "ink-quiet"))
            line = Text(self.sight.value.rjust(self._index_cells), ink)
            for place in range(self.per_line):
                line.append(f"+{place}".rjust(CELL), self.paint("ink-quiet"))
            return line
        line = Text()
        for name, cells, ink_name in self._columns():
            line.append(name.rjust(cells), self.paint(ink_name))
        return line

    # One side, several per line

    def _grid_line(self, number: int) -> Text:
        """An index, and the values from there on."""
        start = number * self.per_line
        line = Text.assemble((str(start).rjust(self._index_cells), self.paint("ink-quiet")))
        for index in range(start, min(start + self.per_line, self.total)):
            text = self._figure(index)
            style = Style.null()
            if text in ("NaN", "Inf", "-Inf"):
                style = self.paint("verdict-nonfinite", bold=True)
            elif self._ranks.get(index, MARKED + 1) <= MARKED:
                style = self.paint("verdict-fail", bold=True)
            line.append(" ").append(text.rjust(CELL - 1), style)
        return line

    def _figure(self, index: int) -> str:
        """What is shown of a value; a dash where a side has ended."""
        a, b = self._sides(index)
        if self._window_of(index) is None:
            return "…"
        if self.sight is Sight.DIFF:
            return "–" if a is None or b is None else format_ratio(abs(a - b))
        value = a if self.sight is Sight.TRACE else b
        return "–" if value is None else format_short(value)

    def _readout(self) -> Text:
        """The place under the cursor, and what both sides have there."""
        layout = self._layout_shown
        whole = short = f"index {self.index}"
        if layout is not None and len(layout.axes) > 1:
            place = layout.position(self.index)
            whole, short = format_position(layout.axes, place), ",".join(map(str, place))
        a, b = self._sides(self.index)
        pairs = [("trace", "ink-trace", a), ("oracle", "ink-oracle", b)]
        if a is not None and b is not None:
            pairs.append(("|d|", "ink-quiet", abs(a - b)))
        # As much as there is room for.
        for place_text, form in ((whole, format_value), (whole, format_compact),
                                 (short, format_compact)):  # fmt: skip
            line = Text(place_text)
            for name, ink, value in pairs:
                if value is not None:
                    line.append(f"  {name} ", self.paint(ink)).append(form(value))
            if line.cell_len <= self.line_width:
                break
        rank = self._ranks.get(self.index)
        if rank is not None:
            line.append(f"  ◀ #{rank}", self.paint("verdict-fail", bold=True))
        line.truncate(self.line_width, overflow="ellipsis")
        return line

    def _window_of(self, index: int) -> ValueWindow | None:
        return self._windows.get(index // WINDOW_VALUES * WINDOW_VALUES)

    def _sides(self, index: int) -> tuple[float | None, float | None]:
        """Trace and oracle; None where a side has ended, or is not read yet."""
        window = self._window_of(index)
        return _value(window, "trace", index), _value(window, "oracle", index)

    # Both sides of one per line

    def _columns(self) -> list[tuple[str, int, str]]:
        """Heading, cells and ink of every column."""
        gap, value = (2, 10) if self._is_wide else (1, 9)
        index = max(len(str(self.total - 1)), 5)
        figures = [
            ("trace", value + gap, "ink-trace"),
            ("oracle", value + gap, "ink-oracle"),
            ("|diff|", 7 + gap, "ink-quiet"),
        ]
        room = self.line_width - sum(cells for _, cells, _ in figures)
        axes = self._axes()
        apart = [
            ("index", index, "ink-quiet"),
            *((name, max(len(name), len(last)) + gap, "ink-quiet") for name, last in axes),
        ]
        place = max(len("place"), len(",".join(last for _, last in axes)))
        # The position in one column where not all fit, the index alone where that does not.
        if sum(cells for _, cells, _ in apart) <= room:
            return [*apart, *figures]
        if axes and place <= room:
            return [("place", place, "ink-quiet"), *figures]
        return [apart[0], *figures]

    def _axes(self) -> list[tuple[str, str]]:
        """Name and last index of every axis; none where the index says it all."""
        layout = self._layout_shown
        if layout is None or len(layout.axes) == 1:
            return []
        return [
            (axis if self._is_wide else SHORT_AXES.get(axis, axis), str(size - 1))
            for axis, size in zip(layout.axes, layout.factors)
        ]

    def _pair_line(self, index: int) -> Text:
        """One value of both sides."""
        columns = self._columns()
        form = format_value if self._is_wide else format_short
        window = self._window_of(index)
        texts = [str(index)]
        if self._layout_shown is not None and (len(columns) > 4 or columns[0][0] == "place"):
            position = [str(i) for i in self._layout_shown.position(index)]
            texts = [",".join(position)] if columns[0][0] == "place" else [*texts, *position]
        a, b = self._sides(index)
        texts += ["…" if window is None else "–" if x is None else form(x) for x in (a, b)]
        diff = None if a is None or b is None else abs(a - b)
        texts.append("" if diff is None else format_ratio(diff))
        line = Text()
        bad = self.paint("verdict-nonfinite", bold=True)
        quiet = self.paint("ink-quiet")
        last = len(columns) - 3
        for number, (text, (_, cells, _)) in enumerate(zip(texts, columns)):
            style: Style | str = quiet if number < last else ""
            if text in ("NaN", "Inf", "-Inf"):
                style = bad
            line.append(text.rjust(cells), style)
        rank = self._ranks.get(index)
        if rank is not None:
            line.append(f" ◀ #{rank}", self.paint("verdict-fail", bold=True))
        line.truncate(self.line_width)
        return line


def _value(window: ValueWindow | None, side: str, index: int) -> float | None:
    values = None if window is None else getattr(window, side)
    if window is None or values is None or index - window.start >= len(values):
        return None
    return float(values[index - window.start])
