"""Judging one stage of a run after the other, from both sides' tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes import Explanation, explain, explain_nonfinite
from aprcore.judging.compare import Comparison, compare, describe, may_be_permuted
from aprcore.judging.layouts import (
    Layout,
    alternatives,
    is_joined,
    is_masked,
    last_token,
    layout_of,
    zero_masked,
)
from aprcore.judging.logits import compare_logits
from aprcore.judging.quantisation import measure_quantisation
from aprcore.judging.replay import Expectation, expect_both, make_judgment
from aprcore.judging.verdict import Evidence, Judgment, Verdict, decide, within
from aprcore.network.graph import Inheritance
from aprcore.network.stages import StageKey
from aprcore.records.report import LogitsReport, StageReport
from aprcore.runs.sides import Sides

Floats = NDArray[np.floating[Any]]

LOGITS_TOP_K = 5

# A tensor in canonical layout, its judgment and what was expected of it, as far as there are any.
_Judged = tuple[Floats | None, Judgment | None, Expectation | None]


class StageJudge:
    """Judges the stages of a run in the order of computation, remembering what later ones need.

    Attributes:
        tensors: Of the stage judged last: (trace, oracle), flat, in canonical layout as far as that
            could be told; None where a side lacks it.
    """

    def __init__(self, sides: Sides, top_k: int) -> None:
        self._sides = sides
        self._top_k = top_k
        self._trace, self._oracle = sides.recorded()
        # How many values of each tensor are not finite, on either side.
        self._lost: dict[StageKey, int] = {}
        self._oracle_lost: dict[StageKey, int] = {}
        self._spoiled, self._oracle_spoiled = Inheritance(sides.graph), Inheritance(sides.graph)
        self._verdicts: dict[StageKey, Verdict | None] = {}
        self._layouts: dict[tuple[str, int], Layout] = {}
        self._graph = sides.graph
        self.tensors: tuple[Floats | None, Floats | None] = (None, None)

    def record(self, key: StageKey, traced: Floats) -> None:
        """Keep a traced tensor that later stages read but nobody asked about.

        Whether it is finite is not remembered: a NaN must be reported once to be inherited.
        """
        if self._trace is not None:
            self._trace.enter(key)
            self._trace.record(key, traced)

    def judge(self, key: StageKey, traced: Floats | None) -> StageReport:
        """The report of one stage.

        Args:
            key: Which stage.
            traced: The tensor under test, or None where that side lacks it.
        """
        sides = self._sides
        oracle = None
        if sides.oracle is not None and key in sides.oracle:
            oracle = sides.oracle.read(key)
        if traced is not None:
            traced = traced.reshape(-1)
        if not self._is_compared_alone(traced, oracle):
            if oracle is not None:
                self._lose(key, oracle=self._count_nonfinite(key, oracle))
            if traced is not None:
                self._lose(key, traced=self._count_nonfinite(key, traced))
        for side in (self._trace, self._oracle):
            if side is not None:
                side.enter(key)
        result = self._with_quantisation(self._judge(key, traced, oracle))
        self._verdicts[key] = result.verdict
        return result

    def _is_compared_alone(self, traced: Floats | None, oracle: Floats | None) -> bool:
        """Whether there is one comparison and no judgment: it counts what is not finite itself."""
        is_replayed = self._trace is not None or self._oracle is not None
        both = traced is not None and oracle is not None and traced.size == oracle.size
        return both and not is_replayed

    def _with_quantisation(self, result: StageReport) -> StageReport:
        """Add what the reference weights show, where they are at hand."""
        reference, side = self._sides.reference, self._oracle
        oracle = None if reference is None or side is None else side.tensor(result.key)
        if reference is None or side is None or oracle is None:
            return result
        found = measure_quantisation(reference, side, result.key, oracle)
        told = (Verdict.NOISE, Verdict.INHERITED, Verdict.FAIL)
        if found is not None and result.verdict in told:
            result = replace(result, reason=f"{result.reason}; {found.describe()}")
        return replace(result, quantisation=found)

    def _judge(self, key: StageKey, traced: Floats | None, oracle: Floats | None) -> StageReport:
        self.tensors = traced, oracle
        present = [x for x in (oracle, traced) if x is not None]
        if not present:
            reason = "both sides lack it"
            if self._sides.oracle is None:
                reason = "the trace lacks it"
            elif key in self._sides.not_computed:
                reason = "the oracle lacks it"
            return StageReport(key, None, Verdict.MISSING, reason)
        layout = self._layout(key, present[0].size)
        if traced is not None and oracle is not None and traced.size != oracle.size:
            return self._other_size(key, traced, oracle)
        return self._values(key, traced, oracle, layout)

    def _other_size(self, key: StageKey, traced: Floats, oracle: Floats) -> StageReport:
        """Sizes differ: the last token only on one side, or really another shape."""
        sizes = self._sides.sizes
        for whole, part, side in ((oracle, traced, "trace"), (traced, oracle, "oracle")):
            last = last_token(key, whole, sizes, part.size)
            if last is None:
                continue
            row, layout = last
            pair = (part, row) if side == "trace" else (row, part)
            *_, found, permuted = self._aligned(key, *pair, layout)
            name = "; ".join(filter(None, (f"the last token only, in the {side}", permuted)))
            evidence = self._evidence(key, found, layout=name)
            if not within(found, evidence.bound_alone):
                evidence = replace(evidence, layout=None)
            verdict, reason = decide(evidence)
            return StageReport(key, layout, verdict, reason, found, permuted=permuted or "")
        layout = self._layout(key, oracle.size)
        return StageReport(
            key, layout, Verdict.SHAPE,
            f"the trace has {traced.size} values, the oracle {oracle.size}",
            trace=describe(traced), oracle=describe(oracle),
        )  # fmt: skip

    def _values(
        self, key: StageKey, traced: Floats | None, oracle: Floats | None, layout: Layout
    ) -> StageReport:
        expected_trace, expected_oracle = self._expect(key, traced, oracle)
        dumped = traced, oracle
        traced, kernel, permuted = self._canonical(
            key, traced, expected_trace, layout, "the trace", self._sides.trace is not None
        )
        oracle, model, moved = self._canonical(
            key, oracle, expected_oracle, layout, "the oracle", True
        )
        permuted = permuted or moved
        self._keep(key, traced, oracle, layout)
        comparison = None
        if traced is not None and oracle is not None:
            if permuted is None and kernel is None and model is None:
                ours, theirs = dumped
                assert ours is not None and theirs is not None
                traced, oracle, comparison, permuted = self._aligned(key, ours, theirs, layout)
                self._lose(key, comparison.nonfinite_a, comparison.nonfinite_b)
            else:
                comparison = compare(traced, oracle, self._top_k)
        self.tensors = traced, oracle
        evidence = self._evidence(key, comparison, layout=permuted, kernel=kernel, model=model)
        verdict, reason = decide(evidence)
        if comparison is None and (verdict is None or not verdict.is_divergence):
            verdict, reason = self._lone(key, traced, oracle, verdict, reason)
        explanation = self._explain(
            key, layout, verdict, (traced, kernel, expected_trace), (oracle, model, expected_oracle)
        )
        if explanation is not None and verdict is Verdict.FAIL:
            judgment, _, figures = reason.partition(": ")
            reason = f"{judgment}: {explanation.clause()}; {figures}"
        elif explanation is not None and explanation.named:
            reason = f"{explanation.clause()}; {reason}"
        logits = None
        if key == self._graph.logits and traced is not None and oracle is not None and traced.size:
            found = compare_logits(traced, oracle, k=LOGITS_TOP_K)
            texts = self._sides.token_texts({*found.top_a, *found.top_b})
            logits = LogitsReport(found, texts)
        return StageReport(
            key, layout, verdict, reason, comparison, kernel=kernel, model=model,
            explanation=explanation,
            trace=None if traced is None or comparison is not None else describe(traced),
            oracle=None if oracle is None or comparison is not None else describe(oracle),
            logits=logits,
            permuted="; ".join(dict.fromkeys(filter(None, (permuted, moved)))),
        )  # fmt: skip

    def _explain(
        self, key: StageKey, layout: Layout, verdict: Verdict | None, traced: _Judged,
        oracle: _Judged,
    ) -> Explanation | None:  # fmt: skip
        """Why a stage fails, by experiments on the inputs of the side that shows it."""
        if verdict is Verdict.NONFINITE and self._trace is not None and traced[0] is not None:
            return explain_nonfinite(self._trace, key, traced[0])
        if verdict is not Verdict.FAIL:
            return None
        for side, (x, judgment, expected), in_file in (
            (self._trace, traced, False), (self._oracle, oracle, True),
        ):  # fmt: skip
            if judgment is not None and not judgment.passed:
                assert side is not None and x is not None and expected is not None
                return explain(side, key, x, expected, layout, in_file=in_file)
        return None

    def _lone(
        self, key: StageKey, traced: Floats | None, oracle: Floats | None,
        verdict: Verdict | None, reason: str,
    ) -> tuple[Verdict | None, str]:  # fmt: skip
        """What to say of a tensor that only one side has."""
        sides = self._sides
        if sides.oracle is None:
            return verdict, reason or "no oracle to hold it against"
        if traced is not None or key in sides.not_computed:
            return Verdict.MISSING, "the oracle lacks it"
        is_layer = key.layer is None or key.layer < self._graph.num_layers
        if sides.model is not None and key not in self._graph and is_layer:
            return self._foreign(key, oracle)
        return Verdict.MISSING, "the trace lacks it"

    def _foreign(self, key: StageKey, oracle: Floats | None) -> tuple[Verdict, str]:
        """A stage that the oracle has and this model's table has not: perhaps lost on import."""
        reads = self._graph.including([key.stage]).inputs(key)
        before = None
        if len(reads) == 1 and self._sides.oracle is not None:
            before = self._sides.oracle.read(reads[0]) if reads[0] in self._sides.oracle else None
        if before is not None and oracle is not None and before.size == oracle.size:
            found = compare(before, oracle)
            if within(found, self._sides.header.bound):
                return (
                    Verdict.MISSING,
                    "this model has no such stage; in the oracle it does nothing",
                )
        return Verdict.FAIL, f"model: the oracle has {key.stage}, this model has no weights for it"

    def _expect(
        self, key: StageKey, traced: Floats | None, oracle: Floats | None
    ) -> tuple[Expectation | None, Expectation | None]:
        """What either side should hold; only for sides that hold something finite."""
        if self._trace is None and self._oracle is None:
            return None, None
        trace_side = self._trace if traced is not None and not self._lost[key] else None
        oracle_side = self._oracle if oracle is not None and not self._oracle_lost[key] else None
        return expect_both(trace_side, oracle_side, key)

    def _canonical(
        self, key: StageKey, x: Floats | None, expected: Expectation | None, layout: Layout,
        side: str, may_permute: bool,
    ) -> tuple[Floats | None, Judgment | None, str | None]:  # fmt: skip
        """A tensor judged against its expectation, read in another layout if that explains it."""
        if x is None:
            return None, None, None
        dumped, x = x, self._unmasked(key, x, layout)
        if expected is None or expected.estimate.value.size != x.size:
            return x, None, None
        judgment = make_judgment(x, expected, layout)
        if judgment is None or judgment.passed or not may_permute:
            return x, judgment, None
        is_oracle = side == "the oracle"
        kv_heads = self._sides.sizes.get("K")
        for name, reading in alternatives(
            self._graph.operation(key), dumped, layout, num_kv_heads=kv_heads, is_oracle=is_oracle
        ):
            permuted = self._unmasked(key, reading, layout)
            other = make_judgment(permuted, expected, layout)
            if other is None or not other.passed:
                continue
            if not is_oracle and not self._readers_agree(key, permuted.reshape(layout.shape)):
                break
            return permuted, other, f"{name} in {side}"
        return x, judgment, None

    def _readers_agree(self, key: StageKey, qkv: Floats) -> bool:
        """Whether the next stages of the trace can have read q, k and v as they are taken here.

        An engine that permutes the rows of q and k writes what one writes that keeps them in
        another order throughout. What reads them tells the two apart.
        """
        if not is_joined(self._graph.operation(key)) or self._trace is None:
            return True
        for reader in self._graph.readers(key):
            dumped = self._trace.peek(reader)
            if dumped is None or len(self._graph.inputs(reader)) > 1:
                continue
            expected = self._trace.expect_from(reader, [qkv])
            layout = layout_of(reader, self._sides.sizes, dumped.size)
            kv_heads = self._sides.sizes.get("K")
            readings = [dumped.reshape(-1)]
            readings += [y for _, y in alternatives(self._graph.operation(reader), readings[0],
                                                    layout, num_kv_heads=kv_heads)]  # fmt: skip
            judged = (make_judgment(x, expected, layout) for x in readings if expected is not None)
            if expected is not None and not any(j is not None and j.passed for j in judged):
                return False
        return True

    def _aligned(
        self, key: StageKey, a: Floats, b: Floats, layout: Layout
    ) -> tuple[Floats, Floats, Comparison, str | None]:
        """Without other judgments, a permutation shows by the comparison of the sides alone."""
        bound = self._sides.bound_alone
        readings = self._readings(key, a, b, layout)
        _, plain_a, plain_b = next(readings)
        plain = compare(plain_a, plain_b, self._top_k)
        if within(plain, bound):
            return plain_a, plain_b, plain, None
        # What a mask leaves out depends on the order; elsewhere every reading has the same values.
        if is_masked(self._graph.operation(key)) or may_be_permuted(a, b, plain, bound):
            for name, ours, theirs in readings:
                found = compare(ours, theirs, self._top_k)
                if within(found, bound):
                    return ours, theirs, found, name
        return plain_a, plain_b, plain, None

    def _readings(
        self, key: StageKey, a: Floats, b: Floats, layout: Layout
    ) -> Iterator[tuple[str | None, Floats, Floats]]:
        """Both sides as they are, then one or each in another layout. Our own is canonical."""

        def read(x: Floats, is_canonical: bool) -> Iterator[tuple[str | None, Floats]]:
            yield None, self._unmasked(key, x, layout)
            if is_canonical:
                return
            kv_heads, operation = self._sides.sizes.get("K"), self._graph.operation(key)
            for name, y in alternatives(operation, x, layout, num_kv_heads=kv_heads):
                yield name, self._unmasked(key, y, layout)

        for ours, x in read(a, is_canonical=self._sides.trace is None):
            for theirs, y in read(b, is_canonical=False):
                if ours is not None and ours == theirs:  # on both sides it changes nothing
                    continue
                parts = ((ours, "the trace"), (theirs, "the oracle"))
                yield "; ".join(f"{name} in {side}" for name, side in parts if name) or None, x, y

    def _keep(
        self, key: StageKey, traced: Floats | None, oracle: Floats | None, layout: Layout
    ) -> None:
        """Remember canonical tensors for the stages that read them."""
        for side, x in ((self._trace, traced), (self._oracle, oracle)):
            if side is not None and x is not None and layout.axes != ("index",):
                side.record(key, x.reshape(layout.shape))

    def _evidence(
        self, key: StageKey, comparison: Comparison | None, *, layout: str | None,
        kernel: Judgment | None = None, model: Judgment | None = None,
    ) -> Evidence:  # fmt: skip
        known = [self._verdicts[s] for s in self._graph.inputs(key) if s in self._verdicts]
        return Evidence(
            comparison=comparison,
            bound=self._sides.header.bound,
            bound_alone=self._sides.bound_alone,
            kernel=kernel,
            model=model,
            traced_nonfinite=self._nonfinite_count(key, comparison),
            inputs_finite=not self._spoiled.before(key),
            oracle_inputs_finite=not self._oracle_spoiled.before(key),
            inputs_pass=all(verdict is Verdict.PASS for verdict in known),
            layout=layout,
        )

    def _unmasked(self, key: StageKey, x: Floats, layout: Layout) -> Floats:
        """A tensor without what no judgment may look at."""
        return zero_masked(self._graph.operation(key), x, layout)

    def _layout(self, key: StageKey, count: int) -> Layout:
        """The layout of a tensor; a stage's is the same in every layer."""
        found = self._layouts.get((key.stage, count))
        if found is None:
            found = layout_of(key, self._sides.sizes, count)
            self._layouts[key.stage, count] = found
        return found

    def _nonfinite_count(self, key: StageKey, comparison: Comparison | None) -> int:
        """NaN and infinities of what was traced, as far as it is compared."""
        lost = self._lost.get(key, 0)
        return lost if comparison is None or not lost else comparison.nonfinite_a

    def _count_nonfinite(self, key: StageKey, x: Floats) -> int:
        """NaN and infinities of a tensor where they count: scores may be -inf over the diagonal."""
        layout = self._layout(key, x.size)
        return x.size - int(np.count_nonzero(np.isfinite(self._unmasked(key, x, layout))))

    def _lose(
        self, key: StageKey, traced: int | None = None, oracle: int | None = None
    ) -> None:  # fmt: skip
        """Remember how many values of a tensor are not finite, on the sides that have it."""
        if traced is not None:
            self._lost[key] = traced
            self._spoiled.tell(key, int(traced > 0))
        if oracle is not None:
            self._oracle_lost[key] = oracle
            self._oracle_spoiled.tell(key, int(oracle > 0))
