"""Judging one stage of a run after the other, from both sides' tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes import CauseSearch, explain_nonfinite
from aprcore.dumps.sidecar import LOG_PROBABILITIES
from aprcore.judging.compare import (
    Comparison,
    compare,
    count_finite,
    describe,
    may_be_permuted,
)
from aprcore.judging.layouts import (
    PAIRS,
    PAIRS_OF_JOINED,
    Layout,
    alternatives,
    is_joined,
    is_masked,
    is_readable,
    last_token,
    layout_of,
    zero_masked,
)
from aprcore.judging.logits import compare_logits, log_probabilities
from aprcore.judging.quantisation import measure_quantisation
from aprcore.judging.replay import Expectation, RecordedSide, expect_both, make_judgment
from aprcore.judging.verdict import Evidence, Judgment, Verdict, decide, within
from aprcore.network.graph import Inheritance
from aprcore.network.operations import Rotate
from aprcore.network.stages import StageKey
from aprcore.records.report import CauseSought, LogitsReport, StageReport
from aprcore.runs.sides import Sides

Floats = NDArray[np.floating[Any]]

LOGITS_TOP_K = 5
# A tensor nearer to what it should be than this, relatively, is in the order that it should have.
LEAST_PERMUTED = 0.1

# A tensor in canonical layout, its judgment and what was expected of it, as far as there are any.
_Judged = tuple[Floats | None, Judgment | None, Expectation | None]


@dataclass(frozen=True, slots=True)
class _Failure:
    """What an explanation of a stage starts from."""

    side: RecordedSide
    observed: Floats
    expected: Expectation
    layout: Layout
    in_file: bool


class StageJudge:
    """Judges the stages of a run in the order of computation, remembering what later ones need.

    Attributes:
        tensors: Of the stage judged last: (trace, oracle), flat, in canonical layout as far as that
            could be told; None where a side lacks it.
    """

    def __init__(self, sides: Sides, top_k: int, most_searched: int | None = None) -> None:
        self._sides = sides
        self._search = CauseSearch(most_searched)
        self._top_k = top_k
        self._most_searched = most_searched
        # Of the stage judged last, if it fails and its cause has not been looked for.
        self._failure: _Failure | None = None
        self._trace, self._oracle = sides.recorded()
        # How many values of each tensor are not finite, on either side.
        self._lost: dict[StageKey, int] = {}
        self._oracle_lost: dict[StageKey, int] = {}
        self._spoiled, self._oracle_spoiled = Inheritance(sides.graph), Inheritance(sides.graph)
        self._verdicts: dict[StageKey, Verdict | None] = {}
        self._layouts: dict[tuple[str, int], Layout] = {}
        # Layers whose q and k the trace keeps as adjacent pairs.
        self._paired: set[int | None] = set()
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
        """The report of one stage; `explain` adds why it fails, which may take longer.

        Args:
            key: Which stage.
            traced: The tensor under test, or None where that side lacks it.
        """
        sides = self._sides
        self.tensors = None, None
        self._failure = None
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

    def sought(self, result: StageReport) -> CauseSought | None:
        """What to say before the cause of the stage judged last is looked for; None: it is not."""
        if self._failure is None:
            return None
        return CauseSought(result, self._search.searched, self._most_searched)

    def explain(self, result: StageReport) -> StageReport:
        """The report of the stage judged last, with why it fails.

        Args:
            result: What `judge` said of it.
        """
        failure, self._failure = self._failure, None
        if failure is None:
            return result
        explanation = self._search.explain(
            failure.side, result.key, failure.observed, failure.expected, failure.layout,
            in_file=failure.in_file,
        )  # fmt: skip
        if explanation is None:
            reason = f"{result.reason}; its cause was not searched for (--causes all)"
            return replace(result, reason=reason)
        judgment, _, figures = result.reason.partition(": ")
        reason = f"{judgment}: {explanation.clause()}; {figures}"
        return replace(result, reason=reason, explanation=explanation)

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
            kernel, model = self._judge_rows(key, traced, oracle)
            *_, found, permuted = self._aligned(key, *pair, layout)
            name = "; ".join(filter(None, (f"the last token only, in the {side}", permuted)))
            evidence = self._evidence(key, found, layout=name, kernel=kernel, model=model)
            if not within(found, evidence.bound_alone):
                evidence = replace(evidence, layout=None)
            verdict, reason = decide(evidence)
            return StageReport(key, layout, verdict, reason, found, kernel=kernel, model=model,
                               permuted=permuted or "")  # fmt: skip
        layout = self._layout(key, oracle.size)
        return StageReport(
            key, layout, Verdict.SHAPE,
            f"the trace has {traced.size} values, the oracle {oracle.size}",
            trace=describe(traced), oracle=describe(oracle),
        )  # fmt: skip

    def _judge_rows(
        self, key: StageKey, traced: Floats, oracle: Floats
    ) -> tuple[Judgment | None, Judgment | None]:
        """The judgments of two sides of which one has the last token's row only."""
        found: list[Judgment | None] = []
        for side, x, lost in (
            (self._trace, traced, self._lost), (self._oracle, oracle, self._oracle_lost),
        ):  # fmt: skip
            layout = self._layout(key, x.size)
            is_usable = side is not None and not lost.get(key) and is_readable(
                side.graph, key, layout, self._sides.sizes
            )  # fmt: skip
            expected = side.expect(key) if side is not None and is_usable else None
            found.append(None if expected is None or expected.estimate.size != x.size
                         else make_judgment(x, expected, layout))  # fmt: skip
        self._keep(key, traced, None, self._layout(key, traced.size))
        self._keep(key, None, oracle, self._layout(key, oracle.size))
        if None in found:  # the comparison alone has to tell, which one judgment would soften
            return None, None
        return found[0], found[1]

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
        self._keep(key, traced, oracle, layout, moved=(permuted is not None, moved is not None))
        permuted = permuted or moved
        judged = traced, oracle
        if key == self._graph.logits and traced is not None and oracle is not None:
            traced, oracle = dumped = self._on_one_scale(traced, oracle)
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
        explanation = None
        if verdict is Verdict.FAIL:
            self._failure = self._failure_of(
                layout, (judged[0], kernel, expected_trace), (judged[1], model, expected_oracle)
            )
        elif verdict is Verdict.NONFINITE and self._trace is not None and traced is not None:
            explanation = explain_nonfinite(self._trace, key, traced)
            if explanation is not None and explanation.named:
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

    def _on_one_scale(self, traced: Floats, oracle: Floats) -> tuple[Floats, Floats]:
        """Logits of both sides, as log-probabilities where one side holds those."""
        dumps = (self._sides.trace, self._sides.oracle)
        held = [dump is not None and dump.sidecar.logits == LOG_PROBABILITIES for dump in dumps]
        if not any(held) or not (np.isfinite(traced).all() and np.isfinite(oracle).all()):
            return traced, oracle
        return (traced if held[0] else log_probabilities(traced),
                oracle if held[1] else log_probabilities(oracle))  # fmt: skip

    def _failure_of(self, layout: Layout, traced: _Judged, oracle: _Judged) -> _Failure | None:
        """What experiments start from: the output and the inputs of the side that shows a fault."""
        for side, (x, judgment, expected), in_file in (
            (self._trace, traced, False), (self._oracle, oracle, True),
        ):  # fmt: skip
            if judgment is not None and not judgment.passed:
                assert side is not None and x is not None and expected is not None
                return _Failure(side, x, expected, layout, in_file)
        return None

    def _lone(
        self, key: StageKey, traced: Floats | None, oracle: Floats | None,
        verdict: Verdict | None, reason: str,
    ) -> tuple[Verdict | None, str]:  # fmt: skip
        """What to say of a tensor that only one side has."""
        sides = self._sides
        if sides.oracle is None and verdict is None and sides.header.judged:
            return Verdict.UNJUDGED, self._why_unjudged(key, traced)
        if sides.oracle is None:
            return verdict, reason or "no oracle to hold it against"
        if traced is not None or key in sides.not_computed:
            return Verdict.MISSING, "the oracle lacks it"
        is_layer = key.layer is None or key.layer < self._graph.num_layers
        if sides.model is not None and key not in self._graph and is_layer:
            return self._foreign(key, oracle)
        return Verdict.MISSING, "the trace lacks it"

    def _why_unjudged(self, key: StageKey, traced: Floats | None) -> str:
        """Why nothing can be said of a traced tensor that has no other side."""
        sides, graph = self._sides, self._graph
        num_tokens = sides.sizes.get("T")
        if key not in graph:
            return "this model has no such stage"
        if self._trace is None or num_tokens is None:
            return "the number of tokens is not known; give --tokens"
        assert traced is not None
        due = math.prod(graph.shape(key, sides.sizes))
        if traced.size != due:
            return f"it has {traced.size} values where {due} are due for {num_tokens} tokens"
        if not graph.inputs(key) and sides.header.tokens is None:
            return "the token ids are not known; give --tokens"
        lacking = [source for source in graph.inputs(key) if self._trace.tensor(source) is None]
        if lacking:
            return f"the trace lacks what it is made of: {', '.join(map(str, lacking))}"
        return "what it should be is not finite"

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
        if expected is None or expected.estimate.size != x.size:
            return x, None, None
        judgment = make_judgment(x, expected, layout)
        if judgment is None or judgment.passed or not may_permute:
            return x, judgment, None
        if judgment.relative_l2 < LEAST_PERMUTED:
            return x, judgment, None
        is_oracle = side == "the oracle"
        kv_heads = self._sides.sizes.get("K")
        usual = None if is_oracle else self._usual_layout(key)
        as_usual = None
        for name, reading in alternatives(
            self._graph.operation(key), dumped, layout, num_kv_heads=kv_heads, is_oracle=is_oracle
        ):
            permuted = self._unmasked(key, reading, layout)
            other = make_judgment(permuted, expected, layout)
            if name == usual:
                as_usual = permuted, other
            if other is None or not other.passed:
                continue
            if not is_oracle and not self._is_convention(key, dumped, permuted, layout):
                return x, judgment, None
            if name == PAIRS_OF_JOINED and not is_oracle:
                self._paired.add(key.layer)
            return permuted, other, f"{name} in {side}"
        if as_usual is not None:  # what is wrong is wrong in the order that the engine keeps
            return *as_usual, f"{usual} in {side}"
        return x, judgment, None

    def _usual_layout(self, key: StageKey) -> str | None:
        """The layout in which the trace keeps a stage: that of most layers, or of what it reads."""
        known = self._sides.layouts.get(key.stage)
        is_rotated = isinstance(self._graph.operation(key), Rotate)
        return PAIRS if known is None and is_rotated and key.layer in self._paired else known

    def _is_convention(
        self, key: StageKey, dumped: Floats, permuted: Floats, layout: Layout
    ) -> bool:
        """Whether an engine keeps q, k and v in another order, and does not permute them wrongly.

        Both write the same. What reads them tells the two apart: it is explained by the tensor as
        it was dumped only where the order is a fault. Where neither explains it, it has one itself.
        """
        if not is_joined(self._graph.operation(key)) or self._trace is None:
            return True
        for reader in self._graph.readers(key):
            if len(self._graph.inputs(reader)) > 1 or self._explains(reader, permuted, layout):
                continue
            if self._explains(reader, dumped, layout):
                return False
        return True

    def _explains(self, reader: StageKey, qkv: Floats, layout: Layout) -> bool:
        """Whether a stage of the trace is what this input gives, in any layout; so if not there."""
        assert self._trace is not None
        dumped = self._trace.peek(reader)
        if dumped is None:
            return True
        expected = self._trace.expect_from(reader, [qkv.reshape(layout.shape)])
        if expected is None:
            return True
        own = layout_of(reader, self._sides.sizes, dumped.size)
        readings = [dumped.reshape(-1)]
        readings += [
            y for _, y in alternatives(
                self._graph.operation(reader), readings[0], own,
                num_kv_heads=self._sides.sizes.get("K"),
            )
        ]  # fmt: skip
        judged = (make_judgment(x, expected, own) for x in readings)
        return any(j is not None and j.passed for j in judged)

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
        self, key: StageKey, traced: Floats | None, oracle: Floats | None, layout: Layout,
        moved: tuple[bool, bool] = (False, False),
    ) -> None:  # fmt: skip
        """Remember canonical tensors for the stages that read them.

        Args:
            key: Which stage.
            traced, oracle: Its tensors.
            layout: Their layout.
            moved: Whether each is in another order than in its dump.
        """
        sides = self._sides
        for side, dump, x, is_moved in (
            (self._trace, sides.trace, traced, moved[0]),
            (self._oracle, sides.oracle, oracle, moved[1]),
        ):
            if side is None or x is None or (dump is not None and not dump.is_exact(key)):
                continue
            if is_readable(side.graph, key, layout, sides.sizes):
                side.record(key, x.reshape(layout.shape), is_as_dumped=not is_moved)

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
        return x.size - count_finite(self._unmasked(key, x, layout))

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
