"""The tree of stages: one line per row, drawn only where it is in view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from aprcore.network.stages import StageKey
from aprtui.measures import Measure
from aprtui.rows import RUN_ROW, Filter, Row, SortOrder, arrange
from aprtui.run_state import RunState
from aprtui.theme import Paint
from aprtui.widgets.lines import cells_of, strip_of

if TYPE_CHECKING:
    from aprtui.widgets.stage_row import RowPainter

MOVE = Binding.Group("move", compact=True)
FOLD = Binding.Group("fold", compact=True)


class StageTree(ScrollView, can_focus=True):
    """Rows of a run: the run itself, its layers, their stages.

    Nothing is kept per row: rows are arranged from the run's state and drawn when in view, so a
    thousand stages cost no more than those on screen.

    Attributes:
        rows: The rows in view or scrolled away, from top to bottom.
        expanded: Layers that are unfolded.
        filter: What rows must contain.
        order: How they are sorted.
        measure: The judgment whose figures they show first.
        user_moved: Whether the user has taken the cursor; it then stays where it is.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"stage-tree--cursor", "stage-tree--cursor-blurred"}
    ALLOW_SELECT = False

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "up", id="tree.up", tooltip="One row up", group=MOVE),
        Binding("down", "move(1)", "down", id="tree.down", tooltip="One row down", group=MOVE),
        Binding("left", "fold", "fold", id="tree.fold", group=FOLD,
                tooltip="Fold the layer, or go up to it"),
        Binding("right", "unfold", "unfold", id="tree.unfold", group=FOLD,
                tooltip="Unfold the layer, or go down into it"),
        Binding("enter,space", "toggle_layer", "fold or unfold", id="tree.toggle", show=False,
                tooltip="Fold or unfold the layer; where only the tree fits, open the stage"),
        Binding("pageup", "page(-1)", "page up", id="tree.page-up", show=False,
                tooltip="One page up"),
        Binding("pagedown", "page(1)", "page down", id="tree.page-down", show=False,
                tooltip="One page down"),
        Binding("home", "move(-1000000)", "first row", id="tree.home", show=False,
                tooltip="The first row"),
        Binding("end", "move(1000000)", "last row", id="tree.end", show=False,
                tooltip="The last row"),
    ]  # fmt: skip

    @dataclass
    class Highlighted(Message):
        """The cursor is on another row."""

        row: Row

    class Opened(Message):
        """The stage under the cursor was asked for."""

    def __init__(self, state: RunState, opening: str, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state
        self._opening = opening
        self.rows: list[Row] = []
        self.expanded: set[int] = set()
        self.filter = Filter()
        self.order = SortOrder.COMPUTATION
        self.measure = Measure.CUMULATIVE
        self.user_moved = False
        self._cursor = 0
        self._painter: RowPainter | None = None
        self._chosen: tuple[object, ...] = ()
        # Lines of stages that are judged: their figures change no more.
        self._drawn: dict[Row, Strip] = {}
        self._ground = Style.null()

    @property
    def row(self) -> Row:
        """The row under the cursor."""
        return self.rows[self._cursor] if self.rows else RUN_ROW

    @property
    def line_width(self) -> int:
        """Cells of a line."""
        return cells_of(self)

    def painter(self) -> RowPainter:
        """Draws rows for the present width, theme and choices."""
        everything = frozenset(self.state.layers) if self.filter else frozenset(self.expanded)
        chosen = (
            self.line_width, everything, self.order, self.measure, self.app.theme, self.state.number
        )  # fmt: skip
        if self._painter is None or chosen != self._chosen:
            from aprtui.widgets.stage_row import RowPainter

            paint = Paint(self.app.theme_variables)
            self._painter = RowPainter(
                self.state, paint, self.line_width, everything, self.order, self.measure
            )
            self._chosen = chosen
            self._drawn.clear()
        return self._painter

    def rearrange(self) -> None:
        """Take over what has changed; the cursor stays on its row, or the nearest that is left."""
        before = self.row
        self.rows = arrange(
            self.state, expanded=self.expanded, filter=self.filter, order=self.order
        )
        self.virtual_size = Size(self.line_width, len(self.rows))
        if len(self.rows) <= self.size.height:
            self.show_vertical_scrollbar = False  # the toolkit may keep one that was needed before
        candidates = (before, Row(layer=before.group) if before.group is not None else before)
        found = next((self.rows.index(row) for row in candidates if row in self.rows), None)
        self._place(min(self._cursor, len(self.rows) - 1) if found is None else found)
        if self.row != before:
            self.post_message(self.Highlighted(self.row))
        self.refresh()

    def choose(
        self, *, filter: Filter | None = None, order: SortOrder | None = None,
        measure: Measure | None = None,
    ) -> None:  # fmt: skip
        """Show other rows, in another order, or with other figures."""
        self.filter = self.filter if filter is None else filter
        self.order = self.order if order is None else order
        self.measure = self.measure if measure is None else measure
        self.rearrange()

    def go_to(self, key: StageKey) -> None:
        """Put the cursor on a stage, unfolding its layer and dropping a filter that hides it."""
        if not self.filter.accepts(key, self.state.reports.get(key)):
            self.filter = Filter()
        if key.layer is not None:
            self.expanded.add(key.layer)
        self.rearrange()
        self.go_to_row(Row(key=key))

    def go_to_row(self, row: Row) -> None:
        """Put the cursor on a row that is shown."""
        if row in self.rows:
            self._move_to(self.rows.index(row))

    def action_move(self, step: int) -> None:
        """Move the cursor by rows."""
        self._take(self._cursor + step)

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self._take(self._cursor + pages * max(1, self.size.height - 1))

    def action_fold(self) -> None:
        """Fold the layer under the cursor, or go up to the layer of a stage."""
        row = self.row
        if row.layer is not None and row.layer in self.expanded:
            self._toggle(row.layer)
        elif row.group is not None and Row(layer=row.group) in self.rows:
            self._take(self.rows.index(Row(layer=row.group)))
        else:
            self._take(0)

    def action_unfold(self) -> None:
        """Unfold the layer under the cursor, or go down into it."""
        if self.row.layer is not None and self.row.layer not in self.expanded and not self.filter:
            self._toggle(self.row.layer)
        elif self.row.layer is not None:
            self._take(self._cursor + 1)

    def action_toggle_layer(self) -> None:
        """Fold or unfold the layer under the cursor, or open the stage."""
        if self.row.layer is not None:
            self._toggle(self.row.layer)
        else:
            self.post_message(self.Opened())

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor; on a layer it also folds or unfolds."""
        number = event.y + self.scroll_offset.y
        if number < len(self.rows):
            self._take(number)
            if self.row.layer is not None:
                self._toggle(self.row.layer)

    def on_resize(self) -> None:
        """Lines are as wide as the widget."""
        self.virtual_size = Size(self.line_width, len(self.rows))
        self._place(self._cursor)

    def render_lines(self, crop: Region) -> list[Strip]:
        """Lines in the widget's own style, which the toolkit would find anew for each of them."""
        self._ground = self.rich_style
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        """The line at `y` below the top of the view."""
        number = y + self.scroll_offset.y
        if number < len(self.rows):
            row = self.rows[number]
            return self._draw_cursor(row) if number == self._cursor else self._draw(row)
        if self.state.header is not None or number > 0:
            return Strip.blank(self.line_width, self._ground)
        return self._strip(Text(self._opening), self._ground)

    def _draw(self, row: Row) -> Strip:
        """A row's line, drawn once where it can be kept."""
        painter, faults = self.painter(), self.state.faults_of(self.measure)
        # The mark of the first fault is yet to come while there is none.
        if row.key not in self.state.reports_of(self.measure) or not faults:
            return self._strip(painter.row(row), self._ground)
        if row not in self._drawn:
            self._drawn[row] = self._strip(painter.row(row), self._ground)
        return self._drawn[row]

    def _draw_cursor(self, row: Row) -> Strip:
        name = "stage-tree--cursor" if self.has_focus else "stage-tree--cursor-blurred"
        cursor = self.get_component_rich_style(name)
        text = self.painter().row(row)
        if not self.has_focus:
            return self._strip(text, self._ground + Style(bgcolor=cursor.bgcolor))
        # On the focused cursor every ink gives way: its background is a strong colour.
        return self._strip(Text(text.plain), self._ground + cursor)

    def _strip(self, text: Text, style: Style) -> Strip:
        return strip_of(self.app, text, style, self.line_width)

    def _toggle(self, layer: int) -> None:
        self.user_moved = True
        self.expanded.symmetric_difference_update({layer})
        self.rearrange()

    def _take(self, number: int) -> None:
        """Move the cursor because the user said so."""
        self.user_moved = True
        self._move_to(number)

    def _move_to(self, number: int) -> None:
        before, line = self.row, self._cursor
        self._place(number)
        if self.row != before:
            self.post_message(self.Highlighted(self.row))
        # Two lines, not the whole tree; scrolling draws everything by itself.
        top, width = self.scroll_offset.y, self.line_width
        self.refresh(*(Region(0, y - top, width, 1) for y in (line, self._cursor)))

    def _place(self, number: int) -> None:
        """Set the cursor and keep it in view."""
        self._cursor = max(0, min(number, len(self.rows) - 1))
        line = Region(0, self._cursor, max(1, self.line_width), 1)
        self.scroll_to_region(line, animate=False, force=True, x_axis=False)
