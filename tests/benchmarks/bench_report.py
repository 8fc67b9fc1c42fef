"""The HTML report of a deep run with many faults: its size, and the time until it is on the screen.

33 layers whose attention reads kv heads as if they were tiled: one stage fails in each, with a
cause. 64 tokens, so that maps have as many cells as a report allows.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import Figure, milliseconds, report

import tiny
from aprcore.engines.forward import trace
from aprcore.records.report import Report
from aprcore.reports.collect import MAPS_SHOWN, collect_maps
from aprcore.reports.files import write_report
from aprcore.reports.maps import StageMap
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from aprcore.runs.tensors import TensorStore
from wrong_backends import WrongStride

# As many rows as 28 layers of 20 stages; this model has 17 in each.
LAYERS, TOKENS = 33, 64
SIZES = {"H": 8, "K": 2, "D": 32, "E": 256, "F": 512, "V": 1024}
REPEATS = 7
MOST_BYTES = 3_000_000
MOST_RENDER_S = 1.0
# Two frames after the load event the browser has laid out and painted.
PAINTED = """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(
    () => done(performance.now()))))"""


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        found, maps = judge(Path(folder))
        faults = sum(stage.verdict is not None and stage.verdict.is_divergence
                     for stage in found.stages)  # fmt: skip
        what = f"{len(found.stages)} stages, {faults} at fault, {len(maps)} maps"
        path = Path(folder) / "report.html"
        laps = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            write_report(path, found, maps=maps, command=sys.argv)
            laps.append(time.perf_counter() - started)
        size = path.stat().st_size
        figures = [
            Figure("HTML report", f"{size / 1e6:.2f} MB", f"<= {MOST_BYTES / 1e6:g} MB",
                   size <= MOST_BYTES and len(maps) == MAPS_SHOWN, what),
            Figure("writing it", milliseconds(laps), "", True, f"the run: {found.elapsed_s:.1f} s"),
        ]  # fmt: skip
        shown = render(path)
        if shown:
            median = statistics.median(shown)
            figures.append(
                Figure("from opening to painted, headless Chromium", milliseconds(shown),
                       f"< {MOST_RENDER_S:g} s", median < MOST_RENDER_S, "about:blank to this file")
            )  # fmt: skip
        return report(figures)


def judge(folder: Path) -> tuple[Report, tuple[StageMap, ...]]:
    """The run and its maps."""
    tiny.SIZES.update(SIZES)
    tokens = tuple(range(TOKENS))
    path = tiny.write_model(folder / "model.apr", num_layers=LAYERS)
    oracle = tiny.write_stages(folder / "oracle", tiny.trace_model(path, tokens), tokens=tokens)
    with tiny.opened(path) as model:
        stream = trace(model.graph, model.weights, WrongStride(1), tokens)
        wrong = {key: tensor.copy() for key, tensor in stream}
    dump = tiny.write_stages(folder / "dump", wrong, tokens=tokens)
    request = Request(model=path, trace=dump, oracle=oracle)
    found = run(request)
    return found, collect_maps(found, TensorStore(request))


def render(path: Path) -> list[float]:
    """Seconds from navigation to the second frame; nothing where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        return []
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=program, args=arguments)
        except Error:
            print("no Chromium starts here: not rendered", file=sys.stderr)
            return []
        laps = [_render_once(browser, path) for _ in range(REPEATS)]
        browser.close()
    return laps


def _render_once(browser: Any, path: Path) -> float:
    page = browser.new_page()
    page.goto(path.as_uri())
    elapsed_ms = float(page.evaluate(PAINTED))
    page.close()
    return elapsed_ms / 1000


if __name__ == "__main__":
    sys.exit(main())
