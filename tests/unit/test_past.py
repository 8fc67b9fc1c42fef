"""Keys and values before a decoding step, from what a dump shows of its engine's cache."""

from __future__ import annotations

import numpy as np
import pytest

from aprcore.dumps.past import read_past
from aprcore.dumps.sidecar import Sidecar
from aprcore.network.config import ModelConfig
from aprcore.network.rope import Rope

PAST, PADDED, KV = 5, 32, 2


def config(dim: int) -> ModelConfig:
    return ModelConfig("llama", 4 * dim, 2, 4, KV, dim, 96, 50, 1e-6, Rope(1e4, dim))


def rows(dim: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((PAST, KV, dim)).astype(np.float32)


def read(arrays: dict[str, np.ndarray], dim: int, **arithmetic: str):
    shapes = {name: array.shape for name, array in arrays.items()}
    sidecar = Sidecar(arithmetic=arithmetic or None)
    return read_past(shapes, arrays.__getitem__, sidecar, config(dim), PAST)


def padded(x: np.ndarray) -> np.ndarray:
    """As llama.cpp's cache is: longer than the text, with what was there before."""
    return np.concatenate([x, np.full((PADDED - PAST, *x.shape[1:]), 7, np.float32)])


def test_rows_are_cut_to_the_tokens_before() -> None:
    k = rows(8)
    found = read({"cache_k_l1 (view)": padded(k)}, 8)
    assert found.num_positions == PAST
    np.testing.assert_array_equal(found.held[1, "k"], k.reshape(PAST, -1))
    assert (0, "k") not in found.held and (1, "v") not in found.held


def test_values_may_be_transposed() -> None:
    v = rows(8)
    found = read({"cache_v_l0 (view)": padded(v).transpose(2, 1, 0)}, 8)
    np.testing.assert_array_equal(found.held[0, "v"], v.reshape(PAST, -1))


@pytest.mark.parametrize(("letter", "size"), [("k", 128), ("v", 64)])
def test_turned_heads_are_turned_back(letter: str, size: int) -> None:
    x = rows(128).astype(np.float64)
    matrix = np.ones((1, 1))
    while len(matrix) < size:  # Sylvester's construction
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    turned = (x.reshape(-1, size) @ matrix).reshape(x.shape)
    name = f"cache_{letter}_l0 (view)"
    found = read({name: padded(turned)}, 128, kv_cache="q8_0")
    np.testing.assert_allclose(found.held[0, letter], x.reshape(PAST, -1), atol=1e-12)
    plain = read({name: padded(turned)}, 128, kv_cache="f16").held[0, letter]
    np.testing.assert_allclose(plain, turned.reshape(PAST, -1), atol=1e-12)


@pytest.mark.parametrize(
    "name", ["cache_k_l0", "cache_k_l0 (view) (permuted)", "cache_q_l0 (view)", "Kcur-0"]
)
def test_other_tensors_are_none_of_it(name: str) -> None:
    assert not read({name: padded(rows(8))}, 8).held


def test_a_cache_of_another_shape_is_left_out() -> None:
    assert not read({"cache_k_l0 (view)": rows(8)[:, :1]}, 8).held
    assert not read({"cache_k_l0 (view)": rows(8)[: PAST - 1]}, 8).held
