"""Histograms of both sides and of their difference, in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aprcore.pictures.plane import TensorPair, ranges
from aprcore.pictures.records import (
    EDGE_BITS,
    OUTLIER_RMS,
    PIECE_VALUES,
    Histogram,
    IsCancelled,
    check,
    never,
)

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_LARGEST = np.float32(np.finfo(np.float32).max)

# The exponent, and the first seven bits behind the binary point, of a float32: enough to tell bins
# apart, few enough to count each of them. Counting needs no second pass over the tensor then.
_FINE_SHIFT = 23 - (EDGE_BITS - 1)
_FINE_BINS = 1 << (31 - _FINE_SHIFT)
_FIRST_NONFINITE = 0x7F80_0000 >> _FINE_SHIFT
_ONE = 0x3F80_0000 >> _FINE_SHIFT


@dataclass(slots=True)
class _Counts:
    """Magnitudes of one tensor, counted finely: bin i holds bit patterns i << _FINE_SHIFT on."""

    fine: Int64
    zeros: int = 0
    squares: float = 0.0
    finite: int = 0

    @property
    def nonfinite(self) -> int:
        return int(self.fine[_FIRST_NONFINITE:].sum())

    def add(self, x: Float32) -> None:
        bits = x.view(np.uint32) & np.uint32(0x7FFF_FFFF)
        self.fine += np.bincount(bits >> np.uint32(_FINE_SHIFT), minlength=_FINE_BINS)
        zeros = x.size - int(np.count_nonzero(bits))
        self.zeros += zeros
        self.fine[0] -= zeros
        wide = x.astype(np.float64)
        with np.errstate(invalid="ignore"):
            squares = float(np.vecdot(wide, wide))
        finite = x.size
        if not math.isfinite(squares):
            wide = wide[np.isfinite(wide)]
            squares, finite = float(np.vecdot(wide, wide)), wide.size
        self.squares += squares
        self.finite += finite

    def between(self, numbers: Int64) -> Int64:
        """Counts of coarse bins that begin, and end, at these fine bins."""
        before = np.concatenate([[0], np.cumsum(self.fine)])
        return np.diff(before[numbers])

    def outlier_bin(self) -> int:
        """The first fine bin that lies wholly beyond the bound."""
        rms = math.sqrt(self.squares / self.finite) if self.finite else 0.0
        if OUTLIER_RMS * rms > float(_LARGEST):
            return _FIRST_NONFINITE
        bits = int(np.float32(OUTLIER_RMS * rms).view(np.uint32))
        return -(-bits // (1 << _FINE_SHIFT))


def _fine_edge(number: int) -> float:
    """The smallest magnitude of a fine bin but zero; of the first that is not finite 2^128."""
    if number >= _FIRST_NONFINITE:
        return 2.0**128
    return float(np.uint32(max(1, number << _FINE_SHIFT)).view(np.float32))


def histogram(pair: TensorPair, bins: int = 60, is_cancelled: IsCancelled = never) -> Histogram:
    """How large the values of both sides and of their difference are.

    Args:
        pair: One side or two; there is a difference where they are comparable.
        bins: At most how many bins; a narrow range has fewer.
        is_cancelled: Asked between pieces.

    Raises:
        Cancelled: It was given up.
        AprError: A file is gone or has changed.
    """
    sides = [side for side in (pair.trace, pair.oracle) if side is not None]
    trace, oracle, diff = (_Counts(np.zeros(_FINE_BINS, np.int64)) for _ in range(3))
    size = max((math.prod(side.layout.shape) for side in sides), default=0)
    for start, stop in ranges(size, PIECE_VALUES):
        check(is_cancelled)
        held = []
        for side, counts in ((pair.trace, trace), (pair.oracle, oracle)):
            if side is None or start >= math.prod(side.layout.shape):
                continue
            held.append(side.read_flat(start, min(stop, math.prod(side.layout.shape))))
            counts.add(held[-1])
        if pair.comparable:
            a, b = held
            with np.errstate(all="ignore"):
                x = a - b
            if not np.isfinite(x).all():
                finite = np.isfinite(a) & np.isfinite(b)
                x = np.clip(x[finite], -_LARGEST, _LARGEST)
            diff.add(x)
    used = np.flatnonzero((trace.fine + oracle.fine + diff.fine)[:_FIRST_NONFINITE])
    low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (_ONE, _ONE + 1)
    numbers = _edges(low, high, bins)
    binned = [x.between(numbers) for x in (trace, oracle, diff)]
    bounds = [counts.outlier_bin() for counts in (trace, oracle)]
    return Histogram(
        edges=np.array([_fine_edge(int(number)) for number in numbers]),
        trace=None if pair.trace is None else binned[0],
        oracle=None if pair.oracle is None else binned[1],
        diff=binned[2] if pair.comparable else None,
        zeros=(trace.zeros, oracle.zeros, diff.zeros),
        nonfinite=(trace.nonfinite, oracle.nonfinite),
        outliers=(
            int(trace.fine[bounds[0] : _FIRST_NONFINITE].sum()),
            int(oracle.fine[bounds[1] : _FIRST_NONFINITE].sum()),
        ),
        outlier_bound=(_fine_edge(bounds[0]), _fine_edge(bounds[1])),
    )


def _edges(low: int, high: int, bins: int) -> Int64:
    """Fine bins at which coarse ones begin, and the end: rising powers from low to high."""
    # The first bin holds all subnormal numbers but the largest: powers begin behind them.
    first, last = _fine_edge(max(1, low)), min(_fine_edge(high), float(_LARGEST))
    powers = np.geomspace(first, max(first, last), bins + 1).astype(np.float32)
    inner = powers.view(np.uint32).astype(np.int64) >> _FINE_SHIFT
    return np.unique(np.concatenate([[low], np.clip(inner[1:-1], low, high), [high]]))
