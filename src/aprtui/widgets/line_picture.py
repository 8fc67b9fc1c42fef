"""Pictures of lines under a heading that stays, with a cursor on one of them."""

from __future__ import annotations

from abc import abstractmethod

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip

from aprtui.widgets.picture_view import PictureView


class LinePicture(PictureView):
    """Lines that are drawn when they come into view, and kept until `fit` is called."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._lines: dict[int, Strip] = {}
        self._drawn_for: tuple[object, ...] = ()

    @property
    @abstractmethod
    def line_count(self) -> int:
        """Lines to scroll through; none before there is a picture."""

    @property
    @abstractmethod
    def cursor_line(self) -> int:
        """The line that the cursor is on."""

    @property
    @abstractmethod
    def lines_below(self) -> int:
        """Lines under the others, which stay as the heading does."""

    @abstractmethod
    def heading(self) -> Text:
        """What stands above the lines."""

    @abstractmethod
    def line(self, number: int, is_marked: bool) -> Text | list[Segment]:
        """A line, with the cursor on it or not."""

    @abstractmethod
    def below(self, number: int) -> Text:
        """One of the lines under the others."""

    def draw(self, y: int) -> Strip:
        """The heading, the lines scrolled to, what is under them."""
        if self.line_count == 0:
            return self.strip(Text(""))
        if y == 0:
            return self.strip(self.heading())
        below = y - (self.size.height - self.lines_below)
        if below >= 0:
            return self.strip(self.below(below))
        number = y - 1 + self.scroll_offset.y
        if number >= self.line_count:
            return self.strip(Text(""))
        drawn_for = self.app.theme, self.outer_size.width
        if drawn_for != self._drawn_for:
            self._lines.clear()
            self._drawn_for = drawn_for
        if number == self.cursor_line and self.has_focus:
            style = Style(bgcolor=self.app.theme_variables["panel"], bold=True)
            return self.strip(self.line(number, True), style)
        if number not in self._lines:
            self._lines[number] = self.strip(self.line(number, False))
        return self._lines[number]

    @property
    def page(self) -> int:
        """Lines in view."""
        return max(1, self.size.height - 1 - self.lines_below)

    def fit(self) -> None:
        """There are as many lines as the picture has, and the cursor stays in view."""
        self._lines.clear()
        self.reserve(self.line_count + 1 + self.lines_below)
        self.show_cursor()
        self.refresh()

    def show_cursor(self, *, is_far: bool = False) -> bool:
        """Scroll to the cursor where it is not in view; returns whether that was so.

        Args:
            is_far: It came from somewhere else: it is best seen in the middle.
        """
        line, top = self.cursor_line, self.scroll_offset.y
        y = min(line, max(top, line - self.page + 1))
        if y == top:
            return False
        self.scroll_to(y=max(0, line - self.page // 2) if is_far else y, animate=False, force=True)
        self.refresh()
        return True

    def refresh_lines(self, *lines: int) -> None:
        """Draw anew only what a move of the cursor between them changes."""
        top, size = self.scroll_offset.y, self.size
        changed = {0, *(y for line in lines if 0 < (y := line + 1 - top) <= self.page)}
        changed.update(range(size.height - self.lines_below, size.height))
        self.refresh(*(Region(0, y, size.width, 1) for y in changed))
