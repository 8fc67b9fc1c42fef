"""Pictures of tensors: panning over a huge one, and the first picture of a stage after a run.

The huge tensor is [32, 2048, 2048] on both sides: a gigabyte of files, made anew in a temporary
folder. It is looked at in a process of its own, so that its memory is what looking at it takes. The
model of the second part is that of bench_trace.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_trace
import numpy as np
from figures import Figure, report

SHAPE = (32, 2048, 2048)
FILES = ("trace.bin", "oracle.bin")
# A large terminal: 200 columns by 60 lines, two cells per character.
ROWS, COLUMNS = 100, 200
STEPS = 12  # per zoom, a quarter of the screen each

PAN_BOUND_MS = 50
MOST_EXTRA_BYTES = 64 << 20
# What a person takes for the answer to a key, and not for waiting.
AT_ONCE_MS = 200
LAYERS = bench_trace.SHAPE["num_hidden_layers"]
# One layer, and a little for opening the files again.
MOST_LAYERS = 2.0


def main() -> int:
    """Measure and print; with --look, be the process that looks at the huge tensor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--look", type=Path, help="folder of the huge tensor")
    folder = parser.parse_args().look
    if folder is not None:
        print(json.dumps(look(folder)))
        return 0
    return report([*panning(), *first_pictures()])


def panning() -> list[Figure]:
    """Time and memory of panning at every zoom."""
    with tempfile.TemporaryDirectory(prefix="aprtui-bench-") as folder:
        for seed, name in enumerate(FILES):
            write_huge(Path(folder) / name, seed)
        command = [sys.executable, __file__, "--look", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    figures = []
    for kind, laps in found["laps_ms"].items():
        p95, worst = float(np.percentile(laps, 95)), max(laps)
        title = f"pan over {list(SHAPE)} from files, {kind}, p95"
        work = float(np.percentile(found["work_ms"][kind], 95))
        peer = f"worst {worst:.1f} ms of {len(laps)} steps; processor time, p95: {work:.1f} ms"
        met = p95 <= PAN_BOUND_MS
        figures.append(Figure(title, f"{p95:.1f} ms", f"<= {PAN_BOUND_MS} ms", met, peer))
    extra = found["extra_bytes"]
    figures.append(
        Figure("its extra memory, building included", f"{extra >> 20} MiB",
               f"<= {MOST_EXTRA_BYTES >> 20} MiB", extra <= MOST_EXTRA_BYTES,
               f"a side is {4 * math.prod(SHAPE) >> 20} MiB; built in {found['build_s']:.2f} s")
    )  # fmt: skip
    return figures


def write_huge(path: Path, seed: int) -> None:
    """A stage file of the huge tensor, a few rows at a time."""
    from aprcore.dumps.stage_file import HEADER, MAGIC

    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 0, math.prod(SHAPE)))
        for _ in range(SHAPE[0]):
            rows = generator.standard_normal(SHAPE[1:], dtype=np.float32)
            file.write(rows.data.cast("B"))


def look(folder: Path) -> dict[str, Any]:
    """Pan over the huge tensor at every zoom from the whole to single values."""
    from aprcore.dumps.stage_file import HEADER
    from aprcore.judging.layouts import Layout
    from aprcore.network.stages import StageKey
    from aprcore.pictures import FilePlane, HeatMap, MapKind, TensorPair

    key = StageKey(0, "attn_scores")  # the scores: what lies above the diagonal is masked
    layout = Layout(SHAPE, SHAPE, ("head", "token", "position"))
    planes = [FilePlane(folder / name, None, layout, HEADER.size) for name in FILES]
    pair = TensorPair(key, planes[0], planes[1])
    laps: dict[str, list[float]] = {}
    works: dict[str, list[float]] = {}
    extra = 0
    build_s = 0.0
    for kind in (MapKind.DIFF, MapKind.TRACE, MapKind.RATIO):
        before, _ = bench_trace.resident_bytes()
        with bench_trace.PeakMemory() as memory:
            started = time.perf_counter()
            heat_map = HeatMap(pair, kind)
            build_s = max(build_s, time.perf_counter() - started)
            laps[kind.value], works[kind.value] = [], []
            for cell_rows, cell_columns in zoom_sizes(heat_map.shape):
                times = pan(heat_map, cell_rows, cell_columns)
                laps[kind.value] += [elapsed for elapsed, _ in times]
                works[kind.value] += [work for _, work in times]
        # What the first kind leaves to the allocator must not make the next ones look small.
        if not extra:
            extra = memory.peak_bytes - before
        del heat_map
    return {"laps_ms": laps, "extra_bytes": extra, "build_s": build_s, "work_ms": works}


def zoom_sizes(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Cell sizes from the whole map on the screen to one value per cell, halved each time."""
    size = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    sizes = [size]
    while size != (1, 1):
        size = max(1, size[0] // 2), max(1, size[1] // 2)
        sizes.append(size)
    return sizes


def pan(heat_map: Any, cell_rows: int, cell_columns: int) -> list[tuple[float, float]]:
    """Milliseconds of each step down and to the right: elapsed, and of the processor.

    On a busy machine the first also holds the wait for a processor.
    """
    top, left = heat_map.shape[0] // 3, heat_map.shape[1] // 3
    laps = []
    for step in range(STEPS):
        started, work = time.perf_counter(), time.thread_time()
        grid = heat_map.grid(top, left, cell_rows, cell_columns, ROWS, COLUMNS)
        elapsed, work = time.perf_counter() - started, time.thread_time() - work
        laps.append((elapsed * 1e3, work * 1e3))
        cell_rows, cell_columns = grid.cell_rows, grid.cell_columns
        top = max(0, (grid.top + (ROWS // 4) * cell_rows * (step % 2)) % heat_map.shape[0])
        left = max(0, (grid.left + (COLUMNS // 4) * cell_columns * ((step + 1) % 2)))
        left %= heat_map.shape[1]
    return laps


def first_pictures() -> list[Figure]:
    """From the end of a run to the map of a stage that nobody kept."""
    from aprcore.network.stages import StageKey
    from aprcore.pictures import HeatMap
    from aprcore.records.report import Report, StageReport
    from aprcore.runs.bisect import bisect
    from aprcore.runs.request import Request
    from aprcore.runs.tensors import LayerInputs, TensorStore

    bench_trace.prepare()
    request = Request(
        model=bench_trace.folder() / "model.apr", oracle=bench_trace.folder() / "oracle",
        tokens=bench_trace.TOKENS, cumulative_only=True,
    )  # fmt: skip
    kept = LayerInputs()
    started = time.perf_counter()
    reports: dict[StageKey, StageReport] = {}
    for event in bisect(request, kept):
        if isinstance(event, StageReport):
            reports[event.key] = event
    assert isinstance(event, Report)
    run_ms = (time.perf_counter() - started) * 1e3
    layer_ms = run_ms / LAYERS

    def picture_ms(store: TensorStore, layer: int) -> float:
        started = time.perf_counter()
        pair = store.open(reports[StageKey(layer, "ffn_out")])
        HeatMap(pair).overview(ROWS, COLUMNS)
        return (time.perf_counter() - started) * 1e3

    first, later = [], []
    for number in range(5):
        store = TensorStore(request, kept)
        first.append(picture_ms(store, 3 + number))
        later += [picture_ms(store, layer) for layer in range(10 + number, 13 + number)]
        store.close()
    early, again = sorted(first)[2], sorted(later)[len(later) // 2]
    return [
        Figure("first picture after a run: the end of a layer", f"{early:.0f} ms",
               f"<= {AT_ONCE_MS} ms", early <= AT_ONCE_MS,
               f"the whole run of {LAYERS} layers {run_ms:.0f} ms"),
        Figure("the next ones, one layer made again", f"{again:.0f} ms",
               f"<= {MOST_LAYERS * layer_ms:.0f} ms", again <= MOST_LAYERS * layer_ms,
               f"{MOST_LAYERS:g} layers of the run, each {layer_ms:.0f} ms"),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
