"""Two directories of 1,900 stage files of 100 KB, from opening to the last cosine, against `cat`.

Both sides are measured with a warm cache and in turns: the whole cumulative comparison, headers
and the 200 largest differences of each stage included, in this process with everything imported;
and a `cat` of the same files, started by a shell as a user would.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from figures import Figure, interleave, median_ratio, milliseconds, report, timed

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import known_stages, outline
from aprcore.network.stages import StageKey
from aprcore.records.report import Report, StageReport
from aprcore.runs.bisect import bisect
from aprcore.runs.request import Request

FILES = 1_900
TOKENS = tuple(range(16))
SHAPES = {"H,T,S": (100, 16, 16)}  # all others: 16 tokens of 1,600 values
SHAPE = (16, 1600)
MOST_TIME = 2.0
REPEATS = 11


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make(root)

        def read() -> None:
            command = "cat A/*/* B/*/* > /dev/null"
            subprocess.run(command, shell=True, check=True, cwd=root)

        ours, theirs = interleave([timed(lambda: compare_all(root)), timed(read)], REPEATS)
    ratio = median_ratio(ours, theirs)
    return report(
        [
            Figure(
                f"all cosines of 2 x {FILES:,} files",
                f"{ratio:.2f}x ({milliseconds(ours)})",
                f"<= {MOST_TIME}x",
                ratio <= MOST_TIME,
                f"cat A/*/* B/*/* > /dev/null ({milliseconds(theirs)})",
            )
        ]
    )


def make(root: Path) -> None:
    """A reference in B, and in A the same with the rounding of another order of summation."""
    random = np.random.default_rng(0)
    sidecar = Sidecar(tokens=TOKENS, dtype="float32", backend="made-up")
    with TraceWriter(root / "A", sidecar) as ours, TraceWriter(root / "B", sidecar) as theirs:
        for key in keys():
            x = random.standard_normal(
                SHAPES.get(known_stages()[key.stage].shape, SHAPE), np.float32
            )
            theirs.write(key, x)
            ours.write(key, x * (1 + np.float32(3e-7) * random.standard_normal(x.shape, x.dtype)))


def keys() -> list[StageKey]:
    """The first tensors of a model that is deep enough; all of them lie in a layer's folder."""
    every = outline(FILES, ("qkv_bias",)).keys
    return list(islice((k for k in every if k.layer is not None), FILES))


def compare_all(root: Path) -> None:
    """The comparison; a benchmark of sound directories that are found wrong is worth nothing."""
    *events, last = bisect(Request(trace=root / "A", oracle=root / "B"))
    assert isinstance(last, Report)
    reports = [event for event in events if isinstance(event, StageReport)]
    assert len(reports) == FILES and all(r.verdict is Verdict.PASS for r in reports)
    assert all(r.comparison is not None and r.comparison.cosine > 0.999999 for r in reports)


if __name__ == "__main__":
    sys.exit(main())
