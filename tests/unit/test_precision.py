"""Spacing and rounding of the number types that engines compute in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.engines.arithmetic import RESULTS, arithmetic_of_dtype
from aprcore.ground.precision import BFLOAT16, FLOAT16, FLOAT32, FLOAT64


@pytest.mark.parametrize(
    ("kind", "numpy_type"),
    [(FLOAT16, np.float16), (FLOAT32, np.float32), (FLOAT64, np.float64)],
)
@given(exponent=st.integers(-13, 14), mantissa=st.floats(1, 2, exclude_max=True))
def test_spacing_is_numpys(kind, numpy_type, exponent: int, mantissa: float) -> None:
    x = numpy_type(mantissa * 2.0**exponent)
    assert kind.spacing(np.array([x]))[0] == float(np.spacing(x))


@pytest.mark.parametrize("kind", [FLOAT16, FLOAT32])
def test_spacing_of_subnormals_and_zero(kind) -> None:
    numpy_type = np.dtype(kind.name).type
    smallest = np.nextafter(numpy_type(0), numpy_type(1))
    assert kind.spacing(np.array([smallest * 3, -smallest]))[1] == float(smallest)
    assert kind.spacing(np.array([0.0]))[0] == 0


def test_bfloat16_is_a_short_float32() -> None:
    # 1 + 2^-7 is the number after 1.
    assert BFLOAT16.spacing(np.array([1.0, -3.0])).tolist() == [2.0**-7, 2.0**-6]
    assert BFLOAT16.roundoff == 2.0**-8


def test_rounding_goes_to_the_nearest_and_to_even_between_two() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-7, 3.39e38, 1e300, np.nan])
    np.testing.assert_array_equal(
        BFLOAT16.round(x), [1.0, 1 + 2.0**-6, 1 + 2.0**-7, 255 / 128 * 2.0**127, np.inf, np.nan]
    )
    np.testing.assert_array_equal(FLOAT16.round(np.array([70000.0, 1 + 2.0**-11])), [np.inf, 1.0])
    assert FLOAT64.round(x) is not x


def test_rounding_variance_is_that_of_real_rounding() -> None:
    x = np.random.default_rng(0).standard_normal(200_000)
    error = x.astype(np.float16).astype(np.float64) - x
    # 200,000 squared errors scatter by about 0.3 percent around their mean.
    assert np.mean(error**2) == pytest.approx(np.mean(FLOAT16.rounding_variance(x)), rel=0.02)


def test_dtypes_name_their_arithmetic() -> None:
    assert arithmetic_of_dtype("bfloat16").common is RESULTS["bf16"]
    assert arithmetic_of_dtype(None).common is RESULTS["f32"]
    assert arithmetic_of_dtype("something new").common is RESULTS["f32"]
