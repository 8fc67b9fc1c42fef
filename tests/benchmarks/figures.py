"""The table that every benchmark prints: what was measured, its bound, and the peer."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: What was measured.
        measured: The figure, as text.
        bound: What it is held to, as text.
        met: Whether it holds.
        peer: What it is measured against, with the peer's own figure.
    """

    name: str
    measured: str
    bound: str
    met: bool
    peer: str


def interleave(
    runs: Sequence[Callable[[], float]], repeats: int, warmups: int = 1
) -> list[list[float]]:
    """Seconds of each run, taken in turns, so that a machine that slows down slows all of them."""
    for _ in range(warmups):
        for run in runs:
            run()
    laps: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for times, run in zip(laps, runs):
            times.append(run())
    return laps


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """`function` as something that returns the seconds it takes."""

    def run() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return run


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of neighbouring laps."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def milliseconds(laps: Sequence[float]) -> str:
    """The median, as text."""
    return f"{statistics.median(laps) * 1000:.0f} ms"


def report(figures: Sequence[Figure]) -> int:
    """Print the table; 1 if a bound does not hold."""
    rows = [("figure", "measured", "bound", "", "against")]
    rows += [(f.name, f.measured, f.bound, "ok" if f.met else "MISSED", f.peer) for f in figures]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
    load = os.getloadavg()[0]
    if load > 1.5:
        print(f"(load average {load:.1f}: other work is running here)", file=sys.stderr)
    return int(not all(figure.met for figure in figures))
