"""The way that an error was followed along, in one line."""

from __future__ import annotations

from rich.text import Text
from textual.widget import Widget

from aprcore.network.stages import StageKey
from aprtui.run_state import RunState
from aprtui.theme import Paint, mark_of


class Breadcrumb(Widget):
    """Stages from where the user began up to where the cursor is; absent until it is needed."""

    DEFAULT_CSS = "Breadcrumb { height: 1; display: none; }"
    ALLOW_SELECT = False

    def __init__(self, state: RunState, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self._way: list[StageKey] = []

    @property
    def way(self) -> tuple[StageKey, ...]:
        """From where the user began to where the cursor is."""
        return tuple(self._way)

    def walk(self, start: StageKey, to: StageKey) -> None:
        """The user goes from one stage to a neighbour, perhaps back the way that was taken."""
        if not self._way or self._way[-1] != start:
            self._way = [start]
        if to in self._way:
            del self._way[self._way.index(to) + 1 :]
        else:
            self._way.append(to)
        self._show()

    def before(self, here: StageKey) -> StageKey | None:
        """Where the user came from."""
        return self._way[-2] if len(self._way) > 1 and self._way[-1] == here else None

    def leave(self, here: StageKey | None) -> None:
        """The cursor is somewhere else: the way ends."""
        if self._way and self._way[-1] != here:
            self._way.clear()
            self._show()

    def _show(self) -> None:
        self.display = len(self._way) > 1
        self.refresh()

    def render(self) -> Text:
        """The names, the last ones where there is no room for all."""
        paint = Paint(self.app.theme_variables)
        pieces: list[Text] = []
        for key in self._way:
            mark = mark_of(self._state.reports.get(key))
            pieces.append(Text(f"{mark.glyph} {key}", paint(mark.ink, bold=key == self._way[-1])))
        arrow = Text(" ← ", paint("ink-quiet"))
        line = arrow.join(pieces)
        while line.cell_len > self.size.width - 1 and len(pieces) > 1:
            pieces = pieces[1:]
            line = Text.assemble(("… ← ", paint("ink-quiet")), arrow.join(pieces))
        line.no_wrap, line.overflow = True, "ellipsis"
        return Text.assemble(" ", line)
