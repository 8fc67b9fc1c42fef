"""The float32 operations against the float64 ones, on the same inputs.

Bounds are those of rounding analysis (Higham, "Accuracy and Stability", 3.1): a sum of n products
errs by at most n u sum |a b|, whatever its order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.reference import ReferenceBackend
from aprcore.network.mask import CAUSAL
from aprcore.network.rope import Rope, RopeScaling
from aprcore.network.weights import CHUNK_BYTES
from closeness import FLOAT32_ROUNDOFF as U
from closeness import assert_close
from masks import Seen, seen
from tiny import ArrayWeight

OP = NumpyBackend(2)
EXACT = ReferenceBackend()

seeds = st.integers(0, 2**32)
tokens = st.integers(1, 17)
some = settings(max_examples=25, deadline=None)


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng([seed, *shape])
    return (scale * generator.standard_normal(shape)).astype(np.float32)


def weight(seed: int, *shape: int) -> ArrayWeight:
    return ArrayWeight("w", draw(seed + 1, *shape))


def check(name: str, inputs: list[np.ndarray], *rest: Any, bound: float, size: Any = None) -> None:
    """Hold an operation against the reference, and its inputs against what they were.

    Args:
        bound: Of the error, relative to the size of `size` (default: of the result).
    """
    before = [x.copy() for x in inputs]
    for x in inputs:
        x.flags.writeable = False  # a backend that writes into its inputs raises here
    found = getattr(OP, name)(*inputs, *rest)
    assert found.dtype == np.float32
    exact = getattr(EXACT, name)(*(x.astype(np.float64) for x in inputs), *rest)
    norm = np.linalg.norm(exact)
    scale = 1.0 if size is None or norm == 0 else float(np.linalg.norm(size) / norm)
    assert_close(found, exact, bound * max(1.0, scale))
    for x, y in zip(inputs, before):
        np.testing.assert_array_equal(x, y)


@given(seeds, tokens, st.integers(1, 9), st.integers(1, 70))
@some
def test_embed_is_exact(seed: int, count: int, rows: int, width: int) -> None:
    table = weight(seed, rows, width)
    ids = np.random.default_rng(seed).integers(0, rows, count)
    assert_close(OP.embed(ids, table), table.values[ids], 0)


@given(
    seeds, tokens, st.integers(1, 4), st.integers(1, 600), st.sampled_from([1e-4, 1, 1e15]),
    st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
@some
def test_rms_norm(
    seed: int, count: int, heads: int, size: int, scale: float, offset: float
) -> None:
    x = draw(seed, count, heads * size, scale=scale)
    # The root halves the error of the sum; sum, mean, eps, root, quotient and two products follow,
    # and the sum of gain and offset.
    check("rms_norm", [x], weight(seed, size), 1e-6, offset, bound=(size / 2 + 9) * U)


@given(seeds, tokens, st.sampled_from([0.0, -3.0, 0.1, 896**0.5]))
@some
def test_scale(seed: int, count: int, factor: float) -> None:
    check("scale", [draw(seed, count, 33)], factor, bound=2 * U)


@given(seeds, tokens, st.sampled_from([0.3, 30, 50]), st.sampled_from([1e-6, 0.1, 1, 30, 1e4]))
@some
def test_soft_cap(seed: int, count: int, cap: float, scale: float) -> None:
    check("soft_cap", [draw(seed, count, 33, scale=scale)], cap, bound=8 * U)


@pytest.mark.parametrize("cap", [0.3, 50.0])
def test_soft_cap_of_extremes(cap: float) -> None:
    x = np.array([-np.inf, -3e38, -1e4, -1e-30, -0.0, 0.0, 1e-30, 1e4, 3e38, np.inf, np.nan])
    with np.errstate(over="ignore"):
        found = OP.soft_cap(x.astype(np.float32), cap)
    np.testing.assert_allclose(found, cap * np.tanh(x / cap), rtol=4 * U)


@given(seeds, tokens, st.integers(1, 700), st.lists(st.integers(1, 40), min_size=1, max_size=3))
@some
def test_linear(seed: int, count: int, width: int, rows: list[int]) -> None:
    x = draw(seed, count, width)
    weights = [weight(seed + i, n, width) for i, n in enumerate(rows)]
    size = np.abs(x) @ np.abs(np.concatenate([w.values for w in weights])).T
    check("linear", [x], weights, bound=width * U, size=size)


def test_linear_over_many_pieces() -> None:
    width = 512
    weights = [weight(0, CHUNK_BYTES // 4 // width * 3 + 5, width), weight(1, 3, width)]
    x = draw(2, 3, width)
    size = np.abs(x) @ np.abs(np.concatenate([w.values for w in weights])).T
    check("linear", [x], weights, bound=width * U, size=size)


@given(seeds, tokens, st.lists(st.integers(1, 20), min_size=1, max_size=3))
@some
def test_add_bias_and_elementwise(seed: int, count: int, sizes: list[int]) -> None:
    x, y = (draw(seed + i, count, sum(sizes)) for i in range(2))
    check("add_bias", [x], [weight(seed, n) for n in sizes], bound=U)
    check("add", [x, y], bound=U)
    check("multiply", [x, y], bound=U)
    stop = x.shape[1]
    assert_close(OP.columns(x, stop // 2, stop), x[:, stop // 2 :], 0)
    assert_close(OP.rows(x, count - 1, count), x[-1:], 0)


@given(
    seeds, st.integers(1, 3), st.integers(1, 32), st.sampled_from([100.0, 1e4, 1e6]),
    st.lists(st.integers(0, 4096), min_size=1, max_size=9, unique=True),
    st.sampled_from([RopeScaling(), RopeScaling("yarn", factor=4.0)]),
)  # fmt: skip
@some
def test_rope(
    seed: int, heads: int, half: int, theta: float, places: list[int], scaling: RopeScaling
) -> None:
    rope = Rope(theta, 2 * half, 4096, scaling)
    positions = np.array(sorted(places))
    x = draw(seed, positions.size, heads * 2 * half)
    # The angle in float32 is off by 2 u of itself, and the fastest turns one radian a position.
    bound = (2 * positions.max() + 8) * U
    check("rope", [x], positions, rope, bound=bound)


heads = st.sampled_from([(1, 1), (5, 1), (6, 2), (7, 7)])
dims = st.integers(1, 40)


@given(seeds, heads, seen(), dims, st.sampled_from([1.0, 0.3]))
@some
def test_attention_scores(
    seed: int, heads: tuple[int, int], where: Seen, dim: int, scale: float
) -> None:
    (num_heads, num_kv_heads), (count, positions) = heads, where.span
    q, k = draw(seed, count, num_heads * dim), draw(seed + 1, positions, num_kv_heads * dim)
    rest = (*heads, scale, where.mask)
    size = EXACT.attention_scores(*(np.abs(x).astype(np.float64) for x in (q, k)), *rest)
    check("attention_scores", [q, k], *rest, bound=(dim + 2) * U, size=size)
    assert (OP.attention_scores(q, k, *rest)[:, where.hidden()] == 0).all()


@given(seeds, heads, seen(), st.sampled_from([1e-3, 1, 50, 1e4, 1e37]))
@some
def test_softmax(seed: int, heads: tuple[int, int], where: Seen, scale: float) -> None:
    scores = draw(seed, heads[0], *where.span, scale=scale)
    # exp of a difference that is off by u |d| is off by u |d| exp(-|d|), at most 0.4 u.
    check("masked_softmax", [scores], where.mask, bound=(where.positions + 8) * U)


@given(seen())
@some
def test_softmax_looks_at_nothing_that_is_masked(where: Seen) -> None:
    scores, hidden = draw(0, 2, *where.span), where.hidden()
    junk = scores.copy()
    junk[:, hidden] = np.nan
    found = OP.masked_softmax(junk, where.mask)
    np.testing.assert_array_equal(found, OP.masked_softmax(scores, where.mask))
    assert (found[:, hidden] == 0).all()


@given(seen(), st.data())
@some
def test_softmax_keeps_a_nan_that_is_seen(where: Seen, data: st.DataObject) -> None:
    scores, hidden = draw(0, 2, *where.span), where.hidden()
    token = data.draw(st.integers(0, where.tokens - 1))
    scores[1, token, data.draw(st.sampled_from(np.flatnonzero(~hidden[token]).tolist()))] = np.nan
    found = OP.masked_softmax(scores, where.mask)
    assert np.isnan(found[1, token, ~hidden[token]]).all()
    found[1, token] = 0
    assert np.isfinite(found).all()


@given(seeds, heads, seen(), dims)
@some
def test_weighted_values(seed: int, heads: tuple[int, int], where: Seen, dim: int) -> None:
    softmax = draw(seed, heads[0], *where.span).astype(np.float64)
    softmax = EXACT.masked_softmax(softmax, where.mask).astype(np.float32)
    v = draw(seed + 1, where.positions, heads[1] * dim)
    size = EXACT.weighted_values(*(np.abs(x).astype(np.float64) for x in (softmax, v)), heads[1])
    check("weighted_values", [softmax, v], heads[1], bound=where.positions * U, size=size)


@given(seeds, tokens, st.sampled_from([1e-3, 1, 10, 1e3]))
@some
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activation(kind: str, seed: int, count: int, scale: float) -> None:
    x = draw(seed, count, 64, scale=scale)
    # One minus something close to one leaves an absolute error of a few u, times x.
    check("activation", [x], kind, bound=12 * U, size=x)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activation_of_extremes(kind: str) -> None:
    x = np.array([-3e38, -1e30, -1e4, -104, -88.8, -0.0, 0.0, 104, 1e4, 1e30, 3e38], np.float32)
    with np.errstate(all="ignore"):
        found, exact = OP.activation(x, kind), EXACT.activation(x.astype(np.float64), kind)
    assert np.isfinite(found).all()
    # From 88.7 on exp(-x) is infinite in float32; the value that is lost there is -2.6e-37.
    np.testing.assert_allclose(found, exact, rtol=8 * U, atol=3e-37)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'swish2'"):
        OP.activation(np.ones(1, np.float32), "swish2")


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    width = 700
    rows = CHUNK_BYTES // 4 // width * 4 + 3
    weights = [weight(0, rows, width), weight(1, 9, width)]
    x = draw(2, 5, width)

    def scores(op: NumpyBackend) -> np.ndarray:
        return op.attention_scores(x, x, 7, 7, 0.1, CAUSAL)

    operations: list[Callable[[NumpyBackend], np.ndarray]] = [
        lambda op: op.linear(x, weights),
        lambda op: op.linear(x[:1], weights),
        scores,
        lambda op: op.weighted_values(op.masked_softmax(scores(op), CAUSAL), x, 7),
    ]
    for operation in operations:
        first = operation(NumpyBackend(1))
        for threads in (2, 3):
            np.testing.assert_array_equal(operation(NumpyBackend(threads)), first)


def test_a_weight_that_cannot_be_read_stops_every_thread() -> None:
    class Broken(ArrayWeight):
        def read(self, start: int, stop: int, out: Any = None) -> Any:
            if start:
                raise OSError("gone")
            return super().read(start, stop, out)

    width = 700
    broken = Broken("w", draw(0, CHUNK_BYTES // 4 // width * 4, width))
    for threads in (1, 2):
        with pytest.raises(OSError, match="gone"):
            NumpyBackend(threads).linear(draw(1, 2, width), [broken])


def test_tensors_go_to_the_host_and_back_unchanged() -> None:
    x = draw(0, 3, 4)
    back = OP.to_host(OP.from_host(x.astype(np.float64))[:, 1:3])
    np.testing.assert_array_equal(back, x[:, 1:3])
    assert back.flags.c_contiguous
