"""Is an error explained by rounding? Measured over predicted energy, for the tensor and its parts.

The prediction (`aprcore.engines.prediction`) gives the variance of every value. A sum of n
independent squared errors over its expectation is distributed as chi-squared over n, so the ratio
that a sound part may reach follows from n: one value may reach 46, a thousand together 1.3. A local
fault that the whole tensor's ratio hides stands out in its own row, token, head or value.

The constants of this module are calibrated in docs/noise-floor.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.estimate import BlockedEstimate, Estimate
from aprcore.judging.layouts import Layout

Float64 = NDArray[np.float64]

# Upper quantiles of chi-squared over n, at one false alarm in 1e11: a run looks at up to some
# 1e8 parts. Computed with the regularised incomplete gamma function; interpolated in log n.
QUANTILES = (
    (1, 46.3285), (1.5, 32.4233), (2, 25.3284), (3, 18.0782), (4, 14.3601), (6, 10.5351),
    (8, 8.5561), (12, 6.4985), (16, 5.4202), (24, 4.2830), (32, 3.6774), (64, 2.6758),
    (128, 2.0793), (256, 1.7117), (1024, 1.3256), (4096, 1.1554), (16384, 1.0759),
    (65536, 1.0375), (1048576, 1.0093), (67108864, 1.0012),
)  # fmt: skip
_LOG_N = np.log([n for n, _ in QUANTILES])
_LOG_QUANTILE = np.log([q for _, q in QUANTILES])

# How far sound models exceed the prediction itself, in energy, beyond chance: the step's d^2/12 is
# an upper estimate for every quantiser measured, float roundoff comes out within this.
CALIBRATION = 1.5
# No judgment looks below this relative error: it is float32's own unit roundoff, in energy.
SMALLEST_ENERGY = (2.0**-24) ** 2


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A part of a tensor whose error stands out most.

    Attributes:
        name: "whole tensor", "token 3", "row 812", "head 2", "token 3, head 2", "value ...".
        ratio: Measured over predicted error energy.
        factor: The largest ratio that a sound part of this many independent errors reaches.
    """

    name: str
    ratio: float
    factor: float


# Tokens whose values differ by less than this, relative to their size, round much alike: with equal
# inputs they differ only by what rounding has done before, some 1e-7, and text has none in between.
ALIKE = 1e-5
PROJECTIONS = 3


@dataclass(frozen=True, slots=True)
class Assessment:
    """An observed tensor against an estimate.

    Attributes:
        ratio: Measured over predicted error energy of the whole tensor.
        floor: Predicted relative L2 error.
        worst: The part that exceeds its factor most, or comes closest to it.
    """

    ratio: float
    floor: float
    worst: TensorPart

    @property
    def explained(self) -> bool:
        """Whether rounding explains every part of the error."""
        return self.worst.ratio <= self.worst.factor


def allowed_ratio(dof: Float64 | float) -> Float64:
    """The largest sound ratio for a number of independent errors (at least 1)."""
    log_n = np.log(np.maximum(np.asarray(dof, dtype=np.float64), 1.0))
    return np.asarray(CALIBRATION * np.exp(np.interp(log_n, _LOG_N, _LOG_QUANTILE)))


def assess(observed: NDArray[np.floating[Any]], expected: Estimate, layout: Layout) -> Assessment:
    """Hold the error of a tensor against its prediction, as a whole and part by part.

    Args:
        observed: Finite values, any shape.
        expected: The estimate, of as many values.
        layout: Names the axes.
    """
    if isinstance(expected, BlockedEstimate) and len(layout.factors) == 3:
        blocks = AssessedBlocks(observed, expected, layout)
        for _ in blocks.pieces():
            pass
        return blocks.assessment()
    shape, expected = layout.factors, expected.whole()
    error = np.square(np.asarray(observed, dtype=np.float64).reshape(shape)
                      - expected.value.reshape(shape))  # fmt: skip
    reference = float(np.square(expected.value).sum())
    predicted = expected.variance.reshape(shape) + _own_rounding(reference, error.size)
    token_dof = _independent_tokens(expected.value.reshape(shape), layout)
    sums = {}
    for kept in _kinds(layout):
        summed = tuple(axis for axis in range(len(shape)) if axis not in kept)
        sums[kept] = _Sums(error, predicted)
        if summed:
            squares = np.square(predicted).sum(axis=summed)
            sums[kept] = _Sums(error.sum(axis=summed), predicted.sum(axis=summed), squares)
    return _assessment(sums, layout, expected, reference, token_dof)


class AssessedBlocks:
    """As `assess`, of an estimate that is made block by block, and in two passes over its blocks.

    Attributes:
        is_finite: Whether all expected values are.
    """

    def __init__(
        self, observed: NDArray[np.floating[Any]], expected: BlockedEstimate, layout: Layout
    ) -> None:
        """Take the first pass: how large the values are, and which tokens are alike.

        Args:
            observed: Finite values, any shape.
            expected: The estimate, of as many values.
            layout: Names the axes: head, token, position.
        """
        self._observed = observed.reshape(expected.shape)
        self._expected = expected
        self._layout = layout
        heads, tokens, positions = expected.shape
        seen, energy = np.zeros((tokens, PROJECTIONS)), np.zeros(tokens)
        directions = _directions(heads * positions).reshape(heads, positions, PROJECTIONS)
        self.is_finite = True
        for head, rows, block in expected.blocks():
            self.is_finite = self.is_finite and bool(np.isfinite(block.value).all())
            if self.is_finite:
                seen[rows] += block.value @ directions[head]
                energy[rows] += np.square(block.value).sum(axis=1)
        self._reference = float(energy.sum())
        self._token_dof = _groups(seen, energy)
        shape = expected.shape
        self._sums = {
            kept: _Sums(*(np.zeros([shape[axis] for axis in kept]) for _ in range(3)))
            for kept in _kinds(layout)
            if len(kept) < len(shape)
        }
        self._worst = TensorPart("", 0.0, 1.0)

    def pieces(self) -> Iterator[tuple[NDArray[np.floating[Any]], Float64]]:
        """Take the second pass, and hand out observed and expected values in order."""
        own = _own_rounding(self._reference, self._expected.size)
        values = "".join(f"{name} {{}}, " for name in self._layout.axes).removesuffix(", ")
        for head, rows, block in self._expected.blocks():
            observed = self._observed[head, rows]
            error = np.square(observed - block.value)
            predicted = block.variance + own
            self._add(head, rows, error, predicted)
            ratio = _ratios(error, predicted)
            flat = int(np.argmax(ratio))
            if ratio.reshape(-1)[flat] > self._worst.ratio or not self._worst.name:
                row, position = divmod(flat, ratio.shape[1])
                name = values.format(head, rows.start + row, position)
                factor = float(allowed_ratio(1.0))
                self._worst = TensorPart(name, float(ratio.reshape(-1)[flat]), factor)
            yield observed.reshape(-1), block.value.reshape(-1)

    def assessment(self) -> Assessment:
        """What both passes have found."""
        return _assessment(
            self._sums, self._layout, self._expected, self._reference, self._token_dof,
            self._worst,
        )  # fmt: skip

    def _add(self, head: int, rows: slice, error: Float64, predicted: Float64) -> None:
        squares = np.square(predicted)
        for kept, sums in self._sums.items():
            place = tuple((head, rows, slice(None))[axis] for axis in kept)
            summed = tuple(axis - 1 for axis in (1, 2) if axis not in kept)
            for total, part in zip(sums, (error, predicted, squares)):
                assert total is not None
                total[place] += part.sum(axis=summed)


class _Sums(NamedTuple):
    """Errors of the parts of one kind, measured and predicted.

    Attributes:
        measured, predicted: Their energy.
        squares: The sum of the squares of what is summed in `predicted`; None of single values.
    """

    measured: Float64
    predicted: Float64
    squares: Float64 | None = None


def _own_rounding(reference: float, size: int) -> float:
    """The least error of a value that is exactly zero (a masked score, a dead row).

    It has no rounding of its own, yet the terms it sums may not cancel to the last bit.
    """
    return SMALLEST_ENERGY * reference / size * 1e-6 if size else 0.0


def _kinds(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The axes of each kind of part: of the whole none, then each, pairs of them, and values."""
    axes, shape = layout.axes, layout.factors
    kinds: list[tuple[int, ...]] = [()]
    kinds += [(axis,) for axis in range(len(axes)) if shape[axis] > 1]
    if axes == ("token", "head", "dim"):
        kinds += [(1, 2), (0, 1)]  # an output row; a head of one token
    if len(axes) > 1:
        kinds.append(tuple(range(len(axes))))
    return tuple(dict.fromkeys(kinds))


def _assessment(
    sums: Mapping[tuple[int, ...], _Sums], layout: Layout, expected: Estimate, reference: float,
    token_dof: float, value: TensorPart | None = None,
) -> Assessment:  # fmt: skip
    """The parts of every kind against what a sound part may reach.

    Args:
        sums: The parts of each kind, by its axes.
        layout: Names the axes.
        expected: The estimate.
        reference: Energy of the expected values.
        token_dof: Over how many independent errors a sum over tokens averages, by the values.
        value: The worst of the single values, where they are not among the sums.
    """
    if expected.token_dof is not None:
        token_dof = min(token_dof, expected.token_dof)
    measured, total = float(sums[()].measured), float(sums[()].predicted)
    floor = math.sqrt(total / reference) if reference > 0 else 0.0
    worst = TensorPart("whole tensor", 0.0, float(allowed_ratio(1.0)))
    parts = [
        _worst_part(kept, each, layout, token_dof, expected.correlation)
        for kept, each in sums.items()
        if expected.size
    ]
    for part in (*parts, *([] if value is None else [value])):
        if part.ratio * worst.factor > worst.ratio * part.factor:
            worst = part
    return Assessment(_ratio(measured, total), floor, worst)


def _worst_part(
    kept: tuple[int, ...], sums: _Sums, layout: Layout, token_dof: float, correlation: float
) -> TensorPart:
    axes, shape = layout.axes, layout.factors
    summed = tuple(axis for axis in range(len(axes)) if axis not in kept)
    dof = _degrees(sums)
    token = axes.index("token") if "token" in axes else None
    if token in summed:
        # Errors repeat from token to token where the inputs look alike.
        dof = dof * min(1.0, token_dof / shape[token])
    # Of n errors with this mean squared correlation, as many are independent as
    # (tr C)^2 / |C|^2 of their covariance C.
    values = math.prod(shape[axis] for axis in summed if axis != token)
    dof = np.maximum(1.0, dof / (1 + (values - 1) * correlation))
    ratio = _ratios(sums.measured, sums.predicted)
    factor = np.broadcast_to(allowed_ratio(dof), ratio.shape)
    flat = int(np.argmax(ratio if dof.size == 1 else ratio / factor))
    position = np.unravel_index(flat, ratio.shape) if kept else ()
    name = ", ".join(f"{axes[a]} {int(i)}" for a, i in zip(kept, position)) or "whole tensor"
    return TensorPart(name, float(ratio.reshape(-1)[flat]), float(factor.reshape(-1)[flat]))


def _independent_tokens(value: Float64, layout: Layout) -> float:
    """Over how many independent errors a sum over tokens averages: (sum n)^2 / sum n^2.

    The n are the sizes of groups of tokens whose values are alike: the same inputs round to the
    same errors, however often a prompt repeats them. Groups are found by a few random projections,
    so that a pass over the tensor is enough; that two other tokens meet in all of them by chance
    makes the estimate only more careful.
    """
    if "token" not in layout.axes or value.size == 0:
        return 1.0
    rows = np.moveaxis(value, layout.axes.index("token"), 0)
    rows = rows.reshape(len(rows), -1)
    return _groups(rows @ _directions(rows.shape[1]), np.square(rows).sum(axis=1))


def _groups(seen: Float64, energy: Float64) -> float:
    """(sum n)^2 / sum n^2 of groups of tokens, from the projections and squared sizes of each."""
    order = np.lexsort(seen.T)
    limit = ALIKE * np.sqrt(energy[order][:, None])
    steps = np.abs(np.diff(seen[order], axis=0))
    # Tokens that are all zero tell nothing of what they were made of.
    begins = np.flatnonzero(np.any(steps > limit[1:], axis=1) | (limit[1:, 0] == 0)) + 1
    sizes = np.diff(np.concatenate([[0], begins, [len(seen)]]))
    return len(seen) ** 2 / float(np.square(sizes).sum())


@lru_cache(maxsize=8)
def _directions(size: int) -> Float64:
    return np.random.default_rng(0).standard_normal((size, PROJECTIONS))


def _degrees(sums: _Sums) -> Float64:
    """How many errors of one size a sum of unequal ones is worth: (sum v)^2 / sum v^2."""
    if sums.squares is None:
        return np.ones(())
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums.squares > 0, np.square(sums.predicted) / sums.squares, 1.0)


def _ratios(measured: Float64, predicted: Float64) -> Float64:
    with np.errstate(divide="ignore", invalid="ignore"):
        if predicted.size and predicted.min() > 0:  # as a rule; it takes a third of the time
            return np.asarray(measured / predicted)
        ratio = np.where(predicted > 0, measured / predicted, np.inf)
    return np.asarray(np.where(measured == 0, 0.0, ratio))


def _ratio(measured: float, predicted: float) -> float:
    return float(_ratios(np.asarray(measured), np.asarray(predicted)))
