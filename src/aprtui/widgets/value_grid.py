"""Every value of a tensor, one per line: where it is, what both sides have, how far apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.strip import Strip

from aprtui.formatting import format_ratio, format_short, format_value
from aprtui.pictures import WINDOW_VALUES, ValuesAsk
from aprtui.places import parse_place
from aprtui.widgets.divergence_table import SHORT_AXES
from aprtui.widgets.picture_view import PictureView

if TYPE_CHECKING:
    from aprcore.layouts import Layout
    from aprcore.pictures import ValueWindow
    from aprtui.pictures import Ask, Picture

# Cells from which values have all their decimals.
WIDE_CELLS = 56
# Windows kept: what is in view, and its neighbours.
WINDOWS_KEPT = 4
NO_VALUES = "neither side has this tensor"


class ValueGrid(PictureView):
    """A line per value under headings that stay; lines are read when they come into view.

    Attributes:
        index: The cursor.
        total: Values of the longer side.
    """

    HINT = "m next largest difference · : go to"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "up", id="values.up", show=False, tooltip="One value up"),
        Binding("down", "move(1)", "down", id="values.down", show=False,
                tooltip="One value down"),
        Binding("left", "row(-1)", "row up", id="values.left", show=False,
                tooltip="The same place one step back along the last axis but one"),
        Binding("right", "row(1)", "row down", id="values.right", show=False,
                tooltip="The same place one step on along the last axis but one"),
        Binding("pageup", "page(-1)", "page up", id="values.page-up", show=False,
                tooltip="One page up"),
        Binding("pagedown", "page(1)", "page down", id="values.page-down", show=False,
                tooltip="One page down"),
        Binding("home", "end(0)", "first", id="values.home", show=False,
                tooltip="The first value"),
        Binding("end", "end(1)", "last", id="values.end", show=False, tooltip="The last value"),
    ]  # fmt: skip

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.index = 0
        self.total = 0
        self.commands = {"kind": self._go_to_next_rank}
        self._windows: dict[int, ValueWindow] = {}
        self._layout_shown: Layout | None = None
        self._ranks: dict[int, int] = {}
        self._ranked: list[int] = []
        self._rank = 0  # of the largest difference that was gone to last

    def ask(self) -> Ask | None:
        """The first window in view that is missing."""
        if not self._is_current:
            return ValuesAsk(0)
        first = self.scroll_offset.y // WINDOW_VALUES * WINDOW_VALUES
        last = min(self.scroll_offset.y + self._page, self.total)
        for start in range(first, last, WINDOW_VALUES):
            if start not in self._windows:
                return ValuesAsk(start)
        return None

    def take(self, ask: Ask, picture: Picture) -> None:
        """Show values."""
        assert isinstance(ask, ValuesAsk)
        window: ValueWindow = picture  # type: ignore[assignment]
        if not self._is_current:
            self._begin(window)
        self._windows[ask.start] = window
        if len(self._windows) > WINDOWS_KEPT:
            here = self.scroll_offset.y
            del self._windows[max(self._windows, key=lambda start: abs(start - here))]
        self.refresh()

    def _begin(self, window: ValueWindow) -> None:
        self._is_current = True
        self._windows.clear()
        self.index, self.total, self._rank = 0, window.total, 0
        report = self.report
        layout = None if report is None else report.layout
        is_whole = layout is not None and math.prod(layout.shape) == self.total
        self._layout_shown = layout if is_whole else None
        found = None if report is None else report.comparison
        self._ranked = [] if found is None else found.top.indices.tolist()
        self._ranks = {index: rank for rank, index in enumerate(self._ranked, 1)}
        self.say("" if window.total else NO_VALUES)
        self.reserve(self.total + 1)
        self.scroll_to(y=0, animate=False, force=True)

    def fit(self) -> None:
        """The cursor stays in view."""
        if self._is_current:
            self.reserve(self.total + 1)
            self._point(self.index)

    def jump(self, text: str) -> str:
        """Go to a flat index or to coordinates."""
        layout = self._layout_shown or (None if self.report is None else self.report.layout)
        if layout is None:
            return "there is no value to go to"
        index = parse_place(text, layout)
        if isinstance(index, str):
            return index
        self._point(index, is_far=True)
        return ""

    def action_move(self, step: int) -> None:
        """Move the cursor by values."""
        self._point(self.index + step)

    def action_row(self, step: int) -> None:
        """Move the cursor by the length of the last axis."""
        length = 1 if self._layout_shown is None else self._layout_shown.factors[-1]
        self._point(self.index + step * length)

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self._point(self.index + pages * self._page)

    def action_end(self, last: int) -> None:
        """Go to the first or the last value."""
        self._point(last * self.total)

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor."""
        number = event.y - 1 + self.scroll_offset.y
        if event.y >= 1 and number < self.total:
            self._point(number)

    def on_focus(self) -> None:
        """The cursor shows."""
        self.refresh()

    def on_blur(self) -> None:
        """The cursor hides."""
        self.refresh()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Other values come into view."""
        super().watch_scroll_y(old_value, new_value)
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
        top = self.scroll_offset.y
        y = min(self.index, max(top, self.index - self._page + 1))
        if is_far and y != top:
            y = max(0, self.index - self._page // 2)
        if y != top:
            self.scroll_to(y=y, animate=False, force=True)
        if before != self.index or y != top:
            self.refresh()

    @property
    def _page(self) -> int:
        return max(1, self.size.height - 1)

    @property
    def _is_wide(self) -> bool:
        return self.line_width >= WIDE_CELLS

    def draw(self, y: int) -> Strip:
        """The headings, or a value."""
        if not self._windows:
            return self.strip(Text(""))
        if y == 0:
            return self.strip(self._headings())
        index = y - 1 + self.scroll_offset.y
        if index >= self.total:
            return self.strip(Text(""))
        is_marked = index == self.index and self.has_focus
        ground = self.app.theme_variables["panel"]
        style = Style(bgcolor=ground, bold=True) if is_marked else None
        return self.strip(self._line(index), style)

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

    def _headings(self) -> Text:
        line = Text()
        for name, cells, ink in self._columns():
            line.append(name.rjust(cells), self.paint(ink))
        return line

    def _line(self, index: int) -> Text:
        columns = self._columns()
        form = format_value if self._is_wide else format_short
        start = index // WINDOW_VALUES * WINDOW_VALUES
        window = self._windows.get(start)
        texts = [str(index)]
        if self._layout_shown is not None and (len(columns) > 4 or columns[0][0] == "place"):
            position = [str(i) for i in self._layout_shown.position(index)]
            texts = [",".join(position)] if columns[0][0] == "place" else [*texts, *position]
        a, b = (_value(window, side, index) for side in ("trace", "oracle"))
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
