"""All three judgments against plain trace + compare, on the 0.5B-shaped model of bench_trace.

Float32 weights, and the same model in Q4_K: quantised weights are what the judgments are for. Each
side is a process of its own, and they take turns. The models are kept between runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bench_trace
from figures import Figure, interleave, median_ratio, milliseconds, report

REPEATS = 5
MOST_TIME = 4.0
FILES = {"f32": "model.apr", "q4_k": "model-q4_k.apr"}


def main() -> int:
    """Measure and print; with --side, be one of the sides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=[f"{what}-{kind}" for what in SIDES for kind in FILES])
    side = parser.parse_args().side
    if side is not None:
        what, kind = side.split("-")
        return bench_trace.serve(SIDES[what](kind))
    prepare()
    return report([figure for kind in FILES for figure in measure(kind)])


def prepare() -> None:
    """Make the models and the oracle, unless they are there."""
    from aprcore.models.convert import import_model

    bench_trace.prepare()
    source, target = (bench_trace.folder() / FILES[kind] for kind in FILES)
    if not target.exists():
        print(f"quantising {source} ...", file=sys.stderr)
        import_model(source, target, quantize="q4_k")


def measure(kind: str) -> list[Figure]:
    """Time and memory of one stored type."""
    sides = {what: Side(f"{what}-{kind}") for what in SIDES}
    try:
        laps = dict(zip(sides, interleave([side.run for side in sides.values()], REPEATS)))
        peaks = {what: side.peak_bytes() for what, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    ratio = median_ratio(laps["judged"], laps["compared"])
    most_bytes = peaks["compared"] + bench_trace.LAYER_FLOAT64_BYTES
    return [
        Figure(f"all three judgments, {kind}", f"{ratio:.2f}x ({milliseconds(laps['judged'])})",
               f"<= {MOST_TIME}x", ratio <= MOST_TIME,
               f"trace + compare ({milliseconds(laps['compared'])})"),
        Figure("their peak anonymous memory", f"{peaks['judged'] >> 20} MiB",
               f"<= {most_bytes >> 20} MiB", peaks["judged"] <= most_bytes,
               f"trace + compare ({peaks['compared'] >> 20} MiB) and one layer in float64"),
    ]  # fmt: skip


class Side(bench_trace.Side):
    """A process that has a model open and runs it on demand."""

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def compared(kind: str) -> Callable[[], float]:
    """Our trace, each stage compared with the oracle's; opening is not counted."""
    from aprcore.judging.compare import compare
    from aprcore.runs.open_sides import open_sides
    from aprcore.runs.request import TOP_K

    def run() -> float:
        with open_sides(request(kind)) as sides:
            oracle = sides.oracle
            assert oracle is not None
            started = time.perf_counter()
            for key, tensor in sides.tensors():
                if key in oracle and tensor is not None:
                    compare(tensor, oracle.read(key), TOP_K)
            return time.perf_counter() - started

    return run


def judged(kind: str) -> Callable[[], float]:
    """The whole run; a benchmark of a sound model that is found wrong is worth nothing."""
    from aprcore.runs.bisect import bisect

    def run() -> float:
        events = bisect(request(kind))
        next(events)
        started = time.perf_counter()
        for event in events:
            last = event
        seconds = time.perf_counter() - started
        if last.diverges():
            raise SystemExit(f"a sound model is judged to be wrong: {last.summary()}")
        return seconds

    return run


def request(kind: str):
    """A model against the oracle."""
    from aprcore.runs.request import Request

    folder: Path = bench_trace.folder()
    return Request(model=folder / FILES[kind], oracle=folder / "oracle", tokens=bench_trace.TOKENS)


SIDES: dict[str, Callable[[str], Callable[[], float]]] = {"compared": compared, "judged": judged}

if __name__ == "__main__":
    sys.exit(main())
