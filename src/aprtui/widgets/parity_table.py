"""The stages of two sides, a line each: what differs, whose kernel is wrong, who took how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from aprcore.network.stages import StageKey
from aprcore.records.telling import figures_of, format_cosine, format_position, format_ratio
from aprtui.run_state import RunState
from aprtui.theme import PENDING, Paint, judgment_mark, mark_of_verdict
from aprtui.widgets.lines import cells_of, strip_of

if TYPE_CHECKING:
    from aprcore.judging.verdict import Judgment
    from aprcore.records.parity import SideJudgment, StageParity

NAME_CELLS = 29  # "layer 127 · post_attn_residual", but for a cell that no model needs
NARROW_NAME_CELLS = 23


class ParityTable(ScrollView, can_focus=True):
    """A line per stage, drawn only where it is in view."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {"parity-table--cursor"}

    class Highlighted(Message):
        """The cursor is on another stage."""

    def __init__(self, state: RunState, at: StageKey | None, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self._cursor = 0
        self._at = at

    @property
    def keys(self) -> tuple[StageKey, ...]:
        """Every stage of the run."""
        return self._state.keys

    @property
    def key(self) -> StageKey | None:
        """The stage under the cursor."""
        return self.keys[self._cursor] if self.keys else None

    def on_mount(self) -> None:
        """Begin where the tree's cursor is."""
        if self._at in self.keys:
            self._cursor = self.keys.index(self._at)
        self.call_after_refresh(self.update_rows)

    def on_resize(self) -> None:
        """Lines are as wide as the widget."""
        self.update_rows()

    def update_rows(self) -> None:
        """Take over what was judged meanwhile."""
        self.virtual_size = Size(self._width, len(self.keys))
        self._keep_in_view()
        self.refresh()

    @property
    def _width(self) -> int:
        return cells_of(self)

    def move_to(self, number: int) -> None:
        """Put the cursor on a line."""
        self._cursor = max(0, min(len(self.keys) - 1, number))
        self._keep_in_view()
        self.refresh()
        self.post_message(self.Highlighted())

    def move_by(self, step: int) -> None:
        """Move the cursor by lines."""
        self.move_to(self._cursor + step)

    @property
    def page(self) -> int:
        """Lines in view."""
        return max(1, self.size.height - 1)

    def _keep_in_view(self) -> None:
        line = Region(0, self._cursor, max(1, self._width), 1)
        self.scroll_to_region(line, animate=False, force=True, x_axis=False)

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor."""
        self.move_to(event.y + self.scroll_offset.y)

    def headings(self, paint: Paint) -> Text:
        """The line above the stages."""
        line = Text("  " + "stage".ljust(self._name_cells), paint("ink-quiet"), no_wrap=True)
        for title, cells in self._columns():
            line.append(title.rjust(cells))
        return line.append("  verdict")

    @property
    def _name_cells(self) -> int:
        return NAME_CELLS if self._width >= 84 else NARROW_NAME_CELLS

    def _columns(self) -> list[tuple[str, int]]:
        """Titles and cells of the columns that there is room for; the first ones matter most."""
        tested, trusted = self._state.side_names
        places = 11 if self._width >= 84 else 8
        kernel, ms = len(f"{trusted} kernel ") + 1, max(9, len(f" {trusted} ms"))
        wanted = [
            ("cosine", places), ("rel. L2", 9), (f"{tested} kernel", kernel),
            ("max|diff|", 10), (f"{trusted} kernel", kernel),
            (f"{tested} ms", ms), (f"{trusted} ms", ms),
            (f"{tested}:oracle", 14), (f"{trusted}:oracle", 14),
            ("at", 30),
        ]  # fmt: skip
        if self._width < 60:
            wanted[2:3] = []
        room = self._width - self._name_cells - 2 - 13
        while wanted and sum(cells for _, cells in wanted) > room:
            wanted.pop()
        return wanted

    def render_line(self, y: int) -> Strip:
        """The line at `y` below the top of the view."""
        number = y + self.scroll_offset.y
        if number >= len(self.keys):
            return Strip.blank(self.size.width, self.rich_style)
        line = self._line(self.keys[number])
        style = self.rich_style
        if number == self._cursor:
            cursor = self.get_component_rich_style("parity-table--cursor")
            line, style = Text(line.plain), style + cursor
        return strip_of(self.app, line, style, self._width)

    def _line(self, key: StageKey) -> Text:
        paint = Paint(self.app.theme_variables)
        parity = self._state.parity.get(key)
        is_first = key in self._state.parity_faults[:1]
        name = Text(f"{'▶' if is_first else ' '} ", paint("verdict-fail", bold=True))
        layer = "" if key.layer is None else f"layer {key.layer} · "
        if layer and self._name_cells < NAME_CELLS:
            layer = f"{key.layer} · "
        label = Text.assemble((layer, paint("ink-quiet")), key.stage)
        label.truncate(self._name_cells, overflow="ellipsis", pad=True)
        line = Text.assemble(name, label)
        for title, cells in self._columns():
            cell = Text() if parity is None else self._cell(title, cells, parity, paint)
            cell.truncate(cells - 1, overflow="ellipsis")
            line.append(" " * (cells - cell.cell_len)).append_text(cell)
        mark = PENDING if parity is None else mark_of_verdict(parity.verdict)
        is_over = parity is None and (
            self._state.rejected is not None or not self._state.is_running
        )
        word = "– not run" if is_over else f"{mark.glyph} {mark.word}"
        return line.append("  ").append(word, paint(mark.ink, bold=parity is not None))

    def _cell(self, title: str, cells: int, parity: StageParity, paint: Paint) -> Text:
        tested, trusted = self._state.side_names
        found, quiet = parity.comparison, paint("ink-quiet")
        match title:
            case "cosine" if found is not None:
                cosine = figures_of(found)[0]
                return Text(format_cosine(cosine, cells - 4), paint.cosine(cosine))
            case "rel. L2" if found is not None:
                style = paint("verdict-fail") if parity.differs else Style.null()
                return Text(format_ratio(figures_of(found)[1]), style)
            case "max|diff|" if found is not None:
                return Text(format_ratio(found.max_abs_diff), quiet)
            case "at" if found is not None and parity.layout is not None and found.max_index >= 0:
                layout = parity.layout
                return Text(format_position(layout.axes, layout.position(found.max_index)), quiet)
        side = parity.tested if title.startswith(tested) else parity.trusted
        if title in (f"{tested} kernel", f"{trusted} kernel"):
            return kernel_cell(side.kernel, side.fault, paint)
        if title in (f"{tested} ms", f"{trusted} ms"):
            return Text(f"{1e3 * side.elapsed_s:.2f}", quiet)
        if title.endswith(":oracle"):
            return _oracle(side, paint)
        return Text()


def kernel_cell(kernel: Judgment | None, fault: str, paint: Paint) -> Text:
    """A kernel judgment in a glyph and its error."""
    if kernel is None:
        return Text("–", paint("ink-quiet"))
    mark = judgment_mark(kernel)
    if not fault and not kernel.passed:
        # Beyond what is predicted, but too little to matter: drivers round some functions worse.
        return Text(f"≈ {format_ratio(kernel.relative_l2)}", paint("verdict-noise"))
    return Text(f"{mark.glyph} {format_ratio(kernel.relative_l2)}", paint(mark.ink))


def _oracle(side: SideJudgment, paint: Paint) -> Text:
    if side.oracle is None:
        return Text("–", paint("ink-quiet"))
    cosine = figures_of(side.oracle)[0]
    return Text(format_cosine(cosine), paint.cosine(cosine))
