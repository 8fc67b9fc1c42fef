"""The detail pane: everything known of the row under the cursor."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from aprtui.description import (
    describe_layer,
    describe_pending,
    describe_run,
    describe_stage,
)
from aprtui.rows import RUN_ROW, Row
from aprtui.run_state import RunState
from aprtui.theme import Paint
from aprtui.widgets.divergence_table import DivergenceTable

# Lines from which the table gets a title of its own.
ROOMY_LINES = 24


class StageDetail(VerticalScroll):
    """Figures above, the largest differences below."""

    def __init__(self, state: RunState, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state

    def compose(self) -> ComposeResult:
        """The figures and the table."""
        yield Static(id="figures")
        yield Static(id="top-title")
        yield DivergenceTable(id="differences")

    def show(self, row: Row, top_k: int) -> None:
        """Describe a row."""
        state = self._state
        paint = Paint(self.app.theme_variables)
        figures = self.query_one("#figures", Static)
        report = None if row.key is None else state.reports.get(row.key)
        if row == RUN_ROW:
            self.border_title = "run"
            figures.update(describe_run(state, paint))
        elif row.layer is not None:
            self.border_title = f"layer {row.layer}"
            figures.update(describe_layer(state, row.layer, paint))
        elif row.key is not None:
            self.border_title = str(row.key)
            if report is None or state.header is None:
                figures.update(describe_pending(row.key.stage, paint))
            else:
                figures.update(describe_stage(report, state.header, paint))
        table = self.query_one(DivergenceTable)
        table.show(report, top_k, paint)
        # Where there is no room for a line above the table, the pane's title says how many.
        title = self.query_one("#top-title", Static)
        is_roomy = self.size.height >= ROOMY_LINES
        title.display = table.display and is_roomy
        title.update(f"{table.row_count} largest differences")
        if table.display and not is_roomy:
            self.border_title = f"{self.border_title} · top {table.row_count}"
