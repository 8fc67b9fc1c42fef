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

    A further tab is a further member here, with a short title in `SHORT_TITLES`, and a branch in
    `aprtui.pane_text`, or in `PicturePane` if it is a picture.
    """

    TOP_K = "Top-K"
    TOKENS = "Tokens"
    MAP = "Heat map"
    HISTOGRAM = "Histogram"
    VALUES = "Values"
    WHY = "Why"

    @property
    def is_picture(self) -> bool:
        """Whether it shows a picture of the stage's tensor."""
        return self not in (DetailTab.TOP_K, DetailTab.WHY)

    def step(self, by: int) -> DetailTab:
        """The tab that many places on, around the end."""
        tabs = list(DetailTab)
        return tabs[(tabs.index(self) + by) % len(tabs)]


SHORT_TITLES = {
    DetailTab.TOP_K: "Top-K",
    DetailTab.TOKENS: "Tok",
    DetailTab.MAP: "Map",
    DetailTab.HISTOGRAM: "Hist",
    DetailTab.VALUES: "Val",
    DetailTab.WHY: "Why",
}


class TabStrip(Widget):
    """Titles of the tabs, the open one marked. Lighter than a row of widgets.

    Where there is room, each with the number that is its key.
    """

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
        for tab, title in self._titles():
            if tab is self._open:
                line.append(f"[{title}]", paint("ink-oracle", bold=True))
            else:
                line.append(f" {title} ", paint("ink-quiet"))
        return line

    def _titles(self) -> list[tuple[DetailTab, str]]:
        """As long as all of them fit."""
        tabs = list(DetailTab)
        forms = (
            [f"{number} {tab.value}" for number, tab in enumerate(tabs, 1)],
            [f"{number} {SHORT_TITLES[tab]}" for number, tab in enumerate(tabs, 1)],
            [SHORT_TITLES[tab] for tab in tabs],
        )
        fitting = (form for form in forms if sum(len(t) + 2 for t in form) <= self.size.width)
        return list(zip(tabs, next(fitting, forms[-1])))

    def on_click(self, event: events.Click) -> None:
        """A click opens the tab under it."""
        start = 0
        for tab, title in self._titles():
            end = start + len(title) + 2
            if start <= event.x < end:
                self.post_message(self.Chosen(tab))
            start = end
