"""The pictures of a tensor: what their keys do, and how they look."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_runs import kernel_run
from driving import come_to_rest, drive, explorer_of, press, settle, then_press, until
from textual import events
from textual.geometry import Region
from textual.pilot import Pilot
from textual.widgets import Static

from aprcore.ground.errors import TraceError
from aprcore.judging.layouts import Layout
from aprcore.network.graph import StageKey
from aprcore.pictures import HeatMap, MapKind, MemoryPlane, TensorPair, levels_of
from aprcore.records.report import StageReport
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.keymap import commands
from aprtui.map_window import FIGURE_COLUMNS, MapWindow, scales_for
from aprtui.pictures import (
    PICTURES_KEPT,
    PictureMade,
    PictureMaker,
)
from aprtui.places import parse_place
from aprtui.ramp import LEVELS, level_of
from aprtui.screens.help import HelpScreen
from aprtui.screens.palette import ScreenCommands
from aprtui.settings import Settings
from aprtui.widgets.bars import bar
from aprtui.widgets.picture_pane import PicturePane
from aprtui.widgets.picture_view import COMPUTING, PictureView
from aprtui.widgets.tabs import DetailTab, TabStrip
from aprtui.widgets.tensor_map import TensorMap
from aprtui.widgets.token_bars import TokenBars, TokensAsk
from aprtui.widgets.value_grid import ValueGrid, ValuesAsk
from conftest import FAULT, faulty, rounded, save, sound_tensors

Compare = Callable[..., bool]
SIZES = {"40x10": (40, 10), "80x24": (80, 24), "120x40": (120, 40), "200x60": (200, 60)}
TABS = {"tokens": "2", "map": "3", "histogram": "4", "values": "5"}
BROKEN = StageKey(1, "attn_norm")
PICTURE_IDS = {name for name in commands() if name.startswith("picture.")}


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal's colours decide how a map is drawn."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


@pytest.fixture
def broken_request() -> Request:
    """A trace with NaN and infinities at `BROKEN`, and a stage of another size."""
    oracle = sound_tensors()
    trace = rounded(oracle)
    trace[BROKEN][2, 3] = np.inf
    trace[BROKEN][4, 5:9] = np.nan
    trace[StageKey(0, "ffn_up")] = trace[StageKey(0, "ffn_up")][:, :60].copy()
    return Request(trace=save("engine-dump", trace), oracle=save("hf-stages", oracle))


def pictures_of(pilot: Pilot[Any]) -> PicturePane:
    return explorer_of(pilot).detail.pictures


def map_of(pilot: Pilot[Any]) -> TensorMap:
    view = pictures_of(pilot).views[DetailTab.MAP]
    assert isinstance(view, TensorMap)
    return view


def tokens_of(pilot: Pilot[Any]) -> TokenBars:
    view = pictures_of(pilot).views[DetailTab.TOKENS]
    assert isinstance(view, TokenBars)
    return view


def values_of(pilot: Pilot[Any]) -> ValueGrid:
    view = pictures_of(pilot).views[DetailTab.VALUES]
    assert isinstance(view, ValueGrid)
    return view


def lines_of(view: PictureView) -> list[str]:
    return [view.render_line(y).text.rstrip() for y in range(view.size.height)]


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


class TestTokens:
    def test_a_line_per_token(self, failing_request: Request, with_texts: Any) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "2")
            found = explorer_of(pilot).state.reports[FAULT].comparison
            assert found is not None
            lines = lines_of(tokens_of(pilot))
            assert '"What"' in lines[1]
            assert "3838" in lines[1]
            assert lines[0].split()[:4] == ["tok", "text", "id", "rel"]
            assert len([line for line in lines[1:] if line]) == 7

        drive(ExplorerApp(failing_request, with_texts), steps)

    def test_heads_are_shown_where_there_are_any(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            tokens = tokens_of(pilot)
            await press(pilot, "2", "h", "enter", "down", "right")
            assert tokens.by_head
            assert (tokens.token, tokens.head) == (1, 1)
            assert "token 1, head 1" in "\n".join(lines_of(tokens))
            await press(pilot, "right", "right", "right", "right")
            assert tokens.head == 3
            await press(pilot, "h")
            assert "rel L2" in lines_of(tokens)[0]

        drive(ExplorerApp(failing_request), steps)

    def test_a_token_that_is_not_finite_is_marked(self, broken_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer_of(pilot).navigation.go_to(BROKEN)
            await press(pilot, "2")
            lines = lines_of(tokens_of(pilot))
            assert "NaN" in lines[3]
            assert "✕ 1 NaN/Inf" in lines[3]
            assert "✕ 4 NaN/Inf" in lines[5]
            assert "NaN" not in lines[4]

        drive(ExplorerApp(broken_request), steps)

    def test_bars_are_as_long_as_their_height(self) -> None:
        assert bar(0, 8) == ""
        assert bar(1, 8) == "█" * 8
        assert bar(0.5, 8) == "████"
        assert bar(1 / 64, 8) == "▏"


class TestMap:
    def test_begins_at_the_largest_difference(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3")
            shown, report = map_of(pilot), explorer_of(pilot).state.reports[FAULT]
            assert report.comparison is not None
            assert shown.cell is not None
            assert shown.cell.index == report.comparison.max_index
            assert shown.cell.trace is not None
            assert shown.cell.oracle is not None
            assert abs(shown.cell.trace - shown.cell.oracle) == pytest.approx(
                report.comparison.max_abs_diff
            )
            assert shown.kind is MapKind.DIFF

        drive(ExplorerApp(failing_request), steps)

    def test_kinds_follow_each_other(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3")
            kinds = []
            for _ in range(4):
                kinds.append(map_of(pilot).kind)
                assert lines_of(map_of(pilot))[0].startswith(map_of(pilot).kind.value)
                await press(pilot, "m")
            assert kinds == list(MapKind)
            assert map_of(pilot).kind is MapKind.DIFF

        drive(ExplorerApp(failing_request), steps)

    def test_axes_and_heads_of_attention(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer_of(pilot).navigation.go_to(StageKey(1, "attn_scores"))
            await press(pilot, "3")
            shown = map_of(pilot)
            names = []
            for _ in range(4):
                assert shown.view is not None
                names.append(shown.view.name)
                await press(pilot, "a")
            assert names == ["all heads", "head × token", "head 0", "all heads"]
            await press(pilot, "a")
            assert shown.view.name == "head 0"
            await press(pilot, "h")
            assert shown.view.name == "head 1"
            await press(pilot, "H", "H")
            assert shown.view.name == "head 3"
            assert shown.cell is not None
            assert shown.cell.position["head"] == 3

        drive(ExplorerApp(failing_request), steps)

    def test_arrows_move_the_cursor_and_zoom_goes_down_to_figures(
        self, failing_request: Request
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3", "enter", "home")
            shown = map_of(pilot)
            assert shown.window is not None
            row = shown.window.row
            await press(pilot, "right", "right")
            assert (shown.window.row, shown.window.column) == (row, 2)
            for _ in range(8):
                await press(pilot, "plus")
            assert shown.window.scale.wide >= FIGURE_COLUMNS
            assert shown.cell is not None
            assert shown.cell.position == {"token": row, "head": 0, "dim": 2}
            before = shown.window
            await press(pilot, "shift+right")
            assert shown.window.left > before.left
            assert shown.window.column - shown.window.left == before.column - before.left
            await press(pilot, "0")
            assert shown.window.zoom == 0

        drive(ExplorerApp(failing_request), steps, size=(100, 30))

    def test_figures_are_those_of_the_tensor(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3", "m", "enter", "colon", "0", "enter")
            await press(pilot, *["plus"] * 8)
            oracle = faulty(sound_tensors())[FAULT].reshape(-1)
            first = lines_of(map_of(pilot))[1].split()[1]
            assert float(first) == pytest.approx(oracle[0], rel=0.05)

        drive(ExplorerApp(failing_request), steps, size=(100, 30))

    def test_what_is_not_finite_has_a_glyph(self, broken_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer_of(pilot).navigation.go_to(BROKEN)
            await press(pilot, "3")
            text = "\n".join(lines_of(map_of(pilot)))
            assert text.count("✕" * 4) >= 1
            assert text.count("∞") >= 2  # in the map, and in the legend
            assert "✕ 4 NaN  ∞ 1 Inf" in text
            assert "trace Inf" in text  # the cursor begins at the first that is not finite

        drive(ExplorerApp(broken_request), steps)

    def test_a_vector_is_folded_and_its_places_are_right(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            key = StageKey(None, "lm_head")
            explorer_of(pilot).navigation.go_to(key)
            await press(pilot, "3", "enter", "colon", *"77", "enter")
            shown, layout = map_of(pilot), explorer_of(pilot).state.reports[key].layout
            assert layout is not None
            fold = shown.view.fold if shown.view else 0
            assert fold > 1
            assert shown.window is not None
            assert (shown.window.row, shown.window.column) == divmod(77, fold)
            assert shown.cell is not None
            assert shown.cell.index == 77
            assert shown.cell.trace == pytest.approx(faulty(sound_tensors())[key].reshape(-1)[77])
            await press(pilot, "colon", *"-1", "enter", "right", "down", "end")
            last = shown.window.row * fold + shown.window.column
            assert last == layout.shape[0] - 1  # the cursor does not leave the vector
            assert shown.cell.index == last
            await press(pilot, "a")
            assert shown.view is not None
            assert shown.view.num_rows == 1

        drive(ExplorerApp(failing_request), steps)

    def test_goes_through_the_largest_differences(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3", "enter", *["plus"] * 8)
            found = explorer_of(pilot).state.reports[FAULT].comparison
            assert found is not None
            for rank in range(4):
                await press(pilot, "l")
                cell = map_of(pilot).cell
                assert cell is not None
                assert cell.index == found.top.indices[rank]

        drive(ExplorerApp(failing_request), steps)

    def test_the_mouse_points_and_drags(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3", *["plus"] * 8)
            shown = map_of(pilot)
            assert shown.window is not None
            await pilot.click(TensorMap, offset=(4, 1))
            await come_to_rest(pilot)
            assert (shown.window.row, shown.window.column) == (
                shown.window.top, shown.window.left
            )  # fmt: skip
            before = shown.window
            await pilot.mouse_down(TensorMap, offset=(30, 3))
            await pilot.hover(TensorMap, offset=(10, 3))
            await pilot.mouse_up(TensorMap, offset=(10, 3))
            await come_to_rest(pilot)
            assert shown.window.left > before.left

        drive(ExplorerApp(failing_request), steps, size=(100, 30))

    def test_stays_where_it_is_from_layer_to_layer(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3", "enter", "plus", "plus", "right", "escape")
            before = map_of(pilot).window
            explorer_of(pilot).navigation.go_to(StageKey(2, "q_post_rope"))
            await come_to_rest(pilot)
            assert map_of(pilot).window == before

        drive(ExplorerApp(failing_request), steps)


class TestValues:
    def test_jumps_to_an_index_and_to_a_place(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "5", "enter", "colon", *"100", "enter")
            values = values_of(pilot)
            assert values.index == 100
            assert explorer_of(pilot).focused is values
            await press(pilot, "colon", *"6,3,7", "enter")
            assert values.index == values.total - 1 == 7 * 4 * 8 - 1
            await press(pilot, "colon", *"7,0,0", "enter")
            assert pictures_of(pilot).is_asking  # there is no token 7: the question stays
            await press(pilot, "escape")
            assert not pictures_of(pilot).is_asking
            assert values.index == values.total - 1

        drive(ExplorerApp(failing_request), steps)

    def test_lines_are_the_tensor_s(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "5", "enter", "down", "down", "right")
            values = values_of(pilot)
            assert values.index == 10
            trace, oracle = faulty(sound_tensors())[FAULT], sound_tensors()[FAULT]
            cells = lines_of(values)[1 + 10 - values.scroll_offset.y].split()
            assert cells[:4] == ["10", "0", "1", "2"]
            assert float(cells[4]) == pytest.approx(trace.reshape(-1)[10], rel=1e-3)
            assert float(cells[5]) == pytest.approx(oracle.reshape(-1)[10], rel=1e-3)

        drive(ExplorerApp(failing_request), steps)

    def test_one_side_in_lines_of_several(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "5", "enter", "colon", *"100", "enter")
            values = values_of(pilot)
            trace, oracle = (x[FAULT].reshape(-1) for x in (faulty(sound_tensors()),
                                                            sound_tensors()))  # fmt: skip
            for name, x in (("trace", trace), ("oracle", oracle), ("|diff|", abs(trace - oracle))):
                await press(pilot, "m")
                assert values.index == 100
                count = values.per_line
                assert count in (4, 8)
                lines = lines_of(values)
                assert lines[0].split() == [name, *(f"+{n}" for n in range(count))]
                line = lines[1 + 100 // count - values.scroll_offset.y].split()
                start = 100 // count * count
                assert int(line[0]) == start
                assert [float(cell) for cell in line[1:]] == pytest.approx(
                    x[start : start + count], rel=0.1, abs=1e-9
                )
                place = np.unravel_index(100, (7, 4, 8))
                assert f"token {place[0]}, head {place[1]}, dim {place[2]}" in lines[-1]
            await press(pilot, "m")
            assert values.per_line == 1

        drive(ExplorerApp(failing_request), steps)

    def test_keys_and_clicks_of_a_grid(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "5", "enter", "m", "right", "down", "right", "up", "down")
            values = values_of(pilot)
            count = values.per_line
            assert values.index == count + 2
            await press(pilot, "end")
            assert values.index == values.total - 1
            await press(pilot, "home", "pagedown")
            assert values.index > 5 * count
            await press(pilot, "home")
            await pilot.click(ValueGrid, offset=(8 + 3 * 10 + 4, 3))
            await come_to_rest(pilot)
            assert values.index == 2 * count + 3

        drive(ExplorerApp(failing_request), steps)

    def test_narrow_panes_have_few_to_a_line(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "5", "m")
            values = values_of(pilot)
            assert values.per_line in (1, 2)
            assert max(map(len, lines_of(values))) <= values.size.width

        drive(ExplorerApp(failing_request), steps, size=(40, 10))

    def test_goes_through_the_largest_differences(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "5")
            found = explorer_of(pilot).state.reports[FAULT].comparison
            assert found is not None
            for rank in range(3):
                await press(pilot, "l")
                assert values_of(pilot).index == found.top.indices[rank]
                assert any(f"◀ #{rank + 1}" in line for line in lines_of(values_of(pilot)))

        drive(ExplorerApp(failing_request), steps)

    def test_sides_of_other_sizes(self, broken_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer_of(pilot).navigation.go_to(StageKey(0, "ffn_up"))
            await press(pilot, "5", "enter", "end")
            values = values_of(pilot)
            assert values.total == 7 * 64
            assert "–" in lines_of(values)[-1]  # the trace has ended

        drive(ExplorerApp(broken_request), steps)


class Slow:
    """Tensors that come when they are told to."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.opened: list[StageKey] = []

    def open(self, report: StageReport) -> TensorPair:
        self.opened.append(report.key)
        assert self.release.wait(30)
        raise TraceError("has changed since the run", where="engine-dump", hint="run again")

    def close(self) -> None:
        pass


class TestMaking:
    def test_waiting_is_said_and_then_what_went_wrong(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            slow = Slow()
            pictures = pictures_of(pilot)
            pictures.use(slow)
            await pilot.press("3")
            await until(pilot, lambda: COMPUTING in " ".join(lines_of(map_of(pilot))))
            assert pictures.is_busy
            await pilot.press("down", "up")  # keys are answered meanwhile
            slow.release.set()
            await come_to_rest(pilot)
            said = " ".join(lines_of(map_of(pilot)))
            assert "engine-dump: has changed since the run" in said
            assert "run again" in said

        drive(ExplorerApp(failing_request), steps)

    def test_a_picture_goes_to_the_view_that_it_was_made_for(
        self, failing_request: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another tab may be opened after a picture was made and before it is handed over."""
        go, made, make = threading.Event(), threading.Event(), PictureMaker.make

        def slow(maker: PictureMaker, report: Any, ask: Any, *rest: Any) -> None:
            if isinstance(ask, TokensAsk):
                assert go.wait(30)
            make(maker, report, ask, *rest)
            made.set()

        monkeypatch.setattr(PictureMaker, "make", slow)

        async def steps(pilot: Pilot[Any]) -> None:
            pictures = pictures_of(pilot)
            await pilot.press("2")
            await until(pilot, lambda: pictures.is_busy)
            with pilot.app._context():
                explorer_of(pilot).tab = DetailTab.HISTOGRAM
            go.set()
            assert made.wait(30)  # before the screen is laid out again for the other tab
            await come_to_rest(pilot)
            assert "|value|" in lines_of(pictures.views[DetailTab.HISTOGRAM])[0]

        drive(ExplorerApp(failing_request), steps)

    @pytest.mark.parametrize("key", ["3", "5"])
    def test_leaving_while_a_tab_opens_is_no_crash(
        self, failing_request: Request, key: str
    ) -> None:
        async def leave_after(turns: int) -> None:
            app = ExplorerApp(failing_request)
            async with app.run_test(size=(120, 40)) as pilot:
                await settle(pilot)
                app.post_message(events.Key(key, key))
                for _ in range(turns):
                    await asyncio.sleep(0)
                app.exit()
            assert not app.return_code

        for turns in range(12):
            asyncio.run(leave_after(turns))

    def test_a_file_that_is_gone_is_no_crash(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            histogram = pictures_of(pilot).views[DetailTab.HISTOGRAM]
            await press(pilot, "4")
            assert "|value|" in lines_of(histogram)[0]
            Path("hf-stages", "layer-1", "attn_scores.bin").write_bytes(b"")
            explorer_of(pilot).navigation.go_to(StageKey(1, "attn_scores"))
            await come_to_rest(pilot)
            said = " ".join(lines_of(histogram))
            assert said.startswith("no picture: ")
            assert "hf-stages" in said
            explorer_of(pilot).navigation.go_to(StageKey(1, "attention"))
            await come_to_rest(pilot)
            assert "|value|" in lines_of(histogram)[0]

        drive(ExplorerApp(failing_request), steps)

    def test_pictures_are_made_while_the_run_goes_on(
        self, failing_request: Request, stopping: Any
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert explorer_of(pilot).state.is_running
            explorer_of(pilot).navigation.go_to(StageKey(0, "attn_norm"))
            await press(pilot, "3")
            assert "token × dim" in lines_of(map_of(pilot))[0]

        drive(ExplorerApp(failing_request, stopping(20)), steps)

    def test_made_pictures_are_kept_and_cancelled_ones_are_not_posted(
        self, failing_request: Request
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            assert screen.running.tensors is not None
            maker, posted = PictureMaker(screen.running.tensors), []
            report = screen.state.reports[FAULT]
            maker.make(report, ValuesAsk(0), lambda: True, posted.append)
            assert posted == []
            for start in range(PICTURES_KEPT + 1):
                maker.make(report, ValuesAsk(start), lambda: False, posted.append)
            assert all(isinstance(message, PictureMade) and not message.error for message in posted)
            assert maker.find(FAULT, ValuesAsk(PICTURES_KEPT)) is not None
            assert maker.find(FAULT, ValuesAsk(0)) is None  # the oldest gave way
            closed = Slow()
            closed.release.set()
            PictureMaker(closed).make(report, ValuesAsk(0), lambda: False, posted.append)
            assert isinstance(posted[-1].error, TraceError)

        drive(ExplorerApp(failing_request), steps)


class TestKeys:
    def test_are_told_by_the_help_where_they_work(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            async def ids_of_help() -> set[str | None]:
                await press(pilot, "question_mark")
                screen = pilot.app.screen
                assert isinstance(screen, HelpScreen)
                found = {binding.id for binding in screen._shown}
                text = "\n".join(screen.query_one(Static).render_line(y).text for y in range(70))
                for binding in screen._shown:
                    if binding.id in PICTURE_IDS:
                        assert binding.tooltip[:20] in text
                await press(pilot, "escape")
                return found

            assert not await ids_of_help() & (PICTURE_IDS - {"picture.leave"})
            await press(pilot, "3")
            assert await ids_of_help() >= PICTURE_IDS - {"picture.leave"}
            await press(pilot, "enter")
            assert await ids_of_help() >= {*PICTURE_IDS, "map.left", "map.pan-left"}
            await press(pilot, "5")
            assert await ids_of_help() >= {"picture.kind", "picture.next-largest", "values.left"}
            await press(pilot, "4")
            assert not await ids_of_help() & {"picture.kind", "picture.axes"}

        drive(ExplorerApp(failing_request), steps, size=(120, 90))

    def test_are_in_the_palette_where_they_work(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            def offered() -> set[str]:
                return {found.name for found in ScreenCommands(pilot.app.screen).commands()}

            named = {"kind of picture", "axes", "heads", "nearer", "next largest difference"}
            assert not named & offered()
            await press(pilot, "3")
            assert named | {"go to"} <= offered()

        drive(ExplorerApp(failing_request), steps)

    def test_can_be_given_to_others(self, failing_request: Request) -> None:
        keys = {"picture.kind": "f5", "picture.next-largest": "f6", "map.pan-right": "f7"}
        settings = Settings(keys=keys)

        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "3", "enter", "m")
            shown = map_of(pilot)
            assert shown.kind is MapKind.DIFF
            await press(pilot, "f5")
            assert shown.kind is MapKind.TRACE
            await press(pilot, *["plus"] * 8)
            assert shown.window is not None
            await press(pilot, "home", "f7")
            assert shown.window.left > 0
            before = shown.window
            await press(pilot, "f6", "f6")
            assert shown.window != before

        drive(ExplorerApp(failing_request, settings=settings), steps, size=(100, 30))


class TestRepaints:
    """Only what changes is drawn again: the screen must look as if all were."""

    @pytest.mark.parametrize(
        ("tab", "keys"),
        [
            ("2", ("down", "down", "up", "end", "h", "right", "down", "left", "home", "h")),
            ("3", ("down", "right", "up", "left", "plus", "right", "down", "minus", "m", "l")),
            ("5", ("down", "right", "end", "m", "left", "up", "l", "m", "down", "l", "m")),
        ],
        ids=["tokens", "map", "values"],
    )
    @pytest.mark.parametrize("size", [(60, 20), (120, 40)], ids=["60x20", "120x40"])
    def test_cursor(
        self, failing_request: Request, tab: str, keys: tuple[str, ...], size: Any
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, tab, "enter")
            shown = pictures_of(pilot).open_view
            assert shown is not None
            asked: list[Region] = []
            refresh = shown.refresh

            def note(*regions: Region, **options: Any) -> Any:
                asked.extend(regions or [shown.size.region])
                return refresh(*regions, **options)

            shown.refresh = note  # type: ignore[method-assign]
            partly = 0
            for key in keys:
                before = [shown.render_line(y) for y in range(shown.size.height)]
                asked.clear()
                await press(pilot, key)
                after = [shown.render_line(y) for y in range(shown.size.height)]
                changed = {y for y, pair in enumerate(zip(before, after)) if pair[0] != pair[1]}
                drawn = {y for region in asked for y in region.line_range}
                assert changed <= drawn, key
                partly += 0 < len(drawn) < shown.size.height
            assert partly >= 3

        drive(ExplorerApp(failing_request), steps, size=size)


class TestPlaces:
    LAYOUT = Layout((7, 32), (7, 4, 8), ("token", "head", "dim"))

    @pytest.mark.parametrize(
        ("typed", "index"),
        [("0", 0), (" 223 ", 223), ("-1", 223), ("6,3,7", 223), ("1 0 0", 32), ("-1, 0, -8", 192)],
    )
    def test_read(self, typed: str, index: int) -> None:
        assert parse_place(typed, self.LAYOUT) == index

    @pytest.mark.parametrize(
        "typed", ["", "x", "224", "-225", "1,2", "7,0,0", "0,0,8", "1.5", "9" * 30, "٣"]
    )
    def test_refused_in_words(self, typed: str) -> None:
        assert isinstance(parse_place(typed, self.LAYOUT), str)


class TestWindow:
    def test_the_first_zoom_has_the_whole_matrix_and_the_last_single_values(self) -> None:
        for rows, columns in ((7, 32), (65536, 2048), (1, 152064), (3000, 3)):
            scales = scales_for(rows, columns, 40, 60)
            first, last = scales[0], scales[-1]
            assert -(-rows // first.rows) * first.tall <= 40
            assert -(-columns // first.columns) * first.wide <= 60
            assert (last.rows, last.columns) == (1, 1)
            assert last.wide >= FIGURE_COLUMNS
            for far, near in pairwise(scales):
                assert near.rows <= far.rows
                assert near.wide >= far.wide

    def test_the_cursor_is_always_in_view_and_the_window_inside(self) -> None:
        random = np.random.default_rng(0)
        window = MapWindow(1000, 700, 40, 60)
        for _ in range(300):
            step, amount = random.integers(0, 4), int(random.integers(-90, 90))
            if step == 0:
                window = window.move(amount, -amount)
            elif step == 1:
                window = window.pan(amount, amount)
            elif step == 2:
                window = window.zoomed(int(random.integers(-2, 3)))
            else:
                height, width = random.integers(1, 120), random.integers(1, 200)
                window = window.resized(int(height), int(width), 1)
            scale, (down, across) = window.scale, window.cells
            assert 0 <= window.top <= window.row < window.top + down * scale.rows
            assert 0 <= window.left <= window.column < window.left + across * scale.columns
            assert window.row < 1000
            assert window.column < 700
            assert window.top % scale.rows == window.left % scale.columns == 0


def test_levels_rise_with_magnitude_and_keep_the_sign() -> None:
    values = [10.0**-n for n in range(12)]
    levels = [level_of(value, 1.0, 8) for value in values]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == LEVELS
    assert levels[-1] == 1
    assert level_of(0.0, 1.0, 8) == 0
    assert level_of(-1.0, 1.0, 8) == -LEVELS
    assert level_of(5.0, 1.0, 8) == LEVELS
    x = np.array([[*values, 0.0, -1.0, 5.0, -3e-5]], np.float32)
    plane = MemoryPlane(x.reshape(-1), Layout(x.shape, x.shape, ("token", "dim")))
    grid = HeatMap(TensorPair(FAULT, plane, None), MapKind.TRACE).overview(1, x.size)
    # Those of a map, which are made all at once.
    assert levels_of(grid, 1.0, 8, LEVELS).tolist() == [
        [level_of(float(value), 1.0, 8) for value in x[0]]
    ]


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
