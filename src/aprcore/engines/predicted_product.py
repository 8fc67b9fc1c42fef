"""A product with the variance of each result, a piece of the weight at a time.

One pass over the weight serves every side: what differs between them is added to its own rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.estimate import Estimate, Float64, Profile
from aprcore.ground.precision import FLOAT32, FloatType
from aprcore.network.weights import StoredWeight, Weight
from aprcore.quant.roundings import Rounded, block_minima
from aprcore.quant.steps import SHRINKAGE

# Mean of 1/m^2 over mantissas m in [1, 2) of values spread evenly in log scale, 3/8 / ln 2: the
# mean of (spacing / |w|)^2 is this times (2u)^2.
MEAN_SQUARED_SPACING = 0.375 / math.log(2)


class PredictedProduct:
    """Rows of W times x for every stacked side, with the variance of each result."""

    def __init__(
        self,
        x: Estimate,
        sides: list[tuple[slice, Profile]],
        offsets: Sequence[Rounded | None] = (),
    ) -> None:
        """A product of x with weights of one kind.

        Args:
            x: The factor, [T, K], as each engine rounds it.
            sides: The rows of every stacked side.
            offsets: By side what `sum_offsets` gives, for weights whose blocks have a minimum.
        """
        self._offsets = offsets
        self._x = np.ascontiguousarray(x.value.T)  # (K, T)
        self._squares = np.ascontiguousarray(np.square(x.value).T, dtype=np.float32)
        self._carried = x.variance.T.astype(np.float32) if np.any(x.variance) else None
        self._sides = sides
        self._width = x.value.shape[1]

    def rows(
        self,
        weight: Weight,
        start: int,
        stop: int,
        value: Float64,
        wander: Float64,
        more: Float64,
    ) -> None:
        """Fill output columns start..stop, [T, stop - start] each.

        Args:
            weight, start, stop: Rows of the weight.
            value: Takes W x.
            wander: Takes sum_k w^2 x^2.
            more: Takes the variance that does not follow from these two.
        """
        shape = (stop - start, self._width)
        narrow, wide, squares = _piece_buffers(shape[0] * shape[1])
        weight.read(start, stop, narrow)
        np.copyto(wide, narrow)
        np.square(narrow, out=squares)
        narrow, squares = narrow.reshape(shape), squares.reshape(shape)
        value[:] = (wide.reshape(shape) @ self._x).T
        wander[:] = (squares @ self._squares).T
        more[:] = 0 if self._carried is None else (squares @ self._carried).T
        if any(offsets is not None for offsets in self._offsets) and isinstance(
            weight, StoredWeight
        ):
            minima = block_minima(weight.read_raw(start, stop), stop - start, weight.dtype).T
            for (rows, _), offsets in zip(self._sides, self._offsets):
                if offsets is not None:
                    value[rows] += offsets.value @ minima
                    more[rows] += offsets.variance @ np.square(minima)
        for rows, profile in self._sides:
            if profile.weights_rounded and weight.dtype not in ("F32", "F64"):
                more[rows] += self._stored_steps(weight, start, stop, rows)
            if profile.weights_rounded and weight.dtype in SHRINKAGE:
                more[rows] += np.square(SHRINKAGE[weight.dtype] * value[rows])
            stored, on_dump = profile.arithmetic.stored, profile.arithmetic.rounds_on_dump
            if stored.digits < FLOAT32.digits and not on_dump:
                more[rows] += self._cast(narrow, wander[rows], rows, stored)

    def _stored_steps(self, weight: Weight, start: int, stop: int, rows: slice) -> Float64:
        """sum_k x_k^2 d_jk^2 / 12 from the steps in the file; of float32 it is below any sum's."""
        steps, group = weight.step_squares(start, stop)
        energy = _block_sums(self._squares[:, rows].T, group)  # (T, groups)
        return (steps.astype(np.float64) @ energy.T.astype(np.float64)).T / 12

    def _cast(
        self, narrow: NDArray[np.float32], wander: Float64, rows: slice, stored: FloatType
    ) -> Float64:
        """The other side's own cast of the weights to a half type, from sum_k w^2 x^2."""
        if _fits(narrow, stored):
            return np.zeros(())
        relative = (2 * stored.roundoff) ** 2 / 12 * MEAN_SQUARED_SPACING
        smallest = np.ldexp(1.0, stored.min_exponent - (stored.digits - 1)) ** 2 / 12
        energy = self._squares[:, rows].sum(axis=0, dtype=np.float64)
        return wander * relative + smallest * energy[:, None]


_scratch = threading.local()


def _piece_buffers(values: int) -> tuple[NDArray[np.float32], Float64, NDArray[np.float32]]:
    """This thread's buffers: a piece of a weight, its float64 copy and its squares, all flat."""
    held = getattr(_scratch, "held", None)
    if held is None or held[0].size < values:
        held = (np.empty(values, np.float32), np.empty(values), np.empty(values, np.float32))
        _scratch.held = held
    narrow, wide, squares = held
    return narrow[:values], wide[:values], squares[:values]


def _fits(x: NDArray[np.float32], kind: FloatType) -> bool:
    """Whether values of a weight are numbers of a half type already."""
    lost = FLOAT32.digits - kind.digits
    bits = x.view(np.uint32)
    return not np.any(bits & np.uint32((1 << lost) - 1))


def _block_sums(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Sums over `block` consecutive columns, the last one short: [rows, ceil(C / block)]."""
    if block == 1:
        return x
    return np.add.reduceat(x, np.arange(0, x.shape[1], block), axis=1)
