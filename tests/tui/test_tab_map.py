"""The Heat map tab: what its keys do, its window and its levels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from driving import come_to_rest, drive, explorer_of, press
from tab_views import lines_of, map_of
from textual.pilot import Pilot

from aprcore.judging.layouts import Layout
from aprcore.network.stages import StageKey
from aprcore.pictures import HeatMap, MapKind, MemoryPlane, TensorPair, levels_of
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.map_window import FIGURE_COLUMNS, MapWindow, scales_for
from aprtui.ramp import LEVELS, level_of
from aprtui.widgets.tensor_map import TensorMap
from conftest import BROKEN, FAULT, faulty, sound_tensors

pytestmark = pytest.mark.usefixtures("colours")


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
