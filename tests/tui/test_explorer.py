"""What the keys of the explorer do, and how a run ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from driving import come_to_rest, drive, explorer_of, press, settle, until
from textual.binding import Binding
from textual.pilot import Pilot
from textual.widgets import Input

from aprcore.network.stages import StageKey
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.rows import RUN_ROW, Row, SortOrder
from aprtui.screens.error import ErrorScreen
from aprtui.screens.explorer import ExplorerScreen
from aprtui.screens.help import HelpScreen
from aprtui.settings import TOP_K_STEPS
from aprtui.theme import THEMES
from aprtui.widgets.divergence_table import DivergenceTable
from aprtui.widgets.stage_tree import StageTree

Steps = Callable[[Pilot[Any]], Any]
FAULT = StageKey(1, "q_post_rope")


def row_of(pilot: Pilot[Any]) -> Row:
    return explorer_of(pilot).tree_of_stages.row


def footer_keys(pilot: Pilot[Any]) -> set[str]:
    return {
        active.binding.description
        for active in pilot.app.screen.active_bindings.values()
        if active.binding.show
    }


class TestMoving:
    def test_cursor_goes_to_the_first_divergence(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert row_of(pilot) == Row(key=FAULT)
            assert explorer_of(pilot).tree_of_stages.expanded == {1}

        drive(ExplorerApp(failing_request), steps)

    def test_cursor_stays_where_the_user_took_it(self, failing_request: Request) -> None:
        release = threading.Event()

        def slow(request: Request) -> Iterator[Any]:
            events = bisect(request)
            yield next(events)
            release.wait(10)
            yield from events

        async def wait(pilot: Pilot[Any]) -> None:
            await until(pilot, lambda: explorer_of(pilot).is_open)
            await press(pilot, "down", "down")
            release.set()
            await settle(pilot)

        async def steps(pilot: Pilot[Any]) -> None:
            assert explorer_of(pilot).state.report is not None
            assert row_of(pilot) == Row(key=StageKey(0, "embedding"))

        drive(ExplorerApp(failing_request, slow), steps, wait=wait)

    def test_arrows_walk_and_fold(self, passing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages
            assert row_of(pilot) == RUN_ROW
            await press(pilot, "down", "right")
            assert row_of(pilot) == Row(key=StageKey(0, "embedding"))
            await press(pilot, "left")
            assert row_of(pilot) == Row(layer=0)
            await press(pilot, "left")
            assert tree.expanded == set()
            await press(pilot, "down", "enter")
            assert tree.expanded == {1}
            await press(pilot, "end")
            assert row_of(pilot) == Row(key=StageKey(None, "lm_head"))
            await press(pilot, "home", "up")
            assert row_of(pilot) == RUN_ROW
            await press(pilot, "pagedown", "pageup")
            assert row_of(pilot) == RUN_ROW

        drive(ExplorerApp(passing_request), steps)

    def test_mouse_moves_and_folds(self, passing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await pilot.click(StageTree, offset=(3, 1))
            await come_to_rest(pilot)
            assert row_of(pilot) == Row(layer=0)
            assert explorer_of(pilot).tree_of_stages.expanded == set()
            await pilot.click(StageTree, offset=(3, 30))  # below the last row
            await come_to_rest(pilot)

        drive(ExplorerApp(passing_request), steps)

    def test_next_and_previous_divergence(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "n")
            assert row_of(pilot) == Row(key=StageKey(1, "attn_scores"))
            await press(pilot, "p", "p")
            assert row_of(pilot) == Row(key=FAULT)
            await press(pilot, "home", "n")
            assert row_of(pilot) == Row(key=FAULT)
            await press(pilot, "end", "n")
            assert row_of(pilot) == Row(key=StageKey(None, "lm_head"))

        drive(ExplorerApp(failing_request), steps)

    def test_next_says_when_there_is_no_divergence(self, passing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert "prev" not in footer_keys(pilot)
            await press(pilot, "n")
            assert [note.message for note in pilot.app._notifications] == ["no divergence"]

        drive(ExplorerApp(passing_request), steps)


class TestChoosing:
    def test_filter(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages
            assert "all stages" not in footer_keys(pilot)
            await press(pilot, "slash", *"layer 2 rope", "enter")
            names = [row.key.stage for row in tree.rows if row.key is not None]
            assert names == ["q_post_rope", "k_post_rope"]
            assert pilot.app.screen.focused is tree
            assert "all stages" in footer_keys(pilot)
            await press(pilot, "escape")
            assert len(tree.rows) > 10
            assert not pilot.app.screen.query("#filter")

        drive(ExplorerApp(failing_request), steps)

    def test_letters_in_the_filter_are_not_commands(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "slash", *"qnsk?")
            assert pilot.app.screen.query_one("#filter", Input).value == "qnsk?"
            await press(pilot, "escape")

        drive(ExplorerApp(failing_request), steps)

    def test_sort(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            tree, reports = screen.tree_of_stages, screen.state.reports
            await press(pilot, "s")
            cosines = [reports[row.key].comparison.cosine for row in tree.rows[1:]]  # type: ignore
            assert cosines == sorted(cosines)
            await press(pilot, "s")
            errors = [reports[row.key].comparison.relative_l2 for row in tree.rows[1:]]  # type: ignore
            assert errors == sorted(errors, reverse=True)
            assert row_of(pilot) == Row(key=FAULT), "the cursor stays on its stage"
            await press(pilot, "s")
            assert tree.order is SortOrder.COMPUTATION

        drive(ExplorerApp(failing_request), steps)

    def test_no_sort_without_an_oracle(self, lone_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert not {"sort", "top-K"} & footer_keys(pilot)
            await press(pilot, "s")
            assert explorer_of(pilot).tree_of_stages.order is SortOrder.COMPUTATION

        drive(ExplorerApp(lone_request), steps)

    def test_top_k(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            table = pilot.app.screen.query_one(DivergenceTable)
            assert table.row_count == 10
            counts = []
            for _ in TOP_K_STEPS:
                await press(pilot, "k")
                counts.append(table.row_count)
            assert counts == [20, 50, 100, 200, 5, 10]

        drive(ExplorerApp(failing_request), steps)


class TestOverlays:
    def test_help_lists_every_binding(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "question_mark")
            assert isinstance(pilot.app.screen, HelpScreen)
            shown = {binding.id for binding in pilot.app.screen._shown}
            assert {"explorer.next", "tree.fold", "app.quit"} <= shown
            await press(pilot, "escape")
            assert isinstance(pilot.app.screen, ExplorerScreen)

        drive(ExplorerApp(failing_request), steps)

    @pytest.mark.parametrize("owner", [ExplorerApp, ExplorerScreen, StageTree, HelpScreen])
    def test_every_binding_can_be_remapped_and_says_what_it_does(self, owner: Any) -> None:
        for binding in owner.BINDINGS:
            assert isinstance(binding, Binding)
            assert binding.id and binding.tooltip

    def test_palette_jumps_to_a_stage(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "ctrl+p", *"layer 0 ffn_up")
            await press(pilot, "enter")
            assert row_of(pilot) == Row(key=StageKey(0, "ffn_up"))

        drive(ExplorerApp(failing_request), steps)

    def test_a_jump_drops_the_filter_that_hides_its_stage(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            await press(pilot, "slash", *"pass", "enter")
            screen.navigation.go_to(FAULT)
            await come_to_rest(pilot)
            assert row_of(pilot) == Row(key=FAULT)
            assert not screen.query("#filter")
            assert not screen.tree_of_stages.filter

        drive(ExplorerApp(failing_request), steps)

    def test_our_themes_can_be_worn_and_no_others(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert set(pilot.app.available_themes) == set(THEMES)
            for name, theme in THEMES.items():
                pilot.app.theme = name
                await come_to_rest(pilot)
                assert pilot.app.current_theme is theme
                ground = explorer_of(pilot).styles.background
                assert ground.hex == theme.background

        drive(ExplorerApp(failing_request), steps)

    def test_any_size_from_tiny_to_huge(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            for size in ((40, 10), (300, 100), (1, 1), (63, 15)):
                await pilot.resize_terminal(*size)
                await press(pilot, "down", "slash", "escape")

        drive(ExplorerApp(failing_request), steps)

    @pytest.mark.parametrize(
        ("there", "back"),
        [("enter", "escape"), ("tab", "tab"), ("w", "escape"), ("1", "escape"), ("k", "escape")],
    )
    def test_on_a_tiny_screen_the_detail_takes_the_place_of_the_tree(
        self, failing_request: Request, there: str, back: str
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            stages = screen.query_one("#stages")
            assert (stages.display, screen.detail.display) == (True, False)
            await press(pilot, there)
            assert (stages.display, screen.detail.display) == (False, True)
            assert screen.query_one("Footer").region.height == 1
            await press(pilot, back)
            assert (stages.display, screen.detail.display) == (True, False)
            assert screen.focused is screen.tree_of_stages

        drive(ExplorerApp(failing_request), steps, size=(40, 10))


class TestEnd:
    def test_codes(self, failing_request: Request) -> None:
        async def leave(pilot: Pilot[Any]) -> None:
            await press(pilot, "q")

        app = ExplorerApp(failing_request)
        drive(app, leave)
        assert app.exit_code == 1
        app = ExplorerApp(Request(trace=failing_request.oracle, oracle=failing_request.oracle))
        drive(app, leave)
        assert app.exit_code == 0

    def test_unusable_input(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert isinstance(pilot.app.screen, ErrorScreen)
            await press(pilot, "escape")  # there is nothing behind it
            assert isinstance(pilot.app.screen, ErrorScreen)
            await press(pilot, "q")

        app = ExplorerApp(Request(trace=Path("nowhere"), oracle=Path("nowhere")))
        drive(app, steps)
        assert app.exit_code == 2

    def test_partial_result_stays_readable(self, failing_request: Request) -> None:
        def failing(request: Request) -> Iterator[Any]:
            for number, event in enumerate(bisect(request)):
                if number == 30:
                    raise RuntimeError("boom")
                yield event

        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "escape", "n")
            assert row_of(pilot) == Row(key=FAULT)

        app = ExplorerApp(failing_request, failing)
        drive(app, steps)
        assert app.exit_code == 2

    def test_leaving_stops_the_run(self, passing_request: Request) -> None:
        closed = threading.Event()
        judged = []

        def endless(request: Request) -> Iterator[Any]:
            events = list(bisect(request))
            try:
                yield events[0]
                while True:
                    judged.append(1)
                    yield events[1]
                    closed.wait(0.005)
            finally:
                closed.set()

        async def wait(pilot: Pilot[Any]) -> None:
            await until(pilot, lambda: len(judged) >= 5)

        async def steps(pilot: Pilot[Any]) -> None:
            await pilot.press("slash", "ctrl+c")  # such a run does not come to rest

        app = ExplorerApp(passing_request, endless)
        drive(app, steps, wait=wait)
        assert closed.wait(5)
        assert app.exit_code == 0
