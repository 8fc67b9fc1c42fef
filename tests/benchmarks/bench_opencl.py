"""OpenCL products and expansion against torch and gguf-py on the same machine.

Weights of 18944 x 3584 and 3584 x 18944, those of a 7B model's feed-forward network, on the device
from the start: what is measured is the kernel, from the host's call to its end. Where the best
device is no CPU, the figures are printed against the same bounds, but torch is still the CPU's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, interleave, median_ratio, milliseconds, report, timed

sys.path.insert(0, str(Path(__file__).parents[1]))
from stored_weights import random_tensor

SHAPES = ((18944, 3584), (3584, 18944))
# Tokens, and how much faster than torch's float32 each stored type must be.
BOUNDS = {
    1: {"F32": 0.0, "Q4_K": 1.5, "Q6_K": 1.5, "Q8_0": 1.5},
    7: {"F32": 1.6, "Q4_K": 2.0, "Q6_K": 2.0, "Q8_0": 2.0},
    64: {"F32": 0.0, "Q4_K": 1.0, "Q6_K": 1.0, "Q8_0": 1.0},
}
# A product of one token is shorter than a time slice of a busy machine: so many make a lap.
CALLS = {1: 8}
REPORTED = ("F16", "BF16", "Q4_0", "Q5_0", "Q5_K", "AprQ4", "AprQ8")  # without a bound, T = 7
LEAST_EXPANSION = 20.0
EXPANDED = SHAPES[0]
REPEATS = 9


def main() -> int:
    """Measure and print."""
    from aprcore.engines.opencl.backend import OpenCLBackend

    with OpenCLBackend(budget_bytes=1 << 40) as op:
        print(f"device: {op.device.label}")
        figures = [figure for shape in SHAPES for figure in products(op, shape)]
        figures += [expansion(op, dtype) for dtype in ("Q4_K", "Q6_K")]
    return report(figures)


def products(op: Any, shape: tuple[int, int]) -> list[Figure]:
    """Every type and number of tokens for one shape, in turns with torch."""
    import torch

    dense = torch.randn(shape)
    figures = []
    dtypes = {dtype for bounds in BOUNDS.values() for dtype in bounds} | set(REPORTED)
    weights = {dtype: random_tensor(dtype, shape, 0) for dtype in sorted(dtypes)}
    for tokens, bounds in BOUNDS.items():
        bounds = bounds | (dict.fromkeys(REPORTED, 0.0) if tokens == 7 else {})
        x = torch.randn(tokens, shape[1])
        there = op.from_host(x.numpy())
        calls = [lambda x=x: torch.nn.functional.linear(x, dense)]
        calls += [product(op, there, weights[dtype]) for dtype in bounds]
        runs = [timed(repeated(call, CALLS.get(tokens, 1))) for call in calls]
        # More than one warm-up: on the host's memory a weight is kept from its second use.
        theirs, *ours = interleave(runs, REPEATS, warmups=3)
        for (dtype, least), laps in zip(bounds.items(), ours):
            ratio = median_ratio(theirs, laps)
            each = [[lap / CALLS.get(tokens, 1) for lap in side] for side in (laps, theirs)]
            figures.append(
                Figure(
                    f"{shape[0]}x{shape[1]} {dtype}, T={tokens}",
                    f"{ratio:.2f}x the speed ({milliseconds(each[0])})",
                    f">= {least}x" if least else "none",
                    ratio >= least,
                    f"torch float32 ({milliseconds(each[1])})",
                )
            )
    op.weights.drop(weights.values())
    return figures


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """`call` several times over."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def product(op: Any, x: Any, weight: Any) -> Callable[[], None]:
    """A product from call to completion."""

    def run() -> None:
        op.linear(x, [weight])
        op.finish()

    return run


def expansion(op: Any, dtype: str) -> Figure:
    """Blocks to floats, on the device, against gguf-py on the host."""
    import gguf

    tensor = random_tensor(dtype, EXPANDED, 0)
    raw = tensor.read_raw(0, EXPANDED[0])
    for _ in range(2):  # on the host's memory a weight is kept from its second use
        op.linear(op.from_host(np.ones((1, EXPANDED[1]))), [tensor])
    pieces = list(op.weights.pieces(tensor))

    def expand() -> None:
        for piece in pieces:
            op.expand(piece, np.arange(piece.stop - piece.start))
        op.finish()

    kind = gguf.GGMLQuantizationType[dtype]
    blocks = raw.reshape(EXPANDED[0], -1)
    runs = [timed(expand), timed(lambda: gguf.quants.dequantize(blocks, kind))]
    ours, theirs = interleave(runs, REPEATS)
    ratio = median_ratio(theirs, ours)
    speed = 4 * math.prod(EXPANDED) / np.median(ours) / 1e9
    return Figure(
        f"{dtype} expansion on the device",
        f"{ratio:.0f}x the speed ({speed:.1f} GB/s)",
        f">= {LEAST_EXPANSION:.0f}x",
        ratio >= LEAST_EXPANSION,
        f"gguf-py ({milliseconds(theirs)})",
    )


if __name__ == "__main__":
    sys.exit(main())
