"""Driving the explorer from tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Input

from aprcore.bisect import bisect
from aprcore.report import Report, RunHeader, StageReport
from aprcore.request import Request
from aprtui.app import ExplorerApp
from aprtui.run_state import RunState
from aprtui.screens.explorer import ExplorerScreen

# Longer than the debounce of the detail pane and the interval between refreshes.
QUIET_S = 0.1


async def settle(pilot: Pilot[Any]) -> None:
    """Wait until the run is over and all that it posted has been handled and drawn."""
    while (worker := explorer_of(pilot).engine_worker) is None:
        await pilot.pause(0.01)
    await worker.wait()
    handled = asyncio.Event()
    explorer_of(pilot).call_later(handled.set)  # queued behind the run's messages
    await handled.wait()
    await come_to_rest(pilot)


async def come_to_rest(pilot: Pilot[Any]) -> None:
    """Wait until the picture stays as it is; on a busy machine one pause is not enough."""
    for box in pilot.app.screen.query(Input):
        box.cursor_blink = False  # a picture is taken at any moment
    before = ""
    for _ in range(50):
        await pilot.pause(QUIET_S)
        now = pilot.app.export_screenshot()
        if now == before and not is_about_to_draw(pilot):
            return
        before = now


def is_about_to_draw(pilot: Pilot[Any]) -> bool:
    """Whether a timer of the explorer is yet to fire: on a starved machine it may be late."""
    explorer = explorer_of(pilot)
    timers = (explorer._detail_timer, explorer._refresh_timer)
    return timers != (None, None) or explorer.detail.pictures.is_busy


def finish(request: Request) -> RunState:
    """What the screen knows of a run that is over, without a screen."""
    state = RunState()
    for event in bisect(request):
        match event:
            case RunHeader():
                state.open(event)
            case StageReport():
                state.add(event)
            case Report():
                state.report = event
    return state


def explorer_of(pilot: Pilot[Any]) -> ExplorerScreen:
    """The explorer, also when another screen lies over it."""
    assert isinstance(pilot.app, ExplorerApp)
    return pilot.app.explorer


def drive(
    app: ExplorerApp,
    steps: Callable[[Pilot[Any]], Coroutine[Any, Any, None]],
    *,
    size: tuple[int, int] = (120, 40),
    wait: Callable[[Pilot[Any]], Awaitable[None]] | None = None,
) -> None:
    """Run an app without a terminal, wait until the run is over, take some steps."""

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await (wait or settle)(pilot)
            await steps(pilot)

    asyncio.run(run())
