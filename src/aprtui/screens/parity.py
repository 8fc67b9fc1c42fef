"""The parity pane: two sides held against each other stage by stage, a GPU against the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer, Static

from aprcore.network.stages import StageKey
from aprcore.records.telling import (
    COSINE_PLACES,
    figures_of,
    format_cosine,
    format_position,
    format_ratio,
)
from aprtui.bindings import cursor_keys
from aprtui.formatting import NARROW_COSINE_PLACES
from aprtui.run_state import RunState
from aprtui.screens.navigation import following
from aprtui.screens.run_view import RunView
from aprtui.text import visible
from aprtui.theme import Paint, mark_of_verdict
from aprtui.widgets.parity_table import ParityTable, kernel_cell
from aprtui.widgets.rejection import Rejection

if TYPE_CHECKING:
    from aprcore.records.parity import StageParity


LEAST_LINES = 20  # of a screen that has two of them for the figures of a stage


class ParityScreen(RunView):
    """Every stage on two sides. Ends with the stage to go to, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *cursor_keys("parity", "stage", "stage", ends=("first", "last")),
        Binding("n", "fault(1)", "next fault", id="parity.next",
                tooltip="The next stage that is wrong on the tested side"),
        Binding("p", "fault(-1)", "previous fault", id="parity.previous",
                tooltip="The one before"),
        Binding("enter", "open", "go there", id="parity.open", tooltip="Go to this stage"),
        Binding("escape,g", "dismiss", "back", id="parity.close", tooltip="Back to the stages"),
    ]  # fmt: skip

    def __init__(self, state: RunState, at: StageKey | None) -> None:
        super().__init__(state)
        # Held, not looked for: they are redrawn for a resize while the screen comes or goes, too.
        names = ("title", "summary", "headings", "stage", "figures")
        self._lines = {name: Static(id=f"parity-{name}") for name in names}
        self._rejection = Rejection(state, id="rejection")
        self.table = ParityTable(state, at, id="parity-table")

    def compose(self) -> ComposeResult:
        """Both sides, what they come to, the stages, the one under the cursor."""
        yield self._lines["title"]
        yield self._lines["summary"]
        yield self._rejection
        yield self._lines["headings"]
        yield self.table
        yield self._lines["stage"]
        yield self._lines["figures"]
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
        self._lines["title"].update(self._title(paint))
        self._lines["summary"].update(self._summary(paint))
        self._lines["headings"].update(self.table.headings(paint))
        self._rejection.refresh_run()
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
        self._lines["stage"].update(line)
        self._lines["figures"].update(self._figures(parity, paint))

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
                line.append(", kernel ").append_text(kernel_cell(side.kernel, side.fault, paint))
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
        found = following(numbers, at, step)
        if found is not None:
            self.table.move_to(found)
        else:
            self.notify("no fault that way" if numbers else "no fault")

    def action_open(self) -> None:
        """Go to the stage in the tree."""
        self.dismiss(self.table.key)
