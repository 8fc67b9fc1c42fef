"""Measured over predicted energy: sound parts pass, and a local fault is found where it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprcore.engines.estimate import Estimate
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import QUANTILES, Assessment, TensorPart, allowed_ratio, assess

HEADS = Layout((16, 12 * 8), (16, 12, 8), ("token", "head", "dim"))
NOISE = 0.05


def log_tail(n: float, ratio: float) -> float:
    """The log of how likely a sum of n squared normal errors exceeds `ratio` times n.

    The upper regularised incomplete gamma function by its continued fraction (Lentz).
    """
    a, x = n / 2, n * ratio / 2
    b = x + 1 - a
    c, d = 1e300, 1 / b
    fraction = d
    for i in range(1, 1_000_000):
        step = -i * (i - a)
        b += 2
        d = 1 / (step * d + b)
        c = b + step / c
        fraction *= c * d
        if abs(c * d - 1) < 1e-13:
            break
    return a * math.log(x) - x - math.lgamma(a) + math.log(fraction)


# One false alarm in a thousand runs of some 1e8 parts.
RARE = math.log(1e-3 / 1e8)


@pytest.mark.parametrize(("n", "ratio"), QUANTILES)
def test_quantiles_are_those_of_chi_squared(n: float, ratio: float) -> None:
    # As far as four decimals go.
    assert log_tail(n, ratio - 1e-4) > RARE > log_tail(n, ratio + 1e-4)


@pytest.mark.parametrize("n", [1.2, 5, 20, 45, 500, 30_000, 300_000, 8_000_000])
def test_between_the_quantiles_the_allowed_is_near(n: float) -> None:
    ratio = float(allowed_ratio(n) / allowed_ratio(1.0)) * QUANTILES[0][1]
    above = ratio - 1
    # The curve is hollow, so that a straight line between two of its points lies above it.
    assert log_tail(n, 1 + 0.6 * above) > RARE > log_tail(n, 1 + 1.001 * above)


def test_the_calibration_is_what_a_sum_of_like_numbers_loses() -> None:
    """The bit that carries over is half a unit or nothing: 1/8 of a unit's square, not 1/12."""
    generator = np.random.default_rng(0)
    a, b = generator.uniform(1, 2, (2, 100_000)).astype(np.float32)
    error = np.square((a + b) - (a.astype(np.float64) + b)).mean()
    predicted = float(np.spacing(np.float32(2))) ** 2 / 12
    calibration = float(allowed_ratio(1.0)) / QUANTILES[0][1]
    assert calibration == pytest.approx(error / predicted, rel=0.02)


def test_more_errors_are_allowed_less() -> None:
    allowed = allowed_ratio(np.array([0.2, 1, 2, 7, 100, 1e5, 1e12]))
    assert (np.diff(allowed) <= 0).all()
    assert allowed[0] == allowed[1] and allowed[-1] > 1


def sound(seed: int, layout: Layout = HEADS) -> tuple[np.ndarray, Estimate]:
    generator = np.random.default_rng(seed)
    value = generator.standard_normal(layout.shape)
    error = NOISE * generator.standard_normal(layout.shape)
    return value + error, Estimate(value, np.full(layout.shape, NOISE**2))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_sound_errors_are_explained(seed: int) -> None:
    observed, estimate = sound(seed)
    found = assess(observed, estimate, HEADS)
    assert found.explained
    # 1,536 squared errors: six standard deviations of their mean.
    assert found.ratio == pytest.approx(1, abs=6 * np.sqrt(2 / observed.size))
    assert found.floor == pytest.approx(NOISE, rel=0.2)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (np.s_[:, 3, 5], "head 3, dim 5"),
        (np.s_[9, :, :], "token 9"),
        (np.s_[:, 7, :], "head 7"),
        (np.s_[2, 4, :], "token 2, head 4"),
        (np.s_[2, 4, 1], "token 2, head 4, dim 1"),
        (np.s_[:], "whole tensor"),
    ],
)
def test_a_local_fault_is_found_and_named(fault, name: str) -> None:
    observed, estimate = sound(5)
    part = observed.reshape(HEADS.factors)
    part[fault] = 0
    if name.count(",") == 2:
        part[fault] += 1 + estimate.value.reshape(HEADS.factors)[fault]
    found = assess(observed, estimate, HEADS)
    assert not found.explained
    assert found.worst.name == name


def test_a_row_hides_in_the_whole_but_not_in_itself() -> None:
    layout = Layout((1, 896), (1, 896), ("token", "dim"))
    observed, estimate = sound(3, layout)
    observed[0, -8:] = 0
    found = assess(observed, estimate, layout)
    assert found.ratio < 10 < found.worst.ratio
    assert found.worst.name.startswith("dim 8")
    assert not found.explained


def test_noise_a_hundred_times_smaller_than_predicted_is_fine() -> None:
    observed, estimate = sound(4)
    quiet = estimate.value + (observed - estimate.value) / 100
    assert assess(quiet, estimate, HEADS).explained


def test_repeated_errors_count_once() -> None:
    """A weight's error is the same in tokens that look alike: a row may then reach more."""
    generator = np.random.default_rng(0)
    layout = Layout((64, 50), (64, 50), ("token", "dim"))
    value = np.zeros(layout.shape)
    error = np.tile(3.5 * NOISE * generator.choice([-1, 1], 50), (64, 1))
    variance = np.full(layout.shape, NOISE**2)
    variance[:, 1:] *= 3.5**2
    assert not assess(value + error, Estimate(value, variance), layout).explained
    assert assess(value + error, Estimate(value, variance, token_dof=1.0), layout).explained


def test_exact_zeros_have_no_noise() -> None:
    layout = Layout((2, 3), (2, 3), ("token", "dim"))
    zero = np.zeros(layout.shape)
    exact = assess(zero, Estimate(zero, zero), layout)
    assert (exact.explained, exact.ratio, exact.floor) == (True, 0.0, 0.0)
    wrong = assess(zero + 1e-30, Estimate(zero, zero), layout)
    assert not wrong.explained and wrong.ratio == np.inf


def test_an_empty_tensor_is_explained() -> None:
    layout = Layout((0, 3), (0, 3), ("token", "dim"))
    empty = np.zeros(layout.shape)
    assert assess(empty, Estimate(empty, empty), layout).explained


def test_a_zero_may_miss_by_a_thousandth_of_a_rounding_of_the_others() -> None:
    """The others have a root mean square of 1; float32 rounds 1 by up to 2^-24."""
    layout = Layout((1, 4), (1, 4), ("token", "dim"))
    value = np.array([[0.0, math.sqrt(2), 1.0, 1.0]])
    none = Estimate(value, np.zeros(layout.shape))
    # As unlikely as for any other single value.
    reach = math.sqrt(float(allowed_ratio(1.0))) * 2.0**-24 / 1000
    for factor in (0.9, 1.1):
        missed = value.copy()
        missed[0, 0] = factor * reach
        found = assess(missed, none, layout)
        assert found.explained == (factor < 1)
        assert found.worst.name.endswith("dim 0")
    assert found.floor == pytest.approx(2.0**-24 / 1000)


def whole_factor(value: np.ndarray, variance: np.ndarray, token_dof: float | None = None) -> float:
    """What the whole of a tensor of [tokens, dims] may reach, whose errors are as predicted."""
    layout = Layout(value.shape, value.shape, ("token", "dim"))
    estimate = Estimate(value, variance, token_dof)
    found = assess(value + np.sqrt(variance), estimate, layout)
    # Every part has the ratio 1, and the whole the smallest factor.
    assert found.worst.name == "whole tensor"
    assert found.ratio == pytest.approx(1)
    return found.worst.factor


def test_errors_count_by_their_share_of_the_energy() -> None:
    value = np.random.default_rng(0).standard_normal((1, 100))
    even = np.ones((1, 100))
    assert whole_factor(value, even) == pytest.approx(float(allowed_ratio(100)))
    # Half of the energy in one of 101: (50 + 50)^2 / (50^2 + 50 * 50 / 50).
    uneven = np.where(np.arange(101) == 0, 50.0, 0.5)[None]
    value = np.random.default_rng(0).standard_normal((1, 101))
    assert whole_factor(value, uneven) == pytest.approx(float(allowed_ratio(100**2 / 2525)))


def test_what_is_known_of_tokens_limits_how_many_count() -> None:
    value = np.random.default_rng(0).standard_normal((8, 50))
    even = np.ones((8, 50))
    for known, counted in ((None, 8), (20.0, 8), (2.0, 2), (1.0, 1)):
        factor = whole_factor(value, even, known)
        assert factor == pytest.approx(float(allowed_ratio(50 * counted)))


def test_tokens_that_are_alike_count_by_their_groups() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.standard_normal((2, 50))
    rounding = 1 + 1e-7 * generator.standard_normal((8, 50))
    # Six tokens alike and two others: 8^2 / (6^2 + 2^2).
    value = np.stack([one, other, one, one, one, other, one, one]) * rounding
    factor = whole_factor(value, np.ones((8, 50)))
    assert factor == pytest.approx(float(allowed_ratio(50 * 64 / 40)))
    # Dead tokens tell nothing of their inputs: each counts.
    factor = whole_factor(np.zeros((8, 50)) + (np.arange(8) == 0)[:, None], np.ones((8, 50)))
    assert factor == pytest.approx(float(allowed_ratio(50 * 8)))


def test_how_near_tokens_have_to_be_to_be_alike() -> None:
    """A hundredfold of what rounding does to equal inputs (1e-7) separates them.

    A difference of 1e-5 is seen in three random directions, in each by a normal factor: it is
    below 1 in all three for one pair in three.
    """
    generator = np.random.default_rng(0)
    alike = 0
    for size in range(20, 620):  # each size has directions of its own
        one, direction = generator.standard_normal((2, size))
        far = one + 1e-5 * direction * np.linalg.norm(one) / np.linalg.norm(direction)
        factor = whole_factor(np.stack([one, far]), np.ones((2, size)))
        assert factor in (float(allowed_ratio(size)), float(allowed_ratio(2 * size)))
        alike += factor == float(allowed_ratio(size))
    assert alike / 600 == pytest.approx(math.erf(1 / math.sqrt(2)) ** 3, abs=0.06)


def test_the_worst_part_is_by_its_own_factor_not_by_its_ratio() -> None:
    layout = Layout((64, 2), (64, 2), ("token", "dim"))
    variance = np.full((64, 2), 1e-6)
    variance[:, 1] = 1.0
    variance[0, 0] = 64.0  # nearly all of dim 0's: one error, which may be large
    error = np.sqrt(variance * [20, 10])
    value = np.random.default_rng(0).standard_normal((64, 2)) * 1e3
    found = assess(value + error, Estimate(value, variance), layout)
    assert found.worst.name == "dim 1"
    assert found.worst.ratio == pytest.approx(10)
    assert found.worst.factor == pytest.approx(float(allowed_ratio(64)))


def test_a_part_at_its_factor_is_explained() -> None:
    part = TensorPart("row 3", 2.0, 2.0)
    assert Assessment(1.0, 0.1, part).explained
    assert not Assessment(1.0, 0.1, TensorPart("row 3", 2.0, 1.99)).explained


def test_an_error_where_none_is_predicted_is_infinitely_wrong() -> None:
    layout = Layout((1, 2), (1, 2), ("token", "dim"))
    zero = np.zeros((1, 2))
    found = assess(np.array([[0.0, 1.0]]), Estimate(zero, np.array([[1.0, 0.0]])), layout)
    assert found.worst.name.endswith("dim 1") and math.isinf(found.worst.ratio)


def test_the_floor_is_relative_to_the_values() -> None:
    layout = Layout((1, 4), (1, 4), ("token", "dim"))
    value = np.array([[3.0, 4.0, 0.0, 12.0]])  # of length 13
    found = assess(value, Estimate(value, np.full((1, 4), 0.25)), layout)
    assert found.floor == pytest.approx(1 / 13)
