"""How fast the explorer paints: `python tests/benchmarks/bench_explorer.py`.

Two figures, each against its bound: the time from process start to the first paint, over that of a
bare Textual app; and the time from a key press to the repaint while a run streams.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aprcore.compare import compare
from aprcore.judge import Verdict
from aprcore.layouts import layout_of
from aprcore.report import RunHeader, Side, StageReport
from aprcore.request import Request
from aprcore.sidecar import Sidecar
from aprcore.stages import BY_NAME, resolve_shape, stage_keys
from aprcore.trace import TraceWriter

FIRST_PAINT_BOUND = 1.5
KEY_BOUND_MS = 50
SIZES = {"T": 7, "S": 7, "H": 14, "K": 2, "D": 64, "E": 896, "F": 4864, "V": 4096}
LAYERS = 28

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
from aprcore.request import Request
from aprtui.app import ExplorerApp
app = ExplorerApp(Request(trace=Path(sys.argv[1]), oracle=Path(sys.argv[2])))
def leave():
    print(time.time(), file=sys.__stdout__)
    app.exit()
app.explorer.call_after_refresh(leave)
app.run(headless=True, size=(120, 40))
"""


def main() -> None:
    """Measure, print the table, and fail when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="process starts of each kind")
    parser.add_argument("--keys", type=int, default=150, help="key presses")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare_s, explorer_s = first_paint(Path(folder), options.runs)
    waits, works = asyncio.run(key_latencies_ms(options.keys))
    p50, p95 = np.percentile(waits, [50, 95])
    work = np.percentile(works, 95)
    ratio = explorer_s / bare_s
    rows = [
        ("bare app, process start to first paint", f"{bare_s * 1e3:.0f} ms", ""),
        ("explorer on two directories, the same", f"{explorer_s * 1e3:.0f} ms", ""),
        ("ratio", f"{ratio:.2f}x", f"<= {FIRST_PAINT_BOUND}x"),
        ("key to repaint while 28 layers stream, p50", f"{p50:.1f} ms", ""),
        ("key to repaint, p95", f"{p95:.1f} ms", f"<= {KEY_BOUND_MS} ms"),
        ("the screen's own processor time in that, p95", f"{work:.1f} ms", ""),
    ]
    for name, figure, bound in rows:
        print(f"{name:<62} {figure:>9}  {bound}")
    sys.exit(int(ratio > FIRST_PAINT_BOUND or p95 > KEY_BOUND_MS))


def first_paint(folder: Path, runs: int) -> tuple[float, float]:
    """Median seconds of a bare app and of the explorer, in turns."""
    paths = [str(folder / name) for name in ("trace", "oracle")]
    random = np.random.default_rng(0)
    for path in paths:
        with TraceWriter(path, Sidecar(tokens=tuple(range(7)))) as writer:
            for key in stage_keys(2, ("dense",)):
                writer.write(key, random.standard_normal((7, 8)).astype(np.float32))
    times: dict[str, list[float]] = {BARE: [], EXPLORER: []}
    for _ in range(runs):
        for code, taken in times.items():
            start = time.time()
            command = [sys.executable, "-c", code, *paths]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            taken.append(float(done.stdout.split()[-1]) - start)
    return statistics.median(times[BARE]), statistics.median(times[EXPLORER])


async def key_latencies_ms(presses: int) -> tuple[list[float], list[float]]:
    """Milliseconds from a key's arrival to the end of the next repaint, while a run streams.

    Returns:
        Elapsed, and spent by the screen's thread: the rest was waiting for a processor.
    """
    from textual import events

    from aprtui.app import ExplorerApp

    app = ExplorerApp(Request(), streaming_run)
    waits, works = [], []
    keys = ["down", "down", "right", "up", "s", "n", "k", "left"]
    async with app.run_test(size=(120, 40)) as pilot:
        while not app.explorer.is_open:
            await pilot.pause(0.01)
        for number in range(presses):
            painted = asyncio.Event()
            key = keys[number % len(keys)]
            start, start_work = time.perf_counter(), time.thread_time()
            app.post_message(events.Key(key, key if len(key) == 1 else None))
            # Queued behind the key; called once the screen has been drawn with what it changed.
            app.call_later(lambda done: app.screen.call_after_refresh(done.set), painted)
            await painted.wait()
            waits.append((time.perf_counter() - start) * 1e3)
            works.append((time.thread_time() - start_work) * 1e3)
            await asyncio.sleep(0.02)
    return waits, works


def streaming_run(request: Request) -> Iterator[Any]:
    """A run of 28 layers of 20 stages and more, a stage every few milliseconds, without end."""
    keys = tuple(stage_keys(LAYERS, ("qkv_bias", "dense")))
    side = Side("made-up", "made-up", "float32")
    yield RunHeader(side, side, None, None, LAYERS, None, None, None, keys, 1e-4, None)
    random = np.random.default_rng(0)
    while True:
        for number, key in enumerate(keys):
            shape = resolve_shape(BY_NAME[key.stage].shape, SIZES)
            layout = layout_of(key, SIZES, math.prod(shape))
            oracle = random.standard_normal(layout.shape).astype(np.float32).reshape(-1)
            noise = 1e-7 if number % 7 else 1e-2
            trace = oracle + noise * random.standard_normal(oracle.size).astype(np.float32)
            comparison = compare(trace, oracle, 200)
            verdict = Verdict.FAIL if number % 7 == 0 else Verdict.PASS
            yield StageReport(key, layout, verdict, "made up", comparison)


if __name__ == "__main__":
    main()
