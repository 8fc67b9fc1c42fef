"""The pictures of the explorer's tabs, for tests."""

from __future__ import annotations

from typing import Any

from driving import explorer_of
from textual.pilot import Pilot

from aprtui.widgets.picture_pane import PicturePane
from aprtui.widgets.picture_view import PictureView
from aprtui.widgets.tabs import DetailTab
from aprtui.widgets.tensor_map import TensorMap
from aprtui.widgets.token_bars import TokenBars
from aprtui.widgets.value_grid import ValueGrid


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
