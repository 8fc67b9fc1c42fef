"""The depth profile on the whole screen: relative L2 over all layers, a curve per judgment."""

from __future__ import annotations

from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Footer, Static

from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from aprcore.records.telling import format_ratio
from aprtui.profile import LEAST, MOST, Curve, Point, gather, height_of, points_of
from aprtui.run_state import RunState
from aprtui.screens.navigation import following
from aprtui.screens.run_view import RunView
from aprtui.theme import Paint, mark_of
from aprtui.widgets.lines import strip_of

# A glyph each, so that curves stay apart without colours; later ones lie over earlier ones.
LOOKS = {
    Curve.NOISE: ("·", "ink-quiet"),
    Curve.CUMULATIVE: ("●", "ink-trace"),
    Curve.MODEL: ("▲", "ink-oracle"),
    Curve.KERNEL: ("■", "verdict-pass"),
}
LABEL_CELLS = 6
MOST_STRETCH = 8


class ProfilePlot(Widget):
    """The curves over the stages; a point can be chosen.

    Attributes:
        stage: The stage whose layers are shown; None for all stages.
        chosen: The stage under the cursor.
    """

    DEFAULT_CSS = "ProfilePlot { height: 1fr; }"
    ALLOW_SELECT = False

    stage: reactive[str | None] = reactive(None)
    chosen: reactive[StageKey | None] = reactive(None)

    def __init__(self, state: RunState, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        # Every line of a repaint asks for them.
        self._gathered: list[Point] = []
        self._gathered_for: tuple[object, ...] = ()

    def points(self) -> list[Point]:
        """What there is room for."""
        state = self._state
        shown = (self._room, self.stage, state.number, len(state.reports))
        if shown != self._gathered_for:
            self._gathered = gather(state, points_of(state, self.stage), self._room)
            self._gathered_for = shown
        return self._gathered

    def number(self, points: list[Point]) -> int:
        """Which point is under the cursor; where the stage is not shown, its layer's first."""
        key = self.chosen
        if key is None:
            return 0
        found = (n for n, point in enumerate(points) if key in point.keys)
        layer = (n for n, point in enumerate(points) if point.key.layer == key.layer)
        return next(found, next(layer, 0))

    def point(self) -> Point | None:
        """The point under the cursor."""
        points = self.points()
        return points[self.number(points)] if points else None

    def render_line(self, y: int) -> Strip:
        """A line of the plot, from the top; the last one is the axis of layers."""
        paint = Paint(self.app.theme_variables)
        points, rows = self.points(), self.size.height - 1
        if y >= rows:
            return self._fit(self._axis(points, paint))
        label = self._label(rows - y, rows)
        line = Text(label.rjust(LABEL_CELLS - 1) + "┤" if label else " " * (LABEL_CELLS - 1) + "│",
                    paint("ink-quiet"))  # fmt: skip
        here = self.number(points)
        for number, point in enumerate(points):
            glyph, style = self._glyph(point, rows - y, rows, paint)
            if number == here:
                style += Style(bgcolor=self._cursor_ground())
                glyph = "┊" if glyph == " " else glyph
            line.append(" " * (self._place(number, len(points)) - line.cell_len))
            line.append(glyph, style)
        return self._fit(line)

    @property
    def _room(self) -> int:
        return max(1, self.size.width - LABEL_CELLS - 1)

    def _place(self, number: int, count: int) -> int:
        """The column of a point: few points are spread out."""
        return LABEL_CELLS + number * min(self._room, count * MOST_STRETCH) // max(1, count)

    def _cursor_ground(self) -> str:
        return self.app.theme_variables["panel"]

    def _glyph(self, point: Point, level: int, rows: int, paint: Paint) -> tuple[str, Style]:
        """What stands at one height of a point."""
        found = (" ", Style.null())
        for curve, (glyph, ink) in LOOKS.items():
            error = point.errors.get(curve)
            if error is not None and height_of(error, rows) == level:
                found = glyph, paint(ink, bold=curve is not Curve.NOISE)
        if point.key in self._state.divergences and level == rows:
            mark = mark_of(self._state.reports[point.key])
            found = mark.glyph, paint(mark.ink, bold=True)
        return found

    @staticmethod
    def _label(level: int, rows: int) -> str:
        """The decade that begins at a height, where one does."""
        for decade in range(LEAST, MOST + 1):
            if height_of(10.0**decade, rows) == level and level > 0:
                return f"1e{decade}"
        return ""

    def _axis(self, points: list[Point], paint: Paint) -> Text:
        """Numbers of layers where they begin, as far as they do not touch."""
        line = Text("layer".rjust(LABEL_CELLS - 1), paint("ink-quiet"))
        before: object = self
        for number, point in enumerate(points):
            layer, at = point.key.layer, self._place(number, len(points))
            if layer != before and at > line.cell_len:
                line.append(" " * (at - line.cell_len))
                line.append("out" if layer is None else str(layer), paint("ink-quiet"))
            before = layer
        return line

    def _fit(self, line: Text) -> Strip:
        return strip_of(self.app, line, self.rich_style, self.size.width)

    def on_click(self, event: events.Click) -> None:
        """A click chooses the nearest point."""
        points = self.points()
        if points:
            places = [self._place(number, len(points)) for number in range(len(points))]
            nearest = min(range(len(points)), key=lambda number: abs(places[number] - event.x))
            self.chosen = points[nearest].key


class ProfileScreen(RunView):
    """Curves over depth. Ends with the stage to go to, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "left", id="profile.left", tooltip="The point to the left"),
        Binding("right", "move(1)", "right", id="profile.right", tooltip="The point to the right"),
        Binding("up", "stage(-1)", "previous stage", id="profile.previous-stage",
                tooltip="This stage over all layers, then the one before"),
        Binding("down", "stage(1)", "next stage", id="profile.next-stage",
                tooltip="This stage over all layers, then the next; after the last one, all"),
        Binding("n", "fault(1)", "next", id="profile.next", tooltip="The next divergence"),
        Binding("p", "fault(-1)", "prev", id="profile.previous", tooltip="The one before"),
        Binding("home", "move(-1000000)", "first", id="profile.first", show=False,
                tooltip="The first point"),
        Binding("end", "move(1000000)", "last", id="profile.last", show=False,
                tooltip="The last point"),
        Binding("enter", "open", "go there", id="profile.open", tooltip="Go to this stage"),
        Binding("escape,o", "dismiss", "back", id="profile.close", tooltip="Back to the stages"),
    ]  # fmt: skip

    def __init__(self, state: RunState, at: StageKey | None) -> None:
        super().__init__(state)
        self._heading, self._foot = Static(id="plot-title"), Static(id="plot-point")
        self.plot = ProfilePlot(state, id="plot")
        self.plot.set_reactive(ProfilePlot.chosen, at)

    def compose(self) -> ComposeResult:
        """What is shown, the curves, what is under the cursor."""
        yield self._heading
        yield self.plot
        yield self._foot
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Begin where the cursor of the tree is."""
        for name in ("stage", "chosen"):
            self.watch(self.plot, name, self._tell, init=False)
        self.call_after_refresh(self._tell)

    def refresh_run(self) -> None:
        """Stages were judged meanwhile."""
        self.plot.refresh()
        self._tell()

    def _tell(self) -> None:
        paint = Paint(self.app.theme_variables)
        title = Text(no_wrap=True, overflow="ellipsis")
        shown = "all stages" if self.plot.stage is None else self.plot.stage
        title.append(" Depth profile ", paint("ink-oracle", bold=True)).append(f"{shown}   ")
        for curve, (glyph, ink) in reversed(LOOKS.items()):
            title.append(f"{glyph} ", paint(ink, bold=True)).append(f"{curve.value}  ")
        title.append("relative L2, log scale", paint("ink-quiet"))
        self._heading.update(title)
        self._foot.update(self._describe(paint))

    def _describe(self, paint: Paint) -> Text:
        """The point under the cursor: its stage, verdict and figures."""
        point = self.plot.point()
        if point is None:
            return Text(" no stage", paint("ink-quiet"))
        mark = mark_of(self._state.reports.get(point.key))
        line = Text(f" {mark.glyph} {mark.word}  {point.key}", paint(mark.ink, bold=True))
        line.no_wrap, line.overflow = True, "ellipsis"
        if len(point.keys) > 1:
            line.append(f" (of {len(point.keys)} stages)", paint("ink-quiet"))
        for curve, error in point.errors.items():
            line.append(f"  {curve.value} ", paint("ink-quiet")).append(format_ratio(error))
        return line

    def action_move(self, step: int) -> None:
        """Move the cursor by points."""
        points = self.plot.points()
        if points:
            number = self.plot.number(points) + step
            self.plot.chosen = points[max(0, min(len(points) - 1, number))].key

    def action_stage(self, step: int) -> None:
        """Show another stage over all layers, or all stages."""
        present = {key.stage for key in self._state.keys if key.layer is not None}
        stages = [None, *(name for name in known_stages() if name in present)]
        point = self.plot.point() if self.plot.stage is None else None
        if point is not None and point.key.stage in present:
            self.plot.stage = point.key.stage  # what is being looked at comes first
        else:
            self.plot.stage = stages[(stages.index(self.plot.stage) + step) % len(stages)]

    def action_fault(self, step: int) -> None:
        """Go to the next point that stands for a divergence."""
        points, diverging = self.plot.points(), set(self._state.divergences)
        faults = [number for number, point in enumerate(points) if point.key in diverging]
        found = following(faults, self.plot.number(points), step)
        if found is None:
            self.notify("no divergence that way")
        else:
            self.plot.chosen = points[found].key

    def action_open(self) -> None:
        """Go to the stage in the tree."""
        point = self.plot.point()
        self.dismiss(None if point is None else point.key)
