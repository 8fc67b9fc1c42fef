"""The Values tab: its lines, and places as they are typed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from driving import come_to_rest, drive, explorer_of, press
from tab_views import lines_of, pictures_of, values_of
from textual.pilot import Pilot

from aprcore.judging.layouts import Layout
from aprcore.network.stages import StageKey
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.places import parse_place
from aprtui.widgets.value_grid import ValueGrid
from conftest import FAULT, faulty, sound_tensors

pytestmark = pytest.mark.usefixtures("colours")


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
