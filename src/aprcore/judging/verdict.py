"""From figures to a verdict: three judgments of one stage, and the order in which they speak.

- cumulative: the traced output against the oracle's. The user sees this; it may be inherited.
- model: our float64 operation on the oracle's inputs, with this model's weights and configuration,
  against the oracle's output. It fails for wrong weights, configuration or import.
- kernel: our float64 operation on the trace's own inputs against the trace's output. It fails when
  the engine computes this operation wrongly, and needs no oracle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from aprcore.judging.compare import Comparison
from aprcore.judging.noise import Assessment
from aprcore.network.stages import StageKey


class Verdict(Enum):
    """What is to be said of one stage. The value is the word shown beside the figure."""

    PASS = "PASS"
    NOISE = "NOISE"
    INHERITED = "INHERITED"
    LAYOUT = "LAYOUT"
    MISSING = "MISSING"
    UNJUDGED = "UNJUDGED"
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

# A ratio from which its figures tell nothing more.
MANY_TIMES = 1e6

FLOAT_TYPES = frozenset({"F32", "F64", "float32", "float64"})
HALF_TYPES = frozenset({"F16", "BF16", "float16", "bfloat16"})


def cumulative_bound(types: Iterable[str]) -> float:
    """The bound on relative L2 for these types of weights and activations, both sides together.

    Where the kernel or the model judgment can be made, only activations count: what quantised
    weights do is then predicted, and called NOISE. Without them the weights count too.
    """
    present = set(types)
    if present - FLOAT_TYPES - HALF_TYPES:
        return QUANTISED_BOUND
    return HALF_BOUND if present & HALF_TYPES else FLOAT32_BOUND


@dataclass(frozen=True, slots=True)
class Judgment:
    """One stage against what it should be, with the error that rounding explains.

    Attributes:
        relative_l2: |observed - expected| / |expected|; also the smallest tolerance that passes.
        cosine: Cosine similarity.
        bound: The relative L2 that rounding explains for the tensor as a whole.
        assessment: Measured over predicted energy, and the part that stands out.
        span: Recorded stages that the judgment starts from, when inputs had to be recomputed.
        recomputed: Those inputs; recording them narrows the judgment to one stage.
    """

    relative_l2: float
    cosine: float
    bound: float
    assessment: Assessment
    span: tuple[StageKey, ...] = ()
    recomputed: tuple[StageKey, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether rounding explains the error, as a whole and in every part."""
        return self.assessment.explained

    def describe(self) -> str:
        """The finding in a clause: "relative L2 0.56 ...; 199 times the predicted noise in row 8".

        Noise is counted in energy throughout, as `Assessment` does.
        """
        worst = self.assessment.worst
        times = f"{worst.ratio:.3g}" if worst.ratio < MANY_TIMES else "over a million"
        if self.passed or self.relative_l2 > self.bound:
            text = f"relative L2 {self.relative_l2:.3g} where rounding explains {self.bound:.2g}"
        else:
            text = f"relative L2 {self.relative_l2:.3g}, no more than rounding as a whole"
        if not self.passed:
            text += f"; {times} times the predicted noise in {worst.name}"
        if self.span:
            narrower = f"dump {_names(self.recomputed)} to narrow it"
            text += f" (judged from {_names(self.span)}; {narrower})"
        return text


def _names(keys: tuple[StageKey, ...]) -> str:
    return ", ".join(key.stage for key in keys)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of one stage.

    Attributes:
        comparison: Trace against oracle in canonical layout, if both have it.
        bound: The cumulative relative L2 that passes.
        bound_alone: The same where neither other judgment can be made.
        kernel, model: The judgments that could be made.
        traced_nonfinite: NaN and infinities in the trace.
        inputs_finite: Whether the trace's nearest recorded inputs were finite.
        oracle_inputs_finite: The same of the oracle.
        inputs_pass: Whether every input of the stage got PASS.
        layout: The permutation under which the values agree, if one was needed.
    """

    comparison: Comparison | None
    bound: float
    bound_alone: float
    kernel: Judgment | None = None
    model: Judgment | None = None
    traced_nonfinite: int = 0
    inputs_finite: bool = True
    oracle_inputs_finite: bool = True
    inputs_pass: bool = True
    layout: str | None = None


def decide(found: Evidence) -> tuple[Verdict | None, str]:
    """The verdict and one sentence that says why; None when there is nothing to judge by.

    The first that holds: NONFINITE, LAYOUT, FAIL by kernel, FAIL by model, PASS, NOISE,
    INHERITED. SHAPE and MISSING are settled before there is any evidence, and what should have been
    judged and cannot be becomes UNJUDGED.
    """
    comparison = found.comparison
    nonfinite = _nonfinite(found)
    if nonfinite is not None:
        return nonfinite
    kernel_failed = found.kernel is not None and not found.kernel.passed
    model_failed = found.model is not None and not found.model.passed
    if found.layout is not None and not kernel_failed and not model_failed:
        return Verdict.LAYOUT, f"equal when read as: {found.layout}"
    if kernel_failed:
        assert found.kernel is not None
        return Verdict.FAIL, f"kernel: {found.kernel.describe()}"
    if model_failed:
        assert found.model is not None
        return Verdict.FAIL, f"model: {found.model.describe()}"
    judged = [j for j in (found.kernel, found.model) if j is not None]
    if comparison is None:
        return (Verdict.PASS, f"kernel: {judged[0].describe()}") if judged else (None, "")
    error = comparison.relative_l2
    bound = found.bound if judged else found.bound_alone
    if error <= bound:
        return Verdict.PASS, f"relative L2 {error:.3g} is within {bound:g}"
    if not judged:
        return Verdict.FAIL, f"relative L2 {error:.3g} exceeds {bound:g}"
    own = max(judged, key=lambda j: j.assessment.ratio * j.assessment.floor**2)
    if found.inputs_pass:
        return Verdict.NOISE, f"own error is {own.assessment.ratio:.2g} times the predicted noise"
    return Verdict.INHERITED, "its own operation is right; its input was not"


def _nonfinite(found: Evidence) -> tuple[Verdict, str] | None:
    comparison = found.comparison
    oracle = 0 if comparison is None else comparison.nonfinite_b
    if found.traced_nonfinite:
        values = _nonfinite_values(found.traced_nonfinite)
        if not found.inputs_finite:
            return Verdict.INHERITED, f"{values}; so were its inputs"
        if not oracle:
            other = "" if comparison is None else " and the oracle are"
            return Verdict.NONFINITE, f"{values}; its inputs{other or ' are'} finite"
        return Verdict.FAIL, f"{values}, and {oracle} of the oracle's"
    if oracle:
        values = f"in the oracle {_nonfinite_values(oracle)}"
        if not found.oracle_inputs_finite:
            return Verdict.INHERITED, f"{values}; so were its inputs"
        return Verdict.FAIL, values
    return None


def _nonfinite_values(count: int) -> str:
    return "1 value is NaN or infinite" if count == 1 else f"{count} values are NaN or infinite"


def within(comparison: Comparison, bound: float) -> bool:
    """Whether a comparison holds: within the bound, and NaN or infinity on neither side."""
    finite = comparison.nonfinite_a == 0 and comparison.nonfinite_b == 0
    return finite and comparison.relative_l2 <= bound
