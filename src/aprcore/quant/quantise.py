"""Quantising float32 rows to Q8_0, Q4_0, Q4_K and Q6_K, and what it costs.

The K-quants are found by search, as llama.cpp does: for each sub-block several ranges are tried,
the scale (and minimum) that fits each choice of codes best is solved for, and the best is kept.
The scales are then rounded to small integers and the codes are chosen anew, with what a reader
will multiply by. Every value counts alike: the aim is the smallest RMSE, which is also what the
predicted noise floor speaks of. llama.cpp gives large values more weight.

Source: docs/formats.md, "Models"; llama.cpp's ggml-quants.c (`make_qkx2_quants`,
`make_qx_quants`) for the search, gguf-py for Q8_0 and Q4_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.parallel import available_threads, for_each
from aprcore.quant.steps import step_squares
from aprcore.quant.types import BlockFormat, Bytes, Float32, dequantize, find_format, row_bytes

SUPER_BLOCK = 256

_LARGEST_HALF = 65504.0

# The largest magnitude of either sign that a block can hold, by its scale times its codes; for
# Q4_K by its minimum, which reaches less far than its scale.
LARGEST: Mapping[str, float] = {
    "Q8_0": 127 * _LARGEST_HALF,
    "Q4_0": 8 * _LARGEST_HALF,
    "Q4_K": 63 * _LARGEST_HALF,
    "Q6_K": 127 * 31 * _LARGEST_HALF,
}

QUANTISED = tuple(LARGEST)

# Super-blocks searched at once: the arrays of the search (256 KiB each) stay in a core's cache.
_PIECE = 256


def quantise(dtype: str, rows: Float32) -> Bytes:
    """Quantise rows.

    A row that ends inside a super-block of a K-quant is filled up with zeros, which have no say
    in the scales.

    Args:
        dtype: One of `QUANTISED`.
        rows: float32 [n, K]; for Q8_0 and Q4_0 K is a multiple of 32.

    Returns:
        uint8 [n, bytes of a row]; expanding them gives finite values.

    Raises:
        ValueError: `count_unrepresentable` is not 0, or K does not fit.
    """
    bad = count_unrepresentable(dtype, rows)
    if bad:
        raise ValueError(f"{bad} values cannot be represented in {dtype}")
    row = find_format(dtype)
    search = _SEARCHES.get(dtype)
    if search is None:
        return _quantise_plain(row, rows)
    return _quantise_super(row, search, np.ascontiguousarray(rows, np.float32))


def count_unrepresentable(dtype: str, rows: Float32) -> int:
    """Number of values that are not finite, or too large for a block's scale."""
    with np.errstate(invalid="ignore"):
        return rows.size - int(np.count_nonzero(np.abs(rows) <= LARGEST[dtype]))


@dataclass(frozen=True, slots=True)
class Rounding:
    """What quantising some weights cost, as sums of squares in float64.

    Attributes:
        weight_energy: Of the weights.
        error_energy: Of stored minus given.
        predicted_energy: d²/12, from the stored steps.
    """

    weight_energy: float = 0.0
    error_energy: float = 0.0
    predicted_energy: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.weight_energy + other.weight_energy,
            self.error_energy + other.error_energy,
            self.predicted_energy + other.predicted_energy,
        )

    @property
    def relative_rmse(self) -> float:
        """Root of error energy over weight energy; 0 for weights that are all 0."""
        return math.sqrt(self.error_energy / self.weight_energy) if self.weight_energy else 0.0

    @property
    def noise_ratio(self) -> float:
        """Measured over predicted error energy; 0 where there is neither."""
        return self.error_energy / self.predicted_energy if self.predicted_energy else 0.0


def measure_rounding(dtype: str, rows: Float32, blocks: Bytes) -> Rounding:
    """Hold quantised rows against what they were made from.

    Args:
        dtype: A type in rows of blocks.
        rows: float32 [n, K].
        blocks: uint8 [n, bytes of a row].
    """
    length = rows.shape[1]
    raw = blocks.reshape(-1)
    stored = np.empty(rows.size, np.float32)
    dequantize(dtype, raw, stored, row_length=length)
    squares, group = step_squares(dtype, raw, rows.size, row_length=length)
    # The last group of a row may be short.
    sizes = np.minimum(group, length - group * np.arange(squares.shape[1]))
    error = np.subtract(stored, rows.reshape(-1), dtype=np.float64)
    values = rows.reshape(-1).astype(np.float64)
    predicted = float((squares.sum(axis=0, dtype=np.float64) * sizes).sum()) / 12
    return Rounding(float(values @ values), float(error @ error), predicted)


def _quantise_plain(row: BlockFormat, rows: Float32) -> Bytes:
    """Q8_0 and Q4_0: gguf-py's bytes, which are llama.cpp's."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    count, length = rows.shape
    if length % row.block_values:
        raise ValueError(f"rows of {length} values are not whole {row.name} blocks")
    if not rows.size:
        return np.empty((count, row_bytes(row, length)), np.uint8)
    # Where 1/d overflows, d is 0 in half precision, and so are the values.
    with np.errstate(all="ignore"):
        blocks: Bytes = quantize(rows, GGMLQuantizationType[row.name])
    return blocks


@dataclass(frozen=True, slots=True)
class _Search:
    """How a K-quant is made.

    Attributes:
        group: Values of a sub-block.
        encode: Sub-blocks to fit the scales to and sub-blocks to store, both float32
            [super-blocks, sub-blocks, group] -> uint8 [super-blocks, bytes].
    """

    group: int
    encode: Callable[[Float32, Float32], Bytes]


def _quantise_super(row: BlockFormat, search: _Search, rows: Float32) -> Bytes:
    count, length = rows.shape
    blocks_per_row = -(-length // SUPER_BLOCK)
    out = np.empty((count, blocks_per_row * row.block_bytes), np.uint8)
    rows_per_piece = max(1, _PIECE // max(1, blocks_per_row))
    shape = (-1, SUPER_BLOCK // search.group, search.group)

    def quantise_piece(start: int) -> None:
        piece = rows[start : start + rows_per_piece]
        stored, fitted = _fill_up(piece, blocks_per_row * SUPER_BLOCK, search.group)
        with np.errstate(all="ignore"):
            encoded = search.encode(fitted.reshape(shape), stored.reshape(shape))
        out[start : start + len(piece)] = encoded.reshape(len(piece), -1)

    for_each(quantise_piece, range(0, count, rows_per_piece), available_threads())
    return out


def _fill_up(rows: Float32, padded: int, group: int) -> tuple[Float32, Float32]:
    """Rows filled up to `padded` values: as they are stored, and as the scales are fitted to.

    Stored are zeros. For the fit, the values of a sub-block that the row ends in are repeated: a
    zero among values that are all near 1 would stretch its range.
    """
    count, length = rows.shape
    if length == padded:
        return rows, rows
    stored = np.zeros((count, padded), np.float32)
    stored[:, :length] = rows
    first = length // group * group
    if first == length:
        return stored, stored
    fitted = stored.copy()
    columns = first + np.arange(length - first, group) % (length - first)
    fitted[:, length : first + group] = rows[:, columns]
    return stored, fitted


def _round_unit(values: Float32) -> NDArray[np.float16]:
    """The nearest float16, finite; of subnormal ones the next away from 0.

    Rounding a unit of scales down cuts the ends off the ranges of the largest sub-blocks. That is
    nothing at eleven bits, but a subnormal half may have one.
    """
    halves = values.astype(np.float16)
    low = np.abs(halves.astype(np.float32)) < np.abs(values) * np.float32(1 - 2.0**-10)
    away = np.copysign(np.float16(np.inf), values.astype(np.float16))
    halves[low] = np.nextafter(halves, away, dtype=np.float16)[low]
    return np.clip(halves, np.float16(-_LARGEST_HALF), np.float16(_LARGEST_HALF))


def _divide(values: Float32, scales: Float32) -> Float32:
    """The quotient, 0 where the scale is 0."""
    return np.divide(values, scales, out=np.zeros_like(values), where=scales != 0)


# Q4_K: codes 0 to 15, value = scale * code - minimum.

# Ranges that are tried: the codes of an unclipped block span 15; fewer clip, more leave a gap.
_Q4_SPANS = np.linspace(13.5, 16.0, 21, dtype=np.float32)


def _fit_q4(x: Float32) -> tuple[Float32, Float32]:
    """Scale and minimum of sub-blocks [n, 32], both at least 0, float32 [n]."""
    low = np.minimum(x.min(axis=1), 0)
    extent = x.max(axis=1) - low
    usable = extent > _SMALLEST  # the others are all alike, and not above 0
    # Into 0 to 1, where no sum overflows, and an offset cannot swamp the differences.
    shifted = (x - low[:, None]) * np.where(usable, 1 / extent, 0)[:, None]
    offset = np.where(usable, low / extent, 0)
    count, sum_y = np.float32(x.shape[1]), _row_sums(shifted)
    best_error = np.full(len(x), np.inf, np.float32)
    best_scale, best_minimum = np.zeros_like(low), np.zeros_like(low)
    codes = np.empty_like(x)
    for span in _Q4_SPANS:
        np.multiply(shifted, span, out=codes)
        np.clip(np.rint(codes, out=codes), 0, 15, out=codes)
        sum_l, sum_ll, sum_yl = _row_sums(codes), _row_dots(codes, codes), _row_dots(shifted, codes)
        determinant = count * sum_ll - sum_l * sum_l
        minimum = (sum_ll * sum_y - sum_l * sum_yl) / determinant
        # The format subtracts: a minimum above 0 cannot be stored. Where all codes are alike any
        # minimum would do, and 0 it is.
        minimum = np.where(determinant > 0, np.minimum(minimum, -offset), -offset)
        scale = (sum_yl - minimum * sum_l) / sum_ll
        error = scale * (scale * sum_ll + 2 * (minimum * sum_l - sum_yl))
        error += minimum * (count * minimum - 2 * sum_y)
        better = error < best_error  # False where the fit has no solution
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_minimum = np.where(better, minimum, best_minimum)
    return np.maximum(best_scale * extent, 0), -np.minimum(best_minimum * extent + low, 0)


def _row_sums(rows: Float32) -> Float32:
    sums: Float32 = np.einsum("ij->i", rows)  # four times as fast as `sum` on short rows
    return sums


def _row_dots(a: Float32, b: Float32) -> Float32:
    dots: Float32 = np.einsum("ij,ij->i", a, b)
    return dots


# Values whose squares or reciprocals leave float32's range are far below the smallest scale.
_SMALLEST = np.float32(1e-18)


def _encode_q4_k(fitted: Float32, stored: Float32) -> Bytes:
    blocks, subs, group = stored.shape
    scale, minimum = (part.reshape(blocks, subs) for part in _fit_q4(fitted.reshape(-1, group)))
    d = _round_unit(scale.max(axis=1) / np.float32(63))
    dmin = _round_unit(minimum.max(axis=1) / np.float32(63))
    unit, unit_minimum = (half.astype(np.float32)[:, None] for half in (d, dmin))
    scales = np.minimum(np.rint(_divide(scale, np.broadcast_to(unit, scale.shape))), 63)
    # A sub-block whose scale rounds to 0 is its minimum alone, best the mean of its values.
    minimum = np.where(scales == 0, np.maximum(-fitted.mean(axis=2), 0), minimum)
    minima = np.minimum(np.rint(_divide(minimum, np.broadcast_to(unit_minimum, minimum.shape))), 63)
    step = np.broadcast_to((unit * scales)[:, :, None], stored.shape)
    places = _divide(stored + (unit_minimum * minima)[:, :, None], step)
    codes = np.clip(np.rint(places), 0, 15).astype(np.uint8)

    out = np.empty((blocks, 144), np.uint8)
    out[:, 0:2] = d.view(np.uint8).reshape(-1, 2)
    out[:, 2:4] = dmin.view(np.uint8).reshape(-1, 2)
    out[:, 4:16] = _pack_six_bits(scales.astype(np.uint8), minima.astype(np.uint8))
    # 32 bytes hold two sub-blocks, the even one in the low nibbles.
    pairs = codes.reshape(blocks, subs // 2, 2, group)
    out[:, 16:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(blocks, -1)
    return out


def _pack_six_bits(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima of 6 bits in 12 bytes, as ggml's `get_scale_min_k4` reads."""
    return np.concatenate(
        [
            scales[:, :4] | scales[:, 4:] >> 4 << 6,
            minima[:, :4] | minima[:, 4:] >> 4 << 6,
            scales[:, 4:] & 0x0F | minima[:, 4:] << 4,
        ],
        axis=1,
    )


# Q6_K: codes -32 to 31, value = scale * code.

# The largest value gets about the code -32, whose side reaches further; its sign goes to the scale.
_Q6_SPANS = np.linspace(-32.9, -31.1, 19, dtype=np.float32)


def _fit_q6(x: Float32) -> Float32:
    """Scale of sub-blocks [n, 16], of either sign, float32 [n]."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    usable = np.abs(largest) > _SMALLEST
    best, best_scale = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
    codes = np.empty_like(x)
    for span in _Q6_SPANS:
        np.multiply(x, np.where(usable, span / largest, 0)[:, None], out=codes)
        np.clip(np.rint(codes, out=codes), -32, 31, out=codes)
        sum_xl, sum_ll = _row_dots(x, codes), _row_dots(codes, codes)
        # The error that is left is the sum of x² less this.
        gain = sum_xl * sum_xl / sum_ll
        better = gain > best
        best[better], best_scale[better] = gain[better], (sum_xl / sum_ll)[better]
    return best_scale


def _encode_q6_k(fitted: Float32, stored: Float32) -> Bytes:
    blocks, subs, group = stored.shape
    scale = _fit_q6(fitted.reshape(-1, group)).reshape(blocks, subs)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1)[:, None], axis=1)
    # The largest scale gets the integer -128, whose side reaches further.
    d = _round_unit(largest[:, 0] / np.float32(-128))
    unit = np.broadcast_to(d.astype(np.float32)[:, None], scale.shape)
    scales = np.clip(np.rint(_divide(scale, unit)), -128, 127)
    step = np.broadcast_to((unit * scales)[:, :, None], stored.shape)
    places = np.clip(np.rint(_divide(stored, step)), -32, 31)
    codes = (places + np.float32(32)).astype(np.uint8)

    out = np.empty((blocks, 210), np.uint8)
    # Halves of 128 values, in quarters of 32: the low nibbles of quarters 0 and 2 share bytes, as
    # do those of 1 and 3; the high two bits of all four do.
    quarters = codes.reshape(blocks, 2, 4, 32)
    low, high = quarters & 0x0F, quarters >> 4
    out[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(blocks, -1)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    out[:, 128:192] = np.bitwise_or.reduce(high << shifts, axis=2).reshape(blocks, -1)
    out[:, 192:208] = scales.astype(np.int8).view(np.uint8)
    out[:, 208:] = d.view(np.uint8).reshape(-1, 2)
    return out


_SEARCHES: Mapping[str, _Search] = {
    "Q4_K": _Search(32, _encode_q4_k),
    "Q6_K": _Search(16, _encode_q6_k),
}
