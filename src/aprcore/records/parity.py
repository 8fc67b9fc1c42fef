"""One stage on two sides, the tested one against the trusted one: plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass

from aprcore.judging.compare import Comparison
from aprcore.judging.layouts import Layout
from aprcore.judging.verdict import FLOAT32_BOUND, Judgment, Verdict
from aprcore.network.stages import StageKey


@dataclass(frozen=True, slots=True)
class SideJudgment:
    """What is known of one side's stage apart from the other side.

    Attributes:
        kernel: Its operation on its own inputs; None where that cannot be told.
        fault: What is wrong with that operation, in a clause, cause first; nothing if it is sound.
        oracle: Its tensor against the oracle's, where there is one.
        elapsed_s: Seconds that it took to compute or read, with the way to the host.
    """

    kernel: Judgment | None = None
    fault: str = ""
    oracle: Comparison | None = None
    elapsed_s: float = 0.0

    @property
    def verdict(self) -> Verdict | None:
        """FAIL where its operation is wrong, PASS where it is sound, None where nobody can tell."""
        if self.fault:
            return Verdict.FAIL
        return None if self.kernel is None else Verdict.PASS


@dataclass(frozen=True, slots=True)
class StageParity:
    """One stage on both sides.

    Attributes:
        step: 0 for a pass over the prompt, then one decoded token each.
        key: The stage.
        layout: Names the axes of its tensor; None if neither side has it.
        comparison: The tested side against the trusted one; None where that cannot be made.
        trusted, tested: Either side for itself.
        verdict: What to say of the tested side, held against the trusted one. FAIL: its operation
            is wrong, or it differs though its inputs do not and nobody can judge its operation.
            NOISE and INHERITED: it differs, and its operation is right.
        reason: One sentence that says why.
        bound: The relative L2 from which the sides differ.
    """

    step: int
    key: StageKey
    layout: Layout | None
    comparison: Comparison | None
    trusted: SideJudgment
    tested: SideJudgment
    verdict: Verdict
    reason: str
    bound: float = FLOAT32_BOUND

    @property
    def differs(self) -> bool:
        """Whether both sides have it and differ by more than rounding explains."""
        if self.comparison is None:
            return self.verdict is Verdict.SHAPE
        return is_different(self.comparison, self.bound)

    @property
    def fault(self) -> str:
        """What is wrong with the tested side's operation, in a clause; nothing if it is sound."""
        return self.tested.fault


@dataclass(frozen=True, slots=True)
class StageFault:
    """The stage at which two runs of a step part.

    Attributes:
        step: The step.
        key: The stage.
        comparison: The tested side against the other.
        layout: Names the axes of its tensor.
        kernel: Whether its operation is wrong on its own inputs. Else this is the first stage that
            differs by more than float32 explains.
        reason: What was found, in a clause.
    """

    step: int
    key: StageKey
    comparison: Comparison
    layout: Layout
    kernel: bool
    reason: str

    def describe(self) -> str:
        """The finding in a clause: "step 2, layer 1 · attention: ..."."""
        return f"step {self.step}, {self.key}: {self.reason}"


def is_different(found: Comparison, bound: float = FLOAT32_BOUND) -> bool:
    """Whether two tensors differ by more than a bound; NaN at one place is the same."""
    return found.unequal_nonfinite > 0 or not found.relative_l2 <= bound
