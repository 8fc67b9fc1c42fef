"""Renderables of one stage as lines, as many as there are."""

from __future__ import annotations

from rich.console import RenderableType
from textual.css.scalar import Scalar
from textual.strip import Strip
from textual.widget import Widget


class Figures(Widget):
    """Renderables as lines that are made once.

    A widget of automatic height would lay out the whole screen for every stage; this one does so
    only when the number of lines changes.
    """

    DEFAULT_CSS = "Figures { height: 0; }"

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._lines: list[Strip] = []

    def present(self, figures: RenderableType | None, width: int) -> None:
        """Show renderables in `width` cells, or nothing in no lines."""
        console = self.app.console
        options = console.options.update(width=max(1, width), height=None)
        lines = [] if figures is None else console.render_lines(figures, options, pad=False)
        self._lines = [Strip(line) for line in lines]
        height = Scalar.from_number(len(self._lines))
        if self.styles.height != height:
            self.styles.height = height
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """One of the lines made before."""
        strip = self._lines[y] if y < len(self._lines) else Strip([])
        return strip.apply_style(self.rich_style).adjust_cell_length(
            self.size.width, self.rich_style
        )
