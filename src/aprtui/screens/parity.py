"""The parity pane: two sides held against each other stage by stage, a GPU against the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.command import Provider
from textual.geometry import Region, Size
from textual.message import Message
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Footer, Static

from aprcore.stages import StageKey
from aprtui.formatting import (
    COSINE_PLACES,
    NARROW_COSINE_PLACES,
    figures_of,
    format_cosine,
    format_position,
    format_ratio,
)
from aprtui.palette import ScreenCommands
from aprtui.run_state import RunState
from aprtui.text import visible
from aprtui.theme import PENDING, Paint, judgment_mark, mark_of_verdict
from aprtui.widgets.rejection import Rejection

if TYPE_CHECKING:
    from aprcore.judge import Judgment
    from aprcore.parity.records import SideJudgment, StageParity

NAME_CELLS = 29  # "layer 127 · post_attn_residual", but for a cell that no model needs
NARROW_NAME_CELLS = 23
LEAST_LINES = 20  # of a screen that has two of them for the figures of a stage


class Heading(NamedTuple):
    """A column.

    Attributes:
        title: What stands above it.
        cells: Its width.
    """

    title: str
    cells: int


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
        return max(0, self.outer_size.width - self.styles.scrollbar_size_vertical)

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
        for heading in self._columns():
            line.append(heading.title.rjust(heading.cells))
        return line.append("  verdict")

    @property
    def _name_cells(self) -> int:
        return NAME_CELLS if self._width >= 84 else NARROW_NAME_CELLS

    def _columns(self) -> list[Heading]:
        """The columns that there is room for; the first ones matter most."""
        tested, trusted = self._state.side_names
        places = 11 if self._width >= 84 else 8
        kernel, ms = len(f"{trusted} kernel ") + 1, max(9, len(f" {trusted} ms"))
        wanted = [
            Heading("cosine", places), Heading("rel. L2", 9), Heading(f"{tested} kernel", kernel),
            Heading("max|diff|", 10), Heading(f"{trusted} kernel", kernel),
            Heading(f"{tested} ms", ms), Heading(f"{trusted} ms", ms),
            Heading(f"{tested}:oracle", 14), Heading(f"{trusted}:oracle", 14),
            Heading("at", 30),
        ]  # fmt: skip
        if self._width < 60:
            wanted[2:3] = []
        room = self._width - self._name_cells - 2 - 13
        while wanted and sum(heading.cells for heading in wanted) > room:
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
        segments = [Segment(s.text, s.style) for s in line.render(self.app.console) if s.text]
        strip = Strip(segments).apply_style(style)
        return strip.adjust_cell_length(self._width, style)

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
        for heading in self._columns():
            cell = Text() if parity is None else self._cell(heading, parity, paint)
            cell.truncate(heading.cells - 1, overflow="ellipsis")
            line.append(" " * (heading.cells - cell.cell_len)).append_text(cell)
        mark = PENDING if parity is None else mark_of_verdict(parity.verdict)
        is_over = parity is None and (
            self._state.rejected is not None or not self._state.is_running
        )
        word = "– not run" if is_over else f"{mark.glyph} {mark.word}"
        return line.append("  ").append(word, paint(mark.ink, bold=parity is not None))

    def _cell(self, heading: Heading, parity: StageParity, paint: Paint) -> Text:
        tested, trusted = self._state.side_names
        found, quiet = parity.comparison, paint("ink-quiet")
        match heading.title:
            case "cosine" if found is not None:
                cosine = figures_of(found)[0]
                return Text(format_cosine(cosine, heading.cells - 4), paint.cosine(cosine))
            case "rel. L2" if found is not None:
                style = paint("verdict-fail") if parity.differs else Style.null()
                return Text(format_ratio(figures_of(found)[1]), style)
            case "max|diff|" if found is not None:
                return Text(format_ratio(found.max_abs_diff), quiet)
            case "at" if found is not None and parity.layout is not None and found.max_index >= 0:
                layout = parity.layout
                return Text(format_position(layout.axes, layout.position(found.max_index)), quiet)
        side = parity.tested if heading.title.startswith(tested) else parity.trusted
        if heading.title in (f"{tested} kernel", f"{trusted} kernel"):
            return _kernel(side.kernel, side.fault, paint)
        if heading.title in (f"{tested} ms", f"{trusted} ms"):
            return Text(f"{1e3 * side.elapsed_s:.2f}", quiet)
        if heading.title.endswith(":oracle"):
            return _oracle(side, paint)
        return Text()


def _kernel(kernel: Judgment | None, fault: str, paint: Paint) -> Text:
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


class ParityScreen(Screen[StageKey | None]):
    """Every stage on two sides. Ends with the stage to go to, or None."""

    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {ScreenCommands}

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "up", id="parity.up", show=False, tooltip="One stage up"),
        Binding("down", "move(1)", "down", id="parity.down", show=False, tooltip="One stage down"),
        Binding("pageup", "page(-1)", "page up", id="parity.page-up", show=False,
                tooltip="One page up"),
        Binding("pagedown", "page(1)", "page down", id="parity.page-down", show=False,
                tooltip="One page down"),
        Binding("home", "move(-1000000)", "first", id="parity.first", show=False,
                tooltip="The first stage"),
        Binding("end", "move(1000000)", "last", id="parity.last", show=False,
                tooltip="The last stage"),
        Binding("n", "fault(1)", "next fault", id="parity.next",
                tooltip="The next stage that is wrong on the tested side"),
        Binding("p", "fault(-1)", "previous fault", id="parity.previous",
                tooltip="The one before"),
        Binding("enter", "open", "go there", id="parity.open", tooltip="Go to this stage"),
        Binding("escape,g", "close", "back", id="parity.close", tooltip="Back to the stages"),
    ]  # fmt: skip

    def __init__(self, state: RunState, at: StageKey | None) -> None:
        super().__init__()
        self._state = state
        self.table = ParityTable(state, at, id="parity-table")

    def compose(self) -> ComposeResult:
        """Both sides, what they come to, the stages, the one under the cursor."""
        yield Static(id="parity-title")
        yield Static(id="parity-summary")
        yield Rejection(self._state, id="rejection")
        yield Static(id="parity-headings")
        yield self.table
        yield Static(id="parity-stage")
        yield Static(id="parity-figures")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Draw what there is."""
        self.table.focus()
        self.call_after_refresh(self.refresh_run)

    def on_resize(self) -> None:
        """Columns depend on the width."""
        self.call_after_refresh(self.refresh_run)

    def on_parity_table_highlighted(self) -> None:
        """Tell of the stage under the cursor."""
        self._tell_stage()

    def refresh_run(self) -> None:
        """Stages were judged meanwhile."""
        paint = Paint(self.app.theme_variables)
        self.query_one("#parity-title", Static).update(self._title(paint))
        self.query_one("#parity-summary", Static).update(self._summary(paint))
        self.query_one("#parity-headings", Static).update(self.table.headings(paint))
        self.query_one(Rejection).refresh_run()
        self.table.update_rows()
        self._tell_stage()

    def _title(self, paint: Paint) -> Text:
        header = self._state.header
        line = Text(" Parity  ", paint("ink-oracle", bold=True), no_wrap=True, overflow="ellipsis")
        if header is None or header.tested is None or header.trusted is None:
            return line.append("no second side: --gpu, or --trace with --against")
        names = self._state.side_names
        if names == ("GPU", "CPU"):
            device = self._state.device
            label = "opening the device…" if device is None else visible(device.label)
            if device is None and self._state.rejected is not None:
                label = "no device"
            line.append(f"GPU {label}", paint("ink-trace", bold=True))
            return line.append(f"   against CPU {visible(header.trusted.label)}")
        line.append(visible(header.tested.path), paint("ink-trace", bold=True))
        return line.append("   against ").append(
            visible(header.trusted.path), paint("ink-oracle", bold=True)
        )

    def _summary(self, paint: Paint) -> Text:
        """What it comes to, and the time that either side took."""
        state = self._state
        tested, trusted = state.side_names
        line = Text(" ", no_wrap=True, overflow="ellipsis")
        faults = len(state.parity_faults)
        if faults:
            first = state.parity[state.parity_faults[0]]
            line.append(f"✗ {first.key}: {visible(first.reason)}", paint("verdict-fail", bold=True))
        elif state.parity:
            differing = sum(parity.differs for parity in state.parity.values())
            said = f"{differing} of {len(state.parity)} stages differ" if differing else (
                f"✓ {len(state.parity)} stages agree"
            )  # fmt: skip
            line.append(said, paint("verdict-noise" if differing else "verdict-pass", bold=True))
        spent = [
            sum(getattr(parity, side).elapsed_s for parity in state.parity.values())
            for side in ("tested", "trusted")
        ]
        times = f"   {tested} {spent[0]:.2f} s   {trusted} {spent[1]:.2f} s "
        room = self.size.width - line.cell_len
        if room < len(times):
            line.truncate(max(1, self.size.width - len(times)), overflow="ellipsis")
        return line.append(times, paint("ink-quiet"))

    def _tell_stage(self) -> None:
        paint, key = Paint(self.app.theme_variables), self.table.key
        parity = None if key is None else self._state.parity.get(key)
        line = Text(no_wrap=True, overflow="ellipsis")
        if parity is None:
            line.append(f" · {key}" if key is not None else "", paint("ink-quiet"))
        else:
            mark = mark_of_verdict(parity.verdict)
            line.append(f" {mark.glyph} {key}  ", paint(mark.ink, bold=True))
            line.append(visible(parity.reason))
        self.query_one("#parity-stage", Static).update(line)
        self.query_one("#parity-figures", Static).update(self._figures(parity, paint))

    def _figures(self, parity: StageParity | None, paint: Paint) -> Text:
        """Where the largest difference is, what the oracle says of each side, and the times."""
        line = Text(" ", paint("ink-quiet"), no_wrap=True, overflow="ellipsis")
        if parity is None:
            return line
        found, layout = parity.comparison, parity.layout
        if found is not None and layout is not None and found.max_index >= 0:
            position = format_position(layout.axes, layout.position(found.max_index))
            line.append(f"max|diff| {format_ratio(found.max_abs_diff)} at {position}   ")
        sides = tuple(zip(self._state.side_names, (parity.tested, parity.trusted)))
        places = COSINE_PLACES if self.size.width >= 100 else NARROW_COSINE_PLACES
        oracles = [
            f"{name} {format_cosine(figures_of(side.oracle)[0], places)}"
            for name, side in sides if side.oracle is not None
        ]  # fmt: skip
        if oracles:
            line.append(f"oracle: {', '.join(oracles)}")
        # The same height for every stage, or the table would jump under the cursor.
        line.append("\n " if self.size.height >= LEAST_LINES else "   ")
        for name, side in sides:
            line.append(f"{name} {1e3 * side.elapsed_s:.2f} ms")
            if side.kernel is not None:
                line.append(", kernel ").append_text(_kernel(side.kernel, side.fault, paint))
            line.append("   ")
        return line

    def action_move(self, step: int) -> None:
        """Move the cursor by stages."""
        self.table.move_by(step)

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self.table.move_by(pages * self.table.page)

    def action_fault(self, step: int) -> None:
        """Go to the next stage that is wrong."""
        keys, here = self.table.keys, self.table.key
        at = keys.index(here) if here in keys else -1
        numbers = [keys.index(key) for key in self._state.parity_faults]
        ahead = [n for n in numbers if (n > at if step > 0 else n < at)]
        if ahead:
            self.table.move_to(min(ahead) if step > 0 else max(ahead))
        else:
            self.notify("no fault that way" if numbers else "no fault")

    def action_open(self) -> None:
        """Go to the stage in the tree."""
        self.dismiss(self.table.key)

    def action_close(self) -> None:
        """Go back to where the tree was."""
        self.dismiss(None)
