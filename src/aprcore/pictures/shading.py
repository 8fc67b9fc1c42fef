"""Shades of a map: a magnitude as one of a few levels of a logarithmic scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aprcore.pictures.records import Grid


def levels_of(grid: Grid, top: float, decades: float, count: int) -> NDArray[np.int8]:
    """The level of every cell, [rows, columns].

    Args:
        grid: The map.
        top: Where the scale ends; what is larger has the last level.
        decades: Powers of ten that the scale spans; what is smaller has the first level.
        count: How many levels there are, at most 125.

    Returns:
        0 for an exact zero, 1 to `count` by magnitude, negative for a negative value; `count` + 1
        for a cell with a NaN, `count` + 2 for one with an infinity only.
    """
    values = np.asarray(grid.values, np.float64)
    found = np.zeros(values.shape, np.int8)
    if top > 0:
        with np.errstate(divide="ignore"):
            height = 1 + np.log10(np.abs(values) / top) / decades
        level = np.sign(values) * np.clip(np.ceil(height * count), 1, count)
        found = level.astype(np.int8)
    found[grid.nonfinite > 0] = count + 2
    found[grid.nan > 0] = count + 1
    return found
