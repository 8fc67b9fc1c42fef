"""Every value of a tensor: where it is, what both sides have, how far apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.binding import Binding, BindingType

from aprtui.pictures import WINDOW_VALUES, ValuesAsk
from aprtui.places import parse_place
from aprtui.widgets.drawn_values import CELL, DrawnValues, Sight

if TYPE_CHECKING:
    from aprcore.pictures import ValueWindow
    from aprtui.pictures import Ask, Picture

# Windows kept: what is in view, and its neighbours.
WINDOWS_KEPT = 4
NO_VALUES = "neither side has this tensor"


class ValueGrid(DrawnValues):
    """Values that are read when they come into view; `m` shows one side in lines of several."""

    HINT = "m one side · l next largest difference · : go to"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "line(-1)", "up", id="values.up", show=False, tooltip="One line up"),
        Binding("down", "line(1)", "down", id="values.down", show=False,
                tooltip="One line down"),
        Binding("left", "sideways(-1)", "left", id="values.left", show=False,
                tooltip="The value before; of one per line, the same place a row before"),
        Binding("right", "sideways(1)", "right", id="values.right", show=False,
                tooltip="The value after; of one per line, the same place a row after"),
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
        self.commands = {"kind": self._next_sight, "next-largest": self._go_to_next_rank}
        self._ranked: list[int] = []
        self._rank = 0  # of the largest difference that was gone to last

    def ask(self) -> Ask | None:
        """The first window in view that is missing."""
        if not self._is_current:
            return ValuesAsk(0)
        top = self.scroll_offset.y
        first = top * self.per_line // WINDOW_VALUES * WINDOW_VALUES
        last = min((top + self._page) * self.per_line, self.total)
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
            here = self.scroll_offset.y * self.per_line
            del self._windows[max(self._windows, key=lambda start: abs(start - here))]
        self._lines.clear()
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
        self._reserve_lines()
        self.scroll_to(y=0, animate=False, force=True)

    def fit(self) -> None:
        """The cursor stays in view."""
        if self._is_current:
            self._reserve_lines()
            self._point(self.index)

    def _reserve_lines(self) -> None:
        self.reserve(self._line_count + 1 + self._lines_below)

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

    def action_line(self, step: int) -> None:
        """Move the cursor by lines."""
        self._point(self.index + step * self.per_line)

    def action_sideways(self, step: int) -> None:
        """Move the cursor within its line; of one value per line, by a row of the last axis."""
        is_pair, layout = self.sight is Sight.BOTH, self._layout_shown
        self._point(self.index + step * (layout.factors[-1] if is_pair and layout else 1))

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self._point(self.index + pages * self._page * self.per_line)

    def action_end(self, last: int) -> None:
        """Go to the first or the last value."""
        self._point(last * self.total)

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor."""
        line = event.y - 1 + self.scroll_offset.y
        place = 0 if self.sight is Sight.BOTH else (event.x - self._index_cells) // CELL
        number = line * self.per_line + max(0, min(place, self.per_line - 1))
        if 1 <= event.y <= self._page and number < self.total:
            self._point(number)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Other values come into view."""
        super().watch_scroll_y(old_value, new_value)
        self.post_message(self.Wanted())

    def _next_sight(self) -> None:
        """Show something else of every value; the cursor stays."""
        sights = list(Sight)
        self.sight = sights[(sights.index(self.sight) + 1) % len(sights)]
        self._reserve_lines()
        self._point(self.index, is_far=True)
        self.refresh()
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
        line, top = self.index // self.per_line, self.scroll_offset.y
        y = min(line, max(top, line - self._page + 1))
        if is_far and y != top:
            y = max(0, line - self._page // 2)
        if y != top:
            self.scroll_to(y=y, animate=False, force=True)
            self.refresh()
        elif before != self.index:
            self.refresh_cursor(before, self.index)
