"""ggml's super-blocks of 256 values as float32, ten times as fast as the `gguf` package.

All passes over the codes work on eight bytes at a time, and only the scaling goes sub-block by
sub-block. Values equal gguf's to the last bit: a product of scale and code is exact in float32, and
the same one rounding follows where there is a minimum.

Source: ggml's block structures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Float32 = NDArray[np.float32]

SUPER_BLOCK_VALUES = 256


def _each_byte(value: int) -> np.uint64:
    """A byte eight times over."""
    return np.uint64(int.from_bytes(bytes([value] * 8), "little"))


_NIBBLE, _TWO_BITS, _BIT = _each_byte(0x0F), _each_byte(0x03), _each_byte(0x01)
_FOUR = np.uint64(4)


def _words(blocks: Bytes, start: int, stop: int) -> Words:
    """Bytes `start` to `stop` of every block, eight to a word."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(np.uint64)


def _halves(blocks: Bytes, offset: int) -> Float32:
    """The float16 at a byte of every block, [n]."""
    stored = np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").reshape(-1)
    return stored.astype(np.float32)


def _scales_and_minima(blocks: Bytes) -> tuple[Float32, Float32]:
    """Of the eight sub-blocks of Q4_K and Q5_K, each [8 n, 1].

    Six bits each: four of a kind in a word, those of the last four with their upper two bits in the
    words of the first four.
    """
    first, second, third = np.ascontiguousarray(blocks[:, 4:16]).view("<u4").T
    codes = np.empty((len(blocks), 2, 2), "<u4")
    codes[:, 0, 0] = first & 0x3F3F3F3F
    codes[:, 1, 0] = second & 0x3F3F3F3F
    codes[:, 0, 1] = third & 0x0F0F0F0F | first >> 2 & 0x30303030
    codes[:, 1, 1] = third >> 4 & 0x0F0F0F0F | second >> 2 & 0x30303030
    scales, minima = codes.view(np.uint8).astype(np.float32).reshape(-1, 2, 8).swapaxes(0, 1)
    scales *= _halves(blocks, 0)[:, None]
    minima *= _halves(blocks, 2)[:, None]
    return scales.reshape(-1, 1), minima.reshape(-1, 1)


def _expand_q4(blocks: Bytes, out: Float32) -> None:
    codes = _words(blocks, 16, 144).reshape(-1, 4)  # 64 values in 32 bytes
    pairs = out.reshape(-1, 2, 32)
    pairs[:, 0] = (codes & _NIBBLE).view(np.uint8)
    pairs[:, 1] = (codes >> _FOUR & _NIBBLE).view(np.uint8)
    _scale(blocks, out)


def _expand_q5(blocks: Bytes, out: Float32) -> None:
    codes = _words(blocks, 48, 176).reshape(-1, 4, 4)
    high = _words(blocks, 16, 48)  # bit s of a byte belongs to sub-block s
    values = out.reshape(-1, 8, 32)
    for sub in range(8):
        low = codes[:, sub // 2] >> np.uint64(4 * (sub % 2)) & _NIBBLE
        values[:, sub] = (low | (high >> np.uint64(sub) & _BIT) << _FOUR).view(np.uint8)
    _scale(blocks, out)


def _scale(blocks: Bytes, out: Float32) -> None:
    scales, minima = _scales_and_minima(blocks)
    values = out.reshape(-1, 32)
    values *= scales
    values -= minima


def _expand_q6(blocks: Bytes, out: Float32) -> None:
    low = _words(blocks, 0, 128).reshape(-1, 2, 2, 4)  # halves of 128 values in 64 bytes
    high = _words(blocks, 128, 192).reshape(-1, 2, 4)
    values = out.reshape(-1, 2, 4, 32)
    for quarter in range(4):
        four = low[:, :, quarter % 2] >> np.uint64(quarter // 2 * 4) & _NIBBLE
        two = high >> np.uint64(2 * quarter) & _TWO_BITS
        values[:, :, quarter] = (four | two << _FOUR).view(np.uint8)
    out -= 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scales *= _halves(blocks, 208)[:, None]
    sixteens = out.reshape(-1, 16)
    sixteens *= scales.reshape(-1, 1)


EXPANSIONS: Mapping[str, Callable[[Bytes, Float32], None]] = {
    "Q4_K": _expand_q4,
    "Q5_K": _expand_q5,
    "Q6_K": _expand_q6,
}
"""By type: blocks, uint8 [n, bytes of a block], into float32 [256 n], which is written whole."""
