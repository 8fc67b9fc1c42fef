"""Every term of the predicted variances, held against a count of roundings made here.

Three made-up engines show one kind of rounding each, so that a term cannot hide behind another:
sums alone, stored results alone, or nothing but the angles of RoPE. What each term should be comes
from elsewhere: from partial sums added up one by one, from numpy's own spacing, or from the error
of a real computation in that precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aprcore.engines.arithmetic import EXACT, RESULTS, Arithmetic
from aprcore.engines.estimate import Estimate, Profile
from aprcore.engines.prediction import PredictionBackend
from aprcore.engines.reference import ReferenceBackend
from aprcore.ground.precision import FLOAT16, FLOAT32, FLOAT64
from aprcore.judging.noise import allowed_ratio
from aprcore.network.mask import CAUSAL, Mask
from aprcore.network.rope import Rope
from aprcore.quant.quantise import quantise
from aprcore.quant.steps import step_squares
from aprcore.quant.types import dequantize
from closeness import assert_close
from tiny import ArrayWeight

# Sums are carried in float32 and nothing else rounds; results are stored in float16 and nothing
# else rounds; results are stored in float16 and so are weights.
SUMS = Arithmetic("sums", FLOAT64, FLOAT32)
STORED = Arithmetic("stored", FLOAT16, FLOAT64, rounds_on_dump=True)
HALF = Arithmetic("half", FLOAT16, FLOAT64)

# Energy of the error of one rounding of a number just above 1, uniform within half the spacing.
ROUNDING = float(np.spacing(np.float32(1))) ** 2 / 12
# A result that is good to one unit in the last place, as libraries promise of exp and tanh: twice
# the error of a rounded one, in energy.
ULP = 4


def device(ulps: float) -> float:
    """The same of a function that is good to so many units, in roundings."""
    return ULP * ulps**2


# OpenCL C 3.0, table "ULP values for single precision built-in math functions", full profile.
EXP, DIVIDED, RSQRT, SINE, TANH = (device(ulps) for ulps in (3, 2.5, 2, 4, 5))
REAL = ReferenceBackend()


def towards_zero(x: np.ndarray) -> np.ndarray:
    """As float32 with the rest cut off."""
    near = x.astype(np.float32)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near).astype(float)


class Stepped(ArrayWeight):
    """A weight in memory, all of it stored with one step."""

    step = 0.0

    def step_squares(self, start: int, stop: int) -> tuple[np.ndarray, int]:
        rows = self.values[start:stop].reshape(stop - start, -1)
        return np.full(rows.shape, self.step**2, np.float32), 1


class Coarse(Stepped):
    step = 0.01


def weight(values: Any, kind: type[Stepped] = Stepped, dtype: str = "F32") -> Stepped:
    return kind("w", np.asarray(values, np.float32), dtype)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def predict(arithmetic: Arithmetic, *, weights_rounded: bool = False) -> PredictionBackend:
    return PredictionBackend([(None, Profile(arithmetic, weights_rounded))], threads=1)


# The operations whose arguments an engine's interface decides, in one place.


def norm_of(op: Any, x: Any, gain: Stepped, eps: float = 0.0, offset: float = 0.0) -> Any:
    return op.rms_norm(x, gain, eps, offset)


def scores_of(
    op: Any, q: Any, k: Any, num_heads: int = 1, num_kv_heads: int = 1, mask: Mask = CAUSAL
) -> Any:
    scale = (q.value.shape[1] // num_heads) ** -0.5
    return op.attention_scores(q, k, num_heads, num_kv_heads, scale, mask)


def softmax_of(op: Any, scores: Any) -> Any:
    return op.masked_softmax(scores, CAUSAL)


def values_of(op: Any, softmax: Any, v: Any) -> Any:
    return op.weighted_values(softmax, v, 1)


def turned(op: Any, x: Any, positions: np.ndarray, rope: Rope) -> Any:
    return op.rope(x, positions, rope)


def counted(found: Estimate) -> np.ndarray:
    """A variance of float32 sums as a number of roundings of 1."""
    return found.variance / ROUNDING


def spacing_energy(x: Any) -> np.ndarray:
    """Energy of rounding x to float16, by numpy's spacing."""
    return np.square(np.spacing(np.abs(np.asarray(x)).astype(np.float16)).astype(float)) / 12


def exact_spacing_energy(x: Any) -> np.ndarray:
    """The same by the spacing of the number below, which a number just below a power of two has."""
    near = np.abs(np.asarray(x)).astype(np.float16)
    below = np.where(near > np.abs(x), np.nextafter(near, np.float16(0)), near)
    return np.square(np.spacing(below).astype(float)) / 12


def half(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float16).astype(np.float64)


def halves(seed: int, *shape: int) -> np.ndarray:
    """Normal values that are numbers of float16."""
    return half(normal(seed, *shape))


def partial_sums(products: np.ndarray) -> float:
    """The energy that rounds in a sum: each addition rounds what it has summed so far."""
    return float(np.square(np.cumsum(products)).sum())


class TestSums:
    """u²/3 (K/2 sum p² + K/3 y²): exact, but for a K-th, where partial sums grow steadily."""

    WIDTH = 8
    ONES = np.ones(WIDTH)

    def test_the_unit_is_the_error_of_a_real_rounding(self) -> None:
        x = 1 + np.random.default_rng(0).uniform(0, 1e-3, 40_000)
        error = np.square(x.astype(np.float32) - x).mean()
        assert error == pytest.approx(ROUNDING, rel=0.03)

    def test_a_product(self) -> None:
        op = predict(SUMS)
        found = op.linear(op.from_host(self.ONES[None]), [weight(self.ONES[None])])
        # Each product rounds once, too.
        expected = partial_sums(self.ONES) + self.WIDTH
        assert counted(found)[0, 0] == pytest.approx(expected, rel=0.01)

    def test_a_product_that_cancels(self) -> None:
        signs = np.random.default_rng(1).choice([-1.0, 1.0], (4000, 32))
        # The walk of independent products, over walks: (K+1)/2 of their energy. Only where the
        # result is zero does the prediction speak of it alone.
        wandering = np.mean([partial_sums(row) for row in signs]) + 32
        op = predict(SUMS)
        zero = np.repeat([1.0, -1.0], 16)
        found = op.linear(op.from_host(zero[None]), [weight(np.ones((1, 32)))])
        assert counted(found)[0, 0] == pytest.approx(wandering, rel=0.05)

    def test_scores(self) -> None:
        op = predict(SUMS)
        x = op.from_host(self.ONES[None])
        # Divided by the root of the head's size at the end, which squares to the size.
        expected = partial_sums(self.ONES) / self.WIDTH
        assert counted(scores_of(op, x, x))[0, 0, 0] == pytest.approx(expected, rel=0.01)

    def test_weighted_values(self) -> None:
        op, size = predict(SUMS), self.WIDTH
        even = np.tril(np.full((size, size), 1 / size))[None]
        found = values_of(op, op.from_host(even), op.from_host(np.ones((size, 1))))
        expected = partial_sums(np.full(size, 1 / size))
        assert counted(found)[-1, 0] == pytest.approx(expected, rel=0.01)

    def test_the_mean_of_squares_of_a_norm(self) -> None:
        op, size = predict(SUMS), 256
        found = norm_of(op, op.from_host(np.ones((1, size))), weight(np.full(size, 3.0)))
        # What is relative to the sum of squares is halved by the root: a quarter in energy.
        # The root is in all values of a row alike, so that no mean is below its worst.
        relative = partial_sums(np.ones(size)) / size**2 / 4 + 3 * RSQRT
        assert_close(counted(found), np.full((1, size), 9 * relative), 0.01)

    def test_the_denominator_of_a_softmax(self) -> None:
        op, size = predict(SUMS), 64
        found = softmax_of(op, op.from_host(np.zeros((1, size, size))))
        relative = counted(found)[0, -1] * size**2
        denominator = partial_sums(np.ones(size)) / size**2
        # The exp of S equal scores, and what the row is divided by, in all of its values alike.
        assert_close(relative - denominator, np.full(size, EXP + 3 * DIVIDED), 0.01)

    def test_sums_that_a_tensor_core_cuts_off(self) -> None:
        op = predict(replace(STORED, stored=FLOAT64, cuts_sums=True))
        x, w = normal(5, 40, 512), normal(6, 300, 512)
        found = op.linear(op.from_host(x), [weight(w)])
        w = w.astype(np.float32).astype(float)
        terms = np.square(x) @ np.square(w).T
        # Half a unit in the last place for each four products, of what partial sums come to.
        assert_close(counted(found), 3 * (512 / 4 / 2) ** 2 * (terms + found.value**2), 1e-5)
        total = np.zeros((40, 300))
        for first in range(0, 512, 4):
            part = slice(first, first + 4)
            total = towards_zero(total + x[:, part] @ w[:, part].T)
        measured = np.square(total - found.value).sum() / found.variance.sum()
        assert 0.1 < measured < 1

    def test_sine_and_cosine_of_a_device(self) -> None:
        op, rope = predict(SUMS), Rope(theta=10.0, head_dim=2)
        found = turned(op, op.from_host(np.array([[3.0, 4.0]])), np.array([0]), rope)
        # At angle 0 the angle itself is off by a few roundings of 1.
        assert_close(counted(found), [[SINE / 2 * 25 + 4 * 16, SINE / 2 * 25 + 4 * 9]], 1e-9)

    def test_a_bias_that_is_added_to_a_sum_in_another_order(self) -> None:
        op, width = predict(SUMS), 16
        y, b = normal(2, 3, width), normal(3, width)
        found = op.add_bias(op.from_host(y), [weight(b)])
        for row in range(3):
            # K independent products have the energy of their sum, K/2 times that wanders, and one
            # more each for the products themselves.
            product = np.mean([y[row, c] ** 2 for c in range(width)])
            expected = [(width / 2 + 1) * (product + float(np.float32(x)) ** 2) for x in b]
            assert_close(counted(found)[row], expected, 1e-9)

    @pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
    def test_an_activation_of_small_values(self, kind: str) -> None:
        op = predict(SUMS)
        x = np.array([[1e-3]])
        found = op.activation(op.from_host(x), kind)
        # Of 1 + tanh, which is about 1 here, a unit in the last place is as much again.
        own = (EXP + DIVIDED if kind == "silu" else ULP) * float(found.value[0, 0]) ** 2
        summed = TANH * float(x[0, 0] / 2) ** 2 if kind.startswith("gelu") else 0.0
        assert counted(found)[0, 0] == pytest.approx(own + summed, rel=1e-5)

    @pytest.mark.parametrize("kind", ["gelu", "gelu_pytorch_tanh"])
    def test_far_below_zero_a_gelu_is_what_cancels(self, kind: str) -> None:
        op, x = predict(SUMS), np.array([[-12.0]])
        found = op.activation(op.from_host(x), kind)
        assert counted(found)[0, 0] == pytest.approx(TANH * 6.0**2, rel=0.05)


class TestExponents:
    """exp(x) computed as 2 to the x/ln 2 is off by what the product loses, u|x| of the result."""

    # From 64 to 72, where the spacing is nearly that of the prediction, which takes the largest.
    EXPONENTS = np.random.default_rng(4).uniform(64, 72, 20_000)

    def test_silu(self) -> None:
        x = -(self.EXPONENTS * np.log(2)).astype(np.float32).astype(np.float64)[None]
        op = predict(SUMS)
        found = op.activation(op.from_host(x), "silu")
        product = (x / np.log(2)).astype(np.float32).astype(np.float64)
        engine = x / (1 + 2**-product)
        error = np.square(engine / found.value - 1).sum()
        assert 0.82 < error / (found.variance / found.value**2).sum() < 0.95

    def test_softmax(self) -> None:
        # Scores 64 to 72 below the maximum: the difference is what rounds.
        top = np.random.default_rng(5).uniform(0.2, 0.4, self.EXPONENTS.size)
        top = top.astype(np.float32).astype(np.float64)
        low = (top - self.EXPONENTS).astype(np.float32).astype(np.float64)
        op = predict(SUMS)
        energy = variance = 0.0
        for start in range(0, 2000, 100):
            rows = [
                np.array([[[a, 0.0], [b, a]]])
                for a, b in zip(top[start : start + 100], low[start : start + 100])
            ]
            scores = np.concatenate(rows)
            found = softmax_of(op, op.from_host(scores))
            depth = (scores[:, 1, 0] - scores[:, 1, 1]).astype(np.float32).astype(np.float64)
            engine = np.exp(depth) / (1 + np.exp(depth))
            relative = 1 / found.value[:, 1, 0] ** 2
            energy += float((np.square(engine - found.value[:, 1, 0]) * relative).sum())
            variance += float((found.variance[:, 1, 0] * relative).sum())
        assert 0.75 < energy / variance < 0.95

    def test_what_underflows(self) -> None:
        op = predict(EXACT)
        found = softmax_of(op, op.from_host(np.array([[[0.0, 0.0], [-200.0, 0.0]]])))
        # exp(-200) is below float32's normal numbers: zero instead, or any of the subnormal ones.
        smallest = float(np.finfo(np.float32).smallest_normal)
        assert found.variance[0, 1, 0] / smallest**2 == pytest.approx(1)
        assert found.value[0, 1, 0] < smallest
        # What is masked is exactly zero.
        assert found.variance[0, 0, 1] == 0


class TestStored:
    """Results that round to float16: what a real engine loses, operation by operation."""

    def ratio(self, engine: np.ndarray, found: Estimate) -> float:
        return float(np.square(engine - found.value).sum() / found.variance.sum())

    # A result that rounds up to a power of two has the spacing above it, by numpy.
    NEARLY = 0.05

    def test_the_unit_is_numpys_spacing(self) -> None:
        op, x = predict(STORED), halves(1, 50, 60)
        found = op.add(op.from_host(x), op.from_host(0 * x))
        assert_close(found.variance, spacing_energy(x), 1e-12)

    def test_products_sums_and_weighted_values(self) -> None:
        op = predict(STORED)
        x, w = halves(2, 30, 16), halves(3, 40, 16)
        found = op.linear(op.from_host(x), [weight(w)])
        assert_close(found.variance, spacing_energy(x @ w.T), self.NEARLY)
        v = halves(4, 6, 5)
        soft = half(np.tril(np.abs(normal(5, 1, 6, 6))))
        found = values_of(op, op.from_host(soft), op.from_host(v))
        assert_close(found.variance, spacing_energy(soft[0] @ v), self.NEARLY)
        found = op.multiply(op.from_host(x), op.from_host(x[::-1]))
        assert_close(found.variance, spacing_energy(x * x[::-1]), self.NEARLY)
        found = op.activation(op.from_host(x), "relu")
        assert_close(found.variance, np.where(x > 0, spacing_energy(x), 0), 1e-9)
        found = softmax_of(op, op.from_host(np.zeros((1, 3, 3))))
        assert found.variance[0, 2, 0] == pytest.approx(float(spacing_energy(1 / 3)))

    def test_scores_round_before_and_after_their_scaling(self) -> None:
        op, x, y = predict(STORED), halves(6, 100, 8), halves(7, 100, 8)
        found = scores_of(op, op.from_host(x), op.from_host(y))
        engine = np.tril(half(half(x @ y.T) / np.sqrt(8)))
        assert self.ratio(engine, found) == pytest.approx(1, abs=0.06)

    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_a_norm_rounds_before_and_after_its_gain(self, offset: float) -> None:
        op, x, gain = predict(STORED), halves(8, 100, 64), half(3 * normal(9, 64))
        found = norm_of(op, op.from_host(x), weight(gain), 1e-3, offset)
        scale = np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-3)
        engine = half(half(x / scale) * (offset + gain))
        assert self.ratio(engine, found) == pytest.approx(1, abs=0.1)

    def test_a_bias_rounds_with_the_product_before_it(self) -> None:
        op, product, bias = predict(STORED), normal(10, 200, 50), halves(11, 50)
        found = op.add_bias(op.from_host(product), [weight(bias)])
        engine = half(half(product) + bias)
        # Numbers of like exponent lose one bit when they are added: 0 or half a unit, whose
        # variance is 1/8 and not 1/12.
        assert 1.05 < self.ratio(engine, found) < 1.3

    def test_rope_rounds_sine_cosine_their_products_and_the_sum(self) -> None:
        # Angles anywhere on the circle; the error of the angle itself is float32's and does not
        # show here.
        rope = Rope(theta=3.0, head_dim=16)
        x, positions = halves(12, 400, 16), np.arange(400)
        op = predict(STORED)
        found = turned(op, op.from_host(x), positions, rope)
        angles = np.multiply.outer(positions, 3.0 ** (-np.arange(8) / 8))
        first, second = x[:, :8], x[:, 8:]
        cosine, sine = half(np.cos(angles)), half(np.sin(angles))
        left = half(half(first * cosine) - half(second * sine))
        right = half(half(first * sine) + half(second * cosine))
        ratio = self.ratio(np.concatenate([left, right], axis=1), found)
        # Sine, cosine and products are taken at the largest spacing for their power of two. On
        # average it is 0.54 of that, less of a cosine near 1, and a result that is stored has half
        # of their energy: below (0.54 + 0.27) of (1 + 0.27).
        assert 0.5 < ratio < 0.64

    def test_an_embedding_rounds_its_weight_and_its_result(self) -> None:
        values = normal(13, 50, 40)
        found = predict(HALF).embed(np.arange(50), weight(values))
        # The second rounding of a number that is one of the type already is free.
        assert self.ratio(half(values.astype(np.float32)), found) == pytest.approx(0.5, abs=0.03)


class TestScale:
    """A factor that rounds once, for all values alike, and a product that rounds for each."""

    # The roots of hidden sizes, of which some are numbers of a half type.
    FACTORS = (2304**0.5, 3584**0.5, 4608**0.5, 1033**0.5)

    @pytest.mark.parametrize("size", [1033, 1152, 3584, 4608, None])
    @pytest.mark.parametrize("name", ["f16", "bf16"])
    def test_of_a_real_engine(self, size: int | None, name: str) -> None:
        arithmetic = RESULTS[name]
        narrow = arithmetic.stored.round
        # Without a size the worst that there is: half a unit off, just above a power of two.
        worst = 16 * (1 + 1.01 * arithmetic.stored.roundoff)
        factor = worst if size is None else size**0.5
        op, x = predict(arithmetic), narrow(normal(1, 200, 100))
        found = op.scale(op.from_host(x), factor)
        engine = narrow(narrow(np.asarray(factor)) * x)
        ratio = float(np.square(engine - found.value).sum() / found.variance.sum())
        # By a power of two and a little the product hardly rounds: less than the prediction has.
        assert ratio == pytest.approx(1, abs=0.06 if size and name == "f16" else 0.2)

    def test_the_factors_error_is_what_it_is_and_no_more(self) -> None:
        op, x = predict(STORED), normal(2, 20, 30)
        for factor in self.FACTORS:
            found = op.scale(op.from_host(x), factor)
            lost = np.square((half(factor) - factor) * x)
            assert_close(found.variance, lost + exact_spacing_energy(factor * x), 1e-9)
        # An engine that rounds nothing has the factor, too.
        exact = predict(EXACT).scale(op.from_host(x), 7.3).variance
        assert not np.any(exact > 1e-28)

    def test_each_stacked_side_rounds_it_to_its_own_type(self) -> None:
        profiles = [Profile(RESULTS[name], False) for name in ("f32", "bf16")]
        x = normal(3, 4, 5)
        both = PredictionBackend([(4, profile) for profile in profiles])
        found = both.scale(both.from_host(np.concatenate([x, x])), 67.88)
        for rows, profile in zip((slice(0, 4), slice(4, 8)), profiles):
            op = predict(profile.arithmetic)
            assert_close(found.variance[rows], op.scale(op.from_host(x), 67.88).variance, 1e-12)


class TestSoftCap:
    """cap · tanh(x / cap): three results that are stored, and a tanh of the library."""

    CAPS = (50.0, 30.0, 2.0)

    def engine(self, x: np.ndarray, cap: float) -> np.ndarray:
        return half(half(np.tanh(half(x / cap))) * cap)

    @pytest.mark.parametrize("cap", CAPS)
    @pytest.mark.parametrize("size", [1e-4, 0.01, 0.3, 1.0, 3.0])
    def test_each_stored_result_rounds_by_its_own_spacing(self, cap: float, size: float) -> None:
        op, x = predict(STORED), halves(1, 200, 100) * cap * size
        found = op.soft_cap(op.from_host(x), cap)
        slope = 1 / np.square(np.cosh(x / cap))
        tanh = np.tanh(x / cap)
        expected = np.square(cap * slope) * exact_spacing_energy(x / cap)
        expected += cap**2 * exact_spacing_energy(tanh) + exact_spacing_energy(cap * tanh)
        assert_close(found.variance, expected, 1e-9)

    @pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
    def test_of_a_real_half_precision_engine(self, size: float) -> None:
        op, x = predict(STORED), half(30 * size * normal(2, 200, 100))
        found = op.soft_cap(op.from_host(x), 30.0)
        error = np.square(self.engine(x, 30.0) - found.value)
        assert error.sum() / found.variance.sum() == pytest.approx(1, abs=0.12)

    @pytest.mark.parametrize("cap", CAPS)
    def test_quotients_that_are_subnormal_where_the_score_is_not(self, cap: float) -> None:
        # What comes to a few of float16's smallest steps after the division: no single value is
        # beyond what a uniform error reaches.
        op, x = predict(RESULTS["f16"]), half(np.geomspace(1e-5, 1e-2, 20_000)[None])
        found = op.soft_cap(op.from_host(x), cap)
        error = np.square(self.engine(x, cap) - found.value)
        assert 0.5 < (error / found.variance).max() <= 3

    def test_tanh_is_good_to_a_few_units_in_the_last_place(self) -> None:
        op, x = predict(SUMS), 40 * normal(3, 5, 7)
        found = op.soft_cap(op.from_host(x), 30.0)
        assert_close(counted(found), (TANH + ULP) * np.square(30 * np.tanh(x / 30)), 1e-9)

    @pytest.mark.parametrize("cap", CAPS)
    def test_of_real_float32_engines(self, cap: float) -> None:
        op = predict(RESULTS["f32"])
        narrow = np.float32(cap)
        for size in (1e-3, 1.0, 30.0):
            x = (size * normal(4, 100, 100)).astype(np.float32)
            found = op.soft_cap(op.from_host(x.astype(np.float64)), cap)
            # Divided by the cap, or multiplied by what its reciprocal rounds to, as llama.cpp does.
            for quotient in (x / narrow, x * (1 / narrow)):
                engine = (np.tanh(quotient) * narrow).astype(np.float64)
                assert np.square(engine - found.value).sum() < found.variance.sum()

    def test_nothing_rounds_in_exact_arithmetic(self) -> None:
        op, x = predict(EXACT), normal(5, 5, 7)
        assert not np.any(op.soft_cap(op.from_host(x), 2.0).variance > 1e-30)


class TestOffset:
    """A norm by 1 + w: what is stored, and cast, is w."""

    SIZE = 64

    def test_steps_and_cast_are_those_of_the_weight_and_not_of_the_sum(self) -> None:
        x, w = normal(1, 9, self.SIZE), 0.01 * normal(2, self.SIZE)
        normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))
        op = predict(EXACT, weights_rounded=True)
        found = norm_of(op, op.from_host(x), weight(w, Coarse), offset=1.0)
        assert_close(found.variance, np.square(normed) * Coarse.step**2 / 12, 1e-6)
        cast, none = (
            norm_of(op, op.from_host(x), weight(w), offset=1.0).variance
            for op in (predict(HALF), predict(STORED))
        )
        assert_close(cast - none, np.square(normed) * spacing_energy(w), TestStored.NEARLY)

    def test_the_sum_rounds_in_float32(self) -> None:
        # Just above 1, where the spacing is that of the prediction.
        w = np.random.default_rng(3).uniform(0, 1e-3, 20_000).astype(np.float32)
        x = normal(4, 1, w.size)
        op = predict(EXACT)
        found = norm_of(op, op.from_host(x), weight(w), offset=1.0)
        normed = x / np.sqrt(np.square(x).mean())
        engine = normed * (np.float32(1) + w).astype(np.float64)
        error = np.square(engine - normed * (1 + w.astype(np.float64))).sum()
        assert error / found.variance.sum() == pytest.approx(1, abs=0.05)

    def test_without_an_offset_there_is_no_sum(self) -> None:
        op = predict(EXACT)
        found = norm_of(op, op.from_host(normal(5, 3, 8)), weight(normal(6, 8)))
        assert not np.any(found.variance > 1e-25)


class TestMasked:
    """What no query sees has no error, and what it sees has one, whatever lies ahead."""

    @pytest.mark.parametrize("mask", [Mask(1, 0), Mask(None, None), Mask(0, 2)])
    @pytest.mark.parametrize("carried", [False, True])
    def test_scores(self, mask: Mask, carried: bool) -> None:
        op = predict(SUMS)
        x = normal(1, 5, 4)
        made = Estimate(x, np.full(x.shape, 1e-8)) if carried else op.from_host(x)
        variance = scores_of(op, made, made, mask=mask).variance
        assert np.array_equal(variance[0] > 0, mask.allowed(5, 5))


class TestWeights:
    """Steps of the file, the other side's own cast, and what both do to what is made with them."""

    def test_a_step_is_the_error_of_a_rounding_to_it(self) -> None:
        values = normal(1, 200, 50)
        error = np.square(np.round(values / Coarse.step) * Coarse.step - values).mean()
        for op in (predict(EXACT, weights_rounded=True), predict(STORED, weights_rounded=True)):
            gain = weight(np.ones(50), Coarse)
            own = norm_of(op, op.from_host(np.ones((1, 50))), gain)
            plain = norm_of(op, op.from_host(np.ones((1, 50))), weight(np.ones(50)))
            assert np.mean(own.variance - plain.variance) == pytest.approx(error, rel=0.03)
        op = predict(EXACT, weights_rounded=True)
        assert op.embed(np.array([0]), weight(values, Coarse)).variance == pytest.approx(
            np.full((1, 50), error), rel=0.03
        )
        biased = op.add_bias(op.from_host(values), [weight(np.ones(50), Coarse)])
        assert biased.variance == pytest.approx(np.full((200, 50), error), rel=0.03)
        product = op.linear(op.from_host(np.ones((1, 50))), [weight(values, Coarse, "Q4_0")])
        assert product.variance == pytest.approx(np.full((1, 200), 50 * error), rel=0.03)

    def test_a_step_and_a_cast_add_up(self) -> None:
        values = 30 * normal(14, 1, 60)  # spaced about as widely as the step
        for rounded in (True, False):
            op = predict(HALF, weights_rounded=rounded)
            found = op.embed(np.array([0]), weight(values, Coarse))
            # Cast, and stored again as the result.
            expected = 2 * exact_spacing_energy(values) + rounded * Coarse.step**2 / 12
            assert_close(found.variance, expected, 1e-6)

    def test_a_norm_scales_the_step_of_its_gain(self) -> None:
        op = predict(EXACT, weights_rounded=True)
        x = normal(2, 5, 8)
        found = norm_of(op, op.from_host(x), weight(normal(3, 8), Coarse))
        energy = np.square(x).mean(axis=1, keepdims=True)
        assert_close(found.variance, np.square(x) / energy * Coarse.step**2 / 12, 1e-6)

    def test_weights_that_are_the_same_roundings_have_no_step(self) -> None:
        op = predict(EXACT)
        assert not np.any(op.embed(np.array([0]), weight(np.ones((1, 4)), Coarse)).variance > 1e-30)

    def test_the_other_sides_cast_of_weights(self) -> None:
        # Deviations over one power of two, as models have them anywhere in it, each row's error
        # relative to its own.
        scales = 2 ** (np.arange(1000)[:, None] / 1000)
        values = (scales * normal(4, 1000, 64)).astype(np.float32)
        x = normal(5, 9, 64)
        with_cast = predict(HALF).linear(predict(HALF).from_host(x), [weight(values)])
        stored = predict(STORED).linear(predict(STORED).from_host(x), [weight(values)])
        error = np.square(x @ (half(values) - values.astype(np.float64)).T)
        predicted = with_cast.variance - stored.variance
        ratio = (error / scales.T**2).sum() / (predicted / scales.T**2).sum()
        assert ratio == pytest.approx(1, abs=0.04)

    def test_the_cast_of_weights_that_are_subnormal_in_the_half_type(self) -> None:
        generator = np.random.default_rng(6)
        values = generator.uniform(-(2.0**-16), 2.0**-16, (400, 64)).astype(np.float32)
        x = normal(7, 9, 64)
        op, plain = predict(HALF), predict(EXACT)
        found = op.linear(op.from_host(x), [weight(values)])
        stored = predict(STORED).linear(op.from_host(x), [weight(values)])
        error = np.square(x @ (half(values) - values.astype(np.float64)).T)
        ratio = error.sum() / (found.variance - stored.variance).sum()
        assert ratio == pytest.approx(1, abs=0.06)
        assert not np.any(plain.linear(plain.from_host(x), [weight(values)]).variance > 1e-25)

    def test_numbers_of_the_half_type_are_not_cast(self) -> None:
        x, w = halves(8, 5, 32), halves(9, 6, 32)
        op = predict(HALF)
        found = op.linear(op.from_host(x), [weight(w)])
        assert_close(found.variance, spacing_energy(x @ w.T), TestStored.NEARLY)
        # One bit more is one too many.
        coarse = np.spacing(np.abs(w).astype(np.float16)).astype(float) / 2
        beside = w.astype(np.float32)
        for finer in (w + coarse, np.nextafter(beside, 9 * np.sign(beside))):
            more = op.linear(op.from_host(x), [weight(finer)]).variance
            assert np.all(more > found.variance * 1.01)

    def test_float32_weights_have_no_step_of_their_own_in_a_product(self) -> None:
        op = predict(EXACT, weights_rounded=True)
        found = op.linear(op.from_host(np.ones((1, 4))), [weight(np.ones((2, 4)), Coarse)])
        assert not np.any(found.variance > 1e-25)

    def test_the_clipped_ends_of_a_k_quant(self) -> None:
        """Beside an outlier a single value is off by more than any normal error of its step."""
        generator = np.random.default_rng(10)
        values = generator.standard_normal((1500, 256)).astype(np.float32)
        outlier = 10 ** generator.uniform(2, 2.25, 1500)
        values[:, 3] = outlier * generator.choice([-1, 1], 1500)
        raw = quantise("Q4_K", values).reshape(-1)
        stored = np.empty(values.size, np.float32)
        dequantize("Q4_K", raw, stored, row_length=256)
        squares, group = step_squares("Q4_K", raw, values.size, row_length=256)
        error = np.square(stored.reshape(values.shape).astype(np.float64) - values)
        worst = float((12 * error / np.repeat(squares, group, axis=1)).max())
        op = predict(EXACT, weights_rounded=True)
        tail, plain = (
            float(op.embed(np.array([0]), weight([[1.0]], Coarse, dtype)).variance[0, 0])
            for dtype in ("Q4_K", "Q4_0")
        )
        assert plain == pytest.approx(Coarse.step**2 / 12, rel=1e-6)
        # More than a normal error may reach, and with the tail in the prediction still less than
        # that; twice as long a tail would hide what is twice as wrong.
        allowed = float(allowed_ratio(1.0))
        assert worst > 2 * allowed
        assert 0.5 < worst / (allowed * tail / plain) < 1

    def test_tokens_count_once_however_often_they_come(self) -> None:
        op = predict(EXACT, weights_rounded=True)
        found = op.embed(np.array([3, 0, 3, 3]), weight(normal(11, 5, 4)))
        assert found.token_dof == 2

    def test_one_vector_errs_in_every_token_alike(self) -> None:
        x = predict(EXACT).from_host(normal(12, 6, 4))
        for rounded, dof in ((True, 1.0), (False, None)):
            op = predict(EXACT, weights_rounded=rounded)
            assert norm_of(op, x, weight(np.ones(4))).token_dof == dof
            assert op.add_bias(x, [weight(np.ones(4))]).token_dof == dof


class TestAngles:
    """RoPE's angles in float32: four roundings of position times frequency."""

    ROPE = Rope(theta=10000.0, head_dim=8)

    def test_large_angles_err_in_proportion(self) -> None:
        positions = np.arange(1000, 3000)
        rope = Rope(theta=1.5, head_dim=8)
        x = normal(1, positions.size, 8)
        op = predict(EXACT)
        found = turned(op, op.from_host(x), positions, rope)
        generator = np.random.default_rng(2)
        angles = np.multiply.outer(positions.astype(float), rope.inverse_frequencies())
        unit = float(np.spacing(np.float32(1))) / 2
        off = angles.copy()
        # The power, its cast to float32, the product, and the reduction before sine and cosine.
        for _ in range(4):
            off *= 1 + generator.uniform(-unit, unit, angles.shape)
        points = x[:, :4] + 1j * x[:, 4:]
        error = np.square(np.abs(points * (np.exp(1j * off) - np.exp(1j * angles)))).sum()
        assert error / found.variance.sum() == pytest.approx(1, abs=0.05)

    def test_real_float32_angles_stay_within(self) -> None:
        positions, rope = np.arange(1000, 3000), self.ROPE
        x = normal(1, positions.size, 8)
        op = predict(EXACT)
        found = turned(op, op.from_host(x), positions, rope)
        exponents = np.arange(0, 8, 2, dtype=np.float32) / np.float32(8)
        frequencies = np.float32(1) / np.float32(rope.theta) ** exponents
        angles = np.multiply.outer(positions.astype(np.float32), frequencies)
        exact = np.multiply.outer(positions.astype(float), rope.inverse_frequencies())
        points = x[:, :4] + 1j * x[:, 4:]
        error = np.square(np.abs(points * (np.exp(1j * angles.astype(float)) - np.exp(1j * exact))))
        assert error.sum() < found.variance.sum()

    def test_small_angles_err_by_what_sine_and_cosine_lose(self) -> None:
        op = predict(EXACT)
        x = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
        found = turned(op, op.from_host(x), np.array([0]), self.ROPE)
        # At angle 0 a dimension errs by its partner times the angle's error; cosine is about 1.
        partner = np.array([[5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0]])
        assert_close(found.variance, 4 * ROUNDING * np.square(partner), 1e-9)


class TestCarried:
    """Errors of the inputs, to first order, by the derivative of each operation."""

    SIZE = 1e-4

    def carried(self, x: np.ndarray, *where: int) -> Estimate:
        variance = np.zeros(x.shape)
        variance[where] = self.SIZE**2
        return Estimate(x, variance)

    def test_each_input_of_a_sum_and_a_product(self) -> None:
        op, x, y = predict(EXACT), np.array([[3.0]]), np.array([[5.0]])
        known, unknown = op.from_host, lambda z: self.carried(z, 0, 0)
        unit = self.SIZE**2
        for make, left, right in ((op.add, 1, 1), (op.multiply, 25, 9)):
            for a, b, expected in (
                (unknown, known, left),
                (known, unknown, right),
                (unknown, unknown, left + right),
            ):
                assert make(a(x), b(y)).variance[0, 0] / unit == pytest.approx(expected)

    def test_each_input_of_attention(self) -> None:
        op = predict(EXACT)
        q, k = np.array([[3.0, 1.0, 0.0, 0.0]]), np.array([[5.0, 2.0, 0.0, 0.0]])
        known = op.from_host
        unit = self.SIZE**2
        found = scores_of(op, self.carried(q, 0, 0), known(k)).variance
        assert found[0, 0, 0] / unit == pytest.approx(25 / 4)
        found = scores_of(op, known(q), self.carried(k, 0, 0)).variance
        assert found[0, 0, 0] / unit == pytest.approx(9 / 4)
        soft, v = np.array([[[0.5]]]), np.array([[7.0]])
        found = values_of(op, self.carried(soft, 0, 0, 0), known(v)).variance
        assert found[0, 0] / unit == pytest.approx(49)
        found = values_of(op, known(soft), self.carried(v, 0, 0)).variance
        assert found[0, 0] / unit == pytest.approx(1 / 4)

    def test_the_derivatives_of_a_softmax(self) -> None:
        op = predict(EXACT)
        scores = np.array([[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.3, -1.0, 0.9]]])
        p = softmax_of(REAL, scores)[0, 2]
        for at in range(3):
            found = softmax_of(op, self.carried(scores, 0, 2, at)).variance[0, 2] / self.SIZE**2
            jacobian = p * ((np.arange(3) == at) - p[at])
            assert_close(found, np.square(jacobian), 1e-6)

    @pytest.mark.parametrize("name", ["bias", "columns", "rope", "activation", "scale", "cap"])
    def test_what_is_known_of_tokens_is_carried_on(self, name: str) -> None:
        op, x = predict(EXACT), np.array([[3.0, 4.0]])
        known = Estimate(x, np.full(x.shape, self.SIZE**2), 2.5)
        found = {
            "bias": lambda: op.add_bias(known, [weight([1.0, 1.0])]),
            "columns": lambda: op.columns(known, 0, 1),
            "rope": lambda: turned(op, known, np.array([0]), Rope(theta=10.0, head_dim=2)),
            "activation": lambda: op.activation(known, "silu"),
            "scale": lambda: op.scale(known, 3.0),
            "cap": lambda: op.soft_cap(known, 30.0),
        }[name]()
        assert found.token_dof == 2.5

    @pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_pytorch_tanh"])
    def test_the_slope_of_an_activation(self, kind: str) -> None:
        op, x = predict(EXACT), np.linspace(-3, 3, 13)[None]
        found = op.activation(Estimate(x, np.full(x.shape, self.SIZE**2)), kind).variance
        above, below = (REAL.activation(x + s * 1e-6, kind) for s in (1, -1))
        slope = (above - below) / 2e-6
        assert_close(found / self.SIZE**2, np.square(slope), 1e-6)

    def test_a_product_a_bias_a_norm_and_a_rotation(self) -> None:
        op, x = predict(EXACT), np.array([[3.0, 4.0]])
        unit = self.SIZE**2
        only = self.carried(x, 0, 0)
        found = op.linear(only, [weight([[5.0, 7.0]])]).variance
        assert found[0, 0] / unit == pytest.approx(25, rel=1e-6)
        found = op.add_bias(only, [weight([1.0, 1.0])]).variance
        assert_close(found / unit, [[1.0, 0.0]], 1e-9)
        # The norm's own length is taken as known: gain over it.
        found = norm_of(op, only, weight([2.0, 2.0]), 0.5).variance
        assert_close(found / unit, [[4 / (12.5 + 0.5), 0.0]], 1e-6)
        found = norm_of(op, only, weight([2.0, 2.0]), 0.5, 1.0).variance
        assert_close(found / unit, [[9 / (12.5 + 0.5), 0.0]], 1e-5)
        assert_close(op.scale(only, 3.0).variance / unit, [[9.0, 0.0]], 1e-6)
        # The derivative of c tanh(x / c).
        found = op.soft_cap(only, 2.0).variance
        assert_close(found / unit, [[np.cosh(1.5) ** -4, 0.0]], 1e-6)
        # Half of the error in either dimension, whatever the angle.
        found = turned(op, only, np.array([0]), Rope(theta=10.0, head_dim=2)).variance
        assert_close(found / unit, [[0.5, 0.5]], 1e-4)
