"""What pictures are made of: plain frozen records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

IsCancelled = Callable[[], bool]
"""Asked between pieces of work; a picture that nobody waits for is given up."""

PIECE_VALUES = 512 * 1024

# Edges of a histogram's bins have as many significant bits: see `aprcore.pictures.histograms`.
EDGE_BITS = 8

# Of a normal distribution two values in a billion are farther out; activations that matter to
# quantisation are (LLM.int8() draws its line at six, too).
OUTLIER_RMS = 6.0


def never() -> bool:
    """Is never cancelled."""
    return False


class Cancelled(Exception):
    """The picture was given up because nobody waits for it any more."""


def check(is_cancelled: IsCancelled) -> None:
    """Give up if nobody waits any more.

    Raises:
        Cancelled: It is so.
    """
    if is_cancelled():
        raise Cancelled


class MapKind(Enum):
    """What a map shows. The value is what the screen calls it."""

    DIFF = "|diff|"
    TRACE = "trace"
    ORACLE = "oracle"
    RATIO = "|diff| / |oracle|"


@dataclass(frozen=True, slots=True)
class MapView:
    """One way to see a tensor as a matrix.

    Attributes:
        name: For people: "token × dim", "head 3", "head × token".
        rows, columns: What the axes count: "token", "dim", "head", "query", "key", "head, query".
        num_rows, num_columns: The matrix.
        first_row: Row of the tensor's own matrix at which it begins: those of one head.
        is_reduced: Whether each of its values stands for a run of the tensor's, by the largest
            magnitude: head x token.
        fold: Values per row of a vector that is folded into a matrix, as text is into lines; 0
            where the rows are the tensor's own. The last row may be short: it ends in zeros.
    """

    name: str
    rows: str
    columns: str
    num_rows: int
    num_columns: int
    first_row: int = 0
    is_reduced: bool = False
    fold: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """A rectangle of a map at some zoom, the largest magnitude of each cell kept.

    Attributes:
        kind: What is shown.
        rows, columns: Names of the axes, as in `MapView`.
        top, left: Row and column of the map's matrix at which the first cell begins.
        cell_rows, cell_columns: Values that a cell covers; those at the edges of the matrix less.
        values: Per cell, float32 [rows, columns]: the finite value of largest magnitude, with its
            sign for a side; 0 where there is none. Magnitudes beyond float32 are its largest.
        nonfinite: Per cell: how many of its values are NaN or infinite. A ratio is infinite where
            only the oracle is 0, and 0 where both sides are.
        nan: Per cell: how many of those are NaN, on either side where both are compared; the others
            are infinite.
        largest: The largest finite magnitude of the whole map, for a scale that panning keeps.
        fold: As in `MapView`.
    """

    kind: MapKind
    rows: str
    columns: str
    top: int
    left: int
    cell_rows: int
    cell_columns: int
    values: Floats
    nonfinite: NDArray[np.int64]
    nan: NDArray[np.int64]
    largest: float
    fold: int = 0


@dataclass(frozen=True, slots=True)
class CellValue:
    """One value of a map.

    Attributes:
        trace, oracle: Both sides there; None for a side that is absent or of another layout.
        position: Coordinates by the names of the layout's axes: {"token": 3, "head": 0, "dim": 7}.
        index: The flat index in canonical layout.
    """

    trace: float | None
    oracle: float | None
    position: dict[str, int]
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenFigures:
    """How far off each token is; per head for stages of attention.

    Figures cover the positions where both sides are finite, in float64, as in
    `aprcore.judging.compare`.

    Attributes:
        relative_l2: |trace - oracle| / |oracle|, [T], or [T, heads] where there is a head axis; 0
            if both are zero, infinite if only the oracle is.
        cosine: Of the same shape; 1 if both are zero, 0 if one is.
        max_abs_diff: Of the same shape.
        heads: Whether there is a head axis.
        nonfinite: [T] (or [T, heads]): positions that are NaN or infinite on either side.
    """

    relative_l2: Floats
    cosine: Floats
    max_abs_diff: Floats
    heads: bool
    nonfinite: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Counts of values by magnitude, on a logarithmic axis that all of them share.

    Attributes:
        edges: Bin edges of |x|, [bins + 1]: rising powers, rounded to `EDGE_BITS` significant bits;
            a bin is edges[i] <= |x| < edges[i + 1]. Every finite value but zeros is in one.
        trace, oracle, diff: Counts, [bins]; None for a side that is absent. The difference is that
            of positions where both sides are finite, rounded to float32.
        zeros: Exact zeros of trace, oracle, diff.
        nonfinite: NaN and infinities of trace and oracle.
        outliers: Values of trace, oracle beyond `outlier_bound` (infinities are not among them).
        outlier_bound: `OUTLIER_RMS` times the RMS of trace, oracle, rounded up to `EDGE_BITS`
            significant bits.
    """

    edges: Floats
    trace: NDArray[np.int64] | None
    oracle: NDArray[np.int64] | None
    diff: NDArray[np.int64] | None
    zeros: tuple[int, int, int]
    nonfinite: tuple[int, int]
    outliers: tuple[int, int]
    outlier_bound: tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class ValueWindow:
    """Consecutive values of both sides.

    Attributes:
        start: Flat index of the first.
        trace, oracle: Float32, each as long as its side reaches; None for a side that is absent.
        total: Values of the longer side.
    """

    start: int
    trace: Floats | None
    oracle: Floats | None
    total: int
