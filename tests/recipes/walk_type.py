"""What a stored type gets from its row and its steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from toys import judge, write_huggingface

from aprcore.network.stages import StageKey
from tiny import draw_weights, opened, trace_model, write_stages

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "model_type": "llama"}
NAME = "model.layers.1.self_attn.q_proj.weight"


def quantised(values: np.ndarray) -> np.ndarray:
    """Blocks of 16 codes behind their scale."""
    blocks = values.reshape(-1, 16)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 7).astype(np.float16)
    codes = np.rint(blocks / scales.astype(np.float32)).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=1)


def test_it_is_read_and_its_rounding_is_explained(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    drawn = draw_weights(has_bias=False)
    shapes = {20: 32, 24: 32, 12: 16}  # of the tiny model, in whole blocks
    weights = {}
    for name, values in drawn.items():
        shape = tuple(shapes.get(size, size) for size in values.shape)
        noise = rng.standard_normal(shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 5)
        weights[name] = (noise + (len(shape) == 1)).astype(np.float32)
    raw = quantised(weights[NAME])
    plain = write_huggingface(tmp_path / "plain", weights, SIZES)
    coarse = write_huggingface(tmp_path / "coarse", weights, SIZES, {NAME: ("TOY8", raw)})
    with opened(coarse) as model:
        weight = model.weights[NAME]
        assert weight.dtype == "TOY8"
        expected = raw[:, 2:].view(np.int8) * raw[:, :2].copy().view(np.float16).astype(np.float32)
        assert np.array_equal(weight.read(3, 5), expected.reshape(32, 32)[3:5])
        squares, group = weight.step_squares(0, 32)
        assert group == 16 and squares.shape == (32, 2)
    oracle = write_stages(tmp_path / "oracle", trace_model(plain))
    report = judge(coarse, oracle=oracle)
    assert report.first_divergence is None
    stages = {stage.key: stage for stage in report.stages}
    found = stages[StageKey(1, "qkv_matmul")]
    assert found.comparison is not None and found.comparison.relative_l2 > 1e-3
    assert found.verdict is not None and found.verdict.value == "NOISE"
