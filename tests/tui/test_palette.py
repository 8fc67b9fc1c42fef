"""The command palette: whatever a key does, and wherever one can go, is found in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from demo_runs import kernel_run
from driving import come_to_rest, drive, explorer_of, press, settle
from textual.binding import Binding
from textual.command import CommandList, CommandPalette, Provider
from textual.pilot import Pilot

from aprcore.network.stages import StageKey
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.keys import EXPLORER_KEYS
from aprtui.rows import Row
from aprtui.screens.palette import ExplorerCommands, ScreenCommands
from aprtui.screens.parity import ParityScreen
from aprtui.screens.profile import ProfileScreen
from aprtui.widgets.tabs import DetailTab
from conftest import FAULT, LAYERS


async def ask(pilot: Pilot[Any], query: str) -> list[str]:
    """Open the palette, type, and read what it offers; it stays open."""
    await press(pilot, "ctrl+p", *query)
    offered = pilot.app.screen.query_one(CommandList)
    return [str(offered.get_option_at_index(n).prompt) for n in range(offered.option_count)]


async def choose(pilot: Pilot[Any], query: str) -> None:
    """Take the first of what the palette offers."""
    assert await ask(pilot, query)
    await press(pilot, "enter")
    assert not CommandPalette.is_open(pilot.app)


async def names_of(provider: Provider, query: str = "") -> list[str]:
    hits = provider.search(query) if query else provider.discover()
    found = [hit async for hit in hits]
    return [str(hit.text) for hit in sorted(found, key=lambda hit: -hit.score)]


def row_of(pilot: Pilot[Any]) -> Row:
    return explorer_of(pilot).tree_of_stages.row


class TestActions:
    def test_every_key_of_the_explorer_is_reached(self) -> None:
        """In one tab or another: what a key does to a heat map needs the heat map."""
        found: set[str] = set()

        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            await press(pilot, "escape")  # back from the pane that two sides open
            screen.navigation.go_to(FAULT)
            for tab in DetailTab:
                screen.tab = tab
                await come_to_rest(pilot)
                found.update(await names_of(ScreenCommands(screen)))
            await press(pilot, "slash")  # there is something to show all stages after
            await come_to_rest(pilot)
            found.update(await names_of(ScreenCommands(screen)))

        judged = kernel_run("kv-tiled")
        drive(ExplorerApp(replace(judged, against=judged.oracle)), steps)
        bindings = [binding for binding in EXPLORER_KEYS if isinstance(binding, Binding)]
        assert {binding.description for binding in bindings} <= found
        assert {"quit", "theme", "fold", "last row"} <= found

    def test_an_action_is_done_to_the_screen_below(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            await choose(pilot, "histogram")
            assert screen.tab is DetailTab.HISTOGRAM
            await choose(pilot, "first row")
            assert row_of(pilot) == Row()

        drive(ExplorerApp(failing_request), steps)

    @pytest.mark.parametrize("kind", [ProfileScreen, ParityScreen])
    def test_other_screens_have_their_own(self, failing_request: Request, kind: Any) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await pilot.app.push_screen(kind(explorer_of(pilot).state, FAULT))
            await come_to_rest(pilot)
            found = await names_of(ScreenCommands(pilot.app.screen))
            for binding in kind.BINDINGS:
                assert binding.description in found
            assert {"quit", "theme"} <= set(found)
            assert not any("fault:" in name for name in found)
            await choose(pilot, "back")
            assert pilot.app.screen is explorer_of(pilot)

        drive(ExplorerApp(failing_request), steps)


class TestFaults:
    def test_come_first(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            offered = await ask(pilot, "")
            assert offered[0].startswith(f"fault: {FAULT}  cumulative FAIL\nrelative L2 0.")
            assert not offered[5].startswith("fault:")

        drive(ExplorerApp(failing_request), steps)

    def test_are_found_by_the_word_and_the_stage(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            faults = explorer_of(pilot).state.divergences
            provider = ExplorerCommands(explorer_of(pilot))
            listed = [name for name in await names_of(provider, "fault") if "fault: " in name]
            assert len(listed) == len(faults) > 30
            await choose(pilot, "fault layer 2 ffn_up")
            assert row_of(pilot) == Row(key=StageKey(2, "ffn_up"))

        drive(ExplorerApp(failing_request), steps)

    def test_there_are_none_in_a_sound_run(self, passing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            provider = ExplorerCommands(explorer_of(pilot))
            for query in ("", "fault"):
                assert not any("fault:" in name for name in await names_of(provider, query))

        drive(ExplorerApp(passing_request), steps)

    def test_of_a_second_side_are_told_apart(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            await press(pilot, "escape")  # back from the parity pane that such a run opens
            await come_to_rest(pilot)
            assert screen.state.parity_faults[0] == FAULT
            offered = await names_of(ExplorerCommands(screen), "trace fault")
            assert offered[0].startswith(f"trace fault: {FAULT}")

        request = Request(trace=failing_request.trace, against=failing_request.oracle)
        drive(ExplorerApp(request), steps)

    def test_a_reason_is_text_and_not_markup(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            state = explorer_of(pilot).state
            state.reports[FAULT] = replace(state.reports[FAULT], reason="a[bold]b[/] [oops\x1b[2J")
            offered = await ask(pilot, "")
            assert offered[0].endswith("a[bold]b[/] [oops\\x1b[2J")

        drive(ExplorerApp(failing_request), steps)


class TestPlaces:
    @pytest.mark.parametrize("query", ["layer 2", "l2", "2"])
    def test_a_layer_is_unfolded_and_gone_to(self, failing_request: Request, query: str) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            tree = explorer_of(pilot).tree_of_stages
            assert 2 not in tree.expanded
            offered = await ask(pilot, query)
            assert offered[0] == "layer 2  ✗ FAIL\n17 of 17 stages judged"
            await press(pilot, "enter")
            assert row_of(pilot) == Row(layer=2)
            assert 2 in tree.expanded

        drive(ExplorerApp(failing_request), steps)

    def test_every_layer_is_offered_for_the_word(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            offered = await names_of(ExplorerCommands(explorer_of(pilot)), "layer")
            names = [name.split("  ")[0] for name in offered[:LAYERS]]
            assert names == [f"layer {layer}" for layer in range(LAYERS)]

        drive(ExplorerApp(failing_request), steps)

    def test_a_layer_in_a_sorted_list_is_its_first_stage(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "s")
            explorer_of(pilot).navigation.go_to_layer(2)
            await come_to_rest(pilot)
            assert row_of(pilot) == Row(key=StageKey(2, "attn_norm"))

        drive(ExplorerApp(failing_request), steps)

    def test_every_stage_is_reached_by_its_name(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            provider = ExplorerCommands(screen)
            for key in screen.state.keys:
                (first, *_) = await names_of(provider, str(key))
                assert first.split("  ")[0] == str(key)

        drive(ExplorerApp(failing_request), steps)


class TestPictures:
    @pytest.mark.parametrize("query", ["", "fault 2 rope", "layer"], ids=["open", "fault", "layer"])
    def test_what_is_offered(self, snap_compare: Any, failing_request: Request, query: str) -> None:
        async def run_before(pilot: Pilot[Any]) -> None:
            await settle(pilot)
            await ask(pilot, query)

        app = ExplorerApp(failing_request)
        assert snap_compare(app, terminal_size=(100, 30), run_before=run_before)
