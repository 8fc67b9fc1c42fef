"""The detail pane: everything known of the row under the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.css.scalar import Scalar
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from aprtui.description import (
    describe_layer,
    describe_pending,
    describe_run,
    describe_stage,
)
from aprtui.rows import Row
from aprtui.run_state import RunState
from aprtui.theme import Paint
from aprtui.widgets.divergence_table import DivergenceTable

if TYPE_CHECKING:
    from aprcore.report import StageReport

# Lines from which the table gets a title of its own.
ROOMY_LINES = 24


class Figures(Widget):
    """Renderables as lines that are made once.

    A widget of automatic height would lay out the whole screen for every stage; this one does so
    only when the number of lines changes.
    """

    DEFAULT_CSS = "Figures { height: 0; }"

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._lines: list[Strip] = []

    def present(self, figures: RenderableType, width: int) -> None:
        """Show renderables in `width` cells."""
        console = self.app.console
        options = console.options.update(width=max(1, width), height=None)
        self._lines = [Strip(line) for line in console.render_lines(figures, options, pad=False)]
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


class StageDetail(VerticalScroll):
    """Figures above, the largest differences below."""

    def __init__(self, state: RunState, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state

    def compose(self) -> ComposeResult:
        """The figures and the table."""
        yield Figures(id="figures")
        yield Static(id="top-title")
        yield DivergenceTable(id="differences")

    def show(self, row: Row, top_k: int) -> None:
        """Describe a row."""
        state = self._state
        paint = Paint(self.app.theme_variables)
        report = None if row.key is None else state.reports.get(row.key)
        title, figures = self._describe(row, report, paint)
        # A cell is left for the scroll bar: lines must not change when it comes.
        width = self.outer_size.width - self.gutter.width - 1
        self.query_one(Figures).present(figures, width - self.query_one(Figures).gutter.width)
        table = self.query_one(DivergenceTable)
        table.show(report, top_k)
        # Where there is no room for a line above the table, the pane's title says how many.
        heading = self.query_one("#top-title", Static)
        is_roomy = self.size.height >= ROOMY_LINES
        heading.display = table.display and is_roomy
        heading.update(f"{table.row_count} largest differences", layout=False)
        if table.display and not is_roomy:
            title = f"{title} · top {table.row_count}"
        self.border_title = title

    def _describe(
        self, row: Row, report: StageReport | None, paint: Paint
    ) -> tuple[str, RenderableType]:
        """The title of the pane and what it says."""
        state = self._state
        if row.key is not None:
            if report is None or state.header is None:
                return str(row.key), describe_pending(row.key.stage, paint)
            return str(row.key), describe_stage(report, state.header, paint)
        if row.layer is not None:
            return f"layer {row.layer}", describe_layer(state, row.layer, paint)
        return "run", describe_run(state, paint)
