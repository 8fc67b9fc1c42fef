"""Backends with one wrong operation each, and real kernels with one wrong line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.opencl.program import read_source
from aprcore.ground.errors import BackendError


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

    def rms_norm(self, x: Any, weight: Any, eps: float, offset: float = 0.0) -> Any:
        scale = self._draw.choice([1, 2], size=(x.shape[0], 1)).astype(np.float32)
        return super().rms_norm(x, weight, eps, offset) * scale


class BlindToTheFirst(NumpyBackend):
    """With a single query, as in decoding, the first position is not attended to."""

    def masked_softmax(self, scores: Any, mask: Any) -> Any:
        weights = super().masked_softmax(scores, mask)
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


@dataclass(frozen=True)
class WrongKernel:
    """A kernel of the package with one line changed, for the device's compiler.

    Attributes:
        fault: What is wrong, in words.
        file: The file in `kernels/`.
        right, wrong: What stands there, once, and what stands there instead.
        stage: The first stage of a pass that it makes wrong.
        dtype: The stored type of the model that meets it.
        lanes: Work-items of a group; None for the device's own number.
        num_tokens: Tokens of the prompt.
    """

    fault: str
    file: str
    right: str
    wrong: str
    stage: str
    dtype: str = "F32"
    lanes: int | None = None
    num_tokens: int = 5

    def read_source(self, file: str) -> str:
        """In place of `program.read_source`."""
        text = read_source(file)
        if file != self.file:
            return text
        assert text.count(self.right) == 1, f"{file} no longer has {self.right!r} once"
        return text.replace(self.right, self.wrong)

    def __str__(self) -> str:
        return f"{self.file}: {self.fault}"


_TAIL = "if (width % 8 && lane == parts % LANES) {\n        UNROLL"

WRONG_KERNELS = (
    WrongKernel("wrong stride for grouped kv heads", "attention.cl",
                "head / (heads / kv_heads), count", "head % kv_heads, count", "attention"),
    WrongKernel("a token does not see itself", "attention.cl",
                "position = row % tokens + (positions - tokens);",
                "position = row % tokens + (positions - tokens) - 1;", "attn_softmax"),
    WrongKernel("sums of the lanes race", "common.cl",
                """        barrier(CLK_LOCAL_MEM_FENCE);
        if (lane < half_way) scratch[lane] += scratch[lane + half_way];""",
                """        if (lane < half_way) scratch[lane] += scratch[lane + half_way];""",
                "attn_norm", lanes=64),
    WrongKernel("products of lanes race", "linear.cl",
                """        barrier(CLK_LOCAL_MEM_FENCE);
        if (lane < half_way)
            for""",
                """        if (lane < half_way)
            for""",
                "qkv_matmul", lanes=64),
    WrongKernel("missing tail, few tokens", "linear.cl", _TAIL, _TAIL.replace("width % 8", "0"),
                "qkv_matmul"),
    WrongKernel("missing tail, many tokens", "linear.cl", "left < 8 ? tail(row, at, left, scale)",
                "left < 8 ? (float8)(0)", "qkv_matmul", num_tokens=12),
    WrongKernel("missing tail", "norms.cl", "for (uint i = lane; i < size; i += LANES) y",
                "for (uint i = lane; i < 8 * vectors; i += LANES) y", "attn_norm"),
    WrongKernel("angles of another token", "rope.cl", "head / heads * half_size + i",
                "head % tokens * half_size + i", "q_post_rope"),
    WrongKernel("last value left out", "elementwise.cl",
                "FOR_SPAN(i, count) y[i] = x[i] / (1 + exp(-x[i]));",
                "FOR_SPAN(i, count - 9) y[i] = x[i] / (1 + exp(-x[i]));", "ffn_silu"),
    WrongKernel("neighbouring row", "embedding.cl", "indices[get_group_id(0)] * row_bytes",
                "(indices[get_group_id(0)] ^ 1) * row_bytes", "embedding"),
    WrongKernel("halves without their sign", "stored_float.cl",
                "return half_bits8(LOAD8_SHORTS((global const ushort *)row + 32 * block"
                " + 8 * part));",
                "return fabs(half_bits8(LOAD8_SHORTS((global const ushort *)row + 32 * block"
                " + 8 * part)));", "embedding", dtype="F16"),
    WrongKernel("scale of another block", "stored_blocks.cl",
                "return TO_FLOAT8(as_char8(LOAD8_BYTES(b + 2 + 8 * part))) * half_at(b);",
                "return TO_FLOAT8(as_char8(LOAD8_BYTES(b + 2 + 8 * part))) * half_at(row);",
                "embedding", dtype="Q8_0"),
)  # fmt: skip
