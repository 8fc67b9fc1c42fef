"""The detail pane: everything known of the row under the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.css.scalar import Scalar
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from aprtui.description import (
    describe_figures,
    describe_judgments,
    describe_layer,
    describe_pending,
    describe_run,
    describe_shortly,
    describe_verdict,
)
from aprtui.rows import Row
from aprtui.run_state import RunState
from aprtui.theme import Paint
from aprtui.why import explain_run, explain_stage
from aprtui.widgets.divergence_table import DivergenceTable
from aprtui.widgets.picture_pane import PicturePane
from aprtui.widgets.tab_strip import DetailTab, TabStrip

if TYPE_CHECKING:
    from aprcore.report import StageReport

# Lines from which the table gets a title of its own, and the Why tab leaves the judgments in view.
ROOMY_LINES = 24
# Lines below which the Why tab has one line above it.
SHORT_LINES = 14


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


class StageDetail(VerticalScroll):
    """The verdict and the judgments above, below them one tab.

    Attributes:
        pictures: The pictures of the stage's tensor.
    """

    def __init__(self, state: RunState, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self.pictures = PicturePane(id="pictures")
        self._shown: tuple[Row, int, DetailTab] | None = None
        self._width_shown = 0

    def compose(self) -> ComposeResult:
        """The verdict, the tabs, and what they show."""
        yield Figures(id="judgments")
        yield TabStrip(id="tabs")
        yield Figures(id="figures")
        yield Static(id="top-title")
        yield DivergenceTable(id="differences")
        yield self.pictures

    def show(self, row: Row, top_k: int, tab: DetailTab) -> None:
        """Describe a row."""
        report = None if row.key is None else self._state.reports.get(row.key)
        head, figures = (self.query_one(f"#{name}", Figures) for name in ("judgments", "figures"))
        # A cell is left for the scroll bar: lines must not change when it comes.
        frame = self.styles.gutter.width + figures.styles.gutter.width
        width = self.outer_size.width - frame - 1
        above, below = self._describe(row, report, tab, width)
        head.present(above, width)
        figures.present(below, width)
        tabs = self.query_one(TabStrip)
        tabs.show(tab)
        tabs.visible = self._state.header is not None
        table = self.query_one(DivergenceTable)
        table.show(report if tab is DetailTab.TOP_K else None, top_k)
        # Where there is no room for a line above the table, the pane's title says how many.
        heading = self.query_one("#top-title", Static)
        heading.display = table.display and self._is_roomy
        heading.update(f"{table.row_count} largest differences", layout=False)
        self.can_focus = not tab.is_picture  # the picture scrolls, not the pane
        self.pictures.show(report, self._state.header, tab, _unpictured(row))
        title = _title(row)
        if table.display and not self._is_roomy:
            title = f"{title} · top {table.row_count}"
        self.border_title = title
        picture = self.pictures.open_view
        self.border_subtitle = "" if picture is None else picture.HINT
        before, self._shown = self._shown, (row, top_k, tab)
        self._width_shown = self.outer_size.width
        if before is None or (before[0], before[2]) != (row, tab):
            self.scroll_to(y=0, animate=False)

    def on_resize(self) -> None:
        """Lines are made for one width, which a pane that was hidden did not have yet."""
        if self._shown is not None and self.outer_size.width != self._width_shown:
            self.show(*self._shown)

    def focus_inside(self) -> None:
        """Focus the open picture, or the pane."""
        picture = self.pictures.open_view
        (self if picture is None else picture).focus()

    @property
    def _is_roomy(self) -> bool:
        return self.size.height >= ROOMY_LINES

    def _describe(
        self, row: Row, report: StageReport | None, tab: DetailTab, width: int
    ) -> tuple[RenderableType, RenderableType | None]:
        """What the pane says above the tabs and below them."""
        state, paint = self._state, Paint(self.app.theme_variables)
        is_why = tab is DetailTab.WHY
        if row.key is None and tab.is_picture:
            return Text(_title(row), "bold"), None
        if row.key is None:
            why = explain_run(state, row.layer, paint) if is_why and state.header else None
            if row.layer is not None:
                return describe_layer(state, row.layer, paint), why
            return describe_run(state, paint), why
        if report is None or state.header is None:
            return describe_pending(row.key.stage, paint), None
        above = [describe_verdict(report, paint)]
        needs_room = is_why or tab.is_picture
        if self._is_roomy or not needs_room:
            above.append(describe_judgments(report, state, paint, width))
        if needs_room:
            why = (
                explain_stage(report, state, paint, figures=not self._is_roomy) if is_why else None
            )
            is_short = self.size.height < (SHORT_LINES if is_why else ROOMY_LINES)
            return (describe_shortly(report, paint) if is_short else Group(*above)), why
        return Group(*above), describe_figures(report, state.header, paint)


def _unpictured(row: Row) -> str:
    """What is said where a row has no picture."""
    if row.key is None:
        return "choose a stage to see its tensor"
    return "not judged yet: its tensor is shown as soon as it is"


def _title(row: Row) -> str:
    if row.key is not None:
        return str(row.key)
    return "run" if row.layer is None else f"layer {row.layer}"
