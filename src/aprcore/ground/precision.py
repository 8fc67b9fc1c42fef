"""Precision of an engine's arithmetic: what it rounds, and by how much.

Every roundoff that a judgment allows for starts from one of these records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        if self.name != "bfloat16":
            return np.dtype(self.name)
        import ml_dtypes  # registers the type with numpy; most runs need none

        return np.dtype(ml_dtypes.bfloat16)

    def round(self, x: NDArray[Any]) -> Float64:
        """The nearest values that it has; infinity beyond them."""
        with np.errstate(over="ignore"):
            return x.astype(self.dtype).astype(np.float64)

    @property
    def roundoff(self) -> float:
        """Unit roundoff u: half the spacing at 1."""
        return 2.0**-self.digits

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

FLOAT_TYPES = {kind.name: kind for kind in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)}


@dataclass(frozen=True, slots=True)
class ActivationBlocks:
    """Activations that are rounded to 8-bit integers, a block at a time, before a product.

    Attributes:
        block: Values per block.
        levels: Steps from zero to the largest magnitude of a block.
    """

    block: int
    levels: int

    def rounding_variance(self, x: Float64) -> Float64:
        """Variance of the rounding per block, [rows, blocks], for x [rows, C]."""
        rows, columns = x.shape
        blocks = -(-columns // self.block)
        padded = np.zeros((rows, blocks * self.block))
        padded[:, :columns] = np.abs(x)
        step = padded.reshape(rows, blocks, self.block).max(axis=2) / self.levels
        return np.square(step) / 12


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How an engine computes.

    Attributes:
        name: As on the command line and in sidecars.
        stored: The type that every stage's result is rounded to.
        accumulated: The type that sums are carried in.
        activations: How inputs of products are rounded, if they are.
        rounds_on_dump: Whether values are rounded to `stored` only when they are dumped. The engine
            then computed with others than it recorded, and every recorded input is off by that.
    """

    name: str
    stored: FloatType
    accumulated: FloatType
    activations: ActivationBlocks | None = None
    rounds_on_dump: bool = False

    def dumped_as(self, dtype: str | None) -> Arithmetic:
        """The same for a dump of this type: values that the engine has finer are rounded to it.

        Stage files hold float32, so that float64 counts as that.
        """
        stored = FLOAT_TYPES.get(dtype or "")
        if stored is None or stored.digits > FLOAT32.digits:
            return self
        if not self.rounds_on_dump and stored.digits >= self.stored.digits:
            return self
        return replace(self, stored=stored, rounds_on_dump=True)


# Nothing is rounded: for what is measured, and for no engine.
EXACT = Arithmetic("exact", FLOAT64, FLOAT64)

# In the order of their noise: `auto` takes the first that explains a dump. float64 comes after
# float32 because a sum of recorded values shows what each lost on dump. Half-precision engines
# carry sums in float32 (cuBLAS, PyTorch, llama.cpp do); one that does not is a finding.
# Q8_0 and Q8_1 blocks hold 32 values with step max/127, Q8_K blocks 256 (ggml-quants.c).
ARITHMETICS = {
    arithmetic.name: arithmetic
    for arithmetic in (
        Arithmetic("f32", FLOAT32, FLOAT32),
        Arithmetic("f64", FLOAT32, FLOAT64, rounds_on_dump=True),
        Arithmetic("f16", FLOAT16, FLOAT32),
        Arithmetic("q8_0", FLOAT32, FLOAT32, ActivationBlocks(32, 127)),
        Arithmetic("q8_1", FLOAT32, FLOAT32, ActivationBlocks(32, 127)),
        Arithmetic("bf16", BFLOAT16, FLOAT32),
        Arithmetic("q8_k", FLOAT32, FLOAT32, ActivationBlocks(256, 127)),
    )
}

_BY_DTYPE = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def arithmetic_of_dtype(dtype: str | None) -> Arithmetic:
    """The arithmetic of a side that records only its dtype; float32 if it records nothing."""
    return ARITHMETICS[_BY_DTYPE.get(dtype or "float32", "f32")]
