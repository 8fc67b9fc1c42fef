"""The tabs of the detail pane, in one line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rich.text import Text
from textual import events
from textual.message import Message
from textual.widget import Widget

from aprtui.theme import Paint


class DetailTab(Enum):
    """What the lower part of the detail pane shows. The value is its title.

    A further tab is a further member here and a branch in `StageDetail`.
    """

    TOP_K = "Top-K"
    WHY = "Why"

    def step(self, by: int) -> DetailTab:
        """The tab that many places on, around the end."""
        tabs = list(DetailTab)
        return tabs[(tabs.index(self) + by) % len(tabs)]


class TabStrip(Widget):
    """Titles of the tabs, the open one marked. Lighter than a row of widgets."""

    DEFAULT_CSS = "TabStrip { height: 1; }"
    ALLOW_SELECT = False

    @dataclass
    class Chosen(Message):
        """A tab was clicked."""

        tab: DetailTab

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._open = DetailTab.TOP_K

    def show(self, tab: DetailTab) -> None:
        """Mark a tab as open."""
        if tab is not self._open:
            self._open = tab
            self.refresh()

    def render(self) -> Text:
        """The titles; brackets mark the open one where there are no colours."""
        paint = Paint(self.app.theme_variables)
        line = Text(no_wrap=True)
        for tab in DetailTab:
            if tab is self._open:
                line.append(f"[{tab.value}]", paint("ink-oracle", bold=True))
            else:
                line.append(f" {tab.value} ", paint("ink-quiet"))
            line.append(" ")
        return line

    def on_click(self, event: events.Click) -> None:
        """A click opens the tab under it."""
        start = 0
        for tab in DetailTab:
            end = start + len(tab.value) + 3
            if start <= event.x < end:
                self.post_message(self.Chosen(tab))
            start = end
