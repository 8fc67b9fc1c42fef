"""What a tab gets from its row and its widget: a key with its words everywhere, and its picture."""

from __future__ import annotations

from typing import Any

from driving import drive, explorer_of, press
from textual.pilot import Pilot

from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.demo import demo_path, load_faults
from aprtui.keymap import commands
from aprtui.widgets.tabs import DetailTab


def test_its_key_opens_it() -> None:
    assert "explorer.tab-7" in commands()
    tab = DetailTab.FIRST
    fault = load_faults()["kv-tiled"]

    async def look(pilot: Pilot[Any]) -> None:
        await press(pilot, "7")
        view: Any = explorer_of(pilot).detail.pictures.open_view
        assert type(view) is tab.load_picture()
        assert view.count == 10
        assert f"{view.count} values" in view.render_line(0).text

    request = Request(model=fault.model, trace=fault.trace, oracle=demo_path() / "oracle")
    drive(ExplorerApp(request), look)
