"""Driving the explorer from tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from time import monotonic
from typing import Any

from textual.app import App
from textual.message_pump import MessagePump
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input

from aprcore.network.stages import StageKey
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
from aprtui.run_state import RunState
from aprtui.screens.explorer import ExplorerScreen

# How long anything may take, with every core taken by others.
PATIENCE_S = 60.0
# Between two looks at what another thread or a timer brings about.
LOOK_S = 0.001
# A timer that fires once within this time is part of what was asked for (a refresh, a debounce); a
# notification that goes by itself is not.
SOON_S = 1.0
READY = "something in the event loop"
# Workers that last as long as the run and the explorer do.
LASTING = {"run", "watch"}


async def settle(pilot: Pilot[Any]) -> None:
    """Wait until the run is over and all that it posted has been handled and drawn."""
    explorer = explorer_of(pilot)
    await until(pilot, lambda: explorer.running.worker is not None)
    assert explorer.running.worker is not None
    await explorer.running.worker.wait()
    await come_to_rest(pilot)


async def press(pilot: Pilot[Any], *keys: str) -> None:
    """Press keys one after the other, each once all that the last one brought about is drawn."""
    for key in keys:
        await pilot.press(key)
        await come_to_rest(pilot)


def then_press(*keys: str, at: StageKey | None = None) -> Callable[[Pilot[Any]], Any]:
    """Makes what is to be done before a picture: keys once the run is over, at a stage."""

    async def run_before(pilot: Pilot[Any]) -> None:
        await settle(pilot)
        if at is not None:
            explorer_of(pilot).navigation.go_to(at)
            await come_to_rest(pilot)
        await press(pilot, *keys)

    return run_before


async def come_to_rest(pilot: Pilot[Any]) -> None:
    """Wait until nothing is left to be handled, computed or drawn, or the app is leaving.

    Textual's own pilot takes a process that uses little processor time for one that is done, which
    it is not where the cores are busy with something else.

    Raises:
        AssertionError: It never comes to rest, with what there still is to do.
    """
    await _wait_while_busy(pilot.app)
    for box in [] if _is_over(pilot.app) else pilot.app.screen.query(Input):
        box.cursor_blink = False  # a picture is taken at any moment
    await _wait_while_busy(pilot.app)


async def until(pilot: Pilot[Any], holds: Callable[[], Any]) -> None:
    """Wait for something that another thread brings about, whatever else is still to be done."""
    end = monotonic() + PATIENCE_S
    while not holds():
        assert not _is_over(pilot.app), "the app has ended before it came about"
        assert monotonic() < end, "it never came about"
        await asyncio.sleep(LOOK_S)


async def _wait_while_busy(app: App[Any]) -> None:
    end = monotonic() + PATIENCE_S
    while not _is_over(app) and (to_do := _step(app)):
        assert monotonic() < end, f"the explorer does not come to rest: {to_do}"
        # What is ready is done in the next turn of the loop; all else takes its time.
        await asyncio.sleep(0 if to_do is READY else LOOK_S)


def _is_over(app: App[Any]) -> bool:
    return app._exit or app._exception is not None


def _step(app: App[Any]) -> str:
    """What there still is to do; what has to be drawn is drawn."""
    if asyncio.get_running_loop()._ready:  # type: ignore[attr-defined]
        return READY
    if to_do := _being_handled(app):
        return to_do
    screen = app.screen
    if _is_dirty(screen):
        screen._on_timer_update()  # which its timer does sixty times a second
        return f"a part of {screen!r} to draw"
    return _being_made(app)


def _pumps(app: App[Any]) -> Iterator[MessagePump]:
    """All that handle messages, also on the screens that lie below."""
    yield app
    for screen in app.screen_stack:
        yield from screen.walk_children(with_self=True)


def _being_handled(app: App[Any]) -> str:
    """A message that is not handled yet; "" if there is none."""
    for pump in _pumps(app):
        queue = pump._message_queue
        # One that waits for its next message has done all that the last one asked for.
        is_waiting = not queue.values and queue.ready_event._waiters  # type: ignore[attr-defined]
        if not is_waiting or pump._next_callbacks:
            return f"a message to {pump!r}"
    return ""


def _is_dirty(screen: Screen[Any]) -> bool:
    return bool(
        screen._layout_required
        or screen._scroll_required
        or screen._repaint_required
        or screen._recompose_required
        or screen._dirty_widgets
    )


def _being_made(app: App[Any]) -> str:
    """What a callback, a worker, a timer or an animation is going to bring."""
    for screen in app.screen_stack:
        if screen._callbacks:
            return f"a callback of {screen!r}"
    for worker in app.workers:
        if worker.group not in LASTING and not worker.is_finished:
            return f"a worker, {worker!r}"
    for pump in _pumps(app):
        for timer in list(pump._timers):
            is_set = timer._task is not None and not timer._task.done()
            if is_set and timer._repeat == 0 and timer._interval < SOON_S:
                return f"{timer!r} of {pump!r}"
    if app.animator._animations or app.animator._scheduled:
        return "an animation"
    return ""


def finish(request: Request) -> RunState:
    """What the screen knows of a run that is over, without a screen."""
    state = RunState()
    for event in bisect(request):
        state.take(event)
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
