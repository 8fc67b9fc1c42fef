"""The detail pane: everything known of the row under the cursor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.containers import VerticalScroll
from textual.widgets import Static

from aprtui.rows import RUN_ROW, Row
from aprtui.run_state import RunState
from aprtui.theme import Paint
from aprtui.widgets.tabs import DetailTab, TabStrip

if TYPE_CHECKING:
    from aprtui.widgets.picture_pane import PicturePane


class StageDetail(VerticalScroll):
    """The verdict and the judgments above, below them one tab.

    It begins as an empty frame, which is all there is to show of a run that is not open yet: what
    goes into it is read and mounted once the first screen is painted.

    Attributes:
        is_filled: Whether there is something in it.
        pictures: The pictures of the stage's tensor; not before it is filled.
    """

    pictures: PicturePane

    def __init__(self, state: RunState, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self.is_filled = False
        self.border_title = RUN_ROW.title
        self._shown: tuple[Row, int, DetailTab] | None = None
        self._width_shown = 0

    async def fill(self) -> None:
        """Mount the verdict, the tabs, and what they show."""
        from aprtui.widgets.divergence_table import DivergenceTable
        from aprtui.widgets.figures import Figures
        from aprtui.widgets.picture_pane import PicturePane

        self._head, self._figures = Figures(id="judgments"), Figures(id="figures")
        self._tabs = TabStrip(id="tabs")
        self._tabs.visible = False
        self._heading = Static(id="top-title")
        self._table = DivergenceTable(id="differences")
        self.pictures = PicturePane(id="pictures")
        await self.mount(
            self._head, self._tabs, self._figures, self._heading, self._table, self.pictures
        )
        self.is_filled = True

    def show(self, row: Row, top_k: int, tab: DetailTab) -> None:
        """Describe a row, once there is something to do it with."""
        if not self.is_filled:
            return
        from aprtui.widgets.pane_text import ROOMY_LINES, describe_pane

        report = None if row.key is None else self._state.reports.get(row.key)
        # A cell is left for the scroll bar: lines must not change when it comes.
        frame = self.styles.gutter.width + self._figures.styles.gutter.width
        width = self.outer_size.width - frame - 1
        paint = Paint(self.app.theme_variables)
        above, below = describe_pane(self._state, row, tab, paint, width, self.size.height)
        self._head.present(above, width)
        self._figures.present(below, width)
        self._tabs.show(tab)
        self._tabs.visible = self._state.header is not None
        self._table.show(report if tab is DetailTab.TOP_K else None, top_k)
        # Where there is no room for a line above the table, the pane's title says how many.
        is_roomy = self.size.height >= ROOMY_LINES
        self._heading.display = self._table.display and is_roomy
        self._heading.update(f"{self._table.row_count} largest differences", layout=False)
        self.can_focus = not tab.is_picture  # the picture scrolls, not the pane
        self.pictures.show(report, self._state.header, tab, _unpictured(row))
        title = row.title
        if self._table.display and not is_roomy:
            title = f"{title} · top {self._table.row_count}"
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

    @property
    def has_focused_picture(self) -> bool:
        """Whether the keys go to a picture."""
        from aprtui.widgets.picture_view import PictureView

        return isinstance(self.screen.focused, PictureView)

    def focus_inside(self) -> None:
        """Focus the open picture, or the pane."""
        picture = self.pictures.open_view if self.is_filled else None
        (self if picture is None else picture).focus()


def _unpictured(row: Row) -> str:
    """What is said where a row has no picture."""
    if row.key is None:
        return "choose a stage to see its tensor"
    return "not judged yet: its tensor is shown as soon as it is"
