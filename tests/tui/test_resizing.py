"""Any size of terminal, on every screen and in every tab: nothing breaks or is out of view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from demo_runs import kernel_run
from driving import come_to_rest, drive, explorer_of, press, settle
from textual.geometry import Region
from textual.pilot import Pilot
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import DataTable

from aprtui.app import ExplorerApp
from aprtui.screens.changes import ChangesScreen
from aprtui.screens.explorer import ExplorerScreen
from aprtui.screens.export import ExportScreen
from aprtui.screens.help import HelpScreen
from aprtui.screens.parity import ParityScreen
from aprtui.screens.profile import ProfileScreen
from aprtui.widgets.parity_table import ParityTable
from aprtui.widgets.stage_tree import StageTree

# Around every breakpoint, and what nobody can read; each is reached from a larger and a smaller.
SIZES = (
    (120, 40), (40, 10), (300, 100), (63, 15), (1, 1), (64, 16), (99, 30), (300, 3), (80, 24),
    (10, 100), (200, 60),
)  # fmt: skip

LEAST = (40, 10)  # from here on everything has its place

# Everything but the ways out.
KEYS = (
    "up", "down", "left", "right", "home", "end", "pageup", "pagedown", "enter", "space", "tab",
    "escape", "slash", "colon", "plus", "minus", "0", "left_square_bracket",
    "right_square_bracket", *"123456nudbsktogwvmahHxey", "question_mark", "ctrl+p",
)  # fmt: skip

# Keys that lead to each view, from the tree.
VIEWS = {
    "tree": (), "tokens": ("2",), "map": ("3",), "histogram": ("4",), "values": ("5",),
    "why": ("6",), "filter": ("slash", "f"), "sorted": ("s", "end"), "place": ("5", "colon"),
    "profile": ("o", "end"), "help": ("question_mark",), "palette": ("ctrl+p",),
    "changes": ("x",), "export": ("e",), "parity": ("g", "end"),
}  # fmt: skip
SCREENS = {
    "profile": ProfileScreen, "help": HelpScreen, "changes": ChangesScreen,
    "export": ExportScreen, "parity": ParityScreen,
}  # fmt: skip


def open_app() -> ExplorerApp:
    """All three judgments and a second side."""
    judged = kernel_run("kv-tiled")
    return ExplorerApp(replace(judged, against=judged.oracle))


async def open_view(pilot: Pilot[Any], view: str) -> None:
    """Go to a view, from wherever such a run begins."""
    assert isinstance(pilot.app.screen, ParityScreen)  # what two dumps are named for
    await press(pilot, "escape")
    if view == "changes":
        await run_again(pilot)
    await press(pilot, *VIEWS[view])
    assert isinstance(pilot.app.screen, SCREENS.get(view, object))


async def run_again(pilot: Pilot[Any]) -> None:
    before = explorer_of(pilot).state.number
    await press(pilot, "r")
    await settle(pilot)
    assert explorer_of(pilot).state.number == before + 1


@pytest.mark.slow
class TestEverySize:
    @pytest.mark.parametrize("view", VIEWS)
    def test_shows_what_there_is_room_for(self, view: str) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await open_view(pilot, view)
            kind = type(pilot.app.screen)
            for size in SIZES:
                await pilot.resize_terminal(*size)
                await come_to_rest(pilot)
                assert type(pilot.app.screen) is kind
                faults = list(faults_of(pilot.app.screen))
                assert not faults, f"{view} at {size[0]}x{size[1]}: {faults}"

        drive(open_app(), steps)

    @pytest.mark.parametrize("size", [(1, 1), (40, 10), (300, 100)], ids=str)
    def test_is_one_to_begin_and_to_run_again_in(self, size: tuple[int, int]) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            for size in ((120, 40), (1, 1), (40, 10), (300, 100)):
                await pilot.resize_terminal(*size)
                await run_again(pilot)
                assert not list(faults_of(pilot.app.screen))

        drive(ExplorerApp(kernel_run("kv-tiled")), steps, size=size)

    @pytest.mark.parametrize("seed", range(2))
    def test_takes_every_key(self, seed: int) -> None:
        """Whatever is open: what a key does must not count on room that there is not."""
        random = Random(seed)

        async def steps(pilot: Pilot[Any]) -> None:
            for _ in range(30):
                await pilot.resize_terminal(*random.choice(SIZES))
                await pilot.press(*random.choices(KEYS, k=4))  # faster than they are drawn
                await come_to_rest(pilot)
            await pilot.resize_terminal(120, 40)
            await come_to_rest(pilot)
            assert not list(faults_of(pilot.app.screen))

        drive(open_app(), steps)


def faults_of(screen: Any) -> Iterator[str]:
    """What is wrong with the arrangement of a screen, if anything; tiny ones only have to live."""
    whole = Region(0, 0, *screen.app.size)
    if whole.width < LEAST[0] or whole.height < LEAST[1]:
        return
    if screen.max_scroll_x or screen.max_scroll_y:
        yield f"the screen scrolls by {screen.max_scroll_x}, {screen.max_scroll_y}"
    for widget in screen.query(Widget):
        line = cursor_line(widget)
        if line is None or not widget.is_on_screen or not widget.size.area:
            continue
        top = round(widget.scroll_offset.y)
        if not top <= line < top + widget.size.height:
            yield f"{widget!r} shows lines from {top} on, not its cursor's, {line}"
    if isinstance(screen, ModalScreen):
        for pane in screen.children:
            if pane.display and not whole.contains_region(pane.region):
                yield f"{pane!r} reaches out of the screen: {pane.region}"
    for wide in screen.query("ProfilePlot, ParityTable"):
        if wide.outer_size.width != whole.width:
            yield f"{wide!r} is {wide.outer_size.width} wide"
    if isinstance(screen, ExplorerScreen):
        panes = [pane for pane in (screen.query_one("#stages"), screen.detail) if pane.display]
        if sum(pane.outer_size.width for pane in panes) != whole.width:
            yield f"panes of {[pane.outer_size.width for pane in panes]} cells"
        if screen.detail.display:
            inside = screen.detail.content_size.width
            for part in screen.detail.children:
                if part.display and part.outer_size.width > inside:
                    yield f"{part!r} is {part.outer_size.width} wide in {inside}"


def cursor_line(widget: Widget) -> int | None:
    """The line of a widget's cursor among all its lines."""
    match widget:
        case StageTree() | ParityTable():
            return widget._cursor if widget.virtual_size.height else None
        case DataTable():
            return widget.cursor_row + widget.header_height if widget.row_count else None
    return None
