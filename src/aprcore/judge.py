"""From figures to a verdict.

Until the kernel and model judgments exist, the cumulative bound alone decides between PASS and
FAIL.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from aprcore.compare import Comparison


class Verdict(Enum):
    """What is to be said of one stage. The value is the word shown beside the figure."""

    PASS = "PASS"
    NOISE = "NOISE"
    INHERITED = "INHERITED"
    LAYOUT = "LAYOUT"
    MISSING = "MISSING"
    FAIL = "FAIL"
    NONFINITE = "NONFINITE"
    SHAPE = "SHAPE"

    @property
    def is_divergence(self) -> bool:
        """Whether it makes the run end with exit code 1."""
        return self in (Verdict.FAIL, Verdict.NONFINITE, Verdict.SHAPE)


# Bounds on the cumulative relative L2 error, from the coarsest type on either side.
# Float32 arithmetic in another order moves a stage by about 1e-6; a bug moves it by far more.
FLOAT32_BOUND = 1e-4
# One rounding to float16 is 2^-11 = 5e-4 and to bfloat16 2^-8 = 4e-3, carried through the layers.
HALF_BOUND = 1e-2
# Four-bit weights carry about 5 to 10 percent of error into every product.
QUANTISED_BOUND = 0.15

FLOAT_TYPES = frozenset({"F32", "F64", "float32", "float64"})
HALF_TYPES = frozenset({"F16", "BF16", "float16", "bfloat16"})


def cumulative_bound(types: Iterable[str]) -> float:
    """The bound on relative L2 for these stored weight types and activation dtypes, both sides."""
    present = set(types)
    if present - FLOAT_TYPES - HALF_TYPES:
        return QUANTISED_BOUND
    return HALF_BOUND if present & HALF_TYPES else FLOAT32_BOUND


def within(comparison: Comparison, bound: float) -> bool:
    """Whether a comparison holds: within the bound, and NaN or infinity on neither side."""
    finite = comparison.nonfinite_a == 0 and comparison.nonfinite_b == 0
    return finite and comparison.relative_l2 <= bound


def judge_values(
    comparison: Comparison, bound: float, *, inputs_finite: bool
) -> tuple[Verdict, str]:
    """The verdict on two tensors of one size in canonical layout, and why.

    Args:
        comparison: Trace (a) against oracle (b).
        bound: The largest relative L2 that passes.
        inputs_finite: Whether every input of the traced stage was finite.
    """
    if comparison.nonfinite_a > 0:
        count = f"{comparison.nonfinite_a} of {comparison.count} values are NaN or infinite"
        if not inputs_finite:
            return Verdict.INHERITED, f"{count}; so were its inputs"
        if comparison.nonfinite_b == 0:
            return Verdict.NONFINITE, f"{count}; its inputs and the oracle are finite"
    if comparison.nonfinite_b > 0:
        return Verdict.FAIL, f"the oracle has {comparison.nonfinite_b} NaN or infinite values"
    if comparison.relative_l2 <= bound:
        return Verdict.PASS, f"relative L2 {comparison.relative_l2:.3g} is within {bound:g}"
    return Verdict.FAIL, f"relative L2 {comparison.relative_l2:.3g} exceeds {bound:g}"
