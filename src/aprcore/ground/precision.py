"""Floating-point types: what they round, and by how much.

Every roundoff that a judgment allows for starts from one of these records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FloatType:
    """A binary floating-point type.

    Attributes:
        name: "float32", ...
        digits: Significant bits, the hidden one included.
        min_exponent: Exponent of the smallest normal number.
    """

    name: str
    digits: int
    min_exponent: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's type of these values; casting to it rounds to nearest, ties to even."""
        if self.name in ("float64", "float32", "float16"):
            return np.dtype(self.name)
        import ml_dtypes  # registers the types with numpy; most runs need none

        return np.dtype(getattr(ml_dtypes, self.name))

    def round(self, x: NDArray[Any]) -> Float64:
        """The nearest values that it has; infinity beyond them."""
        with np.errstate(over="ignore"):
            return x.astype(self.dtype).astype(np.float64)

    @property
    def roundoff(self) -> float:
        """Unit roundoff u: half the spacing at 1."""
        return 2.0**-self.digits

    @property
    def smallest(self) -> float:
        """The smallest number above zero."""
        return 2.0 ** (self.min_exponent - (self.digits - 1))

    def holds(self, x: NDArray[Any]) -> bool:
        """Whether every value is a number of this type already."""
        return bool(np.array_equal(self.round(x), x, equal_nan=True))

    def spacing(self, x: NDArray[Any]) -> Float64:
        """Distance between neighbouring numbers at |x|, subnormals included; zero for zero."""
        _, exponent = np.frexp(np.abs(x))
        exponent = np.maximum(exponent - 1, self.min_exponent)
        return np.where(x == 0, 0.0, np.ldexp(1.0, exponent - (self.digits - 1)))

    def rounding_variance(self, x: NDArray[Any]) -> Float64:
        """Variance of the error of rounding x to this type: spacing^2 / 12."""
        return np.square(self.spacing(x)) / 12


FLOAT64 = FloatType("float64", 53, -1022)
FLOAT32 = FloatType("float32", 24, -126)
FLOAT16 = FloatType("float16", 11, -14)
BFLOAT16 = FloatType("bfloat16", 8, -126)
# What tensor cores read of a float32 (NVIDIA A100 whitepaper): its range with 10 bits of fraction.
TF32 = FloatType("tf32", 11, -126)
# The two formats of 8 bits that caches are kept in (OCP 8-bit floating point, 2023).
FLOAT8_E4M3 = FloatType("float8_e4m3fn", 4, -6)
FLOAT8_E5M2 = FloatType("float8_e5m2", 3, -14)

FLOAT_TYPES = {kind.name: kind for kind in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)}
