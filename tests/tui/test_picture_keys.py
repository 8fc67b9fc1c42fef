"""The keys of pictures: where they are told, and what they draw anew."""

from __future__ import annotations

from typing import Any

import pytest
from driving import drive, press
from tab_views import map_of, pictures_of
from textual.geometry import Region
from textual.pilot import Pilot
from textual.widgets import Static

from aprcore.pictures import MapKind
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.keymap import commands
from aprtui.screens.help import HelpScreen
from aprtui.screens.palette import ScreenCommands
from aprtui.settings import Settings

pytestmark = pytest.mark.usefixtures("colours")
PICTURE_IDS = {name for name in commands() if name.startswith("picture.")}


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
