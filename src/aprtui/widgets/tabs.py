"""The tabs of the detail pane: the table of them, and their titles in one line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import TYPE_CHECKING

from rich.text import Text
from textual import events
from textual.message import Message
from textual.widget import Widget

from aprtui.theme import Paint

if TYPE_CHECKING:
    from aprtui.widgets.picture_view import PictureView


class DetailTab(Enum):
    """What the lower part of the detail pane shows: the table of tabs, in the order of their keys.

    A further tab that is a picture is a row here, and a module with its widget.

    Attributes:
        key: The key that opens it.
        title: What the strip calls it.
        short_title: What the strip calls it where there is little room.
        label: What the palette calls it.
        subject: What it shows.
        picture: The module of this package that has its `PictureView` and that widget's name; empty
            where the tab is made of text.
    """

    TOP_K = "1", "Top-K", "Top-K", "top-K tab", "the largest differences"
    TOKENS = (
        "2", "Tokens", "Tok", "tokens", "how far off each token is, and each head of it",
        "token_bars.TokenBars",
    )  # fmt: skip
    MAP = (
        "3", "Heat map", "Map", "heat map", "the tensor as a map, down to single values",
        "tensor_map.TensorMap",
    )  # fmt: skip
    HISTOGRAM = (
        "4", "Histogram", "Hist", "histogram",
        "how large the values are, on both sides and their difference", "histogram.HistogramView",
    )  # fmt: skip
    VALUES = "5", "Values", "Val", "values", "every value", "value_grid.ValueGrid"
    WHY = "6", "Why", "Why", "why tab", "why this stage has its verdict"

    def __init__(
        self, key: str, title: str, short_title: str, label: str, subject: str, picture: str = ""
    ) -> None:
        self.key = key
        self.title = title
        self.short_title = short_title
        self.label = label
        self.subject = subject
        self.picture = picture

    @property
    def is_picture(self) -> bool:
        """Whether it shows a picture of the stage's tensor."""
        return bool(self.picture)

    def step(self, by: int) -> DetailTab:
        """The tab that many places on, around the end."""
        tabs = list(DetailTab)
        return tabs[(tabs.index(self) + by) % len(tabs)]

    def load_picture(self) -> type[PictureView] | None:
        """The widget of its picture, which is read when it is first asked for."""
        if not self.picture:
            return None
        module, name = self.picture.split(".")
        widget: type[PictureView] = getattr(import_module(f"aprtui.widgets.{module}"), name)
        return widget


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
            [f"{tab.key} {tab.title}" for tab in tabs],
            [f"{tab.key} {tab.short_title}" for tab in tabs],
            [tab.short_title for tab in tabs],
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
