"""The depth profile in one line above the tree: a bar per layer."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text
from textual import events
from textual.message import Message
from textual.widget import Widget

from aprcore.network.stages import StageKey
from aprtui.profile import CURVE_OF, Curve, Point, by_layer, gather, height_of
from aprtui.run_state import RunState
from aprtui.theme import Paint, mark_of
from aprtui.widgets.stage_tree import StageTree

BARS = "▁▂▃▄▅▆▇█"
ABSENT = "·"


class ProfileStrip(Widget):
    """A bar per layer for the judgment that the tree shows, on a logarithmic axis."""

    DEFAULT_CSS = "ProfileStrip { height: 1; }"
    ALLOW_SELECT = False

    @dataclass
    class Chosen(Message):
        """A bar was clicked."""

        key: StageKey

    def __init__(self, state: RunState, tree: StageTree, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self._tree = tree

    def render(self) -> Text:
        """The bars, as wide as there is room for."""
        paint = Paint(self.app.theme_variables)
        line = Text(no_wrap=True)
        points, cells = self._points()
        if not points:
            return line
        line.append("depth ", paint("ink-quiet"))
        curve = CURVE_OF[self._tree.measure]
        for point in points:
            line.append_text(self._bar(point, curve, paint, cells))
        return line

    def _points(self) -> tuple[list[Point], int]:
        """What there is room for, and the cells of each bar."""
        room = max(1, self.size.width - len("depth ") - 1)
        points = gather(self._state, by_layer(self._state, self._tree.measure), room)
        return points, max(1, min(3, room // max(1, len(points))))

    def _bar(self, point: Point, curve: Curve, paint: Paint, cells: int) -> Text:
        measure = self._tree.measure
        mark = mark_of(self._state.reports_of(measure).get(point.key))
        error = point.errors.get(curve)
        faults = self._state.faults_of(measure)
        diverges = point.key in faults
        if error is None:
            glyph = mark.glyph if diverges else ABSENT
        else:
            glyph = BARS[max(0, height_of(error, len(BARS)) - 1)]
        # Without colours the fault must stand out by its height and weight.
        style = paint.shape(mark.ink, bold=diverges)
        if point.key in faults[:1]:
            glyph = mark.glyph
        return Text(glyph * max(1, cells - (cells > 1)) + " " * (cells > 1), style)

    def on_click(self, event: events.Click) -> None:
        """A click goes to the worst stage of the layer."""
        points, cells = self._points()
        number = (event.x - len("depth ")) // cells
        if 0 <= number < len(points):
            self.post_message(self.Chosen(points[number].key))
