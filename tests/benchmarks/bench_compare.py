"""All metrics of two 64 Mi-value tensors in one call, against one read of both (`np.dot`)."""

from __future__ import annotations

import statistics
import sys

import numpy as np
from figures import Figure, interleave, milliseconds, report, timed

from aprcore.judging.compare import compare

VALUES = 64 * 1024 * 1024
TOP_K = 20
LEAST_SHARE = 0.15  # of the speed of np.dot; 0.4 is the aim
REPEATS = 11


def main() -> int:
    """Measure and print."""
    generator = np.random.default_rng(0)
    a = generator.standard_normal(VALUES, dtype=np.float32)
    b = a + np.float32(1e-3) * generator.standard_normal(VALUES, dtype=np.float32)
    ours, theirs = interleave(
        [timed(lambda: compare(a, b, k=TOP_K)), timed(lambda: np.dot(a, b))], REPEATS
    )
    share = statistics.median(peer / own for own, peer in zip(ours, theirs))
    return report(
        [
            Figure(
                "metrics of 2 x 64 Mi values",
                f"{share:.0%} of its speed ({milliseconds(ours)})",
                f">= {LEAST_SHARE:.0%}",
                share >= LEAST_SHARE,
                f"np.dot of the pair ({milliseconds(theirs)})",
            )
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
