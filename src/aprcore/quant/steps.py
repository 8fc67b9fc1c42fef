"""Step sizes: how finely a stored weight could tell two values apart.

A value stored with step `d` is off by a rounding error of variance `d²/12`, so what `y = W·x` loses
to the storage of W can be predicted from the file alone: `sum_k x_k² d_jk² / 12` per row j. Here
are the `d²`, from the stored bytes. A table row per type says how; values of a group share one.

Measured against predicted is in docs/noise-floor.md; tests/unit/test_steps.py holds the bands.

Source: ggml's block structures; docs/formats.md for AprQ4 and AprQ8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aprcore.quant.types import BlockLayout, Bytes, Float32, dequantize, find_format, row_bytes

Halves = NDArray[np.uint16]

_LARGEST = np.float32(np.finfo(np.float32).max)


# By how much a tensor's numbers may all be smaller than they were. MXFP4's scale is a power of two
# below the largest number, which is then cut off at 6 of up to 8: measured 0.020 on Gaussian
# numbers, 0.026 on Student's with 5 degrees of freedom, 0.037 on a trained model's.
SHRINKAGE = {"MXFP4": 0.04}


def step_squares(
    dtype: str,
    raw: Bytes,
    count: int,
    *,
    row_length: int,
    skip_values: int = 0,
    scale: float = 1.0,
) -> tuple[Float32, int]:
    """Squared steps of `count` values in rows of `row_length`.

    Args:
        dtype: A name in `aprcore.quant.types.FORMATS`.
        raw: The bytes that `aprcore.quant.types.locate` names, uint8, contiguous.
        count: Number of values, whole rows.
        row_length: Values per row.
        skip_values: As in `aprcore.quant.types.Span`.
        scale: The scale of an AprQ8 tensor.

    Returns:
        The means of d² over `group` consecutive values of a row, float32
        [count / row_length, ceil(row_length / group)], finite whatever the bytes are, and `group`.
        Squares outside float32's range become 0 or its largest number.

    Raises:
        UnsupportedError: The type is unknown.
    """
    row = find_format(dtype)
    rows = count // max(1, row_length)
    with np.errstate(all="ignore"):
        match row.layout:
            case BlockLayout.PLAIN:
                if dtype not in _SPACINGS:
                    # Integers are exact, and F64 is finer than the float32 it is read as.
                    return np.zeros((rows, 1), np.float32), max(1, row_length)
                squares = _spacing_squares(dtype, raw.view(row.number))
                return squares.reshape(rows, row_length), 1
            case BlockLayout.SCALED:
                square = _finite(np.full((rows, 1), scale, np.float32) ** 2)
                return square, max(1, row_length)
            case BlockLayout.FLAT:
                return _flat_squares(raw, skip_values, rows, row_length)
        kind = _BLOCKS[dtype]
        blocks = raw.reshape(-1, row.block_bytes)
        per_row = row_bytes(row, row_length) // row.block_bytes * (row.block_values // kind.group)
        squares = _finite(kind.squares(blocks)).reshape(rows, per_row)
        return squares[:, : -(-row_length // kind.group)], kind.group


def join_rows(
    squares: Float32, group: int, row_length: int, row_values: int
) -> tuple[Float32, int]:
    """Steps of rows of blocks as steps of a tensor's rows, which hold more of them or a part.

    Args:
        squares: [n, groups], of rows of `row_length` values.
        group: Values per group.
        row_length: Values per row of blocks: the last axis.
        row_values: Values per row of the tensor: all axes but the first, 1 for a vector.

    Returns:
        [n * row_length / row_values, groups'] and the group, which may be smaller: no group of the
        result may span two rows.
    """
    shared = math.gcd(row_length, row_values, group)
    fine = np.repeat(squares, group // shared, axis=1)[:, : row_length // shared]
    return fine.reshape(-1, row_values // shared), shared


def _finite(squares: Float32) -> Float32:
    """Squares of a step that is not a number as 0: such values are a verdict of their own."""
    squares[np.isnan(squares)] = 0
    return np.minimum(squares, _LARGEST, out=squares)


@dataclass(frozen=True, slots=True)
class _Spacing:
    """Where a floating-point type keeps its exponent.

    Attributes:
        exponent: Mask of the exponent's bits.
        lowest: The exponent 1: subnormal numbers are spaced as the smallest normal ones.
        shift: To bit 23, where float32's exponent begins.
        factor: From the exponent, read as a float32, to the spacing.
    """

    exponent: int
    lowest: int
    shift: int
    factor: float


_SPACINGS: Mapping[str, _Spacing] = {
    # The exponents of float16 and float32 have different biases, 15 and 127.
    "F16": _Spacing(0x7C00, 0x0400, 13, 2.0 ** (127 - 15 - 10)),
    "BF16": _Spacing(0x7F80, 0x0080, 16, 2.0**-7),
    "F32": _Spacing(0x7F80_0000, 0x0080_0000, 0, 2.0**-23),
}


def _spacing_squares(dtype: str, numbers: NDArray[np.generic]) -> Float32:
    """Squares of the distance to the next number of the type, float32, of the same shape."""
    spacing = _SPACINGS[dtype]
    bits = numbers.view(np.uint32 if dtype == "F32" else np.uint16).astype(np.uint32)
    bits &= np.uint32(spacing.exponent)
    np.maximum(bits, np.uint32(spacing.lowest), out=bits)
    bits <<= np.uint32(spacing.shift)
    steps = bits.view(np.float32)
    steps *= np.float32(spacing.factor)
    steps *= steps
    np.minimum(steps, _LARGEST, out=steps)
    return steps


def _flat_squares(raw: Bytes, skip_values: int, rows: int, row_length: int) -> tuple[Float32, int]:
    """AprQ4: a row may begin inside a block, so groups are the largest that never span two."""
    group = max(1, math.gcd(row_length, 32))
    scales = _halves(raw.reshape(-1, 18), 0)
    squares = scales.astype(np.float32) ** 2
    squares[~np.isfinite(squares)] = 0  # such a scale counts as 0
    fine = np.repeat(squares, 32 // group)
    first, groups = skip_values // group, row_length // group
    return fine[first : first + rows * groups].reshape(rows, groups), group


def _halves(blocks: Bytes, offset: int) -> NDArray[np.float16]:
    """The float16 at a byte of every block, [n]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").reshape(-1)


Squares = Callable[[Bytes], Float32]


@dataclass(frozen=True, slots=True)
class _BlockSteps:
    """How the steps of a type in blocks are found.

    Attributes:
        group: Values that share a step.
        squares: Blocks, uint8 [n, bytes] -> d², float32 [n, groups of a block].
    """

    group: int
    squares: Squares


def _by_scale(code_square: float, minimum: bool = False) -> _BlockSteps:
    """A scale, and maybe a minimum, as float16 in front of 32 values.

    Codes are chosen with the exact scale and the rounded one is stored, so that a code q is off by
    q times the scale's own rounding: nothing next to `d`, unless the scale is subnormal. So is the
    minimum, which matters where a block lies far from zero: it is wrong by the same amount for the
    whole block, which adds up as noise does wherever the inputs have no common sign.

    Args:
        code_square: The mean of q² in a block of Gaussian values.
        minimum: Whether a minimum follows the scale.
    """

    def squares(blocks: Bytes) -> Float32:
        scales = _halves(blocks, 0)
        total = scales.astype(np.float32) ** 2
        total += np.float32(code_square) * _spacing_squares("F16", scales)
        if minimum:
            total += _spacing_squares("F16", _halves(blocks, 2))
        return total.reshape(-1, 1)

    return _BlockSteps(32, squares)


# What the rounding of a minimum adds to d², in units of the minimum's own step squared: measured
# for Q4_K over offsets from 0 to 1000 deviations, and where the scale rounds to 0.
_MINIMUM_CUT, _MINIMUM_LOST = 0.06, 0.5


def _super_block(
    group: int,
    scales: Callable[[Bytes], NDArray[np.int16]],
    offset: int,
    minimum_offset: int | None,
    extent: float,
    spread: float,
) -> _BlockSteps:
    """Scales of sub-blocks as small integers, in units of one float16 of the super-block.

    The codes of a sub-block are chosen with its rounded scale and minimum, so their rounding costs
    nothing but where it cuts off the ends of the range, on average `extent² / (2 group)`, or rounds
    the scale to 0 and loses the values, `(extent / spread)²`. Both count where a sub-block is small
    next to its neighbours; measured excess over `scale²` for Q4_K 6.5 and 42 (predicted 6.9 and
    41), for Q6_K 28 and 274 (32 and 327).

    Args:
        group: Values of a sub-block.
        scales: Blocks -> the scales, [n, sub-blocks].
        offset: Byte of the scales' unit.
        minimum_offset: Byte of the minima's unit, if there are any.
        extent: The largest code.
        spread: Deviations of Gaussian values that the codes span.
    """
    cut, lost = extent**2 / (2 * group), (extent / spread) ** 2

    def squares(blocks: Bytes) -> Float32:
        units = _halves(blocks, offset).astype(np.float32)[:, None] ** 2
        codes = scales(blocks).astype(np.float32)
        total = (codes * codes + np.where(codes == 0, lost, cut).astype(np.float32)) * units
        if minimum_offset is not None:
            own = _halves(blocks, minimum_offset).astype(np.float32)[:, None] ** 2
            total += np.where(codes == 0, _MINIMUM_LOST, _MINIMUM_CUT).astype(np.float32) * own
        return total

    return _BlockSteps(group, squares)


def _scales_q2(blocks: Bytes) -> NDArray[np.int16]:
    return (blocks[:, :16] & 0x0F).astype(np.int16)


def _scales_q3(blocks: Bytes) -> NDArray[np.int16]:
    """Six bits each: the low four in bytes 96 to 104, the high two in 104 to 108."""
    low = np.concatenate([blocks[:, 96:104] & 0x0F, blocks[:, 96:104] >> 4], axis=1)
    high = np.concatenate([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales: NDArray[np.int16] = (low | high << 4).astype(np.int16) - np.int16(32)
    return scales


def _scales_q4(blocks: Bytes) -> NDArray[np.int16]:
    """Six bits each: four in bytes 4 to 8, the low bits of four more in 12 to 16."""
    first, last = blocks[:, 4:8], blocks[:, 12:16] & 0x0F
    return np.concatenate([first & 0x3F, last | first >> 6 << 4], axis=1).astype(np.int16)


def _scales_q6(blocks: Bytes) -> NDArray[np.int16]:
    return blocks[:, 192:208].view(np.int8).astype(np.int16)


def _by_peak(dtype: str, group: int, fraction: float) -> _BlockSteps:
    """Codebooks, whose spacing is not uniform and whose scales are packed in many ways.

    The largest value of a run that shares a scale stands for the scale, and the step is the
    `fraction` of it that predicts the error of the nearest entries on Gaussian weights. (The
    deviation of the run would not do: one outlier makes the codebook coarse for its neighbours.)
    """

    def squares(blocks: Bytes) -> Float32:
        values = np.empty(len(blocks) * find_format(dtype).block_values, np.float32)
        dequantize(dtype, blocks.reshape(-1), values)
        np.abs(values, out=values)
        peaks: Float32 = values.reshape(len(blocks), -1, group).max(axis=2)
        peaks *= np.float32(fraction)
        peaks *= peaks
        return peaks

    return _BlockSteps(group, squares)


_BLOCKS: Mapping[str, _BlockSteps] = {
    # Of 32 Gaussian values the largest is about 2.07 deviations and the range 4.1, of 16 values
    # 1.77 and 3.5. That gives the mean of q², too.
    "Q4_0": _by_scale((8 / 2.07) ** 2),
    "Q4_1": _by_scale(7.5**2 + (15 / 4.1) ** 2, minimum=True),
    "Q5_0": _by_scale((16 / 2.07) ** 2),
    "Q5_1": _by_scale(15.5**2 + (31 / 4.1) ** 2, minimum=True),
    "Q8_0": _by_scale((127 / 2.07) ** 2),
    "Q2_K": _super_block(16, _scales_q2, 80, 82, extent=3, spread=3.5),
    "Q3_K": _super_block(16, _scales_q3, 108, None, extent=4, spread=1.77),
    "Q4_K": _super_block(32, _scales_q4, 0, 2, extent=15, spread=4.1),
    "Q5_K": _super_block(32, _scales_q4, 0, 2, extent=31, spread=4.1),
    "Q6_K": _super_block(16, _scales_q6, 208, None, extent=32, spread=1.77),
    "IQ4_NL": _by_peak("IQ4_NL", 32, 0.12),
    "IQ4_XS": _by_peak("IQ4_XS", 32, 0.12),
    "MXFP4": _by_peak("MXFP4", 32, 0.18),
    "NVFP4": _by_peak("NVFP4", 16, 0.155),
    "IQ1_S": _by_peak("IQ1_S", 32, 1.1),
    "IQ1_M": _by_peak("IQ1_M", 16, 1.0),
    "IQ2_XXS": _by_peak("IQ2_XXS", 32, 0.58),
    "IQ2_XS": _by_peak("IQ2_XS", 16, 0.53),
    "IQ2_S": _by_peak("IQ2_S", 16, 0.45),
    "IQ3_XXS": _by_peak("IQ3_XXS", 32, 0.26),
    "IQ3_S": _by_peak("IQ3_S", 32, 0.21),
    "TQ1_0": _by_peak("TQ1_0", 256, 1.0),
    "TQ2_0": _by_peak("TQ2_0", 256, 1.0),
}
