"""Causes by experiment: what a conversion spoilt in a file is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aprcore.causes import explain
from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import DataFile
from aprcore.judging.layouts import layout_of
from aprcore.judging.noise import assess
from aprcore.judging.replay import RecordedSide
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.rope import Rope
from aprcore.network.stages import StageKey
from cause_worlds import (
    ATTENTION,
    LAYER,
    MLP,
    TOKENS,
    Floats,
    H,
    T,
    World,
    edited,
    explained,
    to_pair_rows,
)
from tiny import draw_weights, trace_model, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("causes") / "m.apr")


@pytest.fixture(scope="module")
def world(path: Path) -> World:
    return World(trace_model(path, TOKENS), draw_weights())


def moved(name: str, change: Callable[[Floats], Floats]) -> Callable[[dict[str, Floats]], dict]:
    """A conversion that spoils one weight."""
    return lambda weights: {name: np.ascontiguousarray(change(weights[name]), np.float32)}


CONVERSIONS = [
    ("qkv_matmul", moved(ATTENTION + "q_proj.weight", lambda q: to_pair_rows(q, H)), {},
     "q_proj rows permuted from pairs to halves"),
    ("ffn_out", moved(MLP + "down_proj.weight", lambda x: x.T.reshape(x.shape)), {},
     "down_proj weight transposed"),
    ("ffn_gate", lambda w: {MLP + "gate_proj.weight": w[MLP + "up_proj.weight"],
                            MLP + "up_proj.weight": w[MLP + "gate_proj.weight"]}, {},
     "gate and up swapped"),
    ("qkv_bias", moved(ATTENTION + "k_proj.bias", lambda b: 0 * b), {}, "bias of k lost"),
    ("qkv_matmul", moved(ATTENTION + "v_proj.weight", lambda v: edited(v, slice(8, None), 0)), {},
     "weight rows 44 to 47 are zero in this file"),
    ("attn_norm", moved(f"model.layers.{LAYER}.input_layernorm.weight", lambda x: x - 1), {},
     "norm weight + 1 in the original model"),
    ("attn_norm", moved(f"model.layers.{LAYER}.input_layernorm.weight", lambda x: 0 * x + 1), {},
     "norm weight is all ones in this file"),
    ("q_post_rope", dict, {"rope_theta": 1e6}, "RoPE theta 10000 in the original model"),
    ("attn_norm", dict, {"rms_norm_eps": 1e-3}, "norm eps 1e-06 in the original model"),
    ("ffn_silu", dict, {"hidden_act": "gelu"}, "silu as the activation in the original model"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "convert", "metadata", "cause"), CONVERSIONS)
def test_a_files_fault_is_named(
    tmp_path: Path, world: World, stage: str, convert: Callable[[dict[str, Floats]], dict],
    metadata: dict[str, Any], cause: str,
) -> None:  # fmt: skip
    path = write_model(
        tmp_path / "bad.apr", changed=convert(world.weights) if convert is not dict else {},
        metadata=metadata,
    )  # fmt: skip
    key = StageKey(LAYER, stage)
    found = explained(path, world.tensors, key, world.tensors[key], in_file=True)
    names = [c.name for c in found.named]
    assert len(names) == 1 and cause in names[0], (names, found.causes[:3], found.symptom)


def nibbles_of(blocks: NDArray[np.uint8], *, is_swapped: bool = False) -> Floats:
    """Q4_0: a float16 step, then 16 bytes whose low halves come first."""
    steps = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    low, high = (blocks[:, 2:] & 15).astype(int), (blocks[:, 2:] >> 4).astype(int)
    codes = np.hstack([high, low] if is_swapped else [low, high])
    return (codes - 8) * steps


def test_a_wrong_decoder_is_named(tmp_path: Path) -> None:
    generator = np.random.default_rng(11)
    out, width = 24, 64
    blocks = generator.integers(0, 256, (out * 2, 18), dtype=np.uint8)
    blocks[:, :2] = generator.uniform(0.01, 0.02, (out * 2, 1)).astype(np.float16).view(np.uint8)
    (tmp_path / "w").write_bytes(blocks.tobytes())
    with DataFile(tmp_path / "w") as file:
        weight = StoredTensor(f"{MLP}down_proj.weight", (out, width), "Q4_0", file, 0, blocks.size)
        config = ModelConfig("llama", out, 2, 2, 1, 12, width, 5, 1e-6, Rope(1e4, 12))
        x = generator.standard_normal((T, width)).astype(np.float32)
        read = {StageKey(LAYER, "ffn_swigl"): x}.get
        engine = arithmetic_of_dtype("float32")
        side = RecordedSide(Graph(config), {weight.name: weight}, None, T, engine, read=read)
        key = StageKey(LAYER, "ffn_out")
        expected = side.expect(key)
        assert expected is not None
        layout = layout_of(key, side.sizes(), T * out)
        for is_swapped in (False, True):
            rows = nibbles_of(blocks, is_swapped=is_swapped).reshape(out, width)
            observed = (x.astype(np.float64) @ rows.T).astype(np.float32).reshape(-1)
            assert assess(observed, expected.estimate, layout).explained is not is_swapped
        found = explain(side, key, observed, expected, layout, in_file=False)
    assert [c.name for c in found.named] == ["down_proj dequantised with nibbles swapped"]


def test_what_a_file_shows_of_itself_is_named_last(tmp_path: Path, world: World) -> None:
    """The original weight is gone: only that this one is another's tells."""
    copied = {MLP + "down_proj.weight": world.weights["model.layers.0.mlp.down_proj.weight"]}
    path = write_model(tmp_path / "bad.apr", changed=copied)
    key = StageKey(LAYER, "ffn_out")
    found = explained(path, world.tensors, key, world.tensors[key], in_file=True)
    assert [c.is_evidence for c in found.named] == [True]
    assert "copy of model.layers.0.mlp.down_proj" in found.named[0].name
    assert "when tried" not in found.clause()
