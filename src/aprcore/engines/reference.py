"""The judge: float64, written for plainness, sharing no operation with the float32 backend.

It takes other routes on purpose (complex rotation, einsum over repeated heads, masked sums), so
that a mistake in one backend is not repeated by the other. What an engine rounds on its way into a
product, and angles that it reaches step by step, can be reproduced: those it takes over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import EXACT, Arithmetic
from aprcore.engines.rounded_weight import as_read
from aprcore.network.backend import Int64
from aprcore.network.mask import Mask
from aprcore.network.rope import Rope
from aprcore.network.weights import StoredWeight, Weight, row_chunks
from aprcore.quant.roundings import Rounding, block_minima, sum_offsets

Float64 = NDArray[np.float64]

# erf in float64 is not in numpy; the standard library's is exact to the last bit or two.
_erf = np.vectorize(math.erf, otypes=[np.float64])


class ReferenceBackend:
    """Float64 operations in canonical layout; see `aprcore.network.backend.Backend`."""

    name = "reference"

    def __init__(self, arithmetic: Arithmetic = EXACT) -> None:
        """Operations whose factors are rounded as in this arithmetic; by default not at all."""
        self._arithmetic = arithmetic

    def from_host(self, x: NDArray[np.floating[Any]]) -> Float64:
        return np.asarray(x, dtype=np.float64)

    def to_host(self, x: Float64) -> Float64:
        return np.ascontiguousarray(x)

    def embed(self, tokens: Int64, weight: Weight) -> Float64:
        return np.concatenate([_wide(weight, t, t + 1) for t in tokens.tolist()])

    def scale(self, x: Float64, factor: float) -> Float64:
        return factor * x

    def soft_cap(self, x: Float64, cap: float) -> Float64:
        grown = np.expm1(-2 * np.abs(x / cap))  # tanh by another route, without overflow
        return np.asarray(np.copysign(cap * grown / (grown + 2), x))

    def rms_norm(self, x: Float64, weight: Weight, eps: float, offset: float = 0.0) -> Float64:
        gain = offset + _wide(weight)
        out = np.empty_like(x)
        for start in range(0, x.shape[1], gain.size):
            group = slice(start, start + gain.size)
            variance = np.mean(np.square(x[:, group]), axis=1, keepdims=True)
            out[:, group] = gain * (x[:, group] / np.sqrt(variance + eps))
        return out

    def linear(self, x: Float64, weights: Sequence[Weight]) -> Float64:
        return np.concatenate(
            [
                _product(x, weight, self._arithmetic.rounding_of(weight), start, stop)
                for weight in weights
                for start, stop in row_chunks(weight)
            ],
            axis=1,
        )

    def add_bias(self, x: Float64, biases: Sequence[Weight]) -> Float64:
        return x + np.hstack([_wide(bias) for bias in biases])[None, :]

    def columns(self, x: Float64, start: int, stop: int) -> Float64:
        return x[:, start:stop]

    def rope(self, x: Float64, positions: Int64, rope: Rope) -> Float64:
        angles = angles_of(positions, rope, iterated=self._arithmetic.iterates_angles)
        turn = rope.attention_factor() * np.exp(1j * angles)  # (T, D/2)
        half = rope.head_dim // 2
        heads = x.reshape(x.shape[0], -1, 2, half)
        points = (heads[:, :, 0] + 1j * heads[:, :, 1]) * turn[:, None, :]  # (T, N, D/2)
        return np.stack([points.real, points.imag], axis=2).reshape(x.shape)

    def attention_scores(
        self, q: Float64, k: Float64, num_heads: int, num_kv_heads: int, scale: float, mask: Mask
    ) -> Float64:
        head_dim = q.shape[1] // num_heads
        group = num_heads // num_kv_heads
        q = rounded(q, self._arithmetic.activation_rounding, head_dim)
        k = rounded(k, self._arithmetic.cache_rounding, head_dim)
        queries = q.reshape(-1, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        keys = k.reshape(-1, num_kv_heads, 1, head_dim).transpose(1, 2, 3, 0)  # (K, 1, D, S)
        scores: Float64 = np.matmul(queries, keys).reshape(num_heads, q.shape[0], k.shape[0])
        scores *= scale
        past = k.shape[0] - q.shape[0]
        for token in range(q.shape[0]):  # in place: a mask costs as much as the product
            first, stop = mask.span(past + token, k.shape[0])
            scores[:, token, :first] = 0
            scores[:, token, stop:] = 0
        return scores

    def masked_softmax(self, scores: Float64, mask: Mask) -> Float64:
        _, tokens, positions = scores.shape
        out = np.zeros_like(scores)
        for token in range(tokens):
            first, stop = mask.span(positions - tokens + token, positions)
            seen = scores[:, token, first:stop]
            powers = np.exp(seen - seen.max(axis=1, keepdims=True))
            out[:, token, first:stop] = powers / powers.sum(axis=1, keepdims=True)
        return out

    def weighted_values(self, softmax: Float64, v: Float64, num_kv_heads: int) -> Float64:
        num_heads, tokens, positions = softmax.shape
        softmax = rounded(softmax, self._arithmetic.activation_rounding)
        v = rounded(v, self._arithmetic.cache_rounding, v.shape[1] // num_kv_heads)
        values = v.reshape(positions, num_kv_heads, -1)
        values = np.repeat(values, num_heads // num_kv_heads, axis=1)
        return np.einsum("hts,shd->thd", softmax, values, optimize=True).reshape(tokens, -1)

    def activation(self, x: Float64, kind: str) -> Float64:
        match kind:
            case "silu":
                # exp(-|x|) never overflows.
                power = np.exp(-np.abs(x))
                return x * np.where(x >= 0, 1, power) / (1 + power)
            case "gelu_pytorch_tanh":
                return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            case "gelu":
                return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))
            case "relu":
                return np.where(x < 0, 0.0, x)
        raise ValueError(f"unknown activation {kind!r}")

    def add(self, x: Float64, y: Float64) -> Float64:
        return x + y

    def multiply(self, x: Float64, y: Float64) -> Float64:
        return x * y

    def rows(self, x: Float64, start: int, stop: int) -> Float64:
        return x[start:stop]

    def append_rows(self, x: Float64, y: Float64) -> Float64:
        return np.vstack([x, y])


def _product(
    x: Float64, weight: Weight, rounding: Rounding | None, start: int, stop: int
) -> Float64:
    """x times rows of a weight."""
    weight = as_read(weight, rounding)
    rows = _wide(weight, start, stop)
    product: Float64 = rounded(x, rounding) @ rows.T
    offsets = sum_offsets(rounding, weight.dtype, x)
    if offsets is None or not isinstance(weight, StoredWeight):
        return product
    minima = block_minima(weight.read_raw(start, stop), stop - start, weight.dtype)
    return product + offsets.value @ minima.T


def rounded(x: Float64, rounding: Rounding | None, width: int | None = None) -> Float64:
    """A factor as an engine rounds it, in rows of this width (its last axis by default)."""
    if rounding is None:
        return x
    rows = np.ascontiguousarray(x).reshape(-1, width or x.shape[-1])
    return rounding(rows).value.reshape(x.shape)


def angles_of(positions: Int64, rope: Rope, *, iterated: bool) -> Float64:
    """Every position's angles, [T, D/2], in radians.

    Args:
        positions, rope: Whose.
        iterated: Whether each angle is the one before times a float32 factor, in float32, as
            `ggml_rope_cache_init` does; scaling is applied to what that gives.
    """
    frequencies = rope.inverse_frequencies()
    if not iterated:
        return np.multiply.outer(positions.astype(np.float64), frequencies)
    step = np.float32(np.float64(rope.theta) ** (-2 / rope.head_dim))
    angles = np.empty((positions.size, frequencies.size), np.float32)
    angle = positions.astype(np.float32)
    for i in range(frequencies.size):
        angles[:, i] = angle
        angle = angle * step
    plain = np.float64(rope.theta) ** (-np.arange(0, rope.head_dim, 2) / rope.head_dim)
    return angles.astype(np.float64) * (frequencies / plain)


def _wide(weight: Weight, start: int = 0, stop: int | None = None) -> Float64:
    """Rows of a weight in float64."""
    return weight.read(start, weight.shape[0] if stop is None else stop).astype(np.float64)
