"""The depth profile: its numbers, the strip above the tree, the plot and where it leads."""

from __future__ import annotations

import math
from typing import Any

import pytest
from demo_runs import kernel_run
from driving import come_to_rest, drive, explorer_of, finish, press, then_press
from hypothesis import given
from hypothesis import strategies as st
from textual.pilot import Pilot

from aprcore.network.stages import StageKey
from aprtui.app import ExplorerApp
from aprtui.profile import LEAST, MOST, Curve, by_layer, gather, height_of, points_of
from aprtui.run_state import RunState
from aprtui.screens.profile import ProfileScreen

ROOT = StageKey(2, "attn_scores")


@pytest.fixture
def state() -> RunState:
    return finish(kernel_run("kv-tiled"))


def profile_of(pilot: Pilot[Any]) -> ProfileScreen:
    assert isinstance(pilot.app.screen, ProfileScreen)
    return pilot.app.screen


class TestPoints:
    def test_a_point_has_the_figures_of_its_stage(self, state: RunState) -> None:
        for point in points_of(state):
            report = state.reports[point.key]
            assert report.comparison is not None
            assert point.errors[Curve.CUMULATIVE] == report.comparison.relative_l2
            if report.kernel is not None:
                assert point.errors[Curve.KERNEL] == report.kernel.relative_l2

    def test_the_planted_fault_sticks_out_of_the_kernel_curve_alone(self, state: RunState) -> None:
        kernel = {p.key: p.errors[Curve.KERNEL] for p in points_of(state)
                  if Curve.KERNEL in p.errors}  # fmt: skip
        sound = max(error for key, error in kernel.items() if key not in state.divergences)
        assert kernel[ROOT] > 1e4 * sound
        assert max(p.errors.get(Curve.MODEL, 0) for p in points_of(state)) < 1e-6

    @pytest.mark.parametrize("columns", [1, 2, 7, 30, 73, 74, 500])
    def test_no_stage_and_no_fault_is_lost_when_there_is_little_room(
        self, state: RunState, columns: int
    ) -> None:
        points = gather(state, points_of(state), columns)
        assert len(points) == min(columns, len(state.keys))
        assert [key for point in points for key in point.keys] == list(state.keys)
        assert ROOT in {point.key for point in points}
        largest = max(p.errors.get(Curve.CUMULATIVE, 0) for p in points_of(state))
        assert max(p.errors.get(Curve.CUMULATIVE, 0) for p in points) == largest

    def test_a_layer_stands_for_its_gravest_stage(self, state: RunState) -> None:
        by_number = {point.key.layer: point for point in by_layer(state)}
        assert by_number[2].key == ROOT

    def test_no_run_has_no_points(self) -> None:
        assert points_of(RunState()) == by_layer(RunState()) == []
        assert gather(RunState(), [], 10) == []


class TestHeights:
    @given(st.floats(min_value=0, allow_nan=False), st.integers(1, 100))
    def test_are_on_the_axis(self, error: float, levels: int) -> None:
        assert 0 <= height_of(error, levels) <= levels

    @given(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3), st.integers(1, 100))
    def test_grow_with_the_error(self, a: float, b: float, levels: int) -> None:
        low, high = sorted((a, b))
        assert height_of(low, levels) <= height_of(high, levels)

    def test_ends_of_the_axis(self) -> None:
        assert height_of(0.0, 8) == height_of(10.0**LEAST, 8) == 0
        assert height_of(10.0**MOST, 8) == height_of(math.inf, 8) == 8


class TestScreen:
    def test_begins_at_the_cursor_and_enter_goes_to_the_point(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "o")
            point = profile_of(pilot).plot.point()
            assert point is not None and ROOT in point.keys
            await press(pilot, "left", "left", "enter")
            assert explorer_of(pilot).tree_of_stages.row.key == StageKey(2, "q_post_rope")

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    def test_escape_leaves_the_cursor_where_it_was(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "o", "home", "escape")
            assert explorer_of(pilot).tree_of_stages.row.key == ROOT

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    def test_a_stage_over_all_layers_keeps_the_layer(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "o", "down")
            plot = profile_of(pilot).plot
            for presses, stage in enumerate(("attn_scores", "attn_softmax", "attention")):
                await press(pilot, *["down"] * bool(presses))
                point = plot.point()
                assert plot.stage == stage
                assert point is not None and point.key == StageKey(2, stage)
                assert len(plot.points()) == 4
            await press(pilot, "up")
            assert plot.stage == "attn_softmax"

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    def test_n_and_p_go_from_fault_to_fault(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "o", "home", "n")
            plot = profile_of(pilot).plot
            assert plot.chosen == ROOT
            await press(pilot, "n")
            assert plot.chosen == StageKey(2, "attention")
            await press(pilot, "p")
            assert plot.chosen == ROOT

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)

    def test_a_click_on_the_strip_goes_to_the_worst_of_a_layer(self) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            await press(pilot, "home")
            await pilot.click("#profile", offset=(len("depth ") + 3 * 2 + 1, 0))
            await come_to_rest(pilot)
            assert explorer_of(pilot).tree_of_stages.row.key == ROOT

        drive(ExplorerApp(kernel_run("kv-tiled")), steps)


class TestPictures:
    @pytest.mark.parametrize("size", [(40, 10), (80, 24), (120, 40), (200, 60)])
    def test_all_stages(self, snap_compare: Any, size: tuple[int, int]) -> None:
        app = ExplorerApp(kernel_run("kv-tiled"))
        assert snap_compare(app, terminal_size=size, run_before=then_press("o"))

    def test_one_stage(self, snap_compare: Any) -> None:
        assert snap_compare(
            ExplorerApp(kernel_run("kv-tiled")), run_before=then_press("o", *["down"] * 11)
        )
