"""How engines round numbers on the way into a product: to a half type, or to blocks of integers.

What is rounded is at hand, so that its rounding can be reproduced to the bit and is no noise. What
is known only up to an error (recomputed, or recorded more coarsely than it was computed) may fall
on the other side of a tie: there, and only there, a step is uncertain.

Source: ggml-quants.c and ggml-cpu/quants.c of llama.cpp for the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.precision import (
    BFLOAT16,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    FLOAT16,
    FLOAT32,
    TF32,
    FloatType,
)

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]

# Engines divide by the scale or multiply by its inverse, in float32: a code that is off by as much
# of its own size, 127 at the most, may round to its neighbour. Two roundings, with room.
CODE_ROUNDINGS = 4 * 2.0**-24
# Some queries rounded to float16, others not.
UNCERTAIN = "f16 or not"
# Standard deviations within which a value that is known only so well may lie.
SPREADS = 6.0


class Rounded(NamedTuple):
    """Values as an engine rounds them.

    Attributes:
        value: The rounded values, float64.
        variance: Of what they may be instead, where a tie is near.
    """

    value: Float64
    variance: Float64


class Rounding(Protocol):
    """A way to round rows of numbers."""

    @property
    def name(self) -> str:
        """As in sidecars and on the command line."""
        ...

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Round rows.

        Args:
            x: [rows, C].
            spread: Standard deviation of what is not known of x, of its shape or one number.
        """
        ...


def _near_tie(code: Float64, spread: Float64 | float) -> NDArray[np.bool_]:
    """Where a code may be rounded to its other neighbour."""
    from_tie = np.abs(code - np.floor(code) - 0.5)
    return np.asarray(from_tie <= SPREADS * spread + CODE_ROUNDINGS * np.abs(code))


@dataclass(frozen=True, slots=True)
class FloatRounding:
    """Every number to the nearest of a type.

    Attributes:
        kind: The type.
        is_loose: Whether ties may go either way and small numbers may keep their digits: as another
            type of as many digits has it, which is seen in few numbers.
    """

    kind: FloatType
    is_loose: bool = False

    @property
    def name(self) -> str:
        """As in sidecars and on the command line."""
        return {"float16": "f16", "bfloat16": "bf16"}.get(self.kind.name, self.kind.name)

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Round rows."""
        value = self.kind.round(x)
        if self.is_loose:
            step = np.maximum(self.kind.spacing(x), self.kind.smallest)
            is_open = np.abs(np.abs(x - value) - step / 2) <= SPREADS * np.asarray(spread)
            is_open |= np.abs(x) < 2.0**self.kind.min_exponent
            return Rounded(value, np.where(is_open, np.square(step), 0.0))
        if not np.any(spread):  # a cast has no ties of its own: every engine rounds them to even
            return Rounded(value, np.broadcast_to(0.0, value.shape))
        step = np.maximum(self.kind.spacing(x), self.kind.smallest)
        from_tie = np.abs(np.abs(x - value) - step / 2)
        near = from_tie <= SPREADS * np.asarray(spread)
        return Rounded(value, np.where(near, np.square(step), 0.0))


@dataclass(frozen=True, slots=True)
class UncertainRounding:
    """Some rows to a type and some not at all, and nobody knows which.

    Attributes:
        name: As in sidecars and on the command line.
        kind: The type.
    """

    name: str
    kind: FloatType

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Leave the rows as they are, with the variance of their rounding."""
        return Rounded(x, self.kind.rounding_variance(x))


@dataclass(frozen=True, slots=True)
class TensorFloatRounding:
    """Every float32 to TF32.

    Attributes:
        name: As in sidecars and on the command line.
        cuts: Whether bits are cut off, as tensor cores do with what they are given; else to nearest
            and ties away from zero, as `cvt.rna.tf32.f32` does before (PTX ISA, "cvt").
    """

    name: str
    cuts: bool

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Round rows."""
        step = TF32.spacing(x)
        with np.errstate(divide="ignore", invalid="ignore"):
            code = np.where(step > 0, np.abs(x) / step, 0.0)
        whole = np.floor(code + (0.0 if self.cuts else 0.5))
        value = np.copysign(whole * step, x)
        if not np.any(spread):
            return Rounded(value, np.broadcast_to(0.0, value.shape))
        edge = np.rint(code) if self.cuts else np.floor(code) + 0.5
        near = np.abs(code - edge) * step <= SPREADS * np.asarray(spread)
        return Rounded(value, np.where(near, np.square(step), 0.0))


@dataclass(frozen=True, slots=True)
class RoundingOfBoth:
    """A rounding that a product's weights get as well, by a kernel that reads tiles of one type.

    Attributes:
        name: As in sidecars and on the command line.
        inner: The rounding.
    """

    name: str
    inner: Rounding

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Round rows."""
        return self.inner(x, spread)


class _Codes(NamedTuple):
    """Blocks as integers: value = scale · code + offset.

    Attributes:
        code: Before rounding, [rows, blocks, block].
        lowest, highest: The integers that there are.
        scale, offset: [rows, blocks, 1].
        rival: The block's other candidate for the number that makes the scale, where it has one.
    """

    code: Float32
    lowest: int
    highest: int
    scale: Float32
    offset: Float32
    rival: Float32 | None = None


@dataclass(frozen=True, slots=True)
class BlockRounding:
    """Blocks of consecutive numbers to integers of one scale.

    Attributes:
        name: ggml's name of the type, or a description.
        block: Numbers per block; 0: the whole row.
        encode: Finds scale and codes of [rows, blocks, block] float32.
        half: Whether scale and offset are stored in float16.
        sums: Whether what a product loses by the sum of a block, which is stored in float16, is to
            be counted as an error of its numbers: where the other factor's minima are not known.
    """

    name: str
    block: int
    encode: Callable[[Float32], _Codes]
    half: bool = True
    sums: bool = False

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Round rows; a last block that is short is filled with zeros."""
        rows, columns = x.shape
        codes, whole = self._encoded(x)
        unknown = np.zeros((rows, whole[0].size))
        unknown[:, :columns] = spread
        unknown = unknown.reshape(whole.shape)
        # Both ends of a block may be off, by which a scale is off that counts so many steps.
        most = np.sqrt(2) * unknown.max(axis=2, keepdims=True)
        scale = self._stored(codes.scale, most / codes.highest)
        offset = self._stored(codes.offset, most)
        step = np.abs(scale.value)
        with np.errstate(divide="ignore", invalid="ignore"):
            in_codes = np.where(step > 0, unknown / step, 0.0)
        near = _near_tie(codes.code.astype(np.float64), in_codes)
        if codes.rival is not None:
            near |= np.abs(codes.rival) <= SPREADS * most
        variance = np.where(near, np.square(step), 0.0)
        variance += np.square(whole) * scale.variance + offset.variance
        if self.sums:
            variance += self._sum_variance(codes.scale * whole, scale.value * whole)

        def cut(y: Float64) -> Float64:
            return y.reshape(rows, -1)[:, :columns]

        return Rounded(cut(scale.value * whole + offset.value), cut(variance))

    def sum_offsets(self, x: Float64) -> Rounded:
        """By how much a block's stored sum is off the sum of its rounded numbers, [rows, blocks].

        A product with blocks that have a minimum takes the numbers from these and the rest from the
        sum: it is off by this times that minimum.
        """
        codes, whole = self._encoded(x)
        scale = codes.scale.astype(np.float64)
        exact = (scale * whole).sum(axis=2)
        # Engines sum and multiply in float32 first.
        stored = FloatRounding(FLOAT16)(exact, np.abs(exact) * FLOAT32.roundoff)
        numbers = (FLOAT16.round(scale) * whole).sum(axis=2)
        # Another code moves the sum, which then rounds anew.
        near = _near_tie(codes.code.astype(np.float64), 0.0).any(axis=2)
        variance = stored.variance + np.where(near, np.square(FLOAT16.spacing(exact)), 0.0)
        return Rounded(stored.value - numbers, variance)

    def _encoded(self, x: Float64) -> tuple[_Codes, Float64]:
        """Blocks before rounding, and their whole codes [rows, blocks, block]."""
        rows, columns = x.shape
        block = self.block or columns
        count = -(-columns // block)
        padded = np.zeros((rows, count * block), np.float32)
        padded[:, :columns] = x
        codes = self.encode(padded.reshape(rows, count, block))
        whole = np.clip(np.rint(codes.code), codes.lowest, codes.highest).astype(np.float64)
        return codes, whole

    @staticmethod
    def _sum_variance(exact: Float64, stored: Float64) -> Float64:
        """What the stored sum is off by, as if the numbers of the block were.

        It is multiplied by the other block's minimum m, they by its numbers w: m^2 is some 4.3 of
        32 numbers' mean square for Gaussian ones, and 1/4 of their sum is the upper estimate taken.
        """
        total = exact.sum(axis=2, keepdims=True)
        off = np.square(FLOAT16.round(total) - stored.sum(axis=2, keepdims=True))
        return np.broadcast_to(off / 4, exact.shape)

    def _stored(self, number: Float32, spread: Float64) -> Rounded:
        """A scale or an offset as a block stores it."""
        wide = number.astype(np.float64)
        return FloatRounding(FLOAT16)(wide, spread) if self.half else exact(wide)


def _inverse(scale: Float32) -> Float32:
    with np.errstate(divide="ignore"):
        return np.where(scale != 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)


def _by_magnitude(x: Float32) -> _Codes:
    """As Q8_0 and Q8_1: the largest magnitude becomes 127."""
    scale = np.abs(x).max(axis=2, keepdims=True) / np.float32(127)
    return _Codes(x * _inverse(scale), -127, 127, scale, np.zeros_like(scale))


def _by_extreme(lowest: int, highest: int) -> Callable[[Float32], _Codes]:
    """As Q4_0, Q5_0 and Q8_K: the number of largest magnitude becomes the lowest code."""

    def encode(x: Float32) -> _Codes:
        low, high = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
        place = np.abs(x).argmax(axis=2, keepdims=True)
        scale = np.take_along_axis(x, place, axis=2) / np.float32(lowest)
        zero = np.zeros_like(scale)
        return _Codes(x * _inverse(scale), lowest, highest, scale, zero, low + high)

    return encode


def _by_range(levels: int) -> Callable[[Float32], _Codes]:
    """As Q4_1 and Q5_1: from the smallest number to the largest."""

    def encode(x: Float32) -> _Codes:
        low = x.min(axis=2, keepdims=True)
        scale = (x.max(axis=2, keepdims=True) - low) / np.float32(levels)
        return _Codes((x - low) * _inverse(scale), 0, levels, scale, low)

    return encode


# Types whose blocks have a minimum, that a product multiplies by the sum of the other factor's
# block, and the bytes of a block of 32: the scale, the minimum, the codes.
WITH_MINIMUM = {"Q4_1": 20, "Q5_1": 24}


def sum_offsets(rounding: Rounding | None, dtype: str, x: Float64) -> Rounded | None:
    """As `BlockRounding.sum_offsets`, for a weight of this type; None where there are none."""
    is_summed = isinstance(rounding, BlockRounding) and rounding.name == "q8_1"
    if not is_summed or dtype not in WITH_MINIMUM:
        return None
    assert isinstance(rounding, BlockRounding)
    return rounding.sum_offsets(x)


def block_minima(raw: NDArray[np.uint8], rows: int, dtype: str) -> Float64:
    """The minimum of each block of a weight's rows, [rows, blocks], from its stored bytes."""
    blocks = raw.reshape(rows, -1, WITH_MINIMUM[dtype])
    minima = np.ascontiguousarray(blocks[:, :, 2:4]).view("<f2")[:, :, 0]
    return np.asarray(minima, dtype=np.float64)


def exact(x: NDArray[Any]) -> Rounded:
    """Not rounded at all."""
    value = np.asarray(x, dtype=np.float64)
    return Rounded(value, np.broadcast_to(0.0, value.shape))


@dataclass(frozen=True, slots=True)
class RotatedRounding:
    """Rows turned by a Hadamard matrix, rounded, and turned back.

    llama.cpp keeps quantised caches so where heads are whole multiples of 64: outliers are spread
    over the block. Queries are turned as keys are; what the values give is turned back.

    Attributes:
        name: As in sidecars and on the command line.
        inner: The rounding.
        size: Numbers that are turned together; 0: as many as divide the row, a power of two.
    """

    name: str
    inner: Rounding
    size: int = 0

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Round rows of a multiple of 64."""
        columns = x.shape[1]
        size = self.size or columns & -columns
        groups = x.reshape(-1, size)
        known = np.broadcast_to(np.square(spread), x.shape).reshape(groups.shape)
        # The turn is a float32 product of its own: each sum of `size` terms is off by that.
        sums = np.mean(np.square(groups), axis=1, keepdims=True) * size / 2 * _SUM_ENERGY
        unknown = np.sqrt(known.mean(axis=1, keepdims=True) + sums)
        turned = hadamard(groups)
        found = self.inner(
            turned.reshape(x.shape),
            np.broadcast_to(unknown, groups.shape).reshape(x.shape),
        )
        variance = found.variance.reshape(groups.shape).mean(axis=1, keepdims=True)
        value = hadamard(found.value.reshape(groups.shape)).reshape(x.shape)
        return Rounded(value, np.broadcast_to(variance, groups.shape).reshape(x.shape).copy())


@dataclass(frozen=True, slots=True)
class PairedRounding:
    """Heads whose rotated pairs lie side by side in the engine, and D/2 apart here.

    Attributes:
        name: As in sidecars and on the command line.
        inner: The rounding, of rows in the engine's order.
    """

    name: str
    inner: Rounding

    def __call__(self, x: Float64, spread: Float64 | float = 0.0) -> Rounded:
        """Round rows that are heads."""
        rows, columns = x.shape

        def paired(y: Float64) -> Float64:
            return y.reshape(rows, 2, columns // 2).swapaxes(1, 2).reshape(rows, columns)

        def halved(y: Float64) -> Float64:
            return y.reshape(rows, columns // 2, 2).swapaxes(1, 2).reshape(rows, columns)

        known = paired(np.broadcast_to(np.asarray(spread, np.float64), x.shape))
        found = self.inner(paired(x), known)
        return Rounded(halved(found.value), halved(np.broadcast_to(found.variance, x.shape)))


_SUM_ENERGY = 2.0**-48 / 3


def hadamard(x: Float64) -> Float64:
    """Rows times the orthonormal Walsh-Hadamard matrix, which is its own inverse."""
    rows, size = x.shape
    half = 1
    while half < size:
        pairs = x.reshape(rows, -1, 2, half)
        x = np.concatenate(
            [pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], axis=2
        ).reshape(rows, size)
        half *= 2
    return x / np.sqrt(size)


_F16, _BF16 = FloatRounding(FLOAT16), FloatRounding(BFLOAT16)
# What tensor cores are given, by name.
_TILES: dict[str, Rounding] = {"f16:f32": FloatRounding(FLOAT16, is_loose=True), "bf16:f32": _BF16}
_Q8_0 = BlockRounding("q8_0", 32, _by_magnitude)
_Q8_1 = BlockRounding("q8_1", 32, _by_magnitude)
_Q8_K = BlockRounding("q8_k", 256, _by_extreme(-127, 127), half=False)

# By name. Int8 by token is what dynamic W8A8 kernels do: one float32 scale for each row.
ROUNDINGS: dict[str, Rounding] = {
    rounding.name: rounding
    for rounding in (
        _F16, _BF16, _Q8_0, _Q8_1, _Q8_K,
        BlockRounding("q8_1 and sums", 32, _by_magnitude, sums=True),
        BlockRounding("q8_0-f32", 32, _by_magnitude, half=False),
        BlockRounding("int8", 0, _by_magnitude, half=False),
        BlockRounding("q5_1", 32, _by_range(31)),
        BlockRounding("q5_0", 32, _by_extreme(-16, 15)),
        BlockRounding("q4_1", 32, _by_range(15)),
        BlockRounding("q4_0", 32, _by_extreme(-8, 7)),
        FloatRounding(FLOAT8_E4M3), FloatRounding(FLOAT8_E5M2),
        UncertainRounding(UNCERTAIN, FLOAT16),
    )
}  # fmt: skip
ROUNDINGS |= _TILES
ROUNDINGS |= {
    both.name: both
    for both in (
        RoundingOfBoth("tf32", TensorFloatRounding("tf32", cuts=False)),
        RoundingOfBoth("tf32-cut", TensorFloatRounding("tf32-cut", cuts=True)),
        *(RoundingOfBoth(f"{name}-both", tile) for name, tile in _TILES.items()),
    )
}
ROTATED, ROTATED_BY_64, PAIRED = "-rotated", "-rotated by 64", " in pairs"
_OF_CACHES = ("q8_0", "q8_1 and sums", "q5_1", "q5_0", "q4_1", "q4_0")
ROUNDINGS |= {
    f"{name}{suffix}": RotatedRounding(f"{name}{suffix}", ROUNDINGS[name], size)
    for name in _OF_CACHES
    for suffix, size in ((ROTATED, 0), (ROTATED_BY_64, 64))
}
ROUNDINGS |= {
    f"{name}{PAIRED}": PairedRounding(f"{name}{PAIRED}", ROUNDINGS[name])
    for plain in _OF_CACHES
    for name in (plain, plain + ROTATED)
}

_WITH = {"q8_0": ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), "q8_1": ("Q4_1", "Q5_1"),
         "f16": ("F16",), "bf16": ("BF16",), "": ("F32", "F64")}  # fmt: skip
_GGML = {stored: ROUNDINGS.get(name) for name, types in _WITH.items() for stored in types}


def rounded_beside(dtype: str) -> Rounding | None:
    """How ggml's CPU path rounds what it multiplies by a tensor of this type; None: not at all.

    Source: `vec_dot_type` in ggml-cpu.c: K-quants and the i-quants over super-blocks take Q8_K.
    """
    return _GGML.get(dtype, _Q8_K)
