"""A tensor as a map: every value a block, or so many values as fit, panned and zoomed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip

from aprtui.formatting import format_compact, format_position, format_ratio, format_value
from aprtui.map_window import FIGURE_COLUMNS, FIGURE_HALVES, MapWindow, Scale
from aprtui.pictures import CellAsk, GridAsk, Subject, SubjectAsk
from aprtui.places import parse_place
from aprtui.ramp import DECADES, LEVELS, NONFINITE, VALUE_DECADES, level_of
from aprtui.widgets.picture_view import COMPUTING, PictureView
from aprtui.widgets.token_bars import ramp_text

if TYPE_CHECKING:
    from aprcore.pictures import CellValue, Grid, MapKind, MapView
    from aprtui.pictures import Ask, Picture

# Lines from which the legend and the axis of the columns have lines of their own.
ROOMY_LINES = 10
# Cells from which what is under the cursor takes one line.
WIDE_CELLS = 76
WHEEL_CELLS = 3
LEGEND_CELLS = 16
# Cells between the marks of the columns' axis.
TICK_CELLS = 10
NO_SIDES = "neither side has this tensor"


class TensorMap(PictureView):
    """A map of |diff|, of a side or of the ratio; two values per character where there are colours.

    Attributes:
        kind, view: What is shown; None before the first tensor is open.
        window: Which part of it, and the cursor.
        cell: What is under the cursor, once it is known.
        user_moved: Whether the user has taken the cursor; it then stays where it is.
    """

    HINT = "m what · a axes · h head · + - 0 zoom · : go to"

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
        }
        self._subject: Subject | None = None
        # What is drawn, which lags behind what is wanted.
        self._grid: Grid | None = None
        self._scale: Scale | None = None
        self._grid_ask: GridAsk | None = None
        self._cell_ask: CellAsk | None = None
        self._lines: dict[int, list[Segment]] = {}
        self._lines_theme = ""
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
                self._grid, self._grid_ask = picture, ask  # type: ignore[assignment]
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
        layout = None if self.report is None else self.report.layout
        if found is None or layout is None or len(found.top) == 0:
            return
        assert self.view is not None and self.window is not None
        row, column = divmod(int(found.top.indices[0]), max(1, layout.shape[-1]))
        if not self.view.is_reduced and 0 <= row - self.view.first_row < self.view.num_rows:
            self.window = self.window.point(row - self.view.first_row, column)

    def _cell_under_cursor(self) -> CellAsk | None:
        if self.kind is None or self.view is None or self.window is None or self._grid is None:
            return None
        grid, window = self._grid, self.window
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
        row, column = divmod(index, max(1, layout.shape[-1]))
        for view in (self.view, *self._subject.views[self.kind]):
            if not view.is_reduced and 0 <= row - view.first_row < view.num_rows:
                if view != self.view:
                    self._open_map(self.kind, view)
                assert self.window is not None
                self._look(self.window.point(row - view.first_row, column))
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
        others = [v for v in views if not _is_head(v)]
        heads = [v for v in views if _is_head(v)]
        cycle = [*others, *heads[:1]]
        here = heads[0] if _is_head(self.view) else self.view
        if len(cycle) > 1:
            self._open_map(self.kind, cycle[(cycle.index(here) + 1) % len(cycle)])
            self.post_message(self.Wanted())
        else:
            self.notify("this stage has no other axes")

    def _step_head(self, step: int) -> None:
        if self._subject is None or self.kind is None or self.view is None:
            return
        heads = [v for v in self._subject.views[self.kind] if _is_head(v)]
        if not heads:
            self.notify("this stage has no map per head")
            return
        number = heads.index(self.view) + step if self.view in heads else 0
        self._open_map(self.kind, heads[number % len(heads)])
        self.post_message(self.Wanted())

    def _look(self, window: MapWindow) -> None:
        self.user_moved = True
        before, self.window = self.window, window
        if before is None or window == before:
            return
        # Another part of the map is drawn when it comes, once.
        if (before.top, before.left, before.zoom) == (window.top, window.left, window.zoom):
            self.refresh()
        self.post_message(self.Wanted())

    @property
    def _step(self) -> tuple[int, int]:
        """Cells of the window's scale in one that is drawn: of a large tensor they are coarser."""
        if self._grid is None or self.window is None:
            return 1, 1
        scale = self.window.scale
        return (
            max(1, -(-self._grid.cell_rows // scale.rows)),
            max(1, -(-self._grid.cell_columns // scale.columns)),
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
        grid, scale = self._grid, self._scale
        if grid is None or scale is None or self.window is None:
            return
        row = (event.y - 1) * 2 // scale.tall
        column = (event.x - self._gutter) // scale.wide
        rows, columns = grid.values.shape
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

    def on_focus(self) -> None:
        """The cursor shows."""
        self._lines.clear()
        self.refresh()

    def on_blur(self) -> None:
        """The cursor hides."""
        self._lines.clear()
        self.refresh()

    # Drawing

    @property
    def _unit(self) -> int:
        return FIGURE_HALVES if self.ramp.is_dense else 1

    @property
    def _is_roomy(self) -> bool:
        return self.size.height >= ROOMY_LINES

    @property
    def _lines_below(self) -> int:
        """The axis and the legend, and what is under the cursor."""
        return (2 if self._is_roomy else 0) + (1 if self.line_width >= WIDE_CELLS else 2)

    @property
    def _gutter(self) -> int:
        rows = 1 if self.view is None else self.view.num_rows
        return len(str(rows - 1)) + 1 if rows > 1 else 0

    @property
    def _area(self) -> tuple[int, int]:
        """Lines and columns of the map itself."""
        lines = self.size.height - 1 - self._lines_below
        return max(1, lines), max(1, self.line_width - self._gutter)

    @property
    def _is_signed(self) -> bool:
        return self.kind is not None and self.kind.name in ("TRACE", "ORACLE")

    @property
    def _decades(self) -> int:
        return VALUE_DECADES if self._is_signed else DECADES

    def _top(self, grid: Grid) -> float:
        """The end of the scale.

        A difference is seen against the size of the oracle's values, so that rounding looks dark
        and a fault bright at every stage; only a larger one widens the scale.
        """
        if grid.kind.name == "RATIO":
            return 1.0
        found = None if self.report is None else self.report.comparison
        if grid.kind.name == "DIFF" and found is not None:
            return max(grid.largest, found.rms_b)
        return grid.largest

    def draw(self, y: int) -> Strip:
        """The heading, the map, the axis, the legend, what is under the cursor."""
        if self._grid is None or self._scale is None or self.view is None:
            return self.strip(Text(""))
        if y == 0:
            return self.strip(self._heading())
        lines, _ = self._area
        if y <= lines:
            return self.strip(self._map_line(y - 1, self._grid, self._scale))
        number = y - lines - 1
        if self._is_roomy and number == 0:
            return self.strip(self._axis(self._grid, self._scale))
        if self._is_roomy and number == 1:
            return self.strip(self._legend(self._grid, LEGEND_CELLS))
        return self.strip(self._readout(number - (2 if self._is_roomy else 0)))

    def _heading(self) -> Text:
        """What is shown, and how much of it a cell is."""
        assert self.kind is not None and self.view is not None and self._grid is not None
        quiet, view, grid = self.paint("ink-quiet"), self.view, self._grid
        ink = {"TRACE": "ink-trace", "ORACLE": "ink-oracle"}.get(self.kind.name)
        line = Text.assemble((self.kind.value, self.paint(ink, bold=True) if ink else "bold"))
        line.append(f"  {view.name}", "bold" if _is_head(view) else "")
        size = f"{view.num_rows:,} × {view.num_columns:,}"
        if grid.cell_rows * grid.cell_columns == 1:
            said = "every value"
        else:
            said = f"a cell: {grid.cell_rows:,} × {grid.cell_columns:,}"
        for extra in (size, COMPUTING if self._is_waiting else said):
            if line.cell_len + len(extra) + 2 <= self.line_width:
                line.append(f"  {extra}", quiet)
        if not self._is_roomy:
            legend = self._legend(grid, 6)
            if line.cell_len + legend.cell_len + 2 <= self.line_width:
                line.append("  ").append_text(legend)
        line.truncate(self.line_width)
        return line

    def _map_line(self, y: int, grid: Grid, scale: Scale) -> list[Segment]:
        if self._lines_theme != self.app.theme:
            self._lines.clear()
            self._lines_theme = self.app.theme
        segments = self._lines.get(y)
        if segments is None:
            segments = self._lines[y] = self._blocks(y, grid, scale)
        cursor = self._cursor_cell(grid)
        rows = {half // scale.tall for half in (2 * y, 2 * y + 1)}
        is_marked = self.has_focus and cursor is not None and cursor[0] in rows
        gutter = self._row_label(y, grid, scale, is_marked)
        return [gutter, *(self._with_cursor(y, grid, scale, cursor) if is_marked and cursor
                          else segments)]  # fmt: skip

    def _row_label(self, y: int, grid: Grid, scale: Scale, is_marked: bool) -> Segment:
        cells = self._gutter
        if not cells:
            return Segment("")
        row = -(-2 * y // scale.tall)  # the first row that begins in this line
        begins = 2 * y <= row * scale.tall <= 2 * y + 1 and row < grid.values.shape[0]
        # Every row of a small map; of a large one so many that they can be read.
        if not begins or not (scale.tall >= FIGURE_HALVES or y % 4 == 0 or is_marked):
            return Segment(" " * cells)
        label = grid.top + row * grid.cell_rows
        style = self.paint("ink-oracle" if is_marked else "ink-quiet", bold=is_marked)
        return Segment(f"{label}".rjust(cells - 1) + " ", style)

    def _blocks(self, y: int, grid: Grid, scale: Scale) -> list[Segment]:
        """The blocks of a line, those of one colour in one piece."""
        upper, lower = (self._levels((2 * y + half) // scale.tall, grid) for half in (0, 1))
        if upper is None:
            return []
        if scale.wide >= FIGURE_COLUMNS and scale.tall >= FIGURE_HALVES:
            return self._figures(y, grid, scale, upper)
        below = [None] * len(upper) if lower is None else lower
        segments: list[Segment] = []
        start = 0
        for end in range(1, len(upper) + 1):
            here = upper[start], below[start]
            if end < len(upper) and (upper[end], below[end]) == here:
                continue
            segments.append(self._block(*here, (end - start) * scale.wide, scale.wide))
            start = end
        return segments

    def _block(self, upper: int | None, lower: int | None, cells: int, wide: int) -> Segment:
        """Some characters of an upper and a lower level; None is below the map."""
        ramp, is_signed = self.ramp, self._is_signed
        levels = [level for level in (upper, lower) if level is not None]
        if NOT_FINITE in levels:
            others = [level for level in levels if level != NOT_FINITE]
            ground = ramp.color(others[0] if others else 0, is_signed).rich_color
            style = self.paint("verdict-nonfinite", bold=True)
            if not ramp.is_dense:
                style += Style(bgcolor=ground)
            return Segment(NONFINITE.center(wide) * (cells // wide), style)
        assert upper is not None
        if ramp.is_dense:
            return Segment(ramp.density(upper) * cells, self._dense_style(upper))
        if lower is None:
            return Segment("▀" * cells, Style(color=ramp.color(upper, is_signed).rich_color))
        if upper == lower:
            return Segment(" " * cells, ramp.halves(upper, upper, is_signed))
        return Segment("▀" * cells, ramp.halves(upper, lower, is_signed))

    def _dense_style(self, level: int) -> Style | None:
        if not self._is_signed:
            return None
        return self.paint("ink-oracle" if level < 0 else "ink-trace")

    def _figures(self, y: int, grid: Grid, scale: Scale, levels: list[int]) -> list[Segment]:
        """Values large enough to have their figures written into them."""
        row = 2 * y // scale.tall
        is_first = 2 * y == row * scale.tall
        segments = []
        for level, value in zip(levels, grid.values[row].tolist()):
            if level == NOT_FINITE:
                segments.append(self._block(level, level, scale.wide, scale.wide))
                continue
            text = format_compact(value, 8) if is_first else ""
            style = self.ramp.text_style(level, self._is_signed)
            style = Style.null() if self.ramp.is_dense else style
            segments.append(Segment(text.center(scale.wide), style))
        return segments

    def _levels(self, row: int, grid: Grid) -> list[int] | None:
        """Levels of a row of the grid; None below its last."""
        if row >= grid.values.shape[0]:
            return None
        top, decades = self._top(grid), self._decades
        return [
            NOT_FINITE if bad else level_of(value, top, decades)
            for value, bad in zip(grid.values[row].tolist(), grid.nonfinite[row].tolist())
        ]

    def _cursor_cell(self, grid: Grid) -> tuple[int, int] | None:
        """Row and column of the grid under the cursor, if that is in view."""
        if self.window is None:
            return None
        row = (self.window.row - grid.top) // grid.cell_rows
        column = (self.window.column - grid.left) // grid.cell_columns
        rows, columns = grid.values.shape
        return (row, column) if 0 <= row < rows and 0 <= column < columns else None

    def _with_cursor(
        self, y: int, grid: Grid, scale: Scale, cursor: tuple[int, int]
    ) -> list[Segment]:
        """A line with the cursor's cell in the cursor's colour."""
        variables = self.app.theme_variables
        ink, ground = (
            Style.parse(variables[name]).color
            for name in ("block-cursor-foreground", "block-cursor-background")
        )
        strip = Strip(self._lines[y])
        start = cursor[1] * scale.wide
        before, cell, after = strip.divide([start, start + scale.wide, strip.cell_length])
        halves = [(2 * y + half) // scale.tall == cursor[0] for half in (0, 1)]
        if all(halves) or self.ramp.is_dense:
            text = cell.text if cell.text.strip(" ▀") else "+".center(scale.wide)
            marked = [Segment(text, Style(color=ink, bgcolor=ground, bold=True))]
        else:
            other = self._levels((2 * y + (1 if halves[0] else 0)) // scale.tall, grid)
            level = 0 if other is None else max(other[cursor[1]], -LEVELS)
            color = self.ramp.color(level, self._is_signed).rich_color
            block = "▀" if halves[0] else "▄"
            marked = [Segment(block * scale.wide, Style(color=ground, bgcolor=color))]
        return [*before, *marked, *after]

    def _axis(self, grid: Grid, scale: Scale) -> Text:
        """Columns of the matrix below the map."""
        line = ""
        gutter, cells = self._gutter, grid.values.shape[1]
        step = max(1, TICK_CELLS // scale.wide)
        for column in range(0, cells, step):
            label = str(grid.left + column * grid.cell_columns)
            at = gutter + column * scale.wide
            if at + len(label) <= self.line_width and len(line) <= at:
                line = line.ljust(at) + f"{label} "
        text = Text(line.rstrip(), self.paint("ink-quiet"))
        name = grid.columns
        if text.cell_len + len(name) + 2 <= self.line_width:
            text.append(f"  {name}", self.paint("ink-quiet"))
        cursor = self._cursor_cell(grid)
        if cursor is not None and self.has_focus and self.window is not None:
            label, at = str(self.window.column), gutter + cursor[1] * scale.wide
            at = max(0, min(at, self.line_width - len(label)))
            plain = text.plain.ljust(self.line_width)
            quiet, bold = self.paint("ink-quiet"), self.paint("ink-oracle", bold=True)
            text = Text.assemble(
                (plain[: max(0, at - 1)].ljust(at), quiet), (label, bold),
                (f" {plain[at + len(label) + 1 :]}", quiet),
            )  # fmt: skip
            text.truncate(self.line_width)
        return text

    def _legend(self, grid: Grid, cells: int) -> Text:
        """What the colours say."""
        quiet = self.paint("ink-quiet")
        top = self._top(grid)
        if grid.largest == 0:
            line = Text("all zero", quiet)
        else:
            low = format_ratio(top / 10**self._decades)
            line = Text("0", quiet)
            if self._is_signed and not self.ramp.is_dense:
                line = Text("− ", quiet)
                for cell in range(cells // 2):
                    level = LEVELS - cell * LEVELS // (cells // 2)
                    line.append(" ", self.ramp.text_style(-level, is_signed=True))
                cells //= 2
            line.append_text(
                ramp_text(self.ramp, cells, is_signed=self._is_signed, low=low, quiet=quiet)
            )
            sign = " +" if self._is_signed and not self.ramp.is_dense else ""
            line.append(f"{sign} {format_ratio(top)}", quiet)
        bad = int(grid.nonfinite.sum())
        if bad:
            line.append(f"  {NONFINITE} {bad:,} NaN/Inf", self.paint("verdict-nonfinite"))
        largest = f"  largest {format_ratio(grid.largest)}"
        if grid.largest and line.cell_len + len(largest) <= self.line_width and self._is_roomy:
            line.append(largest)
        return line

    def _readout(self, number: int) -> Text:
        """What is under the cursor: the place, and what both sides have there."""
        cell, grid = self.cell, self._grid
        if cell is None or grid is None:
            return Text("")
        quiet = self.paint("ink-quiet")
        axes, place = list(cell.position), list(cell.position.values())
        where = Text(format_position(axes, place))
        if grid.cell_rows * grid.cell_columns > 1:
            where = Text.assemble(("farthest: ", quiet), where)
        figures = Text("")
        is_wide = self.line_width >= WIDE_CELLS
        pairs = [("trace", "ink-trace", cell.trace), ("oracle", "ink-oracle", cell.oracle)]
        if cell.trace is not None and cell.oracle is not None:
            pairs.append(("|d|", "ink-quiet", abs(cell.trace - cell.oracle)))
        for name, ink, value in pairs:
            if value is not None:
                said = format_value(value) if is_wide else format_compact(value, 7)
                figures.append(f"{name} ", self.paint(ink)).append(f"{said}  ")
        figures.rstrip()
        if is_wide:
            line = where.append("   ").append_text(figures) if number == 0 else Text("")
        else:
            line = (where, figures)[number] if number < 2 else Text("")
        line.truncate(self.line_width, overflow="ellipsis")
        return line


# The level of a cell with a value that is not finite: beyond those of values.
NOT_FINITE = LEVELS + 1


def _is_head(view: MapView) -> bool:
    """Whether a view is one head of several."""
    return view.rows == "query" and not view.is_reduced
