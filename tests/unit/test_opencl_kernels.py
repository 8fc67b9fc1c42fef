"""Each kernel against the float64 reference, on every stored type, in odd shapes.

The bound of a product is on the norm of the error against the norm of |x| |W|^T: a bound relative
to the result fails where terms cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.engines.opencl.stored_rows import BLOCK_FORMATS, FLOAT_FORMATS, row_source
from aprcore.engines.reference import ReferenceBackend
from aprcore.models.names import RowSlice, SplitHalves
from aprcore.network.mask import CAUSAL, Mask
from aprcore.network.rope import Rope, RopeScaling
from aprcore.network.weights import Weight, read_all
from closeness import FLOAT32_ROUNDOFF as U
from closeness import assert_close
from masks import SOME_SEEN, Seen, seen
from opencl_device import backend, require_device
from stored_weights import fitting_width, random_bytes, random_tensor, stored_tensor
from tiny import ArrayWeight

require_device()

PRODUCT_BOUND = 2e-6  # of the norm of |x| |W|^T
ALL_LANES = (None, 8, 64)  # the device's own, and work-groups that share a row
STORED = (*FLOAT_FORMATS, *BLOCK_FORMATS)
EXPANDED_ON_HOST = ("F64", "Q2_K", "IQ4_NL")

CPU = NumpyBackend(2)
EXACT = ReferenceBackend()
WINDOW = Mask(2, 0)

seeds = st.integers(0, 2**32)
widths = st.one_of(st.integers(1, 70), st.integers(200, 800))
# Each number of tokens up to 8 is a kernel of its own, and all above 8 share another.
some_tokens = st.sampled_from([1, 7, 9, 16, 33])
some = settings(max_examples=12, deadline=None)
many = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True)
def _without_weights() -> Iterator[None]:
    """A random weight is a file, open for as long as the backend of all tests knows of it."""
    yield
    for lanes in ALL_LANES:
        op = backend(lanes)
        op.weights.drop(op.weights.known)


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng([seed, *shape])
    return (scale * generator.standard_normal(shape)).astype(np.float32)


def weight(seed: int, *shape: int) -> ArrayWeight:
    return ArrayWeight("w", draw(seed + 1, *shape))


def run(op: OpenCLBackend, name: str, inputs: list[np.ndarray], *rest: Any) -> np.ndarray:
    """An operation on the device, from host to host."""
    return op.to_host(getattr(op, name)(*(op.from_host(x) for x in inputs), *rest))


def check(
    name: str, inputs: list[np.ndarray], *rest: Any, bound: float, size: Any = None,
    lanes: int | None = None,
) -> None:  # fmt: skip
    """Hold an operation against the reference; the error is relative to `size`."""
    found = run(backend(lanes), name, inputs, *rest)
    assert found.dtype == np.float32
    exact = getattr(EXACT, name)(*(x.astype(np.float64) for x in inputs), *rest)
    norm = np.linalg.norm(exact)
    scale = 1.0 if size is None or norm == 0 else float(np.linalg.norm(size) / norm)
    assert_close(found, exact, bound * max(1.0, scale))


def check_product(x: np.ndarray, weights: list[Weight], lanes: int | None = None) -> None:
    """Hold a product against dequantise-then-multiply in float64."""
    dense = np.concatenate([read_all(w) for w in weights]).astype(np.float64)
    size = np.abs(x) @ np.abs(dense).T
    check("linear", [x], weights, bound=PRODUCT_BOUND, size=size, lanes=lanes)


# Products


@given(seeds, some_tokens, widths, st.lists(st.integers(1, 40), min_size=1, max_size=3))
@some
@pytest.mark.parametrize("dtype", [*STORED, *EXPANDED_ON_HOST])
def test_linear(dtype: str, seed: int, tokens: int, width: int, rows: list[int]) -> None:
    width = fitting_width(dtype, width)
    weights = [random_tensor(dtype, (n, width), seed + i) for i, n in enumerate(rows)]
    check_product(draw(seed, tokens, width), weights)


@given(seeds, st.sampled_from([1, 7, 20]), widths, st.integers(1, 40))
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize("lanes", ALL_LANES[1:])
@pytest.mark.parametrize("dtype", ["F32", "AprQ8", "Q4_K"])
def test_linear_with_work_groups(
    dtype: str, lanes: int, seed: int, tokens: int, width: int, rows: int
) -> None:
    width = fitting_width(dtype, width)
    check_product(draw(seed, tokens, width), [random_tensor(dtype, (rows, width), seed)], lanes)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", ALL_LANES)
@pytest.mark.parametrize("dtype", STORED)
def test_linear_for_every_number_of_tokens(dtype: str, lanes: int | None) -> None:
    for tokens in range(1, 34):
        width = fitting_width(dtype, 37 * tokens)
        x = draw(tokens, tokens, width)
        check_product(x, [random_tensor(dtype, (2 * tokens + 1, width), tokens)], lanes)


@pytest.mark.parametrize("tokens", [7, 40])
@pytest.mark.parametrize("dtype", ["F32", "Q4_K"])
def test_a_long_sum_of_one_sign_keeps_its_precision(dtype: str, tokens: int) -> None:
    x = np.abs(draw(0, tokens, 18944))
    check_product(x, [random_tensor(dtype, (13, 18944), 0)])


@pytest.mark.parametrize("dtype", ["F32", "Q6_K", "AprQ8"])
def test_pieces_of_any_size_give_the_same_bits(dtype: str) -> None:
    tensor, x = random_tensor(dtype, (61, 300), 0), draw(1, 7, 300)
    whole = run(backend(), "linear", [x], [tensor])
    for piece_bytes in (1, 3000, 20_000):
        with OpenCLBackend(backend().device, piece_bytes=piece_bytes) as op:
            for _ in range(4):  # streamed, kept, kept
                np.testing.assert_array_equal(run(op, "linear", [x], [tensor]), whole)


@pytest.mark.parametrize("lanes", ALL_LANES)
@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_products_repeat_bit_for_bit(tokens: int, lanes: int | None) -> None:
    tensors = [random_tensor("Q4_K", (201, 900), 0), random_tensor("F32", (50, 900), 0)]
    x = draw(1, tokens, 900)
    first = run(backend(lanes), "linear", [x], tensors)
    for _ in range(5):
        np.testing.assert_array_equal(run(backend(lanes), "linear", [x], tensors), first)


def pattern(values: np.ndarray) -> np.ndarray:
    """0 where finite, 1 for NaN, 2 and 3 for the infinities."""
    return np.isnan(values) * 1 + (values == np.inf) * 2 + (values == -np.inf) * 3


@pytest.mark.parametrize("lanes", ALL_LANES)
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("dtype", ["F32", "Q4_K"])
def test_non_finite_inputs_show_where_they_do_on_the_cpu(
    dtype: str, tokens: int, lanes: int | None
) -> None:
    width = 300
    x = draw(0, tokens, width)
    x[0, 299], x[1, 4], x[2, 17] = np.nan, np.inf, -np.inf
    tensor = random_tensor(dtype, (9, width), 0)
    with np.errstate(all="ignore"):
        expected = CPU.linear(x, [tensor])
    assert not np.isfinite(expected[:3]).any()
    found = run(backend(lanes), "linear", [x], [tensor])
    np.testing.assert_array_equal(pattern(found), pattern(expected))


@pytest.mark.parametrize("dtype", STORED)
def test_expansion_equals_the_host_to_the_last_bit(dtype: str) -> None:
    op = backend()
    for seed, width in enumerate((256, 96, 300, 17)):
        shape = (40, fitting_width(dtype, width))
        for wild in (False, True):
            tensor = random_tensor(dtype, shape, seed, wild=wild)
            ids = np.arange(39, -1, -3)
            with np.errstate(all="ignore"):
                expected = CPU.embed(ids, tensor)
            found = op.to_host(op.embed(ids, tensor))
            np.testing.assert_array_equal(found, expected)  # NaN equals NaN, 0 equals -0


@pytest.mark.parametrize("dtype", ["F16", "Q8_0", "Q4_K", "Q6_K", "AprQ4"])
def test_products_of_any_bits_are_finite_where_they_are_on_the_cpu(dtype: str) -> None:
    tensor, x = random_tensor(dtype, (300, 256), 0, wild=True), draw(0, 7, 256)
    with np.errstate(all="ignore"):
        expected = CPU.linear(x, [tensor])
    found = run(backend(), "linear", [x], [tensor])
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))


# Views of stored rows


@pytest.mark.parametrize("dtype", ["F32", "BF16", "Q8_0", "Q4_K", "AprQ4", "AprQ8", "F64"])
def test_views_are_read_in_their_stored_type(dtype: str) -> None:
    width = 160
    fused = random_tensor(dtype, (24, width), 0)
    some_rows = RowSlice("rows", fused, 4, 16)
    views: list[Weight] = [some_rows, SplitHalves("a", fused, 8), SplitHalves("b", some_rows, 8)]
    x = draw(0, 7, width)
    for view in views:
        assert row_source(view).dtype == ("F32" if dtype == "F64" else dtype)
        check_product(x, [view])
        ids = np.array([3, 0, 15])
        np.testing.assert_array_equal(
            backend().to_host(backend().embed(ids, view)), CPU.embed(ids, view)
        )


def test_blocks_that_begin_inside_a_row_are_expanded_on_the_host() -> None:
    tensor = random_tensor("AprQ4", (9, 50), 0)
    assert row_source(tensor).dtype == "F32"
    check_product(draw(0, 3, 50), [tensor])


# What is not a product


@given(seeds, st.integers(1, 17), st.integers(1, 9), st.integers(1, 70))
@some
def test_embed_of_float_rows_is_exact(seed: int, count: int, rows: int, width: int) -> None:
    table = weight(seed, rows, width)
    ids = np.random.default_rng(seed).integers(0, rows, count)
    found = backend().to_host(backend().embed(ids, table))
    np.testing.assert_array_equal(found, table.values[ids])


@given(
    seeds, st.sampled_from(ALL_LANES), st.integers(1, 17), st.integers(1, 4), st.integers(1, 600),
    st.sampled_from([1e-4, 1, 1e15]), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
@some
def test_rms_norm(
    seed: int, lanes: int | None, count: int, heads: int, size: int, scale: float, offset: float
) -> None:
    x = draw(seed, count, heads * size, scale=scale)
    bound = (size / 2 + 9) * U
    check("rms_norm", [x], weight(seed, size), 1e-6, offset, bound=bound, lanes=lanes)


@given(
    seeds, st.sampled_from(ALL_LANES), st.integers(1, 17), st.integers(1, 70),
    st.sampled_from([0.0, -3.0, 0.1, 896**0.5]),
)  # fmt: skip
@some
def test_scale(seed: int, lanes: int | None, count: int, width: int, factor: float) -> None:
    x = draw(seed, count, width)
    np.testing.assert_array_equal(run(backend(lanes), "scale", [x], factor), CPU.scale(x, factor))


@given(
    seeds, st.sampled_from(ALL_LANES), st.integers(1, 17), st.integers(1, 70),
    st.sampled_from([0.3, 30, 50]), st.sampled_from([1e-6, 0.1, 1, 30, 1e4]),
)  # fmt: skip
@some
def test_soft_cap(
    seed: int, lanes: int | None, count: int, width: int, cap: float, scale: float
) -> None:
    check("soft_cap", [draw(seed, count, width, scale=scale)], cap, bound=18 * U, lanes=lanes)


@pytest.mark.parametrize("lanes", ALL_LANES)
@pytest.mark.parametrize("cap", [0.3, 50.0])
def test_soft_cap_of_extremes(cap: float, lanes: int | None) -> None:
    x = np.array([-np.inf, -3e38, -1e4, -1e-30, -0.0, 0.0, 1e-30, 1e4, 3e38, np.inf, np.nan])
    found = run(backend(lanes), "soft_cap", [x.astype(np.float32)], cap)
    np.testing.assert_allclose(found, cap * np.tanh(x / cap), rtol=18 * U)


@given(
    seeds, st.sampled_from(ALL_LANES), st.integers(1, 17),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
)  # fmt: skip
@some
def test_add_bias_and_elementwise(
    seed: int, lanes: int | None, count: int, sizes: list[int]
) -> None:
    op = backend(lanes)
    x, y = (draw(seed + i, count, sum(sizes)) for i in range(2))
    check("add_bias", [x], [weight(seed, n) for n in sizes], bound=U, lanes=lanes)
    check("add", [x, y], bound=U, lanes=lanes)
    check("multiply", [x, y], bound=U, lanes=lanes)
    stop = x.shape[1]
    np.testing.assert_array_equal(run(op, "columns", [x], stop // 2, stop), x[:, stop // 2 :])
    np.testing.assert_array_equal(run(op, "rows", [x], count - 1, count), x[-1:])


def test_elementwise_over_many_groups() -> None:
    for lanes in ALL_LANES:
        x, y = draw(0, 3, 33_333), draw(1, 3, 33_333)
        np.testing.assert_array_equal(run(backend(lanes), "add", [x, y]), x + y)
        found = run(backend(lanes), "columns", [x], 5, 33_330)
        np.testing.assert_array_equal(found, x[:, 5:33_330])


@given(
    seeds, st.sampled_from(ALL_LANES), st.integers(1, 3), st.integers(1, 32),
    st.sampled_from([100.0, 1e4, 1e6]),
    st.lists(st.integers(0, 4096), min_size=1, max_size=9, unique=True),
    st.sampled_from([RopeScaling(), RopeScaling("yarn", factor=4.0)]),
)  # fmt: skip
@some
def test_rope(
    seed: int, lanes: int | None, heads: int, half: int, theta: float, places: list[int],
    scaling: RopeScaling,
) -> None:  # fmt: skip
    rope = Rope(theta, 2 * half, 4096, scaling)
    positions = np.array(sorted(places))
    x = draw(seed, positions.size, heads * 2 * half)
    bound = (2 * positions.max() + 8) * U
    check("rope", [x], positions, rope, bound=bound, lanes=lanes)
    # The same pairs, stored side by side.
    shape = (positions.size, heads, 2, half)
    paired = x.reshape(shape).swapaxes(2, 3).reshape(x.shape)
    op = backend(lanes)
    turned = op.to_host(op.rope(op.from_host(paired), positions, rope, adjacent_pairs=True))
    back = turned.reshape(*shape[:2], half, 2).swapaxes(2, 3).reshape(x.shape)
    np.testing.assert_array_equal(back, run(op, "rope", [x], positions, rope))


heads = st.sampled_from([(1, 1), (5, 1), (6, 2), (7, 7)])


@given(
    seeds, st.sampled_from(ALL_LANES), heads, seen(), st.integers(1, 40),
    st.sampled_from([1.0, 0.3]),
)  # fmt: skip
@many
def test_attention(
    seed: int, lanes: int | None, heads: tuple[int, int], where: Seen, dim: int, scale: float
) -> None:
    (num_heads, num_kv_heads), (count, positions) = heads, where.span
    q, k = draw(seed, count, num_heads * dim), draw(seed + 1, positions, num_kv_heads * dim)
    rest = (*heads, scale, where.mask)
    size = EXACT.attention_scores(*(np.abs(x).astype(np.float64) for x in (q, k)), *rest)
    check("attention_scores", [q, k], *rest, bound=(dim + 2) * U, size=size, lanes=lanes)
    found = run(backend(lanes), "attention_scores", [q, k], *rest)
    assert (found[:, where.hidden()] == 0).all()
    softmax = draw(seed, num_heads, *where.span).astype(np.float64)
    softmax = EXACT.masked_softmax(softmax, where.mask).astype(np.float32)
    size = EXACT.weighted_values(*(np.abs(x).astype(np.float64) for x in (softmax, k)), heads[1])
    bound = (positions + 1) * U
    check("weighted_values", [softmax, k], heads[1], bound=bound, size=size, lanes=lanes)


@given(
    seeds, st.sampled_from(ALL_LANES), heads, seen(), st.sampled_from([1e-3, 1, 50, 1e4, 1e37])
)  # fmt: skip
@many
def test_softmax(
    seed: int, lanes: int | None, heads: tuple[int, int], where: Seen, scale: float
) -> None:
    scores, hidden = draw(seed, heads[0], *where.span, scale=scale), where.hidden()
    bound = (where.positions + 8) * U
    check("masked_softmax", [scores], where.mask, bound=bound, lanes=lanes)
    junk = scores.copy()
    junk[:, hidden] = np.nan
    found = run(backend(lanes), "masked_softmax", [junk], where.mask)
    plain = run(backend(lanes), "masked_softmax", [scores], where.mask)
    np.testing.assert_array_equal(found, plain)
    assert (found[:, hidden] == 0).all()


@pytest.mark.parametrize("lanes", ALL_LANES)
def test_bounds_of_any_size_are_no_bounds(lanes: int | None) -> None:
    op, scores = backend(lanes), draw(0, 2, 5, 9)
    everything = run(op, "masked_softmax", [scores], Mask(None, None))
    for bound in (8, 2**31, 2**32 - 1, 2**32, 2**70):
        found = run(op, "masked_softmax", [scores], Mask(bound, bound))
        np.testing.assert_array_equal(found, everything)


@given(seeds, st.integers(1, 17), st.sampled_from([1e-3, 1, 10, 1e3]))
@some
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activation(kind: str, seed: int, count: int, scale: float) -> None:
    x = draw(seed, count, 64, scale=scale)
    check("activation", [x], kind, bound=12 * U, size=x)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activation_of_extremes(kind: str) -> None:
    x = np.array([-3e38, -1e30, -1e4, -104, -88.8, -0.0, 0.0, 104, 1e4, 1e30, 3e38], np.float32)
    with np.errstate(all="ignore"):
        exact = EXACT.activation(x.astype(np.float64), kind)
    found = run(backend(), "activation", [x], kind)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, rtol=16 * U, atol=3e-37)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'swish2'"):
        run(backend(), "activation", [np.ones(1, np.float32)], "swish2")


@pytest.mark.parametrize("lanes", ALL_LANES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_other_operations_pass_non_finite_values_on(value: float, lanes: int | None) -> None:
    x = draw(0, 6, 24)
    x[2, 5] = value
    rope, places = Rope(1e4, 8), np.arange(6)
    softmax = CPU.masked_softmax(draw(1, 3, 6, 6), CAUSAL)
    masks = (CAUSAL, WINDOW, Mask(None, None), Mask(1, 1))
    cases: list[tuple[str, list[np.ndarray], tuple[Any, ...]]] = [
        ("rms_norm", [x], (weight(0, 8), 1e-5)),
        ("rms_norm", [x], (weight(0, 24), 1e-5, 1.0)),
        ("scale", [x], (0.5,)),
        ("soft_cap", [x], (30.0,)),
        ("add_bias", [x], ([weight(0, 24)],)),
        ("rope", [x], (places, rope)),
        *(("attention_scores", [x, draw(3, 6, 24)], (3, 3, 0.3, mask)) for mask in masks),
        *(("attention_scores", [draw(3, 6, 24), x], (3, 3, 0.3, mask)) for mask in masks),
        *(("masked_softmax", [x.reshape(4, 6, 6)], (mask,)) for mask in masks),
        *(("masked_softmax", [x.T.reshape(4, 6, 6)], (mask,)) for mask in masks),
        ("weighted_values", [softmax, x], (3,)),
        ("add", [x, x], ()),
        ("multiply", [x, x], ()),
        *(("activation", [x], (kind,)) for kind in ("silu", "gelu_pytorch_tanh", "relu")),
    ]
    for name, inputs, rest in cases:
        with np.errstate(all="ignore"):
            expected = getattr(CPU, name)(*inputs, *rest)
        found = run(backend(lanes), name, inputs, *rest)
        np.testing.assert_array_equal(pattern(found), pattern(expected), err_msg=name)


@pytest.mark.parametrize("lanes", ALL_LANES)
def test_argmax_is_that_of_numpy(lanes: int | None) -> None:
    op = backend(lanes)
    for count in (1, 2, 63, 64, 65, 1000, 20_001):
        for seed in range(4):
            x = np.round(draw(seed, count) * 2)  # with equals
            if seed == 3:
                x[[count // 2, count - 1]] = np.nan
            assert op.argmax(op.from_host(x)) == int(np.argmax(x))


@pytest.mark.parametrize("lanes", ALL_LANES)
def test_every_operation_repeats_bit_for_bit(lanes: int | None) -> None:
    op = backend(lanes)
    x = draw(0, 33, 280)
    rope, places = Rope(1e4, 40), np.arange(33)
    gain = weight(0, 280)

    def scores(x: Any) -> Any:
        return op.attention_scores(x, x, 7, 7, 0.2, WINDOW)

    operations: list[Callable[[Any], Any]] = [
        lambda x: op.rms_norm(x, gain, 1e-6, 1.0),
        lambda x: op.soft_cap(x, 30.0),
        lambda x: op.rope(x, places, rope),
        scores,
        lambda x: op.masked_softmax(scores(x), WINDOW),
        lambda x: op.weighted_values(scores(x), x, 7),
        lambda x: op.activation(x, "silu"),
    ]
    for operation in operations:
        first = op.to_host(operation(op.from_host(x)))
        for _ in range(3):
            np.testing.assert_array_equal(op.to_host(operation(op.from_host(x))), first)


@pytest.mark.parametrize("dtype", ["F32", "Q4_K", "AprQ8"])
def test_work_groups_of_every_size_agree(dtype: str) -> None:
    """Only the order of additions differs, so any two are within twice the bound of a product."""
    tensor = random_tensor(dtype, (33, fitting_width(dtype, 700)), 0)
    x = draw(0, 7, tensor.shape[1])
    dense = read_all(tensor).astype(np.float64)
    size = np.linalg.norm(np.abs(x) @ np.abs(dense).T)
    gain, rows = weight(0, tensor.shape[1]), x.shape[1]
    alone = backend(1)
    product, norm = run(alone, "linear", [x], [tensor]), run(alone, "rms_norm", [x], gain, 1e-5)
    for lanes in (2, 4, 16, 32, 128, 256):
        op = backend(lanes)
        assert op.device.tuning.lanes == lanes
        difference = np.linalg.norm(run(op, "linear", [x], [tensor]).astype(np.float64) - product)
        assert difference <= 2 * PRODUCT_BOUND * size, lanes
        assert_close(run(op, "rms_norm", [x], gain, 1e-5), norm, (rows + 16) * U)
        for where in SOME_SEEN:
            scores = draw(0, 3, *where.span)
            softmax = run(op, "masked_softmax", [scores], where.mask)
            expected = run(alone, "masked_softmax", [scores], where.mask)
            assert_close(softmax, expected, (where.positions + 16) * U)


def test_inputs_are_not_written_into() -> None:
    op = backend()
    x = draw(0, 5, 40)
    there = op.from_host(x)
    for operation in (
        lambda: op.add(there, there),
        lambda: op.rms_norm(there, weight(0, 40), 1e-5),
        lambda: op.linear(there, [weight(0, 9, 40)]),
        lambda: op.add_bias(there, [weight(0, 40)]),
        lambda: op.activation(there, "silu"),
        lambda: op.scale(there, 2.0),
        lambda: op.soft_cap(there, 2.0),
        lambda: op.rope(there, np.arange(5), Rope(1e4, 8)),
    ):
        operation()
        np.testing.assert_array_equal(op.to_host(there), x)


def test_stored_bytes_are_what_is_uploaded() -> None:
    """A row of zeros between others: no value of a neighbour may leak in at its ends."""
    raw = bytearray(random_bytes("F16", (3, 37), 0))
    raw[74:148] = bytes(74)
    check_product(draw(0, 7, 37), [stored_tensor("F16", (3, 37), bytes(raw))])
