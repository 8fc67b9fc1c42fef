"""Metrics, each against a plain float64 computation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.judging.compare import (
    CHUNK_VALUES,
    Comparison,
    compare,
    compare_pieces,
    describe,
    may_be_permuted,
)
from aprcore.judging.logits import NEAR_TIE_GAP, compare_logits

# Sums over one chunk and then over the chunks: a few hundred float64 roundings at worst.
SUM_BOUND = 1e-12

SPECIAL = (math.nan, math.inf, -math.inf)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 tensors: sizes around chunk boundaries, ties, zeros, NaN and infinities."""
    around = st.sampled_from([0, 1, CHUNK_VALUES, 2 * CHUNK_VALUES, 3 * CHUNK_VALUES])
    size = draw(st.one_of(st.integers(0, 40), around.map(lambda n: max(0, n - 1)), around,
                          around.map(lambda n: n + 1)))  # fmt: skip
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["near", "far", "ties", "equal", "zero", "tiny", "huge"]))
    b = generator.standard_normal(size).astype(np.float32)
    a = b + np.float32(1e-3) * generator.standard_normal(size).astype(np.float32)
    match kind:
        case "far":
            a = generator.standard_normal(size).astype(np.float32)
        case "ties":
            a, b = (generator.integers(-2, 3, size).astype(np.float32) for _ in "ab")
        case "equal":
            a = b.copy()
        case "zero":
            b = np.zeros(size, np.float32)
        case "tiny":  # subnormals, whose squares float32 cannot hold
            a, b = (x * np.float32(1e-42) for x in (a, b))
        case "huge":  # whose squares float32 cannot hold either
            a, b = (x * np.float32(1e37) for x in (a, b))
    if size and draw(st.booleans()):
        for side in (a, b):
            for _ in range(draw(st.integers(0, 4))):
                side[generator.integers(size)] = draw(st.sampled_from(SPECIAL))
        at = generator.integers(size)
        a[at] = b[at] = draw(st.sampled_from(SPECIAL))
    return a, b


def exact_sum(x: np.ndarray) -> float:
    """In extended precision where there is one; numpy adds pairwise besides."""
    return float(x.astype(np.longdouble).sum())


def plain_top(a: np.ndarray, b: np.ndarray, k: int) -> list[int]:
    """Unequal non-finite positions first, then finite ones by |a - b|, ties by index."""
    finite = np.isfinite(a) & np.isfinite(b)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    leading = np.flatnonzero(~finite & ~equal)
    rest = np.flatnonzero(finite)
    diff = np.abs(a[rest].astype(np.float64) - b[rest].astype(np.float64))
    return [*leading, *rest[np.argsort(-diff, kind="stable")]][:k]


def assert_as_plain(found: Comparison, a: np.ndarray, b: np.ndarray, k: int) -> None:
    finite = np.isfinite(a) & np.isfinite(b)
    x, y = (side[finite].astype(np.float64) for side in (a, b))
    diff = np.abs(x - y)
    approx = lambda value: pytest.approx(value, rel=SUM_BOUND, abs=0)  # noqa: E731
    aa, bb, dd = (exact_sum(v * v) for v in (x, y, x - y))
    assert (found.count, found.finite_count) == (a.size, x.size)
    assert (found.nonfinite_a, found.nonfinite_b) == (
        (~np.isfinite(a)).sum(),
        (~np.isfinite(b)).sum(),
    )
    n = max(1, x.size)
    assert found.rms_a == approx(math.sqrt(aa / n))
    assert found.rms_b == approx(math.sqrt(bb / n))
    assert found.rms_diff == approx(math.sqrt(dd / n))
    if aa == 0 or bb == 0:
        assert found.cosine == float(aa == bb)
    else:  # a sum of terms of both signs is exact to its largest terms, not relatively
        expected = exact_sum(x * y) / math.sqrt(aa) / math.sqrt(bb)
        assert found.cosine == pytest.approx(expected, rel=0, abs=SUM_BOUND)
    if bb == 0:
        assert found.relative_l2 == (0 if dd == 0 else math.inf)
    else:
        assert found.relative_l2 == approx(math.sqrt(dd / bb))
        assert found.nmse == approx(dd / bb)
    assert found.max_abs_diff == (diff.max() if x.size else 0)
    expected_index = np.flatnonzero(finite)[diff.argmax()] if x.size else -1
    assert found.max_index == expected_index
    unequal = ~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))
    assert found.unequal_nonfinite == unequal.sum()
    assert found.first_nonfinite == (-1 if finite.all() else int(np.argmin(finite)))
    assert found.identical == bool(((a == b) | (np.isnan(a) & np.isnan(b))).all())
    assert found.top.indices.tolist() == plain_top(a, b, k)
    for entry in found.top:
        same = [float(a[entry.index]), float(b[entry.index])]
        np.testing.assert_array_equal([entry.a, entry.b], same)
        np.testing.assert_array_equal(entry.abs_diff, abs(same[0] - same[1]))


@given(pairs(), st.sampled_from([0, 1, 3, 200]))
@settings(max_examples=50, deadline=None)
def test_every_figure_is_that_of_a_plain_computation(
    sides: tuple[np.ndarray, np.ndarray], k: int
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a NaN in a tensor is a finding, not a warning
        found = compare(*sides, k)
    assert_as_plain(found, *sides, k)


@given(pairs(), st.sampled_from([0, 2, 50]), st.lists(st.integers(0, 3 * CHUNK_VALUES), max_size=4))
@settings(max_examples=25, deadline=None)
def test_pieces_give_what_the_whole_gives(
    sides: tuple[np.ndarray, np.ndarray], k: int, cuts: list[int]
) -> None:
    a, b = sides
    edges = [0, *sorted(min(cut, a.size) for cut in cuts), a.size]
    buffers = np.empty((2, a.size), np.float32)

    def pieces() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, stop in pairwise(edges):  # the buffers are reused, as callers may
            for buffer, side in zip(buffers, sides):
                buffer[: stop - start] = side[start:stop]
            yield buffers[0, : stop - start], buffers[1, : stop - start]

    assert_as_plain(compare_pieces(pieces(), k), a, b, k)


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="6 values with 5"):
        compare(np.zeros((2, 3), np.float32), np.zeros(5, np.float32))


def test_flat_indices_are_row_major_whatever_the_memory_order() -> None:
    b = np.zeros((3, 4), np.float32)
    a = b.copy()
    a[1, 2] = 1
    assert compare(np.asfortranarray(a), b, 1).max_index == 6


def test_top_is_a_prefix_of_a_longer_top() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(-2, 3, (2, 2 * CHUNK_VALUES + 5)).astype(np.float32)
    a[[7, CHUNK_VALUES]] = b[[7, 9]] = np.nan
    longest = compare(a, b, 500).top.indices.tolist()
    for k in (1, 2, 3, 10, 499):
        assert compare(a, b, k).top.indices.tolist() == longest[:k]


def test_equal_non_finite_values_are_no_difference() -> None:
    a = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    found = compare(a, a.copy(), 4)
    assert found.identical
    assert found.top.indices.tolist() == [3]
    assert not compare(a, -a, 4).identical


class TestDescribe:
    @given(pairs())
    @settings(max_examples=30, deadline=None)
    def test_figures_cover_the_finite_values(self, sides: tuple[np.ndarray, np.ndarray]) -> None:
        x = sides[0]
        found = describe(x)
        finite = x[np.isfinite(x)].astype(np.float64)
        assert (found.count, found.nans, found.infinities) == (
            x.size, np.isnan(x).sum(), np.isinf(x).sum()
        )  # fmt: skip
        assert found.nonfinite == x.size - finite.size
        assert found.zeros == (finite == 0).sum()
        if finite.size == 0:
            figures = (found.mean, found.std, found.minimum, found.maximum, found.rms)
            assert all(map(math.isnan, figures))
            return
        assert (found.minimum, found.maximum) == (finite.min(), finite.max())
        rms = math.sqrt(exact_sum(finite * finite) / finite.size)
        assert found.rms == pytest.approx(rms, rel=SUM_BOUND, abs=0)
        # The mean may cancel: it is exact to the size of the values, and so is the deviation.
        assert found.mean == pytest.approx(exact_sum(finite) / finite.size, abs=SUM_BOUND * rms)
        assert found.std**2 + found.mean**2 == pytest.approx(rms**2, rel=SUM_BOUND, abs=0)


class TestLogits:
    @given(
        st.integers(1, 300), st.integers(0, 2**32), st.floats(0.01, 50), st.floats(0.05, 20),
        st.integers(1, 8),
    )  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_figures_are_those_of_a_plain_computation(
        self, size: int, seed: int, spread: float, temperature: float, k: int
    ) -> None:
        generator = np.random.default_rng(seed)
        b = (spread * generator.standard_normal(size)).astype(np.float32)
        a = b + np.float32(0.3 * spread) * generator.standard_normal(size).astype(np.float32)
        found = compare_logits(a, b, k=k, temperature=temperature)
        p, log_p, log_q = plain_distributions(a, b, temperature)
        assert found.kl == pytest.approx(math.fsum(p * (log_p - log_q)), rel=1e-9, abs=1e-12)
        assert found.argmax_a == int(a.argmax())
        assert found.argmax_b == int(b.argmax())
        assert found.top_a == tuple(np.argsort(-a, kind="stable")[:k].tolist())
        assert found.values_b == tuple(np.sort(b)[::-1][:k].tolist())
        assert found.agree == (a.argmax() == b.argmax())
        if found.agree:
            assert (found.gap, found.near_tie) == (0, False)
        else:
            wide = b.astype(np.float64)
            gap = (wide.max() - wide[a.argmax()]) / (wide.max() - wide.min())
            assert found.gap == pytest.approx(gap, rel=1e-12)
            assert found.near_tie == (gap <= NEAR_TIE_GAP)

    def test_kl_is_from_the_oracle_to_the_trace(self) -> None:
        trace, oracle = (np.log(np.array(p, np.float32)) for p in ([0.5, 0.5], [0.9, 0.1]))
        expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
        assert compare_logits(trace, oracle).kl == pytest.approx(expected, rel=1e-6)

    def test_kl_of_equal_logits_is_zero_and_shifts_do_not_count(self) -> None:
        x = np.linspace(-3, 4, 11, dtype=np.float32)
        assert compare_logits(x, x).kl == 0
        assert compare_logits(x + np.float32(2), x).kl < 1e-12

    def test_large_logits_do_not_overflow(self) -> None:
        a, b = np.array([3e38, -3e38], np.float32), np.array([-3e38, 3e38], np.float32)
        found = compare_logits(a, b)
        assert math.isfinite(found.kl)
        assert found.kl > 1e38

    def test_the_gap_is_measured_on_the_reference(self) -> None:
        trace = np.array([0, 9, 10, 0], np.float32)
        oracle = np.array([0, 10, 9.5, 0], np.float32)
        found = compare_logits(trace, oracle)
        assert found.gap == pytest.approx(0.05)
        assert found.near_tie
        assert not compare_logits(trace, np.array([0, 10, 5, 0], np.float32)).near_tie

    def test_nan_is_never_the_best_token_and_has_no_kl(self) -> None:
        found = compare_logits(
            np.array([np.nan, 1, 2], np.float32), np.array([0, 1, 2], np.float32)
        )
        assert (found.argmax_a, found.top_a[-1]) == (2, 0)
        assert math.isnan(found.kl)
        swapped = compare_logits(
            np.array([5, 1, 2], np.float32), np.array([np.nan, 1, 2], np.float32)
        )
        assert math.isnan(swapped.gap)
        assert not swapped.near_tie

    def test_one_value_and_equal_values(self) -> None:
        one = compare_logits(np.float32([3]), np.float32([-1]))
        assert (one.argmax_a, one.kl, one.gap, one.agree) == (0, 0, 0, True)
        flat = compare_logits(np.float32([1, 2]), np.float32([7, 7]))
        assert (flat.argmax_b, flat.gap, flat.near_tie) == (0, 0, True)

    @pytest.mark.parametrize("temperature", [0, -1, math.nan])
    def test_refuses_a_temperature_that_is_not_positive(self, temperature: float) -> None:
        with pytest.raises(ValueError, match="temperature"):
            compare_logits(np.ones(2), np.ones(2), temperature=temperature)

    def test_refuses_other_sizes_and_none(self) -> None:
        for sizes in ((2, 3), (0, 0)):
            with pytest.raises(ValueError, match="logits"):
                compare_logits(*(np.ones(n, np.float32) for n in sizes))


def plain_distributions(
    a: np.ndarray, b: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """softmax(b / t), its logarithm and that of a, in extended precision where there is one."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.longdouble) / np.longdouble(temperature)
        shifted = wide - wide.max()
        return shifted - np.log(np.exp(shifted).sum())

    log_p, log_q = log_softmax(b), log_softmax(a)
    return np.exp(log_p), log_p, log_q


def test_a_comparison_is_a_plain_record() -> None:
    record = asdict(compare(np.ones(3, np.float32), np.zeros(3, np.float32), 2))
    assert record["max_abs_diff"] == 1
    assert record["cosine"] == 0


class TestOrders:
    """Whether any order of one tensor's values could be near another tensor."""

    @given(pair=pairs(), seed=st.integers(0, 2**32), bound=st.sampled_from([1e-6, 1e-4, 0.15]))
    @settings(max_examples=150, deadline=None)
    def test_no_order_within_the_bound_is_ruled_out(
        self, pair: tuple[np.ndarray, np.ndarray], seed: int, bound: float
    ) -> None:
        a, b = pair
        shuffled = np.random.default_rng(seed).permutation(a)
        if compare(a, b).relative_l2 <= bound and np.isfinite(a).all() and np.isfinite(b).all():
            assert may_be_permuted(shuffled, b, compare(shuffled, b), bound)

    def test_values_that_no_order_mends_are_told(self) -> None:
        b = np.arange(1, 101, dtype=np.float32)
        far = np.sqrt(np.mean(b**2, dtype=np.float64)) * np.ones(100)  # of the same length
        assert not may_be_permuted(far, b, compare(far, b), 0.15)
        assert not may_be_permuted(2 * b[::-1], b, compare(2 * b[::-1], b), 0.15)
        assert may_be_permuted(b[::-1], b, compare(b[::-1], b), 0)

    def test_no_order_makes_a_nan_agree(self) -> None:
        b = np.arange(1, 5, dtype=np.float32)
        a = np.array([4, 3, 2, math.nan], np.float32)
        assert not may_be_permuted(a, b, compare(a, b), 10)
