"""A tensor as a map: every value a block, or so many values as fit, panned and zoomed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip

from aprtui.map_pictures import CellAsk, GridAsk, SubjectAsk, gutter_of, is_head, place_in
from aprtui.map_window import FIGURE_HALVES, MapWindow
from aprtui.pictures import Ask
from aprtui.places import parse_place
from aprtui.widgets.drawn_map import DrawnMap, is_wide_pane
from aprtui.widgets.picture_view import COMPUTING, PictureView

if TYPE_CHECKING:
    from aprcore.pictures import CellValue, MapKind, MapView

WHEEL_CELLS = 3
# Lines from which the legend and the axis of the columns have lines of their own.
ROOMY_LINES = 10
ARROWS = (("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1))
NO_SIDES = "neither side has this tensor"


class TensorMap(PictureView):
    """A map that asks for what is in view, and is moved by keys and mouse.

    Attributes:
        kind, view: What is wanted; None before the first tensor is open.
        window: Which part of it, and the cursor.
        cell: What is under the cursor, once it is known.
        user_moved: Whether the user has taken the cursor; it then stays where it is.
    """

    HINT = "m what · a axes · h head · l largest · + - 0 zoom · : go to"

    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(key, f"move({down}, {across})", f"cell {key}", id=f"map.{key}", show=False,
                    tooltip=f"One cell {key}; at the edge the map moves")
            for key, down, across in ARROWS
        ),
        *(
            Binding(f"shift+{key}", f"pan({down}, {across})", f"pan {key}", id=f"map.pan-{key}",
                    show=False, tooltip=f"Half a window {key}")
            for key, down, across in ARROWS
        ),
        Binding("pageup", "pan(-2, 0)", "page up", id="map.page-up", show=False,
                tooltip="A window up"),
        Binding("pagedown", "pan(2, 0)", "page down", id="map.page-down", show=False,
                tooltip="A window down"),
        Binding("home", "edge(0)", "row's start", id="map.home", show=False,
                tooltip="The first column"),
        Binding("end", "edge(1)", "row's end", id="map.end", show=False,
                tooltip="The last column"),
    ]  # fmt: skip

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.kind: MapKind | None = None
        self.view: MapView | None = None
        self.window: MapWindow | None = None
        self.cell: CellValue | None = None
        self.user_moved = False
        self.commands = {
            "kind": self._next_kind,
            "axes": self._next_axes,
            "next-head": lambda: self._step_head(1),
            "previous-head": lambda: self._step_head(-1),
            "nearer": lambda: self._zoom(1),
            "farther": lambda: self._zoom(-1),
            "whole": self._show_whole,
            "next-largest": self._go_to_next_rank,
        }
        # Every kind of map that the stage has, with the views of each.
        self._views: dict[MapKind, tuple[MapView, ...]] = {}
        # Lags behind what is wanted.
        self._drawn: DrawnMap | None = None
        self._ranked: list[int] = []
        self._rank = 0  # of the largest difference that was gone to last
        self._grid_ask: GridAsk | None = None
        self._cell_ask: CellAsk | None = None
        self._drag: tuple[int, int, MapWindow] | None = None

    def start(self) -> None:
        """Find out what maps the stage has; kind and view stay where it has them."""
        super().start()
        self._grid_ask = self._cell_ask = None

    @property
    def is_stale(self) -> bool:
        """Whether the map is still that of another stage."""
        return self._grid_ask is None

    # What is needed

    def ask(self) -> Ask | None:
        """What maps there are, then the part in view, then what is under the cursor."""
        if not self._is_current:
            return SubjectAsk()
        if self.kind is None or self.view is None or self.window is None:
            return None
        window, scale = self.window, self.window.scale
        grid = GridAsk(
            self.kind, self.view, window.top, window.left, scale.rows, scale.columns, *window.cells
        )
        if grid != self._grid_ask:
            return grid
        cell = self._cell_under_cursor()
        return None if cell is None or cell == self._cell_ask else cell

    def take(self, ask: Ask, picture: Any) -> None:
        """Show what has come."""
        match ask:
            case SubjectAsk():
                self._views, self._is_current = picture, True
                self._show_kind(self.kind)
            case GridAsk() if self.window is not None:
                self._drawn = DrawnMap(self, ask, picture, self.window.scale)
                self._grid_ask = ask
                self.say("")
            case CellAsk():
                self.cell, self._cell_ask = picture, ask
                below = self._lines_below
                self.refresh(Region(0, self.size.height - below, self.size.width, below))
                return
        self.refresh()

    def _show_kind(self, kind: MapKind | None) -> None:
        """Show a kind, or the first where the stage lacks it; the view stays if it can."""
        if not self._views:
            self.say(NO_SIDES)
            self.kind = self.view = self.window = None
            return
        if kind is None or kind not in self._views:
            kind = next(iter(self._views))
        views, name = self._views[kind], "" if self.view is None else self.view.name
        self._open_map(kind, next((view for view in views if view.name == name), views[0]))

    def _open_map(self, kind: MapKind, view: MapView) -> None:
        """Show a map; the window stays where the matrix has the same shape."""
        self.kind, self.view, self.cell, self._cell_ask = kind, view, None, None
        shape = view.num_rows, view.num_columns
        before = self.window
        if before is None or (before.num_rows, before.num_columns) != shape:
            lines, columns = self._area
            self.window = MapWindow(*shape, lines * 2, columns, self._unit)
            self.user_moved = False
        self.fit()
        if not self.user_moved:
            self._find_largest()

    def _find_largest(self) -> None:
        """Put the cursor on the largest difference, where the map has it."""
        self._ranked, self._rank = self.ranked, 0
        layout = self.layout_of_stage
        if self._ranked and layout is not None and self.view is not None:
            place = place_in(self.view, layout, self._ranked[0])
            if place is not None and self.window is not None:
                self.window = self.window.point(*place)

    def _cell_under_cursor(self) -> CellAsk | None:
        if self.kind is None or self.view is None or self.window is None or self._drawn is None:
            return None
        grid, window = self._drawn.shades.grid, self.window
        if not grid.values.size:
            return None
        row = (window.row - grid.top) // grid.cell_rows
        column = (window.column - grid.left) // grid.cell_columns
        return CellAsk(
            self.kind, self.view, *self._drawn.shades.place_of(row, column),
            grid.cell_rows, grid.cell_columns,
        )  # fmt: skip

    # How it is laid out

    @property
    def _unit(self) -> int:
        return FIGURE_HALVES if self.ramp.is_dense else 1

    @property
    def _is_roomy(self) -> bool:
        return self.size.height >= ROOMY_LINES

    @property
    def _lines_below(self) -> int:
        """The axis and the legend, and what is under the cursor."""
        return (2 if self._is_roomy else 0) + (1 if is_wide_pane(self) else 2)

    @property
    def _area(self) -> tuple[int, int]:
        """Lines and columns of the map itself."""
        lines = self.size.height - 1 - self._lines_below
        return max(1, lines), max(1, self.line_width - gutter_of(self.view))

    def draw(self, y: int) -> Strip:
        """The heading, the map, the axis, the legend, what is under the cursor."""
        drawn, window, is_roomy = self._drawn, self.window, self._is_roomy
        if drawn is None or window is None:
            return self.strip(Text(""))
        if y == 0:
            return self.strip(drawn.heading(COMPUTING if self._is_waiting else "", is_roomy))
        cursor = drawn.shades.cell_of(window.row, window.column) if self.has_focus else None
        lines, _ = self._area
        if y <= lines:
            return drawn.line(y - 1, cursor)
        number = y - lines - 1
        if is_roomy and number < 2:
            return self.strip(drawn.legend() if number else drawn.axis(cursor, window.column))
        return self.strip(drawn.readout(self.cell, number - (2 if is_roomy else 0)))

    def _refresh_cursor(self, *windows: MapWindow) -> None:
        """Draw anew only what a move of the cursor changes.

        Args:
            windows: The same part of the map before and after.
        """
        if self._drawn is None:
            return
        lines, _ = self._area
        changed = {lines + 1} if self._is_roomy else set()
        for window in windows:  # the map begins below the heading
            changed.update(y + 1 for y in self._drawn.lines_of(window) if y < lines)
        self.refresh(*(Region(0, y, self.size.width, 1) for y in changed))

    def fit(self) -> None:
        """The window fills the area."""
        if self.window is not None:
            lines, columns = self._area
            wanted = lines * 2, columns, self._unit
            if wanted != (self.window.halves, self.window.columns, self.window.unit):
                self.window = self.window.resized(*wanted)
        self.refresh()

    # What the user does

    def jump(self, text: str) -> str:
        """Go to a flat index or to coordinates of the tensor."""
        layout = self.layout_of_stage
        if layout is None or self.view is None or self.kind is None:
            return "there is no map to go to a place of"
        index = parse_place(text, layout)
        if isinstance(index, str):
            return index
        for view in (self.view, *self._views[self.kind]):
            place = place_in(view, layout, index)
            if place is not None:
                if view != self.view:
                    self._open_map(self.kind, view)
                assert self.window is not None
                self._look(self.window.point(*place))
                return ""
        return "this map does not have that place"

    def action_move(self, down: int, across: int) -> None:
        """Move the cursor by cells."""
        if self.window is not None:
            tall, wide = self._step
            self._look(self.window.move(down * tall, across * wide))

    def action_pan(self, down: int, across: int) -> None:
        """Move the window by half its size."""
        if self.window is not None:
            rows, columns = self.window.cells
            self._look(self.window.pan(down * max(1, rows // 2), across * max(1, columns // 2)))

    def action_edge(self, last: int) -> None:
        """Go to the first or the last column."""
        if self.window is not None:
            self._look(self.window.point(self.window.row, last * self.window.num_columns))

    def _zoom(self, step: int) -> None:
        if self.window is not None:
            self._look(self.window.zoomed(step))

    def _show_whole(self) -> None:
        if self.window is not None:
            self._look(self.window.zoomed(-len(self.window.scales)))
            self.user_moved = False

    def _next_kind(self) -> None:
        if self.kind is not None:
            kinds = list(self._views)
            self._show_kind(kinds[(kinds.index(self.kind) + 1) % len(kinds)])
            self.post_message(self.Wanted())

    def _next_axes(self) -> None:
        """The next view that is not just another head of this one."""
        if self.kind is None or self.view is None:
            return
        views = self._views[self.kind]
        heads = [view for view in views if is_head(view)]
        cycle = [*(view for view in views if not is_head(view)), *heads[:1]]
        here = heads[0] if is_head(self.view) else self.view
        if len(cycle) > 1:
            self._open_map(self.kind, cycle[(cycle.index(here) + 1) % len(cycle)])
            self.post_message(self.Wanted())
        else:
            self.notify("this stage has no other axes")

    def _step_head(self, step: int) -> None:
        if self.kind is None or self.view is None:
            return
        heads = [view for view in self._views[self.kind] if is_head(view)]
        if not heads:
            self.notify("this stage has no map per head")
            return
        number = heads.index(self.view) + step if self.view in heads else 0
        self._open_map(self.kind, heads[number % len(heads)])
        self.post_message(self.Wanted())

    def _go_to_next_rank(self) -> None:
        """From the largest difference to the next of those that this map has."""
        layout = self.layout_of_stage
        if layout is None or self.view is None or self.window is None:
            return
        for _ in self._ranked:
            self._rank = self._rank % len(self._ranked) + 1
            place = place_in(self.view, layout, self._ranked[self._rank - 1])
            if place is not None:
                self._look(self.window.point(*place))
                return
        self.notify("none of the largest differences is in this map")

    def _look(self, window: MapWindow) -> None:
        self.user_moved = True
        layout = self.layout_of_stage
        # Of a folded vector the last row may be short.
        is_folded = layout is not None and self.view is not None and self.view.fold
        count = layout.shape[-1] if layout is not None and is_folded else 0
        if count and window.row * window.num_columns + window.column >= count:
            window = window.point(*divmod(count - 1, window.num_columns))
        before, self.window = self.window, window
        if before is None or window == before:
            return
        # Another part of the map is drawn when it comes, once.
        if (before.top, before.left, before.zoom) == (window.top, window.left, window.zoom):
            self._refresh_cursor(before, window)
        self.post_message(self.Wanted())

    @property
    def _step(self) -> tuple[int, int]:
        """Cells of the window's scale in one that is drawn: of a large tensor they are coarser."""
        if self._drawn is None or self.window is None:
            return 1, 1
        scale, grid = self.window.scale, self._drawn.shades.grid
        return (
            max(1, -(-grid.cell_rows // scale.rows)),
            max(1, -(-grid.cell_columns // scale.columns)),
        )

    # The mouse

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Begin to drag."""
        if self.window is not None:
            self._drag = event.screen_x, event.screen_y, self.window
            self.capture_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Drag the map."""
        if self._drag is None or self.window is None:
            return
        x, y, window = self._drag
        scale = window.scale
        down = (y - event.screen_y) * 2 // scale.tall
        self._look(window.pan(down, (x - event.screen_x) // scale.wide))

    def on_mouse_up(self) -> None:
        """Let go."""
        if self._drag is not None:
            self._drag = None
            self.release_mouse()

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor."""
        place = None if self._drawn is None else self._drawn.cell_at(event.x, event.y - 1)
        if place is not None and self.window is not None:
            self._look(self.window.point(*place))

    def _on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self._wheel(event, -1)

    def _on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self._wheel(event, 1)

    def _wheel(self, event: events.MouseEvent, step: int) -> None:
        event.prevent_default()
        event.stop()
        if event.ctrl:
            self._zoom(-step)
        elif self.window is not None:
            by = step * WHEEL_CELLS
            self._look(self.window.pan(*((0, by) if event.shift else (by, 0))))
