"""The judge's operations against torch's own float64 functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.engines.reference import ReferenceBackend
from aprcore.network.mask import CAUSAL
from aprcore.network.rope import Rope, RopeScaling
from aprcore.network.weights import CHUNK_BYTES
from closeness import assert_close
from masks import SOME_SEEN, Seen, seen
from tiny import ArrayWeight

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Float64's unit roundoff is 1.1e-16 and the longest sum here has 1,500 terms of either sign.
BOUND = 1e-13

OP = ReferenceBackend()


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def weight(*shape: int, seed: int = 1) -> ArrayWeight:
    """Stored as float32, as weights are; read back exactly."""
    return ArrayWeight("w", draw(*shape, seed=seed).astype(np.float32))


def wide(weight: ArrayWeight) -> Any:
    return torch.from_numpy(weight.values.astype(np.float64))


T = torch.from_numpy


@pytest.mark.parametrize("tokens", [1, 5])
class TestRows:
    def test_embed(self, tokens: int) -> None:
        table = weight(11, 7)
        ids = np.arange(tokens) * 3 % 11
        assert_close(OP.embed(ids, table), F.embedding(T(ids), wide(table)), 0)

    @pytest.mark.parametrize("size", [1, 6, 1500])
    @pytest.mark.parametrize("heads", [1, 3])
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_rms_norm(self, tokens: int, size: int, heads: int, offset: float) -> None:
        gain, x = weight(size), 30 * draw(tokens, heads * size)
        expected = F.rms_norm(T(x).view(tokens, heads, size), (size,), offset + wide(gain), 1e-5)
        assert_close(OP.rms_norm(x, gain, 1e-5, offset), expected.view(tokens, -1), BOUND)

    @pytest.mark.parametrize("factor", [0.0, -3.0, 0.1, 896**0.5])
    def test_scale(self, tokens: int, factor: float) -> None:
        x = draw(tokens, 9)
        assert_close(OP.scale(x, factor), factor * T(x), 0)

    @pytest.mark.parametrize("cap", [0.3, 30.0, 50.0])
    @pytest.mark.parametrize("scale", [1e-8, 1e-3, 1, 30, 1e4])
    def test_soft_cap(self, tokens: int, cap: float, scale: float) -> None:
        x = scale * draw(tokens, 200)
        with np.errstate(over="raise", invalid="raise"):
            found = OP.soft_cap(x, cap)
        assert_close(found, cap * torch.tanh(T(x) / cap), BOUND)

    @pytest.mark.parametrize("columns", [1, 6, 1500])
    def test_linear_side_by_side(self, tokens: int, columns: int) -> None:
        x = draw(tokens, columns)
        # The second is read in several pieces.
        weights = [weight(rows, columns) for rows in (3, CHUNK_BYTES // 4 // columns + 7)]
        expected = torch.cat([F.linear(T(x), wide(w)) for w in weights], dim=1)
        assert_close(OP.linear(x, weights), expected, BOUND)

    def test_bias(self, tokens: int) -> None:
        x, biases = draw(tokens, 9), [weight(4), weight(3), weight(2)]
        assert_close(OP.add_bias(x, biases), T(x) + torch.cat([wide(b) for b in biases]), 0)

    @pytest.mark.parametrize(
        ("kind", "function"),
        [
            ("silu", F.silu),
            ("gelu", F.gelu),
            ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh")),
            ("relu", F.relu),
        ],
    )
    @pytest.mark.parametrize("scale", [1e-8, 1, 30, 1000])
    def test_activation(self, tokens: int, kind: str, function: Any, scale: float) -> None:
        x = scale * draw(tokens, 200)
        with np.errstate(over="raise", invalid="raise"):
            found = OP.activation(x, kind)
        assert_close(found, function(T(x)), BOUND)

    def test_add_multiply_columns_and_rows(self, tokens: int) -> None:
        x, y = draw(tokens, 9), draw(tokens, 9, seed=2)
        assert_close(OP.add(x, y), T(x) + T(y), 0)
        assert_close(OP.multiply(x, y), T(x) * T(y), 0)
        assert_close(OP.columns(x, 2, 5), T(x)[:, 2:5], 0)
        assert_close(OP.rows(x, tokens - 1, tokens), T(x)[-1:], 0)


HEADS = [(1, 1), (6, 1), (6, 2), (6, 6)]
DIM = 10


def check_attention(num_heads: int, num_kv_heads: int, where: Seen, scale: float) -> None:
    """Hold each of its three operations, and all of them, against torch's."""
    tokens, positions = where.span
    hidden = T(where.hidden())
    q = draw(tokens, num_heads * DIM)
    k, v = (draw(positions, num_kv_heads * DIM, seed=seed) for seed in (1, 2))
    queries, *shared = (T(x).view(x.shape[0], -1, DIM).transpose(0, 1) for x in (q, k, v))
    keys, values = (x.repeat_interleave(num_heads // num_kv_heads, dim=0) for x in shared)

    scores = OP.attention_scores(q, k, num_heads, num_kv_heads, scale, where.mask)
    expected = (torch.matmul(queries, keys.transpose(1, 2)) * scale).masked_fill(hidden, 0)
    assert_close(scores, expected, BOUND)

    high = 100 * draw(num_heads, tokens, positions)
    softmax = OP.masked_softmax(high, where.mask)
    expected = F.softmax(T(high).masked_fill(hidden, -torch.inf), dim=-1)
    assert_close(softmax, expected, BOUND)
    assert (softmax[:, where.hidden()] == 0).all()

    weights = draw(num_heads, tokens, positions, seed=3)  # on every position, masked or not
    expected = torch.matmul(T(weights), values).transpose(0, 1).reshape(tokens, -1)
    assert_close(OP.weighted_values(weights, v, num_kv_heads), expected, BOUND)

    parts = [x[None] for x in (queries, keys, values)]
    whole = F.scaled_dot_product_attention(*parts, attn_mask=~hidden, scale=scale)
    found = OP.weighted_values(OP.masked_softmax(scores, where.mask), v, num_kv_heads)
    assert_close(found, whole[0].transpose(0, 1).reshape(tokens, -1), BOUND)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("where", SOME_SEEN, ids=str)
def test_attention(num_heads: int, num_kv_heads: int, where: Seen) -> None:
    check_attention(num_heads, num_kv_heads, where, DIM**-0.5)


@given(st.sampled_from(HEADS), seen(), st.sampled_from([1.0, 256**-0.5, DIM**-0.5]))
@settings(max_examples=60, deadline=None)
def test_attention_within_any_window(heads: tuple[int, int], where: Seen, scale: float) -> None:
    check_attention(*heads, where, scale)


def test_softmax_of_what_is_seen_keeps_its_nan() -> None:
    scores = draw(2, 3, 3)
    scores[0, 1, 0] = np.nan
    found = OP.masked_softmax(scores, CAUSAL)
    assert np.isnan(found[0, 1, :2]).all()
    assert np.isfinite(found[:, [0, 2]]).all() and np.isfinite(found[1]).all()


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 1e-18, reason="this machine has no extended precision"
)
class TestRope:
    """Against the formula in extended precision, for positions to 4096."""

    @pytest.mark.parametrize(
        ("dim", "theta"), [(2, 1e4), (8, 100.0), (64, 1e4), (64, 1e6), (128, 5e5)]
    )
    @pytest.mark.parametrize("scaling", [
        RopeScaling(),
        RopeScaling("linear", factor=4),
        RopeScaling("yarn", factor=4, attention_factor=1.25),
    ])  # fmt: skip
    def test_against_the_formula(self, dim: int, theta: float, scaling: RopeScaling) -> None:
        rope = Rope(theta, dim, 4096, scaling)
        positions = np.unique(np.r_[0:9, 0:4097:97, 4080:4097])
        heads = 3
        x = draw(positions.size, heads * dim)
        if scaling.kind == "yarn":  # its ramp has a test of its own; here the rotation counts
            frequencies = rope.inverse_frequencies().astype(np.longdouble)
        else:
            exponents = -np.arange(0, dim, 2).astype(np.longdouble) / dim
            frequencies = np.longdouble(theta) ** exponents / np.longdouble(scaling.factor)
        angles = positions.astype(np.longdouble)[:, None, None] * frequencies
        low, high = np.split(x.astype(np.longdouble).reshape(-1, heads, dim), 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        expected = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        expected = (expected * np.longdouble(rope.attention_factor())).astype(np.float64)
        assert_close(OP.rope(x, positions, rope), expected.reshape(x.shape), BOUND)

    def test_position_zero_is_left_alone_and_lengths_are_kept(self) -> None:
        x = draw(2, 16)
        found = OP.rope(x, np.array([0, 4096]), Rope(1e4, 8))
        np.testing.assert_array_equal(found[0], x[0])
        assert_close(np.linalg.norm(found[1]), np.linalg.norm(x[1]), BOUND)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'swish2'"):
        OP.activation(np.ones(1), "swish2")
