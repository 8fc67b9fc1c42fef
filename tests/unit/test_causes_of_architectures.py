"""Causes that only some architectures have: windows, caps, scales, norms by 1 + w, post-norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aprcore.causes import Explanation, explain
from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.engines.numpy import NumpyBackend
from aprcore.judging.layouts import layout_of, zero_masked
from aprcore.judging.noise import assess
from aprcore.judging.replay import RecordedSide
from aprcore.network.backend import Site
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.rope import Rope
from aprcore.network.stages import StageKey, resolve_shape
from tiny import SIZES, ArrayWeight

H, K, D, E, F, V = (SIZES[letter] for letter in "HKDEFV")
TOKENS = np.array([5, 0, 39, 7, 7, 12, 31, 2, 17])
T = len(TOKENS)
WINDOW, SCALAR, SCORE_CAP, LOGIT_CAP = 4, 15.0, 2.0, 1.5

Floats = NDArray[Any]

GEMMA = ModelConfig(
    "gemma2", E, 2, H, K, D, F, V, 1e-6, Rope(1e4, D), hidden_act="gelu_pytorch_tanh",
    tied_head=True, windows=(WINDOW, None),
    numbers={"query_pre_attn_scalar": SCALAR, "attn_logit_softcapping": SCORE_CAP,
             "final_logit_softcapping": LOGIT_CAP},
)  # fmt: skip
LLAMA = replace(GEMMA, architecture="llama", windows=(None,), numbers={})
ENCODER = replace(LLAMA, is_causal=False)
MISTRAL = replace(LLAMA, architecture="mistral", windows=(WINDOW,))
QWEN3 = replace(LLAMA, architecture="qwen3", qk_norm=True)


class ExactWeight(ArrayWeight):
    """A weight that was not rounded when it was stored."""

    def step_squares(self, start: int, stop: int) -> tuple[Floats, int]:
        width = self.values[0].size
        return np.zeros((stop - start, 1), np.float32), width


@dataclass(frozen=True)
class World:
    """A sound pass of one model."""

    graph: Graph
    weights: dict[str, ArrayWeight]
    tensors: dict[StageKey, Floats]

    def at(self, stage: str, layer: int | None = 0) -> Floats:
        return self.tensors[StageKey(layer, stage)].astype(np.float64)

    def weight(self, name: str) -> Floats:
        found = self.weights.get(f"model.layers.0.{name}") or self.weights[name]
        return found.values.astype(np.float64)

    def products(self) -> Floats:
        """q·k of every pair of positions."""
        q = self.at("q_post_rope").reshape(T, H, D)
        k = self.at("k_post_rope").reshape(T, K, D).repeat(H // K, axis=1)
        return np.stack([q[:, h] @ k[:, h].T for h in range(H)])


def run(config: ModelConfig) -> World:
    graph, generator = Graph(config), np.random.default_rng(5)
    weights: dict[str, ArrayWeight] = {}
    tensors: dict[StageKey, Floats] = {}
    for key in graph.keys:
        operation = graph.operation(key)
        assert operation is not None
        for use in operation.weights:
            if use.needed or (config.qk_norm and use.name.endswith("norm.weight")):
                layer = "" if use.name.startswith("model.") else f"model.layers.{key.layer}."
                drawn = generator.standard_normal(resolve_shape(use.shape, config.sizes(T)))
                drawn = 1 + 0.2 * drawn if drawn.ndim == 1 else drawn / drawn.shape[1] ** 0.5
                name = layer + use.name
                weights.setdefault(name, ExactWeight(name, drawn.astype(np.float32)))
        inputs = [tensors[source] for source in graph.inputs(key)]
        if graph.stage(key).last_token:
            inputs = [x[-1:] for x in inputs]
        site = Site(config, TOKENS, np.arange(T), key.layer, weights)
        tensors[key] = operation(NumpyBackend(), site, *inputs)
    return World(graph, weights, tensors)


def named(
    world: World, stage: str, layer: int | None, observed: Floats, *, in_file: bool = False
) -> Explanation:
    key = StageKey(layer, stage)
    engine = arithmetic_of_dtype("float32")
    side = RecordedSide(
        world.graph, world.weights, TOKENS.tolist(), T, engine, read=world.tensors.get
    )
    expected = side.expect(key)
    assert expected is not None
    flat = np.asarray(observed, dtype=np.float32).reshape(-1)
    layout = layout_of(key, side.sizes(), flat.size)
    flat = zero_masked(world.graph.operation(key), flat, layout)
    assert not assess(flat, expected.estimate, layout).explained, "the fault does not show"
    return explain(side, key, flat, expected, layout, in_file=in_file)


def cap(x: Floats, limit: float) -> Floats:
    return limit * np.tanh(x / limit)


def softmax(x: Floats, sees: Floats) -> Floats:
    powers = np.exp(np.where(sees, x, -np.inf))
    return powers / powers.sum(axis=-1, keepdims=True)


def band(size: int | None, ahead: bool = False) -> Floats:
    """Which positions each query sees, one after the other."""
    return np.array([[(ahead or s <= t) and (size is None or t - s < size) for s in range(T)]
                     for t in range(T)])  # fmt: skip


def rms(x: Floats) -> Floats:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def gemma_scores(w: World) -> Floats:
    return cap(w.products() / SCALAR**0.5, SCORE_CAP)


def plain_scores(w: World) -> Floats:
    return w.products() / D**0.5


def lm_head(w: World) -> Floats:
    return w.at("final_norm", None)[-1] @ w.weight("model.embed_tokens.weight").T


Fault = tuple[ModelConfig, str, int | None, Callable[[World], Floats], str]
FAULTS: list[Fault] = [
    (GEMMA, "attn_softmax", 0, lambda w: softmax(gemma_scores(w), band(None)),
     "window of 4 ignored: attends to everything before"),
    (GEMMA, "attn_softmax", 0, lambda w: softmax(gemma_scores(w), band(5)),
     "window off by one: 5 in place of 4"),
    (GEMMA, "attn_softmax", 0, lambda w: softmax(gemma_scores(w), band(3)),
     "window off by one: 3 in place of 4"),
    (GEMMA, "attn_softmax", 0, lambda w: softmax(gemma_scores(w), band(8)),
     "window of 8 in place of 4"),
    (MISTRAL, "attn_softmax", 0, lambda w: softmax(plain_scores(w), band(2)),
     "window of 2 in place of 4"),
    (LLAMA, "attn_softmax", 0, lambda w: softmax(plain_scores(w), band(4)),
     "only the last 4 positions attended to"),
    (MISTRAL, "attn_softmax", 0, lambda w: softmax(plain_scores(w), band(None, True)),
     "no causal mask, nor a window"),
    (ENCODER, "attn_softmax", 0, lambda w: softmax(plain_scores(w), band(None)),
     "a causal mask (is_causal: false ignored)"),
    (ENCODER, "attn_scores", 0, lambda w: plain_scores(w) * band(None),
     "a causal mask (is_causal: false ignored)"),
    (GEMMA, "attn_softmax", 0, lambda w: softmax(np.where(band(4), gemma_scores(w), -SCORE_CAP),
                                                 band(None, True)), "mask before the soft cap"),
    (MISTRAL, "attn_softmax", 0, lambda w: softmax(plain_scores(w), band(None)) * band(4),
     "mask after softmax, of the window alone"),
    (GEMMA, "attn_scores", 0, lambda w: w.products() / SCALAR**0.5,
     "no soft cap in place of 2"),
    (GEMMA, "attn_scores", 0, lambda w: cap(w.products(), SCORE_CAP) / SCALAR**0.5,
     "soft cap before the scale"),
    (GEMMA, "attn_scores", 0, lambda w: cap(w.products() / SCALAR**0.5, 30),
     "soft cap of 30 in place of 2"),
    (GEMMA, "attn_scores", 0, lambda w: cap(w.products() / SCALAR**0.5, 0.85), "soft cap of 0.85"),
    (GEMMA, "attn_scores", 0, lambda w: cap(w.products() / D**0.5, SCORE_CAP),
     "attention scale 1/sqrt(D), the head dimension"),
    (GEMMA, "attn_scores", 0, lambda w: cap(w.products() * 0.37, SCORE_CAP),
     "attention scale 0.37"),
    (LLAMA, "attn_scores", 0, lambda w: w.products() / (E / H) ** 0.5, "1/sqrt(E/H)"),
    (LLAMA, "attn_scores", 0, lambda w: cap(plain_scores(w), 10), "soft cap of 10"),
    (GEMMA, "lm_head", None, lm_head, "no soft cap in place of 1.5"),
    (GEMMA, "lm_head", None, lambda w: cap(lm_head(w), 50), "soft cap of 50 in place of 1.5"),
    (LLAMA, "lm_head", None, lambda w: cap(lm_head(w), 2.3), "soft cap of 2.3"),
    (GEMMA, "attn_norm", 1, lambda w: rms(w.at("post_ffn_residual"))
     * w.weights["model.layers.1.input_layernorm.weight"].values,
     "norm weight without its 1 (by w in place of 1 + w)"),
    (GEMMA, "attn_post_norm", 0, lambda w: rms(w.at("attn_out"))
     * w.weight("post_attention_layernorm.weight"),
     "norm weight without its 1 (by w in place of 1 + w)"),
    (GEMMA, "ffn_post_norm", 0, lambda w: rms(w.at("ffn_out"))
     * (2 + w.weight("post_feedforward_layernorm.weight")), "norm weight + 1 once more"),
    (LLAMA, "ffn_norm", 0, lambda w: rms(w.at("post_attn_residual"))
     * (1 + w.weight("post_attention_layernorm.weight")),
     "norm weight + 1 (by 1 + w in place of w)"),
    (QWEN3, "q_post_rope", 0, lambda w: turned(rms(w.at("qkv_matmul")[:, : H * D].reshape(T, H, D))
     * (1 + w.weight("self_attn.q_norm.weight"))), "norm weight + 1 (by 1 + w in place of w)"),
    (GEMMA, "post_attn_residual", 0, lambda w: w.at("embedding") + w.at("attn_out"),
     "post-norm missing: the block's output is added before its norm"),
    (GEMMA, "post_ffn_residual", 0, lambda w: w.at("post_attn_residual")
     + rms(w.at("ffn_post_norm")) * (1 + w.weight("post_feedforward_layernorm.weight")),
     "post-norm applied twice"),
    (GEMMA, "embedding", 0, lambda w: w.weight("model.embed_tokens.weight")[TOKENS],
     f"embedding not scaled by {E**0.5:.6g}"),
    (GEMMA, "embedding", 0, lambda w: w.weight("model.embed_tokens.weight")[TOKENS] * E,
     f"embedding scaled by {E**0.5:.6g} twice"),
    (GEMMA, "embedding", 0, lambda w: w.weight("model.embed_tokens.weight")[TOKENS] * 4.46875,
     "embedding scaled by 4.46875, the scale rounded to bfloat16"),
    (LLAMA, "embedding", 0, lambda w: w.weight("model.embed_tokens.weight")[TOKENS] * E**0.5,
     "embedding scaled by sqrt(E)"),
]  # fmt: skip


def turned(x: Floats) -> Floats:
    """RoPE of x [T, N, D]."""
    out = x.copy()
    for t in range(T):
        for i in range(D // 2):
            c, s = np.cos(t * 1e4 ** (-2 * i / D)), np.sin(t * 1e4 ** (-2 * i / D))
            out[t, :, i] = x[t, :, i] * c - x[t, :, i + D // 2] * s
            out[t, :, i + D // 2] = x[t, :, i] * s + x[t, :, i + D // 2] * c
    return out


@pytest.mark.parametrize(
    ("config", "stage", "layer", "fault", "cause"), FAULTS,
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_fault_of_an_architecture_is_named(
    config: ModelConfig, stage: str, layer: int | None, fault: Callable[[World], Floats], cause: str
) -> None:
    world = run(config)
    found = named(world, stage, layer, fault(world))
    names = [c.name for c in found.named]
    assert len(names) == 1 and cause in names[0], (names, found.causes[:3], found.symptom)


IN_FILE: list[Fault] = [
    (GEMMA, "attn_norm", 0, lambda w: rms(w.at("embedding")) * w.weight("input_layernorm.weight"),
     "norms stored as 1 + w"),
    (LLAMA, "attn_norm", 0, lambda w: rms(w.at("embedding"))
     * (1 + w.weight("input_layernorm.weight")), "norm weight + 1 in the original model"),
    (GEMMA, "attn_softmax", 0, lambda w: softmax(gemma_scores(w), band(None)),
     "no window in the original model"),
    (LLAMA, "attn_softmax", 0, lambda w: softmax(plain_scores(w), band(None, True)),
     "no causal mask in the original model"),
    (GEMMA, "attn_scores", 0, lambda w: w.products() / SCALAR**0.5,
     "no soft cap in place of 2 in the original model"),
    (LLAMA, "attn_softmax", 0, lambda w: softmax(plain_scores(w), band(6)),
     "only the last 6 positions attended to in the original model"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "stage", "layer", "fault", "cause"), IN_FILE)
def test_a_files_fault_of_an_architecture_is_named(
    config: ModelConfig, stage: str, layer: int | None, fault: Callable[[World], Floats], cause: str
) -> None:
    world = run(config)
    found = named(world, stage, layer, fault(world), in_file=True)
    names = [c.name for c in found.named]
    assert len(names) == 1 and cause in names[0], (names, found.causes[:3], found.symptom)
