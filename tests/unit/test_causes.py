"""Causes by experiment: faults of an engine made apart from the catalogue are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aprcore.causes import explain_nonfinite
from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.judging.replay import RecordedSide
from aprcore.network.stages import StageKey
from cause_worlds import (
    LAYER,
    TOKENS,
    D,
    E,
    F,
    Floats,
    H,
    K,
    T,
    V,
    World,
    all_scores,
    edited,
    explained,
    grouped,
    half_sums,
    in_8_bits,
    masked,
    rms,
    rotate,
    scores,
    sigmoid,
    softmax,
    to_pair_rows,
    weighted,
    with_k,
)
from tiny import draw_weights, opened, trace_model, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("causes") / "m.apr")


@pytest.fixture(scope="module")
def world(path: Path) -> World:
    return World(trace_model(path, TOKENS), draw_weights())


Fault = tuple[str, Callable[[World], Floats], str]

ROPE: list[Fault] = [
    ("q_post_rope", lambda w: rotate(w.part("q"), pairs=True), "RoPE on adjacent pairs"),
    ("k_post_rope", lambda w: rotate(w.part("k"), theta=5e5), "RoPE theta 500000"),
    ("q_post_rope", lambda w: rotate(w.part("q"), theta=31337.0), "RoPE theta 31337"),
    ("q_post_rope", lambda w: rotate(w.part("q"), start=1), "RoPE positions off by +1"),
    ("k_post_rope", lambda w: rotate(w.part("k"), start=-1), "RoPE positions off by -1"),
    ("q_post_rope", lambda w: np.concatenate([rotate(w.part("q")[:4]), rotate(w.part("q")[4:8]),
                                              rotate(w.part("q")[8:])]), "restarting every 4"),
    ("q_post_rope", lambda w: np.concatenate([rotate(w.part("q")[:6]), rotate(w.part("q")[6:])]),
     "RoPE positions restarting"),
    ("q_post_rope", lambda w: w.part("q"), "RoPE not applied"),
    ("q_post_rope", lambda w: rotate(rotate(w.part("q"))), "RoPE applied twice"),
    ("q_post_rope", lambda w: rotate(w.part("q"), sign=-1), "sine negated"),
    ("k_post_rope", lambda w: rotate(w.part("k"), rotary=2), "first 2 dimensions"),
    ("q_post_rope", lambda w: rotate(w.part("q"), step=0.25), "positions divided by 4"),
    ("q_post_rope", lambda w: rotate(w.part("q", "qkv_matmul")), "before its bias"),
    ("q_post_rope", lambda w: edited(rotate(w.part("q")), (slice(None), 2),
                                     rotate(w.part("q"), pairs=True)[:, 2]),
     "RoPE on adjacent pairs, in head 2 only"),
]  # fmt: skip

ATTENTION_FAULTS: list[Fault] = [
    ("attn_scores", lambda w: np.tril(all_scores(w) * D**0.5), "attention scale none"),
    ("attn_scores", lambda w: np.tril(all_scores(w) * (D / E) ** 0.5), "1/sqrt(E), the hidden"),
    ("attn_scores", lambda w: np.tril(all_scores(w) * 0.7), "attention scale 0.28"),
    ("attn_scores", lambda w: np.tril(scores(w.at("q_post_rope"), w.at("k_post_rope"), D**-0.5,
                                             lambda h: h % K)), "kv heads tiled"),
    ("attention", lambda w: weighted(w.at("attn_softmax"), w.part("v"), lambda h: h % K),
     "kv heads tiled"),
    ("attn_scores", lambda w: np.tril(scores(w.part("q"), w.part("k"), D**-0.5, grouped)),
     "scores of q and k before RoPE"),
    ("attn_softmax", lambda w: softmax(all_scores(w)), "no causal mask"),
    ("attn_softmax", lambda w: softmax(masked(all_scores(w), 1)), "mask off by one (+1)"),
    ("attn_softmax", lambda w: np.tril(softmax(all_scores(w))), "mask after softmax"),
    ("attn_softmax", lambda w: np.nan_to_num(softmax(masked(all_scores(w)), axis=1)),
     "wrong axis: queries"),
    ("attn_softmax", lambda w: softmax(masked(all_scores(w))).astype(np.float16), "float16"),
    ("attn_softmax", lambda w: softmax(masked(all_scores(w) * D**-0.5)), "divided by sqrt(D)"),
    ("attention", lambda w: weighted(w.at("attn_softmax"), rotate(w.part("v"))),
     "RoPE applied to v too"),
    ("attention", lambda w: weighted(w.at("attn_softmax"), w.part("k")), "k's columns"),
    ("attention", lambda w: weighted(w.at("attn_softmax"), w.part("v", "qkv_matmul")),
     "v before its bias"),
]  # fmt: skip

PRODUCTS: list[Fault] = [
    ("qkv_matmul", lambda w: with_k(w, to_pair_rows(w.weight("self_attn.k_proj.weight"), K)),
     "k_proj rows permuted from halves to pairs"),
    ("qkv_matmul", lambda w: with_k(w, w.weight("self_attn.k_proj.weight").reshape(E, K * D).T),
     "k_proj weight transposed"),
    ("qkv_matmul", lambda w: with_k(w, w.weight("self_attn.v_proj.weight")),
     "k_proj uses the weight of v_proj"),
    ("qkv_matmul", lambda w: with_k(w, w.weight("self_attn.k_proj.weight", 0)),
     "k_proj weight of layer 0"),
    ("qkv_matmul", lambda w: np.concatenate(
        [w.part("k", "qkv_matmul"), w.part("q", "qkv_matmul"), w.part("v", "qkv_matmul")], axis=1),
     "in the order k, q, v"),
    ("ffn_up", lambda w: w.at("ffn_norm") @ w.weight("mlp.gate_proj.weight").T,
     "gate and up swapped"),
    ("ffn_gate", lambda w: edited(w.at("ffn_gate"), (slice(None), slice(20, F)), 0.0),
     "not computed (left at zero), in dims 20 to 27 only"),
    ("ffn_out", lambda w: w.at("ffn_swigl")[:, :-4] @ w.weight("mlp.down_proj.weight")[:, :-4].T,
     "leaves out the last 4 input dimensions"),
    ("ffn_out", lambda w: w.at("ffn_silu") @ w.weight("mlp.down_proj.weight").T,
     "down_proj reads ffn_silu"),
    ("attn_out", lambda w: w.at("attention").reshape(T, H, D).swapaxes(0, 1).reshape(T, H * D)
     @ w.weight("self_attn.o_proj.weight").T, "reads heads before tokens"),
    ("ffn_out", lambda w: half_sums(w.at("ffn_swigl"), w.weight("mlp.down_proj.weight")),
     "float16"),
    ("ffn_gate", lambda w: in_8_bits(w.at("ffn_norm")) @ w.weight("mlp.gate_proj.weight").T,
     "activations rounded to 8 bits"),
    ("qkv_bias", lambda w: w.at("qkv_matmul"), "bias of q, k and v missing"),
    ("qkv_bias", lambda w: edited(w.at("qkv_bias"), (slice(None), slice(H * D, (H + K) * D)),
                                  w.at("qkv_matmul")[:, H * D : (H + K) * D]),
     "bias of k missing"),
    ("qkv_bias", lambda w: 2 * w.at("qkv_bias") - w.at("qkv_matmul"), "bias of q, k and v doubled"),
    ("qkv_bias", lambda w: w.at("qkv_matmul") + np.concatenate(
        [w.weight(f"self_attn.{p}_proj.bias", 2) for p in "qkv"]), "of layer 2"),
]  # fmt: skip

OTHERS: list[Fault] = [
    ("attn_norm", lambda w: rms(w.stream, 1e-2) * w.weight("input_layernorm.weight"),
     "norm eps 0.01"),
    ("attn_norm", lambda w: rms(w.stream), "norm weight missing"),
    ("ffn_norm", lambda w: rms(w.at("post_attn_residual"))
     * (1 + w.weight("post_attention_layernorm.weight")), "norm weight + 1"),
    ("attn_norm", lambda w: rms(w.stream - w.stream.mean(1, keepdims=True))
     * w.weight("input_layernorm.weight"), "LayerNorm for RMSNorm"),
    ("attn_norm", lambda w: w.stream / np.sqrt((w.stream**2).mean(0) + 1e-6)
     * w.weight("input_layernorm.weight"), "mean square over the wrong axis (over tokens)"),
    ("attn_norm", lambda w: rms(w.stream) * w.weight("post_attention_layernorm.weight"),
     "norm weight of layers.1.post_attention_layernorm"),
    ("ffn_silu", lambda w: 0.5 * w.at("ffn_gate")
     * (1 + np.vectorize(math.erf)(w.at("ffn_gate") / 2**0.5)), "gelu as the activation"),
    ("ffn_silu", lambda w: 0.5 * w.at("ffn_gate") * (1 + np.tanh(
        (2 / math.pi) ** 0.5 * (w.at("ffn_gate") + 0.044715 * w.at("ffn_gate") ** 3))),
     "gelu_pytorch_tanh as the activation"),
    ("ffn_silu", lambda w: np.maximum(w.at("ffn_gate"), 0), "relu as the activation"),
    ("ffn_silu", lambda w: w.at("ffn_up") * sigmoid(w.at("ffn_up")),
     "activation of up instead of gate"),
    ("ffn_swigl", lambda w: w.at("ffn_gate") * w.at("ffn_up") * sigmoid(w.at("ffn_up")),
     "activation of up instead of gate"),
    ("ffn_swigl", lambda w: w.at("ffn_gate") * w.at("ffn_up"), "without the activation"),
    ("post_attn_residual", lambda w: w.at("attn_out"), "residual missing"),
    ("post_attn_residual", lambda w: 2 * w.stream + w.at("attn_out"), "residual added twice"),
    ("post_attn_residual", lambda w: w.at("attn_norm") + w.at("attn_out"),
     "the normalised stream instead of the stream"),
    ("post_ffn_residual", lambda w: w.stream + w.at("ffn_out"), "the layer's input"),
    ("ffn_silu", lambda w: 1.37 * w.at("ffn_silu"), "output scaled by a factor of 1.37"),
    ("ffn_silu", lambda w: w.at("ffn_silu")[:, np.random.default_rng(0).permutation(F)],
     "dims permuted"),
    ("ffn_norm", lambda w: w.at("attn_norm"), "stale: the tensor of layer 1 · attn_norm"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "fault", "cause"),
    [*ROPE, *ATTENTION_FAULTS, *PRODUCTS, *OTHERS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_engines_fault_is_named(
    path: Path, world: World, stage: str, fault: Callable[[World], Floats], cause: str
) -> None:
    found = explained(path, world.tensors, StageKey(LAYER, stage), fault(world))
    names = [c.name for c in found.named]
    assert any(cause in name for name in names), (names, found.causes[:3], found.symptom)
    assert len(names) == 1, names
    assert found.named[0].advice and found.named[0].cosine > 0.99
    assert found.symptom is None and cause in found.clause() and cause in found.summary()


@pytest.mark.parametrize(
    ("stage", "layer", "fault", "cause"),
    [
        ("embedding", 0, lambda w: w.weight("model.embed_tokens.weight", None)[
            [t + 1 for t in TOKENS[:2]] + [0] + [t + 1 for t in TOKENS[3:]]],
         "embedding row off by +1"),
        ("embedding", 0, lambda w: w.at("embedding", 0) * E**0.5, "scaled by sqrt(E)"),
        ("lm_head", None, lambda w: w.at("final_norm", None)[-2]
         @ w.weight("lm_head.weight", None).T, "logits of the last-but-one token"),
        ("lm_head", None, lambda w: w.at("final_norm", None)[-1]
         @ w.weight("model.embed_tokens.weight", None).T, "head tied to the embedding"),
    ],
)  # fmt: skip
def test_a_fault_at_either_end_is_named(
    tmp_path: Path, stage: str, layer: int | None, fault: Callable[[World], Floats], cause: str
) -> None:
    head = np.random.default_rng(4).standard_normal((V, E)).astype(np.float32) / 4
    weights = draw_weights() | {"lm_head.weight": head}
    path = write_model(tmp_path / "m.apr", changed={"lm_head.weight": head})
    world = World(trace_model(path, TOKENS), weights)
    found = explained(path, world.tensors, StageKey(layer, stage), fault(world))
    assert [c.name for c in found.named] and cause in found.named[0].name, found


def test_two_faults_in_one_product_are_both_named(path: Path, world: World) -> None:
    observed = with_k(world, to_pair_rows(world.weight("self_attn.k_proj.weight"), K))
    observed[:, : H * D] = world.at("attn_norm") @ world.weight("self_attn.q_proj.weight", 2).T
    found = explained(path, world.tensors, StageKey(LAYER, "qkv_matmul"), observed)
    assert [c.name for c in found.named] == [
        "q_proj weight of layer 2", "k_proj rows permuted from halves to pairs",
    ]  # fmt: skip
    assert "; " in found.clause() and " or " not in found.clause()


def test_an_overflow_is_named(path: Path, world: World) -> None:
    scores_of = edited(world.at("attn_scores"), (0, 5, 2), 95.0)
    scaled = edited(scores_of, (1, 7, 3), 20.0).astype(np.float32)  # too much for float16 alone
    tensors = world.tensors | {StageKey(LAYER, "attn_scores"): scaled}
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp(np.where(np.tri(T, dtype=bool), scaled, -np.inf))  # in float32
        observed = powers / powers.sum(axis=2, keepdims=True)
    with opened(path) as model:
        engine = arithmetic_of_dtype("float32")
        side = RecordedSide(model.graph, model.weights, TOKENS, T, engine, read=tensors.get)
        found = explain_nonfinite(side, StageKey(LAYER, "attn_softmax"), observed)
    assert found is not None
    assert {c.name for c in found.named} == {
        "softmax without the maximum's subtraction (exp overflows bfloat16 or float32)"
    }
