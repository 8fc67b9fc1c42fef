"""A tensor as a map: every value a block, or so many values as fit, panned and zoomed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region

from aprtui.map_window import MapWindow
from aprtui.pictures import CellAsk, GridAsk, Shades, Subject, SubjectAsk
from aprtui.places import parse_place
from aprtui.widgets.drawn_map import DrawnMap, is_head

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout
    from aprcore.pictures import MapKind, MapView
    from aprtui.pictures import Ask, Picture

WHEEL_CELLS = 3
NO_SIDES = "neither side has this tensor"


class TensorMap(DrawnMap):
    """A map that asks for what is in view, and is moved by keys and mouse.

    Attributes:
        user_moved: Whether the user has taken the cursor; it then stays where it is.
    """

    HINT = "m what · a axes · h head · l largest · + - 0 zoom · : go to"

    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(key, f"move({down}, {across})", f"cell {key}", id=f"map.{key}", show=False,
                    tooltip=f"One cell {key}; at the edge the map moves")
            for key, down, across in (
                ("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1),
            )
        ),
        *(
            Binding(f"shift+{key}", f"pan({down}, {across})", f"pan {key}", id=f"map.pan-{key}",
                    show=False, tooltip=f"Half a window {key}")
            for key, down, across in (
                ("up", -1, 0), ("down", 1, 0), ("left", 0, -1), ("right", 0, 1),
            )
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
        self._subject: Subject | None = None
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
        down, across = self.window.cells
        scale = self.window.scale
        grid = GridAsk(
            self.kind, self.view, self.window.top, self.window.left, scale.rows, scale.columns,
            down, across,
        )  # fmt: skip
        if grid != self._grid_ask:
            return grid
        cell = self._cell_under_cursor()
        return None if cell is None or cell == self._cell_ask else cell

    def take(self, ask: Ask, picture: Picture) -> None:
        """Show what has come."""
        match ask:
            case SubjectAsk():
                assert isinstance(picture, Subject)
                self._subject, self._is_current = picture, True
                self._choose_map()
            case GridAsk() if self.window is not None:
                assert isinstance(picture, Shades)
                self._shades, self._grid_ask = picture, ask
                self._scale = self.window.scale
                self._lines.clear()
                self.say("")
            case CellAsk():
                self.cell, self._cell_ask = picture, ask  # type: ignore[assignment]
                below = self._lines_below
                top = self.size.height - below
                self.refresh(Region(0, top, self.size.width, below))
                return
        self.refresh()

    def _choose_map(self) -> None:
        assert self._subject is not None
        kinds = list(self._subject.views)
        if not kinds:
            self.say(NO_SIDES)
            self.kind = self.view = self.window = None
            return
        kind = self.kind if self.kind in kinds else kinds[0]
        assert kind is not None
        views = self._subject.views[kind]
        name = "" if self.view is None else self.view.name
        view = next((view for view in views if view.name == name), views[0])
        self._open_map(kind, view)

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
        found = None if self.report is None else self.report.comparison
        self._ranked = [] if found is None else found.top.indices.tolist()
        self._rank = 0
        layout = None if self.report is None else self.report.layout
        if self._ranked and layout is not None and self.view is not None:
            place = _place_in(self.view, layout, self._ranked[0])
            if place is not None and self.window is not None:
                self.window = self.window.point(*place)

    def _cell_under_cursor(self) -> CellAsk | None:
        if self.kind is None or self.view is None or self.window is None or self._shades is None:
            return None
        grid, window = self._shades.grid, self.window
        if not grid.values.size:
            return None
        row = (window.row - grid.top) // grid.cell_rows
        column = (window.column - grid.left) // grid.cell_columns
        return CellAsk(
            self.kind, self.view, grid.top + row * grid.cell_rows,
            grid.left + column * grid.cell_columns, grid.cell_rows, grid.cell_columns,
        )  # fmt: skip

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
        layout = None if self.report is None else self.report.layout
        if layout is None or self.view is None or self._subject is None or self.kind is None:
            return "there is no map to go to a place of"
        index = parse_place(text, layout)
        if isinstance(index, str):
            return index
        for view in (self.view, *self._subject.views[self.kind]):
            place = _place_in(view, layout, index)
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
        if self._subject is not None and self.kind is not None and self.view is not None:
            kinds = list(self._subject.views)
            kind = kinds[(kinds.index(self.kind) + 1) % len(kinds)]
            views = self._subject.views[kind]
            view = next((view for view in views if view.name == self.view.name), views[0])
            self._open_map(kind, view)
            self.post_message(self.Wanted())

    def _next_axes(self) -> None:
        """The next view that is not just another head of this one."""
        if self._subject is None or self.kind is None or self.view is None:
            return
        views = self._subject.views[self.kind]
        others = [v for v in views if not is_head(v)]
        heads = [v for v in views if is_head(v)]
        cycle = [*others, *heads[:1]]
        here = heads[0] if is_head(self.view) else self.view
        if len(cycle) > 1:
            self._open_map(self.kind, cycle[(cycle.index(here) + 1) % len(cycle)])
            self.post_message(self.Wanted())
        else:
            self.notify("this stage has no other axes")

    def _step_head(self, step: int) -> None:
        if self._subject is None or self.kind is None or self.view is None:
            return
        heads = [v for v in self._subject.views[self.kind] if is_head(v)]
        if not heads:
            self.notify("this stage has no map per head")
            return
        number = heads.index(self.view) + step if self.view in heads else 0
        self._open_map(self.kind, heads[number % len(heads)])
        self.post_message(self.Wanted())

    def _go_to_next_rank(self) -> None:
        """From the largest difference to the next of those that this map has."""
        layout = None if self.report is None else self.report.layout
        if layout is None or self.view is None or self.window is None:
            return
        for _ in self._ranked:
            self._rank = self._rank % len(self._ranked) + 1
            place = _place_in(self.view, layout, self._ranked[self._rank - 1])
            if place is not None:
                self._look(self.window.point(*place))
                return
        self.notify("none of the largest differences is in this map")

    def _look(self, window: MapWindow) -> None:
        self.user_moved = True
        count = self._count_values()
        if count and window.row * window.num_columns + window.column >= count:
            window = window.point(*divmod(count - 1, window.num_columns))
        before, self.window = self.window, window
        if before is None or window == before:
            return
        # Another part of the map is drawn when it comes, once.
        if (before.top, before.left, before.zoom) == (window.top, window.left, window.zoom):
            self.refresh_cursor(before, window)
        self.post_message(self.Wanted())

    def _count_values(self) -> int:
        """Values of a folded vector, whose last row may be short; 0 of anything else."""
        if self.report is None or self.view is None or not self.view.fold:
            return 0
        layout = self.report.layout
        return 0 if layout is None else layout.shape[-1]

    @property
    def _step(self) -> tuple[int, int]:
        """Cells of the window's scale in one that is drawn: of a large tensor they are coarser."""
        if self._shades is None or self.window is None:
            return 1, 1
        scale, grid = self.window.scale, self._shades.grid
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
        shades, scale = self._shades, self._scale
        if shades is None or scale is None or self.window is None:
            return
        grid = shades.grid
        row = (event.y - 1) * 2 // scale.tall
        column = (event.x - self._gutter) // scale.wide
        rows, columns = shades.shape
        if 0 <= row < rows and 0 <= column < columns:
            self._look(self.window.point(
                grid.top + row * grid.cell_rows, grid.left + column * grid.cell_columns
            ))  # fmt: skip

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


def _place_in(view: MapView, layout: Layout, index: int) -> tuple[int, int] | None:
    """Row and column of a flat index, if a view has it as a value of its own."""
    if view.is_reduced:
        return None
    row, column = divmod(index, view.fold or max(1, layout.shape[-1]))
    row -= view.first_row
    return (row, column) if 0 <= row < view.num_rows else None
