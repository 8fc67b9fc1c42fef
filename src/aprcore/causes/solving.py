"""Solving for the one number that an alternative leaves open; other small sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_GOLDEN = (math.sqrt(5) - 1) / 2


def minimise(function: Callable[[float], float], grid: Float64, steps: int = 60) -> float:
    """The argument of the least value: the best of a grid, refined by golden section."""
    values = [function(float(x)) for x in grid]
    best = int(np.argmin(values))
    low, high = float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)])
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - _GOLDEN * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + _GOLDEN * (high - low)
            at_b = function(b)
    return (low + high) / 2


def best_factor(observed: Float64, plain: Float64) -> float | None:
    """The factor c for which c times `plain` is nearest to `observed`; None for a zero tensor."""
    energy = float(np.vdot(plain, plain))
    return float(np.vdot(plain, observed)) / energy if energy > 0 else None


def nearest(value: float, known: dict[str, float], tolerance: float) -> str | None:
    """The name of the known number that a value is, relatively to within a tolerance."""
    for name, number in known.items():
        if abs(value - number) <= tolerance * abs(number):
            return name
    return None


def round_number(value: float, tolerance: float) -> float:
    """The shortest decimal number within a relative tolerance of a value."""
    for digits in range(1, 8):
        short = float(f"{value:.{digits - 1}e}")
        if abs(short - value) <= tolerance * abs(value):
            return short
    return value


def to_pairs(x: NDArray[Any], dim: int) -> NDArray[Any]:
    """Heads along the last axis from halves to adjacent pairs: i + s·D/2 goes to 2i + s."""
    return x.reshape(*x.shape[:-1], -1, 2, dim // 2).swapaxes(-1, -2).reshape(x.shape)


def to_halves(x: NDArray[Any], dim: int) -> NDArray[Any]:
    """The inverse of `to_pairs`."""
    return x.reshape(*x.shape[:-1], -1, dim // 2, 2).swapaxes(-1, -2).reshape(x.shape)


def off_by_a_token(x: Float64) -> Iterator[tuple[str, Float64]]:
    """Rows one token off, around the end of the text."""
    if len(x) > 1:
        yield "earlier", np.roll(x, 1, axis=0)
        yield "later", np.roll(x, -1, axis=0)
