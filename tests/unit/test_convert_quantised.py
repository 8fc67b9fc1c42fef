"""Importing with `quantize`: which tensors, what bytes, what is refused, and at what cost."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from aprcore.formats.apr import AprFlag, read_apr, verify_apr
from aprcore.ground.errors import AprError, WeightError
from aprcore.models.convert import ConvertProgress, import_model
from aprcore.models.model import open_model
from aprcore.network.weights import read_all
from aprcore.quant.quantise import measure_rounding, quantise
from aprcore.quant.types import dequantize

# Hidden and ffn sizes as stories260k has them: no whole super-blocks, and rows of 172 not even
# whole blocks of 32.
E, F, H, K, D, V = 64, 172, 4, 2, 16, 48

Tensors = dict[str, np.ndarray]


def make_tensors(seed: int = 0, ffn: int = F, hidden: int = E) -> Tensors:
    rng = np.random.default_rng(seed)
    prefix = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (V, hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (V, hidden),
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
        f"{prefix}self_attn.q_proj.weight": (H * D, hidden),
        f"{prefix}self_attn.k_proj.weight": (K * D, hidden),
        f"{prefix}self_attn.v_proj.weight": (K * D, hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, H * D),
        f"{prefix}self_attn.q_proj.bias": (H * D,), f"{prefix}self_attn.k_proj.bias": (K * D,),
        f"{prefix}self_attn.v_proj.bias": (K * D,),
        f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
        f"{prefix}mlp.up_proj.weight": (ffn, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, ffn),
    }  # fmt: skip
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def make_model(path: Path, tensors: Tensors) -> Path:
    path.mkdir()
    config: dict[str, Any] = {
        "model_type": "qwen2", "hidden_size": tensors["model.norm.weight"].size,
        "num_hidden_layers": 1, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": D,
        "intermediate_size": len(tensors["model.layers.0.mlp.up_proj.weight"]), "vocab_size": V,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 512,
        "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hf") / "tiny", make_tensors())


def read_back(dtype: str, values: np.ndarray) -> np.ndarray:
    out = np.empty(values.size, np.float32)
    dequantize(dtype, quantise(dtype, values).reshape(-1), out, row_length=values.shape[1])
    return out.reshape(values.shape)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_k", "q6_k"])
def test_matrices_are_quantised_and_the_rest_stays(
    tmp_path: Path, source: Path, dtype: str
) -> None:
    target = tmp_path / "m.apr"
    plan = import_model(source, target, quantize=dtype)
    kind = dtype.upper()
    whole_rows = kind.endswith("_K")
    apr = verify_apr(target)
    assert AprFlag.QUANTIZED in apr.flags
    for name, values in make_tensors().items():
        wanted = values.ndim == 2 and name.startswith("model.layers")
        wanted &= whole_rows or values.shape[-1] % 32 == 0
        assert apr.tensors[name].dtype == (kind if wanted else "F32"), name
        expected = read_back(kind, values) if wanted else values
        np.testing.assert_array_equal(read_all(apr.tensors[name]), expected)
    with open_model(source) as old, open_model(target) as new:
        assert new.config == old.config
    lines = plan.summary()
    assert "2 tensors: F32 kept (embedding and head stay float)" in lines
    assert "6 tensors: F32 kept (vectors stay float)" in lines
    assert ("1 tensor: F32 kept (rows of 172 are not whole blocks)" in lines) is not whole_rows
    assert f"{7 if whole_rows else 6} tensors: F32 -> {kind}" in lines


def test_the_cost_is_that_of_the_matrices(tmp_path: Path, source: Path) -> None:
    plan = import_model(source, tmp_path / "m.apr", quantize="q4_k")
    matrices = [t for n, t in make_tensors().items() if t.ndim == 2 and "layers" in n]
    costs = [measure_rounding("Q4_K", t, quantise("Q4_K", t)) for t in matrices]
    found = plan.roundings["Q4_K"]
    assert found.error_energy == pytest.approx(sum(cost.error_energy for cost in costs))
    assert found.weight_energy == pytest.approx(sum(cost.weight_energy for cost in costs))
    assert 0.06 < found.relative_rmse < 0.08
    assert 0.7 < found.noise_ratio < 0.85
    assert plan.summary()[-1] == (
        f"Q4_K: relative RMSE {found.relative_rmse:.3g}, "
        f"error energy {found.noise_ratio:.2f} of what its steps predict"
    )


def test_embedding_and_head_on_request(tmp_path: Path, source: Path) -> None:
    import_model(source, tmp_path / "m.apr", quantize="q6_k", quantize_embeddings=True)
    apr = read_apr(tmp_path / "m.apr")
    tensors = make_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert apr.tensors[name].dtype == "Q6_K"
        np.testing.assert_array_equal(read_all(apr.tensors[name]), read_back("Q6_K", tensors[name]))
    assert apr.tensors["model.norm.weight"].dtype == "F32"


def test_the_rest_takes_the_float_type(tmp_path: Path, source: Path) -> None:
    plan = import_model(source, tmp_path / "m.apr", dtype="bf16", quantize="q8_0")
    assert {t.dtype for t in read_apr(tmp_path / "m.apr").tensors.values()} == {"BF16", "Q8_0"}
    assert "6 tensors: F32 -> BF16 (vectors stay float)" in plan.summary()


def test_quantising_twice_copies(tmp_path: Path, source: Path) -> None:
    first, second = tmp_path / "first.apr", tmp_path / "second.apr"
    import_model(source, first, quantize="q4_k")
    plan = import_model(first, second, quantize="q4_k")
    assert "7 tensors: Q4_K kept" in plan.summary()
    assert plan.roundings == {}  # nothing was rounded again
    a, b = read_apr(first), read_apr(second)
    for name, tensor in a.tensors.items():
        assert read_all(tensor).tobytes() == read_all(b.tensors[name]).tobytes(), name


def test_what_stays_float_is_widened(tmp_path: Path, source: Path) -> None:
    first, second = tmp_path / "first.apr", tmp_path / "second.apr"
    import_model(source, first, quantize="q8_0", quantize_embeddings=True)
    plan = import_model(first, second, quantize="q4_k")
    assert "2 tensors: Q8_0 -> F32 (embedding and head stay float)" in plan.summary()
    assert "6 tensors: Q8_0 -> Q4_K" in plan.summary()


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_k", "q6_k"])
@pytest.mark.parametrize(
    ("values", "words"),
    [([np.nan], "1 value has"), ([np.inf, -np.inf, np.nan], "3 values have"), ([1e30], "1 value")],
)
def test_what_cannot_be_represented_is_refused(
    tmp_path: Path, dtype: str, values: list[float], words: str
) -> None:
    tensors = make_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][5, : len(values)] = values
    hf = make_model(tmp_path / "hf", tensors)
    with pytest.raises(WeightError, match=rf"'{name}': {words}.* no finite {dtype.upper()}"):
        import_model(hf, tmp_path / "m.apr", quantize=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "q8_0"}, "unknown type 'q8_0'; types are keep, f32, f16, bf16"),
        ({"quantize": "f16"}, "unknown type 'f16'; types are q8_0, q4_0, q4_k, q6_k"),
        ({"quantize_embeddings": True}, "no type to quantise to; name it with --quantize"),
    ],
)
def test_types_that_make_no_sense(
    tmp_path: Path, source: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(AprError, match=message):
        import_model(source, tmp_path / "m.apr", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_stored_bytes(tmp_path: Path, source: Path) -> None:
    seen: list[ConvertProgress] = []
    import_model(source, tmp_path / "m.apr", quantize="q4_k", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert {now.tensor for now in seen} == set(make_tensors())


def test_a_tensor_is_never_held_whole(tmp_path: Path) -> None:
    tensors = make_tensors(ffn=40_000, hidden=256)
    source = make_model(tmp_path / "hf", tensors)
    size = tensors["model.layers.0.mlp.up_proj.weight"].nbytes  # 39 MiB, three times
    del tensors
    tracemalloc.start()
    try:
        import_model(source, tmp_path / "m.apr", quantize="q6_k")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size


def test_stories260k(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "stories260k"
    plan = import_model(source, tmp_path / "m.apr", quantize="q4_k")
    assert plan.roundings["Q4_K"].relative_rmse < 0.072
    with open_model(source) as old, open_model(tmp_path / "m.apr") as new:
        assert (new.config, new.tokenizer_data) == (old.config, old.tokenizer_data)
        assert new.weight_types == {"F32", "Q4_K"}
        for name, weight in old.weights.items():
            error = read_all(new.weights[name]) - read_all(weight)
            squares, group = new.weights[name].step_squares(0, weight.shape[0])
            if new.weights[name].dtype == "F32":
                assert not error.any()
                continue
            steps = np.repeat(squares, group, axis=1)[:, : weight.shape[1]]
            assert 0.5 < np.square(error).sum() * 12 / steps.sum() < 1, name
