"""A second, separate engine for the demo model, which can be told to make a mistake.

It shares no operation with aprcore: a dump that a wrong engine made must come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from aprcore.models.model import Model
from aprcore.network.stages import StageKey
from aprcore.network.weights import read_all


@dataclass(frozen=True)
class Mistake:
    """What the engine does wrong, and in which layer.

    Attributes:
        kind: "kv-tiled" or "residual-normed"; "none" makes it a right engine.
        layer: The layer.
    """

    kind: str = "none"
    layer: int = 0

    def made_in(self, layer: int, kind: str) -> bool:
        """Whether this is the mistake and this the layer."""
        return self.kind == kind and self.layer == layer


def run_engine(
    model: Model, tokens: Sequence[int], mistake: Mistake
) -> Iterator[tuple[StageKey, np.ndarray]]:
    """Every stage of a pass of a Qwen2 model, float32, in canonical layout."""
    weights = {name: read_all(weight) for name, weight in model.weights.items()}
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[np.asarray(tokens)]  # [T, E]
    yield StageKey(0, "embedding"), x
    for layer in range(model.config.num_layers):
        for stage, values in run_layer(model, weights, layer, x, mistake):
            yield StageKey(layer, stage), values
            x = values
    x = normalise(x, weights["model.norm.weight"], model.config.rms_norm_eps)
    yield StageKey(None, "final_norm"), x
    yield StageKey(None, "lm_head"), weights.get("lm_head.weight", embedding) @ x[-1]


def run_layer(
    model: Model, weights: dict[str, np.ndarray], layer: int, x: np.ndarray, mistake: Mistake
) -> Iterator[tuple[str, np.ndarray]]:
    """The stages of one layer; the last is its output. x: [T, E]."""
    config = model.config

    def weight(name: str) -> np.ndarray:
        return weights[f"model.layers.{layer}.{name}"]

    normed = normalise(x, weight("input_layernorm.weight"), config.rms_norm_eps)
    yield "attn_norm", normed
    matrices = [weight(f"self_attn.{part}_proj.weight") for part in "qkv"]
    yield "qkv_matmul", (qkv := np.concatenate([normed @ w.T for w in matrices], axis=1))
    biases = [weight(f"self_attn.{part}_proj.bias") for part in "qkv"]
    yield "qkv_bias", (qkv := qkv + np.concatenate(biases))
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim], axis=1)
    yield "q_post_rope", (q := rotate(q, heads, config.rope.theta))
    yield "k_post_rope", (k := rotate(k, kv_heads, config.rope.theta))
    for stage, values in attend(config, q, k, v, layer, mistake):
        yield stage, values
    yield "attn_out", (h := values @ weight("self_attn.o_proj.weight").T)
    stream = normed if mistake.made_in(layer, "residual-normed") else x
    yield "post_attn_residual", (x := stream + h)
    norm = weight("post_attention_layernorm.weight")
    yield "ffn_norm", (h := normalise(x, norm, config.rms_norm_eps))
    yield "ffn_gate", (gate := h @ weight("mlp.gate_proj.weight").T)
    yield "ffn_up", (up := h @ weight("mlp.up_proj.weight").T)
    yield "ffn_silu", (gate := gate / (1 + np.exp(-gate)))
    yield "ffn_swigl", (h := gate * up)
    yield "ffn_out", (h := h @ weight("mlp.down_proj.weight").T)
    yield "post_ffn_residual", x + h


def attend(config, q, k, v, layer: int, mistake: Mistake) -> Iterator[tuple[str, np.ndarray]]:
    """Scores, softmax and weighted values. q: [T, H·D]; k, v: [T, K·D]."""
    tokens, heads, kv_heads, dim = len(q), config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = (x.reshape(tokens, -1, dim).swapaxes(0, 1) for x in (q, k, v))  # [heads, T, D]
    if mistake.made_in(layer, "kv-tiled"):  # 0 1 0 1 where 0 0 1 1 is right
        k, v = (np.tile(x, (heads // kv_heads, 1, 1)) for x in (k, v))
    else:
        k, v = (np.repeat(x, heads // kv_heads, axis=0) for x in (k, v))
    future = np.triu(np.ones((tokens, tokens), dtype=bool), 1)
    scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(dim))  # [H, T, T]
    yield "attn_scores", np.where(future, np.float32(0), scores)
    scores = np.where(future, np.float32(-np.inf), scores)
    softmax = np.exp(scores - scores.max(axis=-1, keepdims=True))
    yield "attn_softmax", (softmax := softmax / softmax.sum(axis=-1, keepdims=True))
    yield "attention", (softmax @ v).swapaxes(0, 1).reshape(tokens, heads * dim)


def normalise(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm of each row."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight


def rotate(x: np.ndarray, heads: int, theta: float) -> np.ndarray:
    """RoPE on split halves of every head. x: [T, heads·D]."""
    x = x.reshape(len(x), heads, 2, -1)
    half = x.shape[-1]
    angles = np.arange(len(x))[:, None, None] * theta ** -(np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[:, :, 0], x[:, :, 1]
    rotated = np.stack([first * cos - second * sin, second * cos + first * sin], axis=2)
    return rotated.reshape(len(x), -1)
