"""Every value of a tensor: where it is, what both sides have, how far apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType

from aprcore.records.telling import format_position, format_ratio, format_value
from aprtui.bindings import cursor_keys
from aprtui.formatting import format_compact, format_short
from aprtui.pictures import Ask, OpenTensor
from aprtui.places import parse_place
from aprtui.widgets.divergence_table import SHORT_AXES
from aprtui.widgets.line_picture import LinePicture
from aprtui.widgets.picture_view import both_sides

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout
    from aprcore.pictures import ValueWindow

# Values of one window: more than a screen of them, at a cost of one read.
WINDOW_VALUES = 1024
# Windows kept: what is in view, and its neighbours.
WINDOWS_KEPT = 4
NO_VALUES = "neither side has this tensor"
# Cells from which values have all their decimals.
WIDE_CELLS = 56
# A value of one side, "-3.31e-01", and the gap before it.
CELL = 10
# Of the largest differences so many stand out among the values of one side.
MARKED = 10
# Lines from which what is under the cursor has one of its own.
ROOMY_LINES = 5


@dataclass(frozen=True, slots=True)
class ValuesAsk(Ask):
    """Values from a flat index on."""

    start: int

    def make(self, tensor: OpenTensor, is_cancelled: Callable[[], bool]) -> ValueWindow:
        """Read them."""
        from aprcore.pictures import values

        return values(tensor.pair, self.start, WINDOW_VALUES)


class Sight(Enum):
    """What is shown of every value. The value is what the headings call it."""

    BOTH = "both"
    TRACE = "trace"
    ORACLE = "oracle"
    DIFF = "|diff|"


INKS = {Sight.TRACE: "ink-trace", Sight.ORACLE: "ink-oracle"}


class ValueGrid(LinePicture):
    """Values that are read when they come into view; `m` shows one side in lines of several.

    Attributes:
        sight: What is shown of them.
        index: The cursor.
        total: Values of the longer side.
    """

    HINT = "m one side · l next largest difference · : go to"

    BINDINGS: ClassVar[list[BindingType]] = [
        *cursor_keys(
            "values", "line", "value",
            Binding("left", "sideways(-1)", "left", id="values.left", show=False,
                    tooltip="The value before; of one per line, the same place a row before"),
            Binding("right", "sideways(1)", "right", id="values.right", show=False,
                    tooltip="The value after; of one per line, the same place a row after"),
        ),
    ]  # fmt: skip

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.commands = {"kind": self._next_sight, "next-largest": self._go_to_next_rank}
        self.sight = Sight.BOTH
        self.index = 0
        self.total = 0
        self._windows: dict[int, ValueWindow] = {}
        self._layout_shown: Layout | None = None
        self._ranked: list[int] = []
        self._ranks: dict[int, int] = {}
        self._rank = 0  # of the largest difference that was gone to last

    def ask(self) -> Ask | None:
        """The first window in view that is missing."""
        if not self._is_current:
            return ValuesAsk(0)
        top = self.scroll_offset.y
        first = top * self.per_line // WINDOW_VALUES * WINDOW_VALUES
        last = min((top + self.page) * self.per_line, self.total)
        for start in range(first, last, WINDOW_VALUES):
            if start not in self._windows:
                return ValuesAsk(start)
        return None

    def take(self, ask: Ask, picture: Any) -> None:
        """Show values."""
        assert isinstance(ask, ValuesAsk)
        window: ValueWindow = picture
        if not self._is_current:
            self._begin(window)
        self._windows[ask.start] = window
        if len(self._windows) > WINDOWS_KEPT:
            here = self.scroll_offset.y * self.per_line
            del self._windows[max(self._windows, key=lambda start: abs(start - here))]
        self._lines.clear()
        self.refresh()

    def _begin(self, window: ValueWindow) -> None:
        self._is_current = True
        self._windows.clear()
        self.index, self.total, self._rank = 0, window.total, 0
        layout = self.layout_of_stage
        is_whole = layout is not None and math.prod(layout.shape) == self.total
        self._layout_shown = layout if is_whole else None
        self._ranked = self.ranked
        self._ranks = {index: rank for rank, index in enumerate(self._ranked, 1)}
        self.say("" if window.total else NO_VALUES)
        self.fit()
        self.scroll_to(y=0, animate=False, force=True)

    @property
    def per_line(self) -> int:
        """Values of a line: a power of two, so that places are easy to find."""
        if self.sight is Sight.BOTH:
            return 1
        room = max(1, (self.line_width - self._index_cells) // CELL)
        return 1 << (room.bit_length() - 1)

    @property
    def line_count(self) -> int:
        """As many lines as all values take."""
        return -(-self.total // self.per_line)

    @property
    def cursor_line(self) -> int:
        """The line of the value."""
        return self.index // self.per_line

    @property
    def lines_below(self) -> int:
        """What is under the cursor, which a line of both sides says by itself."""
        return int(self.sight is not Sight.BOTH and self.size.height >= ROOMY_LINES)

    @property
    def _is_wide(self) -> bool:
        return self.line_width >= WIDE_CELLS

    @property
    def _index_cells(self) -> int:
        return max(len(str(self.total - 1)), *(len(sight.value) for sight in Sight))

    def line(self, number: int, is_marked: bool) -> Text:
        """A value of both sides, or several of one."""
        if self.sight is Sight.BOTH:
            return self._pair_line(number)
        line = self._grid_line(number)
        if is_marked:
            start = self._index_cells + (self.index % self.per_line) * CELL
            line.stylize(self.cursor_style(), start + 1, start + CELL)
        return line

    def heading(self) -> Text:
        """What each column is."""
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

    def below(self, number: int) -> Text:
        """The place under the cursor, and what both sides have there."""
        layout = self._layout_shown
        whole = short = f"index {self.index}"
        if layout is not None and len(layout.axes) > 1:
            place = layout.position(self.index)
            whole, short = format_position(layout.axes, place), ",".join(map(str, place))
        pairs = both_sides(*self._sides(self.index))
        # As much as there is room for.
        for place_text, form in ((whole, format_value), (whole, format_compact),
                                 (short, format_compact)):  # fmt: skip
            line = Text(place_text)
            for name, ink, value in pairs:
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

    # What the user does

    def jump(self, text: str) -> str:
        """Go to a flat index or to coordinates."""
        layout = self._layout_shown or self.layout_of_stage
        if layout is None:
            return "there is no value to go to"
        index = parse_place(text, layout)
        if isinstance(index, str):
            return index
        self._point(index, is_far=True)
        return ""

    def action_move(self, step: int) -> None:
        """Move the cursor by lines."""
        self._point(self.index + step * self.per_line)

    def action_sideways(self, step: int) -> None:
        """Move the cursor within its line; of one value per line, by a row of the last axis."""
        is_pair, layout = self.sight is Sight.BOTH, self._layout_shown
        self._point(self.index + step * (layout.factors[-1] if is_pair and layout else 1))

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self.action_move(pages * self.page)

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor."""
        line = event.y - 1 + self.scroll_offset.y
        place = 0 if self.sight is Sight.BOTH else (event.x - self._index_cells) // CELL
        number = line * self.per_line + max(0, min(place, self.per_line - 1))
        if 1 <= event.y <= self.page and number < self.total:
            self._point(number)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Other values come into view."""
        super().watch_scroll_y(old_value, new_value)
        self.post_message(self.Wanted())

    def _next_sight(self) -> None:
        """Show something else of every value; the cursor stays."""
        sights = list(Sight)
        self.sight = sights[(sights.index(self.sight) + 1) % len(sights)]
        self.fit()
        self._point(self.index, is_far=True)
        self.post_message(self.Wanted())

    def _go_to_next_rank(self) -> None:
        """From the largest difference to the next, and to the largest from anywhere else."""
        if self._ranked:
            is_on_it = self._rank > 0 and self._ranked[self._rank - 1] == self.index
            self._rank = self._rank % len(self._ranked) + 1 if is_on_it else 1
            self._point(self._ranked[self._rank - 1], is_far=True)

    def _point(self, index: int, *, is_far: bool = False) -> None:
        before = self.index
        self.index = max(0, min(index, self.total - 1))
        if not self.show_cursor(is_far=is_far) and before != self.index:
            self.refresh_lines(before // self.per_line, self.cursor_line)


def _value(window: ValueWindow | None, side: str, index: int) -> float | None:
    values = None if window is None else getattr(window, side)
    if window is None or values is None or index - window.start >= len(values):
        return None
    return float(values[index - window.start])
