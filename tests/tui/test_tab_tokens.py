"""The Tokens tab: how far off each token is."""

from __future__ import annotations

from typing import Any

import pytest
from driving import drive, explorer_of, press
from tab_views import lines_of, tokens_of
from textual.pilot import Pilot

from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.widgets.bars import bar
from conftest import BROKEN, FAULT

pytestmark = pytest.mark.usefixtures("colours")


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
