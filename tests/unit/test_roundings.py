"""How factors of products are rounded: as ggml does, to the bit, and what is uncertain of it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.engines.rounded_weight import as_read
from aprcore.ground.precision import BFLOAT16, FLOAT8_E4M3, FLOAT16
from aprcore.quant.roundings import (
    ROUNDINGS,
    FloatRounding,
    block_minima,
    rounded_beside,
    sum_offsets,
)
from tiny import ArrayWeight


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_are_those_of_the_gguf_package(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    x = normal(1, 40, 96)
    x[3, 32:64] = 0  # a block of zeros has a scale of zero
    stored = gguf.quants.quantize(x, kind)
    found = ROUNDINGS[name.lower()](x.astype(np.float64))
    np.testing.assert_array_equal(
        found.value.astype(np.float32), gguf.quants.dequantize(stored, kind)
    )
    # That package divides by the scale as ggml's reference does; nothing here lay on a tie.
    assert np.count_nonzero(found.variance) < 0.01 * x.size


def test_super_blocks_of_activations() -> None:
    """Q8_K: the number of largest magnitude becomes -127, the scale is float32."""
    x = normal(2, 3, 512)
    value = ROUNDINGS["q8_k"](x.astype(np.float64)).value.reshape(3, 2, 256)
    blocks = x.reshape(3, 2, 256).astype(np.float64)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    assert np.abs(value - blocks).max() <= 0.5000001 * largest.max() / 127
    codes = value / (largest / 127)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)


def test_a_row_by_one_scale() -> None:
    x = normal(3, 5, 70).astype(np.float64)
    found = ROUNDINGS["int8"](x).value
    step = (np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)).astype(float)
    np.testing.assert_allclose(found, np.round(x / step) * step, rtol=1e-6)


@pytest.mark.parametrize(("name", "added"), [("tf32", 0x1000), ("tf32-cut", 0)])
def test_what_tensor_cores_read_of_a_float32(name: str, added: int) -> None:
    x = np.concatenate([normal(7, 200), [0, 1, -1.00048828125, 1.0004882813, 1e-40, 3e38]])
    x = x.astype(np.float32)
    bits = (x.view(np.uint32) + np.uint32(added)) & np.uint32(0xFFFFE000)
    normal_ones = np.abs(x) > 1e-37
    found = ROUNDINGS[name](x.astype(np.float64)[None])
    np.testing.assert_array_equal(found.value[0][normal_ones], bits.view(np.float32)[normal_ones])
    assert not found.variance.any()
    # Near an edge, and only there, it is uncertain which neighbour it is.
    edge = 1 + 2.0**-10 * (1 if name == "tf32-cut" else 0.5)
    near = ROUNDINGS[name](np.array([[edge + 1e-8, edge + 1e-4]]), 1e-8)
    assert near.variance[0, 0] == 2.0**-20 and near.variance[0, 1] == 0


def test_a_tile_may_be_float16_or_tf32() -> None:
    """Ties and small numbers are rounded otherwise by these two, and few numbers are either."""
    x = np.array([[1 + 2.0**-11, 1.1, 2.0**-16 / 3]])
    found = ROUNDINGS["f16:f32"](x)
    np.testing.assert_array_equal(found.value, FLOAT16.round(x))
    assert (found.variance > 0).tolist() == [[True, False, True]]


def test_both_factors_are_rounded() -> None:
    w = ArrayWeight("w", np.array([[1.0001, 2.0]], np.float32), "F32")
    assert as_read(w, ROUNDINGS["f16:f32"]) is w
    for name in ("f16:f32-both", "bf16:f32-both", "tf32", "tf32-cut"):
        read = as_read(w, ROUNDINGS[name])
        assert read.read(0, 1).tolist() == [[1.0, 2.0]]
        assert (read.name, read.shape, read.dtype) == (w.name, w.shape, w.dtype)
    half = ArrayWeight("w", np.array([[1.0, 2.0]], np.float32), "BF16")
    assert as_read(half, ROUNDINGS["tf32"]) is half


@pytest.mark.parametrize("kind", [FLOAT16, BFLOAT16, FLOAT8_E4M3])
def test_a_cast_is_certain(kind) -> None:
    x = normal(4, 6, 50).astype(np.float64)
    found = FloatRounding(kind)(x)
    np.testing.assert_array_equal(found.value, kind.round(x))
    assert not found.variance.any()


@given(st.integers(0, 10_000), st.sampled_from(["f16", "bf16", "q8_0", "q8_k", "q4_0", "q5_1"]))
def test_what_is_known_up_to_an_error_is_rounded_alike_or_said_to_be_uncertain(
    seed: int, name: str
) -> None:
    """Whatever the error does, a value moves by no more than its variance admits."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 256))
    spread = 1e-5
    rounding = ROUNDINGS[name]
    found = rounding(x, spread)
    other = rounding(x + spread * rng.standard_normal(x.shape)).value
    # Beyond the error itself (in a block it moves the scale as well), only where a tie is near.
    moved = np.abs(other - found.value) > 16 * spread
    assert not np.any(moved & (found.variance == 0))
    assert np.all(np.square(other - found.value)[moved] <= 1.1 * found.variance[moved])


def test_a_tie_is_uncertain_and_its_neighbours_are_not() -> None:
    x = np.zeros((1, 32))
    x[0, :4] = [127.0, 0.5, 0.49, 1.5]
    found = ROUNDINGS["q8_0"](x)
    assert found.variance[0, 1] == found.variance[0, 3] == 1
    assert found.variance[0, 0] == found.variance[0, 2] == 0


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("F32", None), ("F16", "f16"), ("BF16", "bf16"), ("Q8_0", "q8_0"), ("Q4_0", "q8_0"),
     ("IQ4_NL", "q8_0"), ("Q4_1", "q8_1"), ("Q5_1", "q8_1"), ("Q4_K", "q8_k"), ("IQ4_XS", "q8_k"),
     ("Q6_K", "q8_k")],
)  # fmt: skip
def test_what_ggml_rounds_activations_to(dtype: str, name: str | None) -> None:
    found = rounded_beside(dtype)
    assert (None if found is None else found.name) == name


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_the_sum_of_a_block_stands_in_for_its_numbers_beside_a_minimum(name: str) -> None:
    """ggml's product of Q4_1 with Q8_1: d4 d8 sum(q4 q8) + m s, where s is a float16."""
    x = normal(5, 4, 64)
    raw = gguf.quants.quantize(normal(6, 10, 64), gguf.GGMLQuantizationType[name])
    minima = block_minima(raw, 10, name)
    weights = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float64)
    assert np.array_equal(minima, weights.reshape(10, 2, 32).min(axis=2))
    rounding = ROUNDINGS["q8_1"]
    blocks = x.reshape(4, 2, 32)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    codes = np.round(blocks / scale)
    half = scale.astype(np.float16).astype(np.float64)
    sums = (scale * codes).sum(axis=2).astype(np.float16).astype(np.float64)
    above = (weights.reshape(10, 2, 32) - minima[:, :, None]).reshape(10, 64)
    product = (half * codes).reshape(4, 64) @ above.T + sums @ minima.T
    found = sum_offsets(rounding, name, x.astype(np.float64))
    assert found is not None
    ours = rounding(x.astype(np.float64)).value @ weights.T + found.value @ minima.T
    np.testing.assert_allclose(ours, product, rtol=0, atol=1e-6 * np.abs(product).max())
    plain = rounding(x.astype(np.float64)).value @ weights.T
    assert np.abs(plain - product).max() > 1e-4 * np.abs(product).max()


def test_other_products_have_no_such_sum() -> None:
    x = normal(7, 2, 64).astype(np.float64)
    assert sum_offsets(ROUNDINGS["q8_1"], "Q4_0", x) is None
    assert sum_offsets(ROUNDINGS["q8_0"], "Q4_1", x) is None
    assert sum_offsets(None, "Q4_1", x) is None
