"""Pictures are made while the screen answers keys."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from driving import come_to_rest, drive, explorer_of, press, settle, until
from tab_views import lines_of, map_of, pictures_of
from textual import events
from textual.pilot import Pilot

from aprcore.ground.errors import TraceError
from aprcore.network.stages import StageKey
from aprcore.pictures import TensorPair
from aprcore.records.report import StageReport
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.pictures import (
    PICTURES_KEPT,
    PictureMade,
    PictureMaker,
)
from aprtui.widgets.picture_view import COMPUTING
from aprtui.widgets.tabs import DetailTab
from aprtui.widgets.token_bars import TokensAsk
from aprtui.widgets.value_grid import ValuesAsk
from conftest import FAULT

pytestmark = pytest.mark.usefixtures("colours")


class Slow:
    """Tensors that come when they are told to."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.opened: list[StageKey] = []

    def open(self, report: StageReport) -> TensorPair:
        self.opened.append(report.key)
        assert self.release.wait(30)
        raise TraceError("has changed since the run", where="engine-dump", hint="run again")

    def close(self) -> None:
        pass


class TestMaking:
    def test_waiting_is_said_and_then_what_went_wrong(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            slow = Slow()
            pictures = pictures_of(pilot)
            pictures.use(slow)
            await pilot.press("3")
            await until(pilot, lambda: COMPUTING in " ".join(lines_of(map_of(pilot))))
            assert pictures.is_busy
            await pilot.press("down", "up")  # keys are answered meanwhile
            slow.release.set()
            await come_to_rest(pilot)
            said = " ".join(lines_of(map_of(pilot)))
            assert "engine-dump: has changed since the run" in said
            assert "run again" in said

        drive(ExplorerApp(failing_request), steps)

    def test_a_picture_goes_to_the_view_that_it_was_made_for(
        self, failing_request: Request, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another tab may be opened after a picture was made and before it is handed over."""
        begun, go, made = threading.Event(), threading.Event(), threading.Event()
        make = PictureMaker.make

        def slow(maker: PictureMaker, report: Any, ask: Any, *rest: Any) -> None:
            if isinstance(ask, TokensAsk):
                begun.set()
                assert go.wait(30)
            make(maker, report, ask, *rest)
            made.set()

        monkeypatch.setattr(PictureMaker, "make", slow)

        async def steps(pilot: Pilot[Any]) -> None:
            pictures = pictures_of(pilot)
            await pilot.press("2")
            await until(pilot, begun.is_set)  # its worker needs the loop to begin
            with pilot.app._context():
                explorer_of(pilot).tab = DetailTab.HISTOGRAM
            go.set()
            assert made.wait(30)  # before the screen is laid out again for the other tab
            await come_to_rest(pilot)
            assert "|value|" in lines_of(pictures.views[DetailTab.HISTOGRAM])[0]

        drive(ExplorerApp(failing_request), steps)

    @pytest.mark.parametrize("key", ["3", "5"])
    def test_leaving_while_a_tab_opens_is_no_crash(
        self, failing_request: Request, key: str
    ) -> None:
        async def leave_after(turns: int) -> None:
            app = ExplorerApp(failing_request)
            async with app.run_test(size=(120, 40)) as pilot:
                await settle(pilot)
                app.post_message(events.Key(key, key))
                for _ in range(turns):
                    await asyncio.sleep(0)
                app.exit()
            assert not app.return_code

        for turns in range(12):
            asyncio.run(leave_after(turns))

    def test_a_file_that_is_gone_is_no_crash(self, failing_request: Request) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            histogram = pictures_of(pilot).views[DetailTab.HISTOGRAM]
            await press(pilot, "4")
            assert "|value|" in lines_of(histogram)[0]
            Path("hf-stages", "layer-1", "attn_scores.bin").write_bytes(b"")
            explorer_of(pilot).navigation.go_to(StageKey(1, "attn_scores"))
            await come_to_rest(pilot)
            said = " ".join(lines_of(histogram))
            assert said.startswith("no picture: ")
            assert "hf-stages" in said
            explorer_of(pilot).navigation.go_to(StageKey(1, "attention"))
            await come_to_rest(pilot)
            assert "|value|" in lines_of(histogram)[0]

        drive(ExplorerApp(failing_request), steps)

    def test_pictures_are_made_while_the_run_goes_on(
        self, failing_request: Request, stopping: Any
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            assert explorer_of(pilot).state.is_running
            explorer_of(pilot).navigation.go_to(StageKey(0, "attn_norm"))
            await press(pilot, "3")
            assert "token × dim" in lines_of(map_of(pilot))[0]

        drive(ExplorerApp(failing_request, stopping(20)), steps)

    def test_made_pictures_are_kept_and_cancelled_ones_are_not_posted(
        self, failing_request: Request
    ) -> None:
        async def steps(pilot: Pilot[Any]) -> None:
            screen = explorer_of(pilot)
            assert screen.running.tensors is not None
            maker, posted = PictureMaker(screen.running.tensors), []
            report = screen.state.reports[FAULT]
            maker.make(report, ValuesAsk(0), lambda: True, posted.append)
            assert posted == []
            for start in range(PICTURES_KEPT + 1):
                maker.make(report, ValuesAsk(start), lambda: False, posted.append)
            assert all(isinstance(message, PictureMade) and not message.error for message in posted)
            assert maker.find(FAULT, ValuesAsk(PICTURES_KEPT)) is not None
            assert maker.find(FAULT, ValuesAsk(0)) is None  # the oldest gave way
            closed = Slow()
            closed.release.set()
            PictureMaker(closed).make(report, ValuesAsk(0), lambda: False, posted.append)
            assert isinstance(posted[-1].error, TraceError)

        drive(ExplorerApp(failing_request), steps)
