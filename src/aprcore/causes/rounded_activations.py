"""Activations rounded to few bits before a product, with the scales that engines take.

Those of llama.cpp's blocks of eight bits are in `precision`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.projections import Part, Variant
from aprcore.causes.scene import Float64

Float32 = NDArray[np.float32]

ADVICE = "what the kernel rounds before the product, and to how many bits"
# Blocks of a row that share a scale; 0 for the row, -1 for the tensor.
EVERY_4_BITS = {"32 values a block": 32, "128 values a block": 128, "a scale for each token": 0,
                "one scale for all tokens": -1}  # fmt: skip
# The largest finite value of float8 e4m3, and its bits after the leading one.
LARGEST_E4M3, DIGITS_E4M3, SMALLEST_E4M3 = 448.0, 3, -6


def variants(part: Part) -> Iterator[Variant]:
    """The product by activations of 4 or 8 bits."""
    if part.scene.in_file:
        return
    for name, block in EVERY_4_BITS.items():
        if block >= part.x.shape[1]:
            continue
        for top in (7, 8):
            x = _symmetric(part.x, block, top)
            yield Variant(f"{{}} activations rounded to 4 bits ({name})", ADVICE, x=x)
        x = _from_lowest(part.x, block, 15)
        yield Variant(
            f"{{}} activations rounded to 4 bits ({name}, with a zero point)", ADVICE, x=x
        )
    for name, block in (("a scale for each token", 0), ("one scale for all tokens", -1)):
        if block:
            for top in (127, 128):
                x = _symmetric(part.x, block, top)
                yield Variant(f"{{}} activations rounded to 8 bits ({name})", ADVICE, x=x)
        x = _from_lowest(part.x, block, 255)
        yield Variant(
            f"{{}} activations rounded to 8 bits ({name}, with a zero point)", ADVICE, x=x
        )
        yield Variant(f"{{}} activations rounded to float8 ({name})", ADVICE,
                      x=_float8(part.x, block))  # fmt: skip


def _grouped(x: Float64, block: int) -> Float32:
    """[groups, values]: the tensor, its rows, or blocks of its rows filled up with zeros.

    In float32, as engines divide: what is halfway between two codes there may be below it in
    float64.
    """
    return _groups_of(x, block).astype(np.float32)


def _groups_of(x: Float64, block: int) -> Float64:
    if block < 0:
        return x.reshape(1, -1)
    if not block:
        return x
    padded = np.zeros((x.shape[0], -(-x.shape[1] // block) * block))
    padded[:, : x.shape[1]] = x
    return padded.reshape(-1, block)


def _ungrouped(groups: Float32, x: Float64) -> Float64:
    exact: Float64 = groups.astype(np.float64)
    if exact.size == x.size:
        return exact.reshape(x.shape)
    return exact.reshape(x.shape[0], -1)[:, : x.shape[1]]


def _symmetric(x: Float64, block: int, top: int) -> Float64:
    """Steps of the largest magnitude over `top`, codes from -top to top, or to one less."""
    groups = _grouped(x, block)
    step = np.abs(groups).max(axis=1, keepdims=True) / np.float32(top)
    highest = top if top % 2 else top - 1
    codes = np.clip(np.rint(groups / np.where(step > 0, step, np.float32(1))), -top, highest)
    return _ungrouped(codes * step, x)


def _from_lowest(x: Float64, block: int, top: int) -> Float64:
    """Steps of the range over `top`, from a zero point that is a whole code."""
    groups = _grouped(x, block)
    low = np.minimum(groups.min(axis=1, keepdims=True), 0.0)
    high = np.maximum(groups.max(axis=1, keepdims=True), 0.0)
    step = (high - low) / np.float32(top)
    step = np.where(step > 0, step, np.float32(1))
    zero = np.rint(-low / step)
    codes = np.clip(np.rint(groups / step) + zero, 0, top)
    return _ungrouped((codes - zero) * step, x)


def _float8(x: Float64, block: int) -> Float64:
    """float8 e4m3, scaled so that the largest magnitude is its largest value."""
    groups = _grouped(x, block)
    step = np.abs(groups).max(axis=1, keepdims=True) / np.float32(LARGEST_E4M3)
    scaled = groups / np.where(step > 0, step, np.float32(1))
    exponent = np.maximum(np.frexp(scaled)[1] - 1, SMALLEST_E4M3)
    spacing = np.ldexp(np.float32(1), exponent - DIGITS_E4M3)
    return _ungrouped(np.rint(scaled / spacing) * spacing * step, x)
