"""Causes by experiment: what llama.cpp's options, caches and fused kernels get wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from aprcore.causes import explain_nonfinite
from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.judging.replay import RecordedSide
from aprcore.network.rope import RopeScaling
from aprcore.network.stages import StageKey
from cause_passes import (
    CONFIG,
    LAYER,
    TOKENS,
    D,
    E,
    ExactWeight,
    Floats,
    H,
    K,
    Pass,
    T,
    V,
    plain_frequencies,
    products,
    rms,
    run,
    softmax,
    told,
    turned,
    weighted,
    with_rope,
    yarn_frequencies,
)

PLACES = np.arange(T)
CONFIGS = {
    "plain": CONFIG,
    "yarn": with_rope(scaling=RopeScaling("yarn", 4.0, 4096)),
    "deep": replace(CONFIG, num_layers=12),
    "odd": replace(CONFIG, head_dim=20, rope=replace(CONFIG.rope, head_dim=20)),
    "llama3": with_rope(scaling=RopeScaling("llama3", 8.0, 64)),
}
YARN_FACTOR = 0.1 * np.log(4) + 1

Fault = tuple[str, str, Callable[[Pass], Floats], str]


def q_turned(
    frequencies: Floats, positions: Floats = PLACES, factor: float = 1.0
) -> Callable[[Pass], Floats]:
    return lambda p: turned(p.part("q"), frequencies, positions, factor)


ROPE: list[Fault] = [
    ("plain", "q_post_rope", q_turned(plain_frequencies(), PLACES + 37),
     "RoPE positions off by +37"),
    ("plain", "q_post_rope", q_turned(plain_frequencies(), PLACES - 1200),
     "RoPE positions off by -1200"),
    ("plain", "q_post_rope", q_turned(plain_frequencies(), np.minimum(PLACES, 9)),
     "RoPE positions held at 9"),
    ("plain", "q_post_rope", q_turned(plain_frequencies() / 4), "RoPE positions divided by 4"),
    ("plain", "q_post_rope", q_turned(plain_frequencies() * 0.3),
     "RoPE positions divided by 3.33333"),
    ("plain", "q_post_rope", q_turned(yarn_frequencies(4, 64), factor=YARN_FACTOR),
     "RoPE scaling added: yarn by 4 from 64"),
    ("plain", "q_post_rope", q_turned(yarn_frequencies(4, 64)),
     "RoPE scaling added: yarn by 4 from 64, with an attention factor of 1"),
    ("yarn", "q_post_rope", q_turned(plain_frequencies()), "RoPE scaling (yarn) missing"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 4096), factor=1.3),
     "RoPE scaling with an attention factor of 1.3 in place of 1.1386"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 4096, fast=4), factor=YARN_FACTOR),
     "RoPE scaling with beta_fast 4 in place of 32"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 4096, slow=0.5), factor=YARN_FACTOR),
     "RoPE scaling with beta_slow 0.5 in place of 1"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(4, 512), factor=YARN_FACTOR),
     "RoPE scaling with original_max_position_embeddings 512 in place of 4096"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(8, 4096), factor=0.1 * np.log(8) + 1),
     "RoPE scaling with factor 8 in place of 4"),
    ("llama3", "q_post_rope", q_turned(plain_frequencies() / 8), "as if it were linear"),
]  # fmt: skip


STALE = np.random.default_rng(9).standard_normal((T, K, D))


def chunked(size: int, start: int = 0) -> Floats:
    """Which positions each query sees of its own chunk alone."""
    chunk = PLACES // size if not start else (start <= PLACES).astype(int)
    return np.tri(T, dtype=bool) & (chunk[:, None] == chunk[None, :])


def rolled(x: Floats) -> Floats:
    """Every row one late; the first is empty."""
    return np.concatenate([0 * x[:1], x[:-1]])


def added(low: float) -> Callable[[Pass], Floats]:
    """A mask that is a number."""
    return lambda p: softmax(
        products(p.queries(), p.keys()) + np.where(np.tri(T, dtype=bool), 0.0, low),
        np.ones((T, T), bool),
    )


def with_sinks(logits: Floats) -> Callable[[Pass], Floats]:
    def fault(p: Pass) -> Floats:
        powers = np.where(np.tri(T, dtype=bool), np.exp(p.at("attn_scores")), 0.0)
        return powers / (powers.sum(axis=2, keepdims=True) + np.exp(logits)[:, None, None])

    return fault


def patched(x: Floats, rows: slice, other: Floats) -> Floats:
    out = x.copy()
    out[rows] = other[rows]
    return out


DISTANCE = PLACES[None] - PLACES[:, None]
SLOPES = np.asarray([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None]

ATTENTION: list[Fault] = [
    ("plain", "attn_scores", lambda p: products(p.queries(), p.keys(0)),
     "scores against the keys of layer 0"),
    ("plain", "attn_scores", lambda p: products(p.queries(), p.keys(2)),
     "scores against the keys of layer 2"),
    ("plain", "attn_scores", lambda p: products(p.queries(), rolled(p.keys())),
     "scores against keys one token earlier"),
    ("plain", "attn_scores", lambda p: products(p.queries(), patched(
        p.keys(), slice(4, 7), STALE)), "stale keys at positions 4 to 6 of the cache"),
    ("plain", "attn_scores", lambda p: products(p.queries(), patched(
        p.keys(), slice(5, 9), p.keys(0))), "keys of layer 0, in positions 5 to 8 only"),
    ("odd", "attn_scores", lambda p: products(
        p.queries()[:, :, :16], p.keys()[:, :, :16], 20**-0.5),
     "the last 4 dimensions of a head left out"),
    ("plain", "attn_scores", lambda p: products(
        *(p.at(f"{part}_post_rope").reshape(T, D, -1).swapaxes(1, 2) for part in "qk")),
     "head count and head dimension exchanged in q and k"),
    ("plain", "attn_scores", lambda p: p.at("attn_scores") + SLOPES * DISTANCE, "ALiBi added"),
    ("plain", "attn_scores", lambda p: products(p.queries(), p.keys()) * 1.7,
     "attention scale 0.425"),
    ("plain", "attn_softmax", lambda p: softmax(p.at("attn_scores") + SLOPES * DISTANCE),
     "ALiBi added"),
    ("plain", "attn_softmax", lambda p: softmax(p.at("attn_scores"), chunked(8)),
     "nothing before it seen in chunks of 8 tokens"),
    ("plain", "attn_softmax", lambda p: softmax(p.at("attn_scores"), chunked(0, 11)),
     "nothing before it seen from token 11 on"),
    ("plain", "attn_softmax", lambda p: softmax(p.at("attn_scores") / 1.7),
     "softmax at a temperature of 1.7"),
    ("plain", "attn_softmax", with_sinks(np.zeros(4)), "softmax with 1 added to the sum"),
    ("plain", "attn_softmax", with_sinks(np.asarray([1.0, -0.5, 0.25, 2.0])),
     "softmax with a logit more for each head, -0.5 to 2 (a sink)"),
    ("plain", "attn_softmax", with_sinks(np.full(4, 0.7)), "softmax with one logit of 0.7 more"),
    ("plain", "attn_softmax", added(-10.0), "mask adds -10 in place of -inf"),
    ("plain", "attn_softmax", added(-7.5), "mask adds -7.5 in place of -inf"),
    ("plain", "attention", lambda p: weighted(p.at("attn_softmax"), p.part("v", 0)),
     "weighted sum of the values of layer 0"),
    ("plain", "attention", lambda p: weighted(p.at("attn_softmax"), rolled(p.part("v"))),
     "weighted sum of v one token earlier (zeros first)"),
    ("plain", "attention", lambda p: weighted(p.at("attn_softmax"), patched(
        p.part("v"), slice(6, 7), STALE)), "stale values at position 6 of the cache"),
    ("plain", "attention", lambda p: weighted(p.at("attn_softmax"), patched(
        p.part("v"), slice(3, 7), STALE)), "stale values at positions 3 to 6 of the cache"),
]  # fmt: skip


def attended(
    q: Floats,
    k: Floats,
    v: Floats,
    scale: float = D**-0.5,
    kv_of: Callable[[int], int] | None = None,
) -> Floats:  # fmt: skip
    return weighted(softmax(products(q, k, scale, kv_of)), v, kv_of)


def unrescaled(p: Pass, size: int, sums: tuple[bool, bool]) -> Floats:
    """Flash attention, a block of keys after the other, that forgets to rescale its sums."""
    x, v = products(p.queries(), p.keys()), p.part("v")
    out = np.zeros((T, H, D))
    for h in range(H):
        for t in range(T):
            top, total, mixed = -np.inf, 0.0, np.zeros(D)
            for start in range(0, t + 1, size):
                block = slice(start, min(start + size, t + 1))
                new = max(top, x[h, t, block].max())
                shrink = np.exp(top - new)
                powers = np.exp(x[h, t, block] - new)
                mixed = mixed * (shrink if sums[0] else 1.0) + powers @ v[block, h // (H // K)]
                total = total * (shrink if sums[1] else 1.0) + powers.sum()
                top = new
            out[t, h] = mixed / total
    return out


def both_turned(p: Pass, frequencies: Floats) -> Floats:
    q, k = (turned(p.part(part), frequencies, PLACES) for part in "qk")
    return attended(q, k, p.part("v"))


def permuted(rows: Floats, heads: int) -> Floats:
    """llama.cpp's `permute` of the rows of q or k."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def unpermuted(rows: Floats, heads: int) -> Floats:
    return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def with_rows(part: str, change: Callable[[Floats], Floats]) -> Callable[[Pass], Floats]:
    """The projections with the rows of one of them changed."""

    def fault(p: Pass) -> Floats:
        weights = [p.weight(f"self_attn.{c}_proj.weight") for c in "qkv"]
        weights["qkv".index(part)] = change(weights["qkv".index(part)])
        return p.at("attn_norm") @ np.concatenate(weights).T

    return fault


def twice(parts: int, *which: int) -> Callable[[Pass], Floats]:
    """Down projection whose sum over some parts of the inner dimension is there twice."""

    def fault(p: Pass) -> Floats:
        x = p.at("ffn_swigl").reshape(T, parts, -1).copy()
        x[:, list(which)] *= 2
        return x.reshape(T, -1) @ p.weight("mlp.down_proj.weight").T

    return fault


def gate(x: Callable[[Floats], Floats]) -> Callable[[Pass], Floats]:
    """The gate of other activations."""
    return lambda p: x(p.at("ffn_norm")) @ p.weight("mlp.gate_proj.weight").T


def in_4_bits(x: Floats) -> Floats:
    step = np.abs(x).max(axis=1, keepdims=True) / 7
    return np.round(x / step) * step


def in_8_bits_of_all(x: Floats) -> Floats:
    step = np.abs(x).max() / 127
    return np.round(x / step) * step


def from_the_lowest(x: Floats) -> Floats:
    low = x.min(axis=1, keepdims=True)
    step = (x.max(axis=1, keepdims=True) - low) / 255
    zero = np.round(-low / step)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step


def without_block(p: Pass) -> Floats:
    weight = p.weight("mlp.gate_proj.weight").copy()
    weight[7, :32] = 0
    return p.at("ffn_norm") @ weight.T


def normed(x: Floats, weight: Floats) -> Floats:
    return rms(x) * weight


PRODUCTS: list[Fault] = [
    ("plain", "qkv_matmul", with_rows("k", lambda k: permuted(k, H)),
     "k_proj rows permuted as 4 heads of 8 (H in place of K)"),
    ("plain", "qkv_matmul", with_rows("k", lambda k: unpermuted(permuted(k, H), K)),
     "k_proj rows permuted as 4 heads of 8, and back as 2 (H in place of K)"),
    ("plain", "qkv_matmul", with_rows("q", lambda q: permuted(q, K)),
     "q_proj rows permuted as 2 heads of 32 (K in place of H)"),
    ("plain", "ffn_out", twice(4, 1), "down_proj sum with part 1 of 4 added twice"),
    ("plain", "ffn_out", twice(8, 0, 5),
     "down_proj sum with part 0 of 8 added twice and part 5 of 8 added twice"),
    ("plain", "ffn_gate", gate(in_4_bits), "rounded to 4 bits (a scale for each token)"),
    ("plain", "ffn_gate", gate(in_8_bits_of_all), "rounded to 8 bits (one scale for all tokens)"),
    ("plain", "ffn_gate", gate(from_the_lowest),
     "rounded to 8 bits (a scale for each token, with a zero point)"),
    ("plain", "ffn_gate", without_block, "block 0 of row 7 (zero)"),
    ("plain", "ffn_gate", lambda p: p.at("attn_norm") @ p.weight("mlp.gate_proj.weight").T,
     "gate_proj reads attn_norm (a parallel block)"),
    ("plain", "ffn_norm", lambda p: normed(
        p.at("post_ffn_residual", 0), p.weight("post_attention_layernorm.weight")),
     "norm of the layer's input (a parallel block)"),
    ("plain", "ffn_norm", lambda p: normed(
        p.at("attn_out"), p.weight("post_attention_layernorm.weight")), "norm of attn_out"),
    ("plain", "attn_norm", lambda p: normed(
        p.at("post_ffn_residual", 2), p.weight("input_layernorm.weight")),
     "norm of what layer 2 gives"),
    ("plain", "attn_norm", lambda p: normed(p.at("embedding", 0),
     p.weight("input_layernorm.weight")), "norm of the embedding"),
    ("plain", "q_post_rope", lambda p: turned(
        p.part("q").reshape(T, 2 * H, D // 2), plain_frequencies(dim=D // 2), PLACES),
     "RoPE on heads of 8 dimensions in place of 16"),
    ("deep", "ffn_gate", lambda p: p.at("ffn_norm") @ p.weight("mlp.gate_proj.weight", 3).T,
     "gate_proj weight of layer 3"),
]  # fmt: skip


def test_layers_in_the_order_of_their_names() -> None:
    p = sound("deep")
    x, weight = p.at("ffn_norm", 2), p.weight("mlp.gate_proj.weight", 10)
    found = told(p, "ffn_gate", x @ weight.T, layer=2)
    assert [c.name for c in found.named] == [
        "gate_proj weight of layer 10 (layers in the order of their names: 0, 1, 10, ...)"
    ]


IN_FILE: list[Fault] = [
    ("plain", "q_post_rope", q_turned(yarn_frequencies(4, 64), factor=YARN_FACTOR),
     "RoPE scaling yarn by 4 from 64 in the original model, dropped in this file"),
    ("plain", "q_post_rope", q_turned(plain_frequencies() / 4),
     "RoPE scaling (linear by 4) in the original model"),
    ("yarn", "q_post_rope", q_turned(yarn_frequencies(8, 4096), factor=0.1 * np.log(8) + 1),
     "RoPE scaling with factor 8 in place of 4 in the original model"),
    ("yarn", "q_post_rope", q_turned(plain_frequencies()),
     "no RoPE scaling in the original model"),
    ("plain", "attn_softmax", with_sinks(np.asarray([1.0, -0.5, 0.25, 2.0])),
     "(a sink) in the original model"),
    ("plain", "qkv_matmul", with_rows("k", lambda k: unpermuted(permuted(k, K), H)),
     "(H in place of K)"),
    ("plain", "ffn_norm", lambda p: normed(
        p.at("post_ffn_residual", 0), p.weight("post_attention_layernorm.weight")),
     "norm of the layer's input (a parallel block) in the original model"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "stage", "fault", "cause"), IN_FILE)
def test_a_files_fault_is_named(
    model: str, stage: str, fault: Callable[[Pass], Floats], cause: str
) -> None:
    found = told(sound(model), stage, fault(sound(model)), in_file=True)
    names = [c.name for c in found.named]
    assert len(names) == 1 and cause in names[0], (names, found.causes[:3])


def test_a_head_that_was_dropped_is_named_by_what_the_file_shows() -> None:
    p = sound("plain")
    head = np.random.default_rng(8).standard_normal((V, E)) / E**0.5
    logits = p.at("final_norm", None)[-1] @ head.T
    found = told(p, "lm_head", logits, layer=None, in_file=True)
    assert [c.is_evidence for c in found.named] == [True]
    assert "the original's was dropped" in found.named[0].name
    # A tied head is nothing odd where the logits are its own, but for a factor.
    scaled = told(p, "lm_head", p.at("lm_head", None) * 1.3, layer=None, in_file=True)
    assert not any("dropped" in c.name for c in scaled.named)


def test_infinity_in_a_weight_is_told_from_an_overflow() -> None:
    p = sound("plain")
    name = f"model.layers.{LAYER}.mlp.up_proj.weight"
    values = p.weights[name].values.copy()
    values[5, 3] = np.inf
    weights = p.weights | {name: ExactWeight(name, values)}
    engine = arithmetic_of_dtype("float32")
    side = RecordedSide(p.graph, weights, TOKENS.tolist(), T, engine, read=p.tensors.get)
    observed = (p.at("ffn_norm") @ values.T).astype(np.float32)
    found = explain_nonfinite(side, StageKey(LAYER, "ffn_up"), observed)
    assert found is not None
    assert [c.name for c in found.named] == [
        "mlp.up_proj.weight is not finite in this file (row 5)"
    ]


SCORES = ("attn_scores", "attn_softmax")
ALL = (*SCORES, "q_post_rope", "k_post_rope")
FUSED: list[tuple[tuple[str, ...], Callable[[Pass], Floats], str]] = [
    (SCORES, lambda p: attended(p.queries(), p.keys(), p.part("v"), kv_of=lambda h: h % K),
     "kv heads tiled (head h reads kv head h mod K) instead of grouped"),
    (ALL, lambda p: attended(p.queries(), p.keys(), p.part("v"), kv_of=lambda h: h % K),
     "kv heads tiled (head h reads kv head h mod K) instead of grouped"),
    (ALL, lambda p: both_turned(p, plain_frequencies(5e5)), "q and k: RoPE theta 500000"),
    (ALL, lambda p: attended(p.part("q"), p.part("k"), p.part("v")),
     "scores of q and k before RoPE"),
    (SCORES, lambda p: attended(p.queries(), p.keys(0), p.part("v", 0)),
     "keys and values of layer 0"),
    (SCORES, lambda p: attended(p.queries(), p.keys(0), p.part("v")),
     "attn_scores: scores against the keys of layer 0"),
    (SCORES, lambda p: attended(p.queries(), p.keys(), p.part("v", 0)),
     "weighted sum of the values of layer 0"),
    (SCORES, lambda p: attended(p.queries(), rolled(p.keys()), rolled(p.part("v"))),
     "keys and values one token earlier (zeros first)"),
    (SCORES, lambda p: unrescaled(p, 8, (False, False)),
     "of the sum of values and the sum of weights, in blocks of 8 keys"),
    (SCORES, lambda p: unrescaled(p, 16, (False, True)),
     "flash attention, of the sum of values, in blocks of 16 keys"),
    (SCORES, lambda p: unrescaled(p, 8, (True, False)),
     "flash attention, of the sum of weights, in blocks of 8 keys"),
    (SCORES, lambda p: attended(p.queries(), p.keys(), p.part("v"), 0.4), "attention scale 0.4"),
    (SCORES, lambda p: attended(p.queries(), p.keys(), p.part("v"), D**0.5),
     "attn_scores: attention scale sqrt(D)"),
    (SCORES, lambda p: weighted(softmax(products(p.queries(), p.keys()), chunked(8)), p.part("v")),
     "nothing before it seen in chunks of 8 tokens"),
    (SCORES, lambda p: weighted(softmax(products(p.queries(), p.keys()), np.ones((T, T), bool)),
                                p.part("v")), "no causal mask"),
    (SCORES, lambda p: weighted(with_sinks(np.zeros(4))(p), p.part("v")),
     "softmax with 1 added to the sum"),
    (SCORES, lambda p: weighted(with_sinks(np.asarray([1.0, -0.5, 0.25, 2.0]))(p), p.part("v")),
     "softmax with a logit more for each head, -0.5 to 2 (a sink)"),
    (SCORES, lambda p: weighted(softmax(p.at("attn_scores") + SLOPES * DISTANCE), p.part("v")),
     "ALiBi added"),
]  # fmt: skip


@pytest.mark.parametrize(("undumped", "fault", "cause"), FUSED)
def test_a_fault_of_fused_attention_is_named(
    undumped: tuple[str, ...], fault: Callable[[Pass], Floats], cause: str
) -> None:
    p = sound("plain")
    found = told(p, "attention", fault(p), undumped=undumped)
    names = [c.name for c in found.named]
    assert len(names) == 1 and cause in names[0], (names, found.causes[:3])


@cache
def sound(model: str) -> Pass:
    return run(CONFIGS[model])


@pytest.mark.parametrize(
    ("model", "stage", "fault", "cause"), [*ROPE, *ATTENTION, *PRODUCTS],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_engines_fault_is_named(
    model: str, stage: str, fault: Callable[[Pass], Floats], cause: str
) -> None:
    found = told(sound(model), stage, fault(sound(model)))
    names = [c.name for c in found.named]
    assert names == [cause] or (len(names) == 1 and cause in names[0]), (names, found.causes[:3])
