"""How fast the explorer paints: `python tests/benchmarks/bench_explorer.py`.

Each figure against its bound: the time from process start to the first paint, over that of a bare
Textual app; the time from a key press to the repaint while a run streams, and in every tab of a
report of a 70B-shaped model; and the time from a key press to the new picture while a heat map of
[32, 2048, 2048] is panned in its files.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.judging.compare import compare
from aprcore.judging.layouts import Layout, layout_of
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import known_stages, outline
from aprcore.network.stages import Scope, StageKey, resolve_shape
from aprcore.pictures import MemoryPlane, TensorPair
from aprcore.records.report import Report, RunHeader, Side, StageReport
from aprcore.runs.request import Request

if TYPE_CHECKING:
    from textual.screen import Screen

    from aprcore.records.tensor_source import TensorSource
    from aprtui.app import ExplorerApp

FIRST_PAINT_BOUND = 1.5
KEY_BOUND_MS = 50
SIZES = {"T": 7, "S": 7, "H": 14, "K": 2, "D": 64, "E": 896, "F": 4864, "V": 4096}
LAYERS = 28
# Shaped like a Llama of 70B with every optional stage, and a prompt of 64 tokens: as many rows as
# 80 layers of 23 stages.
LARGE_SIZES = {
    "T": 64, "S": 64, "H": 64, "K": 8, "D": 128, "E": 8192, "F": 28672, "V": 128256, "k": 2,
}  # fmt: skip
LARGE_LAYERS = 92
TREE_KEYS = ("down", "down", "up", "n", "down", "right", "left", "n", "p")
PICTURE_KEYS = (
    "down", "right", "m", "shift+right", "plus", "down", "h", "pagedown", "minus", "right", "end",
    "shift+left", "up", "home", "0",
)  # fmt: skip
# Longer than the debounce of the detail pane.
QUIET_S = 0.08
MAP_SHAPE = (32, 2048, 2048)

# Both print the time and leave as soon as the screen has been drawn once.
BARE = """
import sys, time
from textual.app import App
from textual.widgets import DataTable, Footer, Tree
class Bare(App):
    def compose(self):
        yield Tree("run")
        yield DataTable()
        yield Footer()
    def on_mount(self):
        self.call_after_refresh(self.leave)
    def leave(self):
        print(time.time(), file=sys.__stdout__)
        self.exit()
Bare().run(headless=True, size=(120, 40))
"""
EXPLORER = """
import sys, time
from pathlib import Path
from aprcore.runs.request import Request
from aprtui.app import ExplorerApp
app = ExplorerApp(Request(trace=Path(sys.argv[1]), oracle=Path(sys.argv[2])))
def leave():
    print(time.time(), file=sys.__stdout__)
    app.exit()
app.explorer.call_after_refresh(leave)
app.run(headless=True, size=(120, 40))
"""


def first_paint(folder: Path, runs: int) -> tuple[float, float]:
    """Median seconds of a bare app and of the explorer, in turns."""
    paths = [str(folder / name) for name in ("trace", "oracle")]
    random = np.random.default_rng(0)
    for path in paths:
        with TraceWriter(path, Sidecar(tokens=tuple(range(7)))) as writer:
            for key in outline(2, ()).keys:
                writer.write(key, random.standard_normal((7, 8)).astype(np.float32))
    # As installed: compiled, which Textual is already.
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def paint(code: str) -> float:
        start = time.time()
        command = [sys.executable, "-c", code, *paths]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1]) - start

    times: dict[str, list[float]] = {BARE: [], EXPLORER: []}
    for code in times:
        paint(code)
    for _ in range(runs):
        for code, taken in times.items():
            taken.append(paint(code))
    return statistics.median(times[BARE]), statistics.median(times[EXPLORER])


async def key_latencies_ms(presses: int) -> tuple[list[float], list[float]]:
    """Milliseconds from a key's arrival to the end of the next repaint, while a run streams.

    Returns:
        Elapsed, and spent by the screen's thread: the rest was waiting for a processor.
    """
    from aprtui.app import ExplorerApp

    app = ExplorerApp(Request(), streaming_run)
    waits, works = [], []
    keys = ["down", "down", "right", "up", "s", "n", "k", "left"]
    async with app.run_test(size=(120, 40)) as pilot:
        write_screens(app)
        while not app.explorer.is_open:
            await pilot.pause(0.01)
        for key in itertools.islice(itertools.cycle(keys), presses):
            start, start_work = time.perf_counter(), time.thread_time()
            await press(app, key)
            waits.append((time.perf_counter() - start) * 1e3)
            works.append((time.thread_time() - start_work) * 1e3)
            await asyncio.sleep(0.02)
    return waits, works


async def press(app: ExplorerApp, key: str) -> None:
    """Press a key, and wait until the screen has been drawn with what it changed."""
    from textual import events

    painted = asyncio.Event()
    app.post_message(events.Key(key, key if len(key) == 1 else None))
    # Queued behind the key; called once the screen has been drawn.
    app.call_later(lambda done: app.screen.call_after_refresh(done.set), painted)
    await painted.wait()


async def open_large(app: ExplorerApp, tensors: TensorSource) -> None:
    """Wait until the made-up run is over, and give it tensors."""
    while app.explorer.state.report is None:
        assert app.explorer.state.error is None, app.explorer.state.error
        await asyncio.sleep(0.05)
    app.explorer.detail.pictures.use(tensors)
    await asyncio.sleep(0.5)


async def tab_latencies_ms(presses: int) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds from a key's arrival to the end of the next repaint, by tab and focus.

    Returns:
        Elapsed, and spent by the screen's thread, of every key that changed something.
    """
    from aprtui.app import ExplorerApp
    from aprtui.widgets.tabs import DetailTab

    found: dict[str, tuple[list[float], list[float]]] = {}
    app = ExplorerApp(Request(), large_run)
    async with app.run_test(size=(200, 60)) as pilot:
        await open_large(app, MadeUpTensors())
        repaints = Repaints(app)
        for number, tab in enumerate(DetailTab, 1):
            app.explorer.tree_of_stages.focus()
            await pilot.press(str(number))
            await pilot.pause(0.5)
            found[f"{tab.value} from the tree"] = await waits_ms(repaints, TREE_KEYS, presses)
            if tab.is_picture and tab is not DetailTab.HISTOGRAM:  # which has no cursor
                await pilot.press("enter")
                await pilot.pause(0.5)
                found[f"{tab.value} in it"] = await waits_ms(repaints, PICTURE_KEYS, presses)
    return found


def write_screens(app: ExplorerApp) -> None:
    """Have an app without a terminal make what it would write to one, which it would leave out."""
    from textual._compositor import CompositorUpdate

    display = app._display

    def write(screen: Screen[Any], renderable: Any) -> None:
        display(screen, renderable)
        if isinstance(renderable, CompositorUpdate):
            renderable.render_segments(app.console).encode()

    app._display = write  # type: ignore[method-assign]


class Repaints:
    """When an app's screen was drawn, by the clock of `time.perf_counter`.

    Attributes:
        times: Every repaint since the last key.
        mapped: Those with the whole map that was asked for.
        work_s: What the screen's thread has spent on the first of `times`: the rest was waiting for
            a processor.
    """

    def __init__(self, app: ExplorerApp) -> None:
        from aprtui.map_pictures import GridAsk
        from aprtui.widgets.tabs import DetailTab

        self.times: list[float] = []
        self.mapped: list[float] = []
        self.work_s = 0.0
        self._start_work = 0.0
        self._app = app
        write_screens(app)
        display = app._display

        def note(*args: Any) -> None:
            display(*args)
            self.times.append(time.perf_counter())
            if len(self.times) == 1:
                self.work_s = time.thread_time() - self._start_work
            shown = app.explorer.detail.pictures.views[DetailTab.MAP]
            if not isinstance(shown.ask(), GridAsk):
                self.mapped.append(self.times[-1])

        app._display = note  # type: ignore[method-assign]

    async def after(self, key: str) -> tuple[list[float], list[float]]:
        """Milliseconds from a key's arrival to each of `times` and `mapped`, until all is still."""
        from textual import events

        self.times.clear()
        self.mapped.clear()
        start, self._start_work = time.perf_counter(), time.thread_time()
        self._app.post_message(events.Key(key, key if len(key) == 1 else None))
        pictures = self._app.explorer.detail.pictures
        while True:
            count = len(self.times)
            await asyncio.sleep(QUIET_S)
            if len(self.times) == count and not pictures.is_busy:
                waits = [[(at - start) * 1e3 for at in kind] for kind in (self.times, self.mapped)]
                return waits[0], waits[1]


async def waits_ms(
    repaints: Repaints, keys: Sequence[str], presses: int
) -> tuple[list[float], list[float]]:
    """Milliseconds from some keys to the first repaint after each.

    Returns:
        Elapsed, and spent by the screen's thread; a key that changes nothing draws nothing.

    Raises:
        RuntimeError: No key drew anything, so that there is nothing to measure.
    """
    waits, works = [], []
    for key in itertools.islice(itertools.cycle(keys), presses):
        painted, _ = await repaints.after(key)
        if painted:
            waits.append(painted[0])
            works.append(repaints.work_s * 1e3)
    if not waits:
        raise RuntimeError(f"none of {', '.join(keys)} drew anything")
    return waits, works


async def pan_latencies_ms(folder: Path, presses: int) -> list[float]:
    """Milliseconds from a key to each new picture of a map of two files of 512 MB."""
    from aprtui.app import ExplorerApp

    report, tensors = large_files(folder)

    def run(request: Request) -> Iterator[Any]:
        side = Side("made-up", "made-up", "float32")
        header = RunHeader(side, side, None, None, 1, None, None, None, (report.key,), 1e-4, None)
        yield header
        yield report
        yield Report(header, (report,), 0.0)

    waits = []
    app = ExplorerApp(Request(), run)
    async with app.run_test(size=(200, 60)) as pilot:
        await open_large(app, tensors)
        pictures, repaints = app.explorer.detail.pictures, Repaints(app)
        app.explorer.navigation.go_to(report.key)
        await pilot.pause(0.5)
        await pilot.press("3")
        await pilot.pause(0.2)
        while pictures.is_busy:
            await asyncio.sleep(0.01)
        await pilot.press("enter", "plus", "plus")
        await pilot.pause(0.5)
        keys = ("shift+right", "shift+down", "shift+right", "shift+down", "plus", "shift+left",
                "shift+up", "minus")  # fmt: skip
        for key in itertools.islice(itertools.cycle(keys), presses):
            _, mapped = await repaints.after(key)
            waits.extend(mapped[:1])
    return waits


def large_files(folder: Path) -> tuple[StageReport, TensorSource]:
    """Attention probabilities of 32 heads over 2,048 tokens, both sides in files."""
    from aprcore.dumps.stage_file import HEADER, write_stage_file
    from aprcore.pictures import FilePlane

    key = StageKey(0, "attn_softmax")
    layout = Layout(MAP_SHAPE, MAP_SHAPE, ("head", "token", "position"))
    random = np.random.default_rng(0)
    head = random.standard_normal(MAP_SHAPE[1:]).astype(np.float32)
    planes = []
    for name in ("trace", "oracle"):
        path = folder / f"{name}.bin"
        write_stage_file(path, 0, np.concatenate([head + n for n in range(MAP_SHAPE[0])]))
        planes.append(FilePlane(path, None, layout, HEADER.size))
        head = head * np.float32(1.001)

    class Files:
        def open(self, report: StageReport) -> TensorPair:
            return TensorPair(key, *planes)

        def close(self) -> None:
            return None

    return StageReport(key, layout, Verdict.PASS, "made up"), Files()


class MadeUpTensors:
    """Tensors of any stage of the large run: parts of the same random values."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        count = LARGE_SIZES["T"] * LARGE_SIZES["F"]
        self._oracle = random.standard_normal(count).astype(np.float32)
        self._trace = self._oracle * np.float32(1.001)

    def open(self, report: StageReport) -> TensorPair:
        """Both sides of a stage."""
        assert report.layout is not None
        count = math.prod(report.layout.shape)
        sides = (MemoryPlane(x[:count], report.layout) for x in (self._trace, self._oracle))
        return TensorPair(report.key, *sides)

    def close(self) -> None:
        """Nothing is open."""


def large_run(request: Request) -> Iterator[Any]:
    """A finished run of 80 layers with every stage; a seventh of them fails."""
    layers = range(LARGE_LAYERS)
    stages = known_stages().values()
    keys = tuple(
        [StageKey(n, s.name) for n in layers for s in stages if s.scope is Scope.LAYER]
        + [StageKey(None, s.name) for s in stages if s.scope is Scope.MODEL]
    )
    side = Side("made-up", "made-up", "float32")
    tokens = tuple(range(LARGE_SIZES["T"]))
    texts = tuple(f" word{n}" for n in tokens)
    header = RunHeader(
        side, side, None, None, LARGE_LAYERS, None, tokens, texts, keys, 1e-4, None
    )  # fmt: skip
    yield header
    tensors = MadeUpTensors()
    made: dict[str, StageReport] = {}
    reports = []
    for number, key in enumerate(keys):
        if key.stage not in made:
            layout = layout_of(key, LARGE_SIZES, math.prod(
                resolve_shape(known_stages()[key.stage].shape, LARGE_SIZES)
            ))  # fmt: skip
            report = StageReport(key, layout, Verdict.PASS, "made up")
            trace, oracle = tensors.open(report).both()
            count = math.prod(layout.shape)
            found = compare(trace.read_flat(0, count), oracle.read_flat(0, count), 200)
            made[key.stage] = replace(report, comparison=found)
        verdict = Verdict.FAIL if number % 7 == 0 else Verdict.PASS
        reports.append(replace(made[key.stage], key=key, verdict=verdict))
        yield reports[-1]
    yield Report(header, tuple(reports), 0.0)


def streaming_run(request: Request) -> Iterator[Any]:
    """A run of 28 layers of 20 stages and more, a stage every few milliseconds, without end."""
    keys = outline(LAYERS, ("qkv_bias",)).keys
    side = Side("made-up", "made-up", "float32")
    yield RunHeader(side, side, None, None, LAYERS, None, None, None, keys, 1e-4, None)
    random = np.random.default_rng(0)
    while True:
        for number, key in enumerate(keys):
            shape = resolve_shape(known_stages()[key.stage].shape, SIZES)
            layout = layout_of(key, SIZES, math.prod(shape))
            oracle = random.standard_normal(layout.shape).astype(np.float32).reshape(-1)
            noise = 1e-7 if number % 7 else 1e-2
            trace = oracle + noise * random.standard_normal(oracle.size).astype(np.float32)
            comparison = compare(trace, oracle, 200)
            verdict = Verdict.FAIL if number % 7 == 0 else Verdict.PASS
            yield StageReport(key, layout, verdict, "made up", comparison)


def main() -> None:
    """Measure, print the table, and fail when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="process starts of each kind")
    parser.add_argument("--keys", type=int, default=150, help="key presses")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS),
                        help="which figures; default: all")  # fmt: skip
    options = parser.parse_args()
    # Most terminals have all colours; a map has two values per character there.
    os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    os.environ.pop("NO_COLOR", None)
    is_slow = False
    for part in options.only:
        for name, figure, unit, bound, note in PARTS[part](options.runs, options.keys):
            limit = "" if bound is None else f"<= {bound} {unit}"
            print(f"{name:<68} {figure:>8.2f} {unit:<2}  {limit:<9} {note}".rstrip(), flush=True)
            is_slow |= bound is not None and figure > bound
    sys.exit(int(is_slow))


class Figure(NamedTuple):
    """A line of the table.

    Attributes:
        name: What was measured.
        value: How much of `unit` it took.
        bound: The most that is allowed; None for what is only told.
        note: What else there is to say.
    """

    name: str
    value: float
    unit: str = "ms"
    bound: float | None = None
    note: str = ""


def start_figures(runs: int, presses: int) -> Iterator[Figure]:
    """The first paint, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        bare_s, explorer_s = first_paint(Path(folder), runs)
    yield Figure("bare app, process start to first paint", bare_s * 1e3)
    yield Figure("explorer on two directories, the same", explorer_s * 1e3)
    yield Figure("ratio", explorer_s / bare_s, "x", FIRST_PAINT_BOUND)


def stream_figures(runs: int, presses: int) -> Iterator[Figure]:
    """Keys while stages come in."""
    waits, works = asyncio.run(key_latencies_ms(presses))
    p50, p95 = np.percentile(waits, [50, 95])
    yield Figure("key to repaint while 28 layers stream, p50", p50)
    yield Figure("key to repaint while 28 layers stream, p95", p95, "ms", KEY_BOUND_MS,
                 own_work(works))  # fmt: skip


def tab_figures(runs: int, presses: int) -> Iterator[Figure]:
    """Keys in every tab of a large report."""
    for name, (waits, works) in asyncio.run(tab_latencies_ms(presses)).items():
        yield Figure(f"key to repaint, {LARGE_LAYERS} layers, T = 64, {name}, p95",
                     float(np.percentile(waits, 95)), "ms", KEY_BOUND_MS,
                     own_work(works))  # fmt: skip


def pan_figures(runs: int, presses: int) -> Iterator[Figure]:
    """Pans of a map in files of 512 MB."""
    with tempfile.TemporaryDirectory() as folder:
        waits = asyncio.run(pan_latencies_ms(Path(folder), presses // 2))
    yield Figure(f"heat map pan of {list(MAP_SHAPE)} in files, key to picture, p95",
                 float(np.percentile(waits, 95)), "ms", KEY_BOUND_MS)  # fmt: skip


def own_work(works: Sequence[float]) -> str:
    """What of it the screen's thread has worked; the rest was waiting for a processor."""
    p50, p95 = np.percentile(works, [50, 95])
    return f"its own processor time {p50:.0f} ms, p95 {p95:.0f} ms"


PARTS: Mapping[str, Callable[[int, int], Iterator[Figure]]] = {
    "start": start_figures,
    "stream": stream_figures,
    "tabs": tab_figures,
    "pan": pan_figures,
}


if __name__ == "__main__":
    main()
