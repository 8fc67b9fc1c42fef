"""Backends with one wrong operation each, as a wrong kernel would be."""

from __future__ import annotations

from typing import Any

import numpy as np

from aprcore.backends.numpy import NumpyBackend
from aprcore.errors import BackendError


class WrongStride(NumpyBackend):
    """Grouped kv heads are read as if they were tiled."""

    def weighted_values(self, softmax: Any, v: Any, num_kv_heads: int) -> Any:
        num_heads, tokens, positions = softmax.shape
        values = v.reshape(positions, num_kv_heads, -1)[:, np.arange(num_heads) % num_kv_heads]
        return np.einsum("hts,shd->thd", softmax, values).reshape(tokens, -1).astype(np.float32)


class MissingTail(NumpyBackend):
    """Products leave out what does not fill a vector of eight inputs, in the down projection."""

    def linear(self, x: Any, weights: Any) -> Any:
        if weights[0].name.endswith("down_proj.weight"):
            x = x.copy()
            x[:, x.shape[1] // 8 * 8 :] = 0
        return super().linear(x, weights)


class Race(NumpyBackend):
    """Now and then a norm reads a sum that another work-item has not finished."""

    def __init__(self) -> None:
        super().__init__(1)
        self._draw = np.random.default_rng(0)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        scale = self._draw.choice([1, 2], size=(x.shape[0], 1)).astype(np.float32)
        return super().rms_norm(x, weight, eps) * scale


class BlindToTheFirst(NumpyBackend):
    """With a single query, as in decoding, the first position is not attended to."""

    def causal_softmax(self, scores: Any) -> Any:
        weights = super().causal_softmax(scores)
        if weights.shape[1] == 1:
            weights = weights.copy()
            weights[..., 0] = 0
        return weights


class StaleCache(NumpyBackend):
    """Appending loses a little of the first row."""

    def append_rows(self, x: Any, y: Any) -> Any:
        joined = super().append_rows(x, y)
        joined[0] *= 1.001
        return joined


class NotFinite(NumpyBackend):
    """An activation overflows."""

    def activation(self, x: Any, kind: str) -> Any:
        y = super().activation(x, kind).copy()
        y[0, 0] = np.nan
        return y


class OutOfMemory(NumpyBackend):
    """Memory runs out in the middle of a layer, in the pass of a number."""

    def __init__(self, pass_number: int) -> None:
        super().__init__(1)
        self._passes_left = pass_number

    def embed(self, tokens: Any, weight: Any) -> Any:
        self._passes_left -= 1
        return super().embed(tokens, weight)

    def multiply(self, x: Any, y: Any) -> Any:
        if self._passes_left < 0:
            raise BackendError("the device is out of memory")
        return super().multiply(x, y)
