"""The CPU path: float32 numpy, weights streamed through the cache by a few threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.parallel import available_threads, for_each, single_threaded_blas
from aprcore.network.backend import Int64
from aprcore.network.mask import Mask
from aprcore.network.rope import Rope
from aprcore.network.weights import Float32, Weight, read_all, row_chunks, row_values


class NumpyBackend:
    """Float32 operations in canonical layout; see `aprcore.network.backend.Backend`.

    Results do not depend on the number of threads: each thread computes whole pieces of the output
    whose boundaries follow from the shapes alone.
    """

    name = "numpy"

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or available_threads()
        self._local = threading.local()

    def from_host(self, x: NDArray[np.floating[Any]]) -> Float32:
        return np.ascontiguousarray(x, dtype=np.float32)

    def to_host(self, x: Float32) -> Float32:
        return np.ascontiguousarray(x)

    def embed(self, tokens: Int64, weight: Weight) -> Float32:
        out = np.empty((tokens.size, *weight.shape[1:]), dtype=np.float32)
        for row, token in enumerate(tokens.tolist()):
            weight.read(token, token + 1, out[row])
        return out

    def scale(self, x: Float32, factor: float) -> Float32:
        return x * np.float32(factor)

    def soft_cap(self, x: Float32, cap: float) -> Float32:
        limit = np.float32(cap)
        capped = x / limit
        np.tanh(capped, out=capped)
        capped *= limit
        return capped

    def rms_norm(self, x: Float32, weight: Weight, eps: float, offset: float = 0.0) -> Float32:
        gain = read_all(weight)
        if offset:
            gain = np.float32(offset) + gain
        groups = x.reshape(-1, gain.size)
        mean_square = np.einsum("ij,ij->i", groups, groups, dtype=np.float32) / np.float32(
            gain.size
        )
        scale = 1 / np.sqrt(mean_square + np.float32(eps))
        return (groups * scale[:, None] * gain).reshape(x.shape)

    def linear(self, x: Float32, weights: Sequence[Weight]) -> Float32:
        y = np.empty((x.shape[0], sum(weight.shape[0] for weight in weights)), dtype=np.float32)
        # W @ x.T is far faster than x @ W.T when there are few tokens.
        columns = np.ascontiguousarray(x.T)
        jobs = []
        first = 0
        for weight in weights:
            jobs += [(weight, first, start, stop) for start, stop in row_chunks(weight)]
            first += weight.shape[0]

        def multiply(job: tuple[Weight, int, int, int]) -> None:
            weight, first, start, stop = job
            rows = weight.read(start, stop, self._scratch((stop - start) * row_values(weight)))
            np.copyto(y[:, first + start : first + stop], (rows @ columns).T)

        with single_threaded_blas():
            for_each(multiply, jobs, self.threads)
        return y

    def add_bias(self, x: Float32, biases: Sequence[Weight]) -> Float32:
        return x + np.concatenate([read_all(bias) for bias in biases])

    def columns(self, x: Float32, start: int, stop: int) -> Float32:
        return x[:, start:stop]

    def rope(self, x: Float32, positions: Int64, rope: Rope) -> Float32:
        # Angles in float32, as engines and transformers compute them.
        frequencies = rope.inverse_frequencies().astype(np.float32)
        angles = positions.astype(np.float32)[:, None] * frequencies
        factor = np.float32(rope.attention_factor())
        cos, sin = (f(angles)[:, None, :] * factor for f in (np.cos, np.sin))
        heads = x.reshape(x.shape[0], -1, rope.head_dim)
        half = rope.head_dim // 2
        low, high = heads[..., :half], heads[..., half:]
        rotated = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        return rotated.reshape(x.shape)

    def attention_scores(
        self, q: Float32, k: Float32, num_heads: int, num_kv_heads: int, scale: float, mask: Mask
    ) -> Float32:
        tokens, positions = q.shape[0], k.shape[0]
        queries = q.reshape(tokens, num_heads, -1).transpose(1, 0, 2)  # (H, T, D)
        keys = k.reshape(positions, num_kv_heads, -1).transpose(1, 2, 0)  # (K, D, S)
        scores = np.empty((num_heads, tokens, positions), dtype=np.float32)
        group = num_heads // num_kv_heads
        for head in range(num_heads):
            np.matmul(queries[head], keys[head // group], out=scores[head])
        scores *= np.float32(scale)
        hidden = ~mask.allowed(tokens, positions)
        for of_head in scores:  # one by one: over all heads numpy would list the places
            of_head[hidden] = 0
        return scores

    def masked_softmax(self, scores: Float32, mask: Mask) -> Float32:
        allowed = mask.allowed(*scores.shape[1:])
        weights = np.where(allowed, scores, np.float32(-np.inf))
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
        return weights

    def weighted_values(self, softmax: Float32, v: Float32, num_kv_heads: int) -> Float32:
        num_heads, tokens, positions = softmax.shape
        values = v.reshape(positions, num_kv_heads, -1).transpose(1, 0, 2)  # (K, S, D)
        group = num_heads // num_kv_heads
        out = np.empty((tokens, num_heads, values.shape[-1]), dtype=np.float32)
        for head in range(num_heads):
            out[:, head] = softmax[head] @ values[head // group]
        return out.reshape(tokens, -1)

    def activation(self, x: Float32, kind: str) -> Float32:
        match kind:
            case "silu":
                # exp(-x) overflows to infinity for very negative x, and x / inf is the right 0.
                with np.errstate(over="ignore"):
                    return x / (1 + np.exp(-x))
            case "gelu_pytorch_tanh":
                inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
                return np.float32(0.5) * x * (1 + np.tanh(inner))
            case "gelu":
                erf = np.vectorize(math.erf, otypes=[np.float64])
                return (x * 0.5 * (1 + erf(x.astype(np.float64) / math.sqrt(2)))).astype(np.float32)
            case "relu":
                return np.maximum(x, 0)
        raise ValueError(f"unknown activation {kind!r}")

    def add(self, x: Float32, y: Float32) -> Float32:
        return x + y

    def multiply(self, x: Float32, y: Float32) -> Float32:
        return x * y

    def rows(self, x: Float32, start: int, stop: int) -> Float32:
        return x[start:stop]

    def append_rows(self, x: Float32, y: Float32) -> Float32:
        return np.concatenate([x, y])

    def _scratch(self, values: int) -> Float32:
        """A flat buffer of this thread, reused: fresh pages cost more than the product."""
        buffer: Float32 | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < values:
            buffer = np.empty(values, dtype=np.float32)
            self._local.buffer = buffer
        return buffer
