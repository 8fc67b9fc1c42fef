"""The tabs: how they are opened, and how they look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo_runs import kernel_run
from driving import come_to_rest, drive, explorer_of, press, settle, then_press
from tab_views import lines_of, map_of, pictures_of, values_of
from textual.pilot import Pilot

from aprcore.network.stages import StageKey
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.settings import Settings
from aprtui.widgets.tabs import DetailTab, TabStrip
from conftest import BROKEN

pytestmark = pytest.mark.usefixtures("colours")
Compare = Callable[..., bool]
SIZES = {"40x10": (40, 10), "80x24": (80, 24), "120x40": (120, 40), "200x60": (200, 60)}
TABS = {"tokens": "2", "map": "3", "histogram": "4", "values": "5"}


class TestTabs:
    def test_numbers_brackets_and_clicks_open_tabs(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            for number, tab in enumerate(DetailTab, 1):
                await press(pilot, str(number))
                assert screen.tab is tab
                assert pictures_of(pilot).display is tab.is_picture
            await press(pilot, "right_square_bracket")
            assert screen.tab is DetailTab.TOP_K
            await press(pilot, "left_square_bracket")
            assert screen.tab is DetailTab.WHY
            strip = screen.query_one(TabStrip)
            at = strip.render().plain.index("Histogram")
            await pilot.click(TabStrip, offset=(at, 0))
            await come_to_rest(pilot)
            assert screen.tab is DetailTab.HISTOGRAM

        drive(ExplorerApp(failing_request), steps)

    @pytest.mark.parametrize("width", [80, 100, 120, 200])
    def test_every_title_fits(self, failing_request: Request, width: int) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3")
            strip = explorer_of(pilot).query_one(TabStrip)
            assert len(strip.render().plain) <= strip.size.width
            assert "Map" in strip.render().plain or "Heat map" in strip.render().plain

        drive(ExplorerApp(failing_request), steps, size=(width, 30))

    def test_focus_goes_in_and_comes_back(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            await press(pilot, "3")
            row = screen.tree_of_stages.row
            await press(pilot, "down")
            assert screen.tree_of_stages.row != row  # the map takes no arrows from the tree
            for enter in ("enter", "tab"):
                await press(pilot, enter)
                assert screen.focused is map_of(pilot)
                await press(pilot, "5")
                assert screen.focused is values_of(pilot)
                await press(pilot, "3", "escape")
                assert screen.focused is screen.tree_of_stages
            await press(pilot, "enter", "1")
            assert screen.focused is screen.tree_of_stages

        drive(ExplorerApp(failing_request), steps)

    def test_a_picture_takes_the_tree_s_place_on_a_tiny_screen(
        self, failing_request: Request
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            await press(pilot, "3")
            assert screen.focused is map_of(pilot)
            assert not screen.query_one("#stages").display
            await press(pilot, "escape")
            assert screen.query_one("#stages").display
            assert screen.focused is screen.tree_of_stages

        drive(ExplorerApp(failing_request), steps, size=(40, 10))

    def test_one_can_be_chosen_while_the_run_opens(
        self, failing_request: Request, stopping: Any
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3")
            assert explorer_of(pilot).tab is DetailTab.MAP
            assert "choose a stage" in lines_of(map_of(pilot))[0]

        drive(ExplorerApp(failing_request, stopping(0)), steps)

    def test_rows_without_a_tensor_say_so(self, failing_request: Request, stopping: Any) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3", "home")
            assert "choose a stage" in lines_of(map_of(pilot))[0]
            await press(pilot, "end")
            assert "not judged yet" in lines_of(map_of(pilot))[0]

        drive(ExplorerApp(failing_request, stopping(20)), steps)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tab", TABS.values(), ids=TABS)
class TestLooks:
    def test_fault(self, snap_compare: Compare, tab: str, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=size, run_before=then_press(tab))


@pytest.mark.parametrize("tab", TABS.values(), ids=TABS)
class TestStates:
    def test_without_an_oracle(self, snap_compare: Compare, tab: str) -> None:
        app = ExplorerApp(kernel_run("kv-tiled", oracle=False))
        assert snap_compare(app, terminal_size=(120, 40), run_before=then_press(tab))

    def test_not_finite(self, snap_compare: Compare, broken_request: Request, tab: str) -> None:
        run_before = then_press(tab, at=BROKEN)
        app = ExplorerApp(broken_request)
        assert snap_compare(app, terminal_size=(120, 40), run_before=run_before)

    def test_gone(self, snap_compare: Compare, failing_request: Request, tab: str) -> None:
        async def run_before(pilot: Pilot[Any]) -> None:
            await settle(pilot)
            await press(pilot, tab)
            Path("hf-stages", "layer-1", "attn_scores.bin").unlink()
            explorer_of(pilot).navigation.go_to(StageKey(1, "attn_scores"))
            await come_to_rest(pilot)

        app = ExplorerApp(failing_request)
        assert snap_compare(app, terminal_size=(80, 24), run_before=run_before)


class TestPictures:
    @pytest.mark.parametrize("size", [(40, 10), (120, 40)], ids=["40x10", "120x40"])
    def test_heads(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        keys = ["2", "h", "enter", "down", "right"]
        assert snap_compare(app, terminal_size=size, run_before=then_press(*keys))

    @pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
    def test_figures(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        keys = ["3", "enter", *["plus"] * 6]
        assert snap_compare(app, terminal_size=size, run_before=then_press(*keys))

    @pytest.mark.parametrize("theme", ["okabe-ito-light", "high-contrast", "monochrome"])
    def test_themes(self, snap_compare: Compare, theme: str) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"), settings=Settings(theme=theme))
        keys = ["3", "m", "enter", "right"]
        assert snap_compare(app, terminal_size=(120, 40), run_before=then_press(*keys))

    @pytest.mark.parametrize("theme", ["okabe-ito-light", "monochrome"])
    @pytest.mark.parametrize("tab", TABS.values(), ids=TABS)
    def test_themes_of_tabs(self, snap_compare: Compare, theme: str, tab: str) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"), settings=Settings(theme=theme))
        assert snap_compare(app, terminal_size=(120, 40), run_before=then_press(tab, "enter"))

    @pytest.mark.parametrize("tab", ["2", "3", "4"], ids=["tokens", "map", "histogram"])
    def test_sixteen_colors(
        self, snap_compare: Compare, monkeypatch: pytest.MonkeyPatch, tab: str
    ) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("COLORTERM")
        app = ExplorerApp(kernel_run("kv-tiled"))
        keys = [tab, "enter", "m"]
        assert snap_compare(app, terminal_size=(80, 24), run_before=then_press(*keys))

    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    def test_folded(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=size, run_before=then_press("end", "3", "enter"))

    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
    def test_values_of_one_side(self, snap_compare: Compare, size: Any) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        keys = ["5", "enter", "m", "l"]
        assert snap_compare(app, terminal_size=size, run_before=then_press(*keys))

    def test_glyphs_of_single_values(self, snap_compare: Compare, broken_request: Request) -> None:
        run_before = then_press("3", "enter", *["plus"] * 4, at=BROKEN)
        app = ExplorerApp(broken_request)
        assert snap_compare(app, terminal_size=(120, 40), run_before=run_before)

    def test_no_color(self, snap_compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=(120, 40), run_before=then_press("3", "enter"))

    def test_pending(self, snap_compare: Compare, failing_request: Request, stopping: Any) -> None:
        app = ExplorerApp(failing_request, stopping(20))
        assert snap_compare(app, terminal_size=(80, 24), run_before=then_press("3", "end"))

    def test_place(self, snap_compare: Compare) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        keys = ["5", "l", "colon", *"1,8"]
        assert snap_compare(app, terminal_size=(80, 24), run_before=then_press(*keys))
