"""Following an error: up to its cause, down to what it spoils, and the way on screen."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import demo_runs
from driving import drive, explorer_of, press
from textual.pilot import Pilot

from aprcore.network.graph import computation_order, outline
from aprcore.network.stages import StageKey
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.widgets.tabs import DetailTab


def kv_run() -> Request:
    """A dump that tiles kv heads instead of grouping them, over the sound model."""
    return demo_runs.kernel_run("kv-tiled")


def verdict(pilot: Pilot[Any], key: StageKey) -> str:
    found = explorer_of(pilot).state.reports[key].verdict
    assert found is not None
    return found.value


class TestUpstream:
    def test_leads_from_the_head_to_the_stage_to_blame(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            root = explorer.state.divergences[0]
            explorer.navigation.go_to(StageKey(None, "lm_head"))
            seen = [explorer.tree_of_stages.row.key]
            for _ in range(200):
                await press(pilot, "u")
                here = explorer.tree_of_stages.row.key
                if here == seen[-1]:
                    break
                seen.append(here)
            assert seen[-1] == root
            header = explorer.state.header
            assert header is not None
            # Every step goes from a stage to one of its inputs, past those that nobody recorded.
            graph = outline(header.num_layers, {key.stage for key in header.keys})
            for reader, source in pairwise(seen):
                assert reader is not None and source is not None
                assert source in graph.inputs(reader)
                assert verdict(pilot, source) != "PASS"
            assert explorer.navigation.breadcrumb.way == tuple(seen)

        drive(ExplorerApp(kv_run()), steps)

    def test_way_back_is_the_way_taken(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            explorer.navigation.go_to(StageKey(None, "lm_head"))
            await press(pilot, "u", "u", "u", "d", "d")
            assert explorer.tree_of_stages.row.key == StageKey(None, "final_norm")
            assert len(explorer.navigation.breadcrumb.way) == 2

        drive(ExplorerApp(kv_run()), steps)

    def test_another_move_ends_the_way(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            explorer.navigation.go_to(StageKey(None, "lm_head"))
            await press(pilot, "u", "u")
            assert explorer.navigation.breadcrumb.display
            await press(pilot, "up")
            assert not explorer.navigation.breadcrumb.display

        drive(ExplorerApp(kv_run()), steps)


class TestDownstream:
    def test_goes_to_the_first_stage_that_is_spoiled(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            root = explorer.state.divergences[0]
            explorer.navigation.go_to(root)
            await press(pilot, "d")
            here = explorer.tree_of_stages.row.key
            assert here is not None
            assert computation_order(here) > computation_order(root)
            assert verdict(pilot, here) in ("INHERITED", "FAIL", "NOISE")

        drive(ExplorerApp(kv_run()), steps)

    def test_sound_stage_spoils_nothing(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            key = explorer.state.keys[0]
            explorer.navigation.go_to(key)
            await press(pilot, "d")
            assert explorer.tree_of_stages.row.key == key

        drive(ExplorerApp(kv_run()), steps)


class TestBlame:
    def test_a_second_fault_answers_for_itself(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            second = explorer.state.divergences[1]
            explorer.navigation.go_to(second)
            await press(pilot, "b")
            assert explorer.tree_of_stages.row.key == second
            assert explorer.tab is DetailTab.WHY

        drive(ExplorerApp(kv_run()), steps)

    def test_one_key_shows_why_the_root_fails(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            explorer = explorer_of(pilot)
            explorer.navigation.go_to(StageKey(None, "final_norm"))
            await press(pilot, "b")
            assert explorer.tree_of_stages.row.key == explorer.state.divergences[0]
            assert explorer.tab is DetailTab.WHY
            assert explorer.navigation.breadcrumb.way[0] == StageKey(None, "final_norm")

        drive(ExplorerApp(kv_run()), steps)
