"""Judging the stages of a second side: each on its own inputs, and against the other side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes import Explanation, explain
from aprcore.judging.compare import Comparison, compare
from aprcore.judging.layouts import Layout, alternatives, last_token, layout_of, zero_masked
from aprcore.judging.replay import RecordedSide, make_judgment
from aprcore.judging.verdict import FLOAT32_BOUND, Judgment, Verdict
from aprcore.network.graph import Graph, Inheritance
from aprcore.network.stages import StageKey, split_axes
from aprcore.records.parity import SideJudgment, StageParity, is_different
from aprcore.records.report import StageReport

Floats = NDArray[np.floating[Any]]

# A kernel whose own error is below this cannot have turned logits by the 14 percent that a cosine
# of 0.99 leaves. Drivers round exp and sqrt a little worse than predicted, and are not to blame.
BLAME_FLOOR = 1e-5


class KernelJudge:
    """Judges each stage of one pass on the inputs that it had there."""

    def __init__(self, side: RecordedSide, *, has_past: bool = False) -> None:
        """Begin with a side that has recorded nothing.

        Args:
            side: Keeps the tensors.
            has_past: Whether the pass continues a text.
        """
        self._side = side
        self._has_past = has_past

    def record(self, key: StageKey, tensor: Floats) -> None:
        """Keep a tensor that later stages read but nobody asked about."""
        self._side.enter(key)
        self._side.record(key, tensor)

    def judge(
        self, key: StageKey, tensor: Floats, layout: Layout, budget: float | None = None
    ) -> SideJudgment:
        """A stage's operation on its own inputs, and what is wrong with it, if anything.

        Args:
            key: The stage.
            tensor: What it gave, in canonical shape.
            layout: Names the axes of the tensor.
            budget: The largest error of its own that the user tolerates here.
        """
        self._side.enter(key)
        expected = self._side.expect(key)
        self._side.record(key, tensor)
        kernel = None if expected is None else make_judgment(tensor, expected, layout)
        if expected is None or not is_blamed(kernel, budget):
            return SideJudgment(kernel)
        cause = None
        # The catalogue's alternatives of attention are written for a full pass.
        graph = self._side.graph
        read = (key, *graph.inputs(key))
        if not (self._has_past and any(("S",) in split_axes(graph.stage(k).shape) for k in read)):
            cause = explain(self._side, key, tensor, expected, layout, in_file=False)
        return SideJudgment(kernel, describe_fault(kernel, cause))


def is_blamed(kernel: Judgment | None, budget: float | None = None) -> bool:
    """Whether a kernel is wrong by more than drivers differ and the user tolerates."""
    if kernel is None or kernel.passed:
        return False
    return kernel.relative_l2 > max(BLAME_FLOOR, budget or 0.0)


def describe_fault(kernel: Judgment | None, cause: Explanation | None) -> str:
    """What is wrong with a kernel, cause first."""
    assert kernel is not None
    clauses = [] if cause is None else [cause.clause()]
    return f"kernel: {'; '.join([*clauses, kernel.describe()])}"


def side_of(report: StageReport, *, elapsed_s: float = 0.0) -> SideJudgment:
    """What the main judge found of a side, as one of two sides."""
    fault = ""
    if is_blamed(report.kernel, report.budget):
        fault = describe_fault(report.kernel, report.explanation)
    return SideJudgment(report.kernel, fault, report.comparison, elapsed_s)


# What later stages need to know of a pair, in bits.
DIFFERS, NONFINITE = 1, 2


class PairJudge:
    """Holds the stages of two sides against each other in the order of computation."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        graph: Graph,
        *,
        bound: float = FLOAT32_BOUND,
        top_k: int = 0,
        step: int = 0,
        permuted: bool = False,
    ) -> None:
        """Begin before the first stage.

        Args:
            sizes: Numbers for the letters of symbolic shapes, as far as known.
            graph: Which stages there are, and what they read.
            bound: The relative L2 up to which two sides are the same.
            top_k: How many of the largest differences to keep.
            step: The number of the step, for the report.
            permuted: Whether a side may have written its tensors in another layout.
        """
        self._sizes = sizes
        self._graph = graph
        self._bound = bound
        self._top_k = top_k
        self._step = step
        self._permuted = permuted
        self._before = Inheritance(graph)

    def note(self, key: StageKey, tested: Floats, trusted: Floats) -> None:
        """Remember a pair that later stages read but nobody asked about."""
        self._see(key, compare(tested.reshape(-1), trusted.reshape(-1)))

    def judge(
        self, key: StageKey, tested: Floats | None, trusted: Floats | None,
        tested_side: SideJudgment, trusted_side: SideJudgment,
    ) -> StageParity:  # fmt: skip
        """One stage on both sides.

        Args:
            key: Which stage.
            tested, trusted: Its tensors; None where a side lacks it.
            tested_side, trusted_side: What is known of either side for itself.
        """
        layout, found, permutation = None, None, None
        if tested is None or trusted is None:
            present = trusted if tested is None else tested
            if present is not None:
                layout = layout_of(key, self._sizes, present.size)
            lacking = [n for n, x in (("tested", tested), ("trusted", trusted)) if x is None]
            verdict = Verdict.MISSING
            reason = f"the {lacking[0]} side lacks it" if present is not None else "both lack it"
        else:
            layout, found, permutation = self._compare(key, tested.reshape(-1), trusted.reshape(-1))
            if found is None:
                self._before.tell(key, DIFFERS)
                verdict = Verdict.SHAPE
                reason = f"the tested side has {tested.size} values, the trusted {trusted.size}"
                if tested_side.fault:
                    reason += f"; {tested_side.fault}"
            else:
                fault = self._nonfinite_fault(key, found)
                if fault:
                    tested_side = replace(tested_side, fault=fault)
                verdict, reason = self._decide(key, found, permutation, tested_side, trusted_side)
                if fault:
                    verdict = Verdict.NONFINITE
                self._see(key, found)
        return StageParity(
            self._step, key, layout, found, trusted_side, tested_side, verdict, reason, self._bound
        )

    def _compare(
        self, key: StageKey, tested: Floats, trusted: Floats
    ) -> tuple[Layout, Comparison | None, str | None]:
        """Both as they are, or read in the layout in which they agree, which is then named."""
        name = None
        if tested.size != trusted.size:
            layout = layout_of(key, self._sizes, trusted.size)
            for whole, part, side in ((trusted, tested, "tested"), (tested, trusted, "trusted")):
                last = last_token(key, whole, self._sizes, part.size)
                if last is not None:
                    row, layout = last
                    tested, trusted = (part, row) if side == "tested" else (row, part)
                    name = f"the last token only, on the {side} side"
                    break
            else:
                return layout, None, None
        else:
            layout = layout_of(key, self._sizes, tested.size)
        straight = None
        for permutation, a, b in self._readings(key, tested, trusted, layout):
            found = compare(a, b, self._top_k)
            if straight is None:
                straight = found
            if not is_different(found, self._bound):
                return layout, found, "; ".join(filter(None, (name, permutation))) or None
        return layout, straight, name

    def _readings(
        self, key: StageKey, tested: Floats, trusted: Floats, layout: Layout
    ) -> Iterator[tuple[str | None, Floats, Floats]]:
        """Both sides as they are, then one of them in another layout."""
        operation = self._graph.operation(key)
        a, b = (zero_masked(operation, x, layout) for x in (tested, trusted))
        yield None, a, b
        if not self._permuted:
            return
        for name, x in alternatives(operation, tested, layout):
            yield f"{name} on the tested side", zero_masked(operation, x, layout), b
        for name, x in alternatives(operation, trusted, layout):
            yield f"{name} on the trusted side", a, zero_masked(operation, x, layout)

    def _decide(
        self, key: StageKey, found: Comparison, permutation: str | None,
        tested: SideJudgment, trusted: SideJudgment,
    ) -> tuple[Verdict, str]:  # fmt: skip
        """The first that holds; see `StageParity`."""
        error = f"relative L2 {found.relative_l2:.3g}"
        if found.unequal_nonfinite:
            error = _describe_nonfinite(found)
        if tested.fault:
            return Verdict.FAIL, tested.fault
        if not is_different(found, self._bound):
            if permutation is not None:
                return Verdict.LAYOUT, f"equal when read as: {permutation}"
            return Verdict.PASS, f"{error} is within {self._bound:g}"
        if trusted.fault:
            return Verdict.FAIL, f"{error}, and the trusted side is wrong: {trusted.fault}"
        if self._before.before(key) & DIFFERS:
            right = "" if tested.kernel is None else "its own operation is right; "
            return Verdict.INHERITED, f"{right}its input differs already"
        if tested.kernel is None:
            return Verdict.FAIL, f"{error}, and its inputs are the same on both sides"
        return Verdict.NOISE, f"{error}, which rounding of each side explains"

    def _nonfinite_fault(self, key: StageKey, found: Comparison) -> str:
        """NaN or infinity that a stage makes out of finite inputs, on one side only."""
        if not found.unequal_nonfinite or self._before.before(key) & NONFINITE:
            return ""
        return _describe_nonfinite(found)

    def _see(self, key: StageKey, found: Comparison) -> None:
        nonfinite = NONFINITE if found.nonfinite_a or found.nonfinite_b else 0
        self._before.tell(key, (DIFFERS if is_different(found, self._bound) else 0) | nonfinite)


def _describe_nonfinite(found: Comparison) -> str:
    count = found.unequal_nonfinite
    values = "1 value is" if count == 1 else f"{count} values are"
    return f"{values} NaN or infinite on one side only"
