"""Lines as widgets draw them that draw only what is in view."""

from __future__ import annotations

from typing import Any

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import App
from textual.strip import Strip
from textual.widget import Widget


def cells_of(widget: Widget) -> int:
    """Cells of a line; the scroll bar has a column of its own whether it is there or not."""
    return max(0, widget.outer_size.width - widget.styles.scrollbar_size_vertical)


def strip_of(app: App[Any], content: Text | list[Segment], style: Style, cells: int) -> Strip:
    """A whole line of text or segments, on a style of its own."""
    if isinstance(content, Text):
        # A text of one style renders without it.
        whole = content if content.spans else Text.assemble((content.plain, content.style))
        content = [Segment(segment.text, segment.style) for segment in whole.render(app.console)]
    return Strip(content).apply_style(style).adjust_cell_length(cells, style)
