"""A sound trace, and operations made apart from the catalogue of causes, for its tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes import Explanation, explain
from aprcore.engines.arithmetic import engine_arithmetic
from aprcore.judging.layouts import layout_of
from aprcore.judging.noise import assess
from aprcore.judging.replay import RecordedSide
from aprcore.network.stages import StageKey
from tiny import SIZES, Tensors, opened

H, K, D, E, F, V = (SIZES[letter] for letter in "HKDEFV")
TOKENS = (5, 0, 39, 7, 7, 12, 31, 2, 17)
T = len(TOKENS)
LAYER = 1
ATTENTION = f"model.layers.{LAYER}.self_attn."
MLP = f"model.layers.{LAYER}.mlp."

Floats = NDArray[Any]


@dataclass(frozen=True)
class World:
    """A sound trace and the weights it was made with."""

    tensors: Tensors
    weights: dict[str, Floats]

    def at(self, stage: str, layer: int | None = LAYER) -> Floats:
        return self.tensors[StageKey(layer, stage)].astype(np.float64)

    def weight(self, name: str, layer: int | None = LAYER) -> Floats:
        whole = name if layer is None else f"model.layers.{layer}.{name}"
        return self.weights[whole].astype(np.float64)

    @property
    def stream(self) -> Floats:
        return self.at("post_ffn_residual", LAYER - 1)

    def part(self, name: str, stage: str = "qkv_bias") -> Floats:
        """q, k or v as [T, heads, D]."""
        start = {"q": 0, "k": H, "v": H + K}[name]
        stop = {"q": H, "k": H + K, "v": H + 2 * K}[name]
        return self.at(stage).reshape(T, H + 2 * K, D)[:, start:stop]


def explained(
    path: Path, tensors: Tensors, key: StageKey, observed: Floats, *, in_file: bool = False,
    tokens: tuple[int, ...] = TOKENS, arithmetic: str = "f32",
) -> Explanation:  # fmt: skip
    """What `explain` says of an output in a side that recorded `tensors`."""
    with opened(path) as model:
        side = RecordedSide(
            model.graph, model.weights, tokens, len(tokens),
            engine_arithmetic({"all": arithmetic}), weights_rounded=in_file, read=tensors.get,
        )  # fmt: skip
        expected = side.expect(key)
        assert expected is not None
        flat = np.asarray(observed, dtype=np.float32).reshape(-1)
        layout = layout_of(key, side.sizes(), flat.size)
        assert not assess(flat, expected.estimate, layout).explained, "the fault does not show"
        return explain(side, key, flat, expected, layout, in_file=in_file)


def rotate(
    x: Floats, *, theta: float = 10000.0, start: float = 0, step: float = 1, rotary: int = D,
    pairs: bool = False, sign: int = 1,
) -> Floats:  # fmt: skip
    """RoPE of x [T, N, D], one number after the other."""
    out = x.copy()
    for t in range(x.shape[0]):
        for i in range(rotary // 2):
            angle = sign * (start + step * t) * theta ** (-2 * i / rotary)
            a, b = (2 * i, 2 * i + 1) if pairs else (i, i + rotary // 2)
            first, second = x[t, :, a].copy(), x[t, :, b].copy()
            out[t, :, a] = first * math.cos(angle) - second * math.sin(angle)
            out[t, :, b] = first * math.sin(angle) + second * math.cos(angle)
    return out


def scores(q: Floats, k: Floats, scale: float, kv_of: Callable[[int], int]) -> Floats:
    """[H, T, T] with nothing masked, head by head."""
    q, k = q.reshape(T, H, D), k.reshape(T, K, D)
    return np.stack([q[:, h] @ k[:, kv_of(h)].T * scale for h in range(H)])


def grouped(head: int) -> int:
    return head // (H // K)


def softmax(x: Floats, axis: int = -1) -> Floats:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def masked(x: Floats, offset: int = 0) -> Floats:
    return np.where(np.tri(T, T, offset, dtype=bool), x, -np.inf)


def weighted(weights: Floats, v: Floats, kv_of: Callable[[int], int] = grouped) -> Floats:
    out = [weights[h] @ v[:, kv_of(h)] for h in range(H)]
    return np.stack(out, axis=1)


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def rms(x: Floats, eps: float = 1e-6) -> Floats:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def to_pair_rows(weight: Floats, heads: int) -> Floats:
    """Rows i and i + D/2 of every head next to each other."""
    out = weight.copy()
    for head in range(heads):
        for i in range(D // 2):
            out[head * D + 2 * i] = weight[head * D + i]
            out[head * D + 2 * i + 1] = weight[head * D + i + D // 2]
    return out


def all_scores(w: World) -> Floats:
    return scores(w.at("q_post_rope"), w.at("k_post_rope"), D**-0.5, grouped)


def with_k(w: World, k_weight: Floats) -> Floats:
    """qkv_matmul with another weight for k."""
    out = w.at("qkv_matmul").copy()
    out[:, H * D : (H + K) * D] = w.at("attn_norm") @ k_weight.T
    return out


def edited(x: Floats, where: Any, values: Any) -> Floats:
    out = x.copy()
    out[where] = values
    return out


def half_sums(x: Floats, weight: Floats) -> Floats:
    """x·Wᵀ with every partial sum rounded to float16."""
    total = np.zeros((x.shape[0], weight.shape[0]), np.float16)
    for k in range(x.shape[1]):
        total = (total + np.outer(x[:, k], weight[:, k]).astype(np.float32)).astype(np.float16)
    return total


def in_8_bits(x: Floats) -> Floats:
    """Blocks of 32 values in steps of their largest over 127."""
    out = np.empty_like(x)
    for start in range(0, x.shape[1], 32):
        block = x[:, start : start + 32]
        step = np.abs(block).max(axis=1, keepdims=True) / 127
        out[:, start : start + 32] = np.rint(block / step) * step
    return out
