"""The whole run: two sides, stage by stage, into a `Report`. The screen and the headless commands
are both driven by `bisect`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.compare import compare, compare_logits, describe
from aprcore.judge import Verdict, cumulative_bound, judge_values, within
from aprcore.layouts import (
    Layout,
    alternatives,
    last_token,
    layout_of,
    zero_above_diagonal,
)
from aprcore.plan import Plan
from aprcore.report import LogitsReport, Report, RunHeader, StageReport
from aprcore.sides import Sides, open_sides
from aprcore.stages import StageKey, input_keys

Floats = NDArray[np.floating[Any]]

# How many of the largest differences a report keeps; the screen shows up to as many.
TOP_K = 200
LOGITS_TOP_K = 5


@dataclass(frozen=True, slots=True)
class Request:
    """What to run and what to hold it against.

    Attributes:
        model: A .apr or .gguf file or a Hugging Face directory.
        oracle: A directory of stage files: the reference.
        trace: Another engine's dump, judged in place of a trace of `model`.
        prompt: Text to run; default: the tokens that the oracle recorded.
        tokens: Token ids to run, instead of a prompt.
        plan: Stages and layers; default: those of the oracle, or all.
        threads: Threads of the CPU path; default: one per processor.
        top_k: How many of the largest differences to keep per stage.
    """

    model: Path | None = None
    oracle: Path | None = None
    trace: Path | None = None
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    plan: Plan | None = None
    threads: int | None = None
    top_k: int = TOP_K


def bisect(request: Request) -> Iterator[RunHeader | StageReport | Report]:
    """Run a request and stream what it finds.

    A tensor is compared as it is produced and then dropped. Closing the generator ends the run.

    Yields:
        One `RunHeader`, a `StageReport` per stage in the order of computation, then the `Report`.

    Raises:
        AprError: The arguments or a file are unusable.
    """
    started = time.perf_counter()
    with open_sides(request) as sides:
        yield sides.header
        judge = _StageJudge(sides, request.top_k)
        results = []
        lap = time.perf_counter()
        for key, tensor in sides.tensors():
            result = judge.judge(key, tensor)
            now = time.perf_counter()
            result, lap = replace(result, elapsed_s=now - lap), now
            results.append(result)
            yield result
    yield Report(sides.header, tuple(results), time.perf_counter() - started)


class _StageJudge:
    """Judges one stage after the other; remembers which traced tensors were finite."""

    def __init__(self, sides: Sides, top_k: int) -> None:
        self._sides = sides
        self._top_k = top_k
        self._finite: dict[StageKey, bool] = {}

    def judge(self, key: StageKey, traced: Floats | None) -> StageReport:
        """The report of one stage.

        Args:
            key: Which stage.
            traced: The tensor under test, or None where that side lacks it.
        """
        sides = self._sides
        wanted = sides.oracle is not None and key in sides.oracle
        oracle = sides.oracle.read(key) if sides.oracle is not None and wanted else None
        if traced is None or oracle is None:
            return self._lone(key, traced, oracle)
        traced = traced.reshape(-1)
        layout = layout_of(key, sides.sizes, oracle.size)
        if layout.axes == ("index",) and traced.size != oracle.size:
            layout = layout_of(key, sides.sizes, traced.size)
        if traced.size != oracle.size:
            return self._other_size(key, traced, oracle, layout)
        return self._values(key, traced, oracle, layout)

    def _lone(self, key: StageKey, traced: Floats | None, oracle: Floats | None) -> StageReport:
        present = oracle if traced is None else traced
        layout = None if present is None else layout_of(key, self._sides.sizes, present.size)
        verdict, reason = None, "no oracle to hold it against"
        if self._sides.oracle is not None:
            verdict = Verdict.MISSING
            if traced is None:
                reason = "the trace lacks it" if oracle is not None else "both sides lack it"
            else:
                reason = "the oracle lacks it"
            if key in self._sides.not_computed:
                reason = "the oracle lacks it"
        return StageReport(
            key, layout, verdict, reason,
            trace=None if traced is None else describe(traced),
            oracle=None if oracle is None else describe(oracle),
        )  # fmt: skip

    def _other_size(
        self, key: StageKey, traced: Floats, oracle: Floats, layout: Layout
    ) -> StageReport:
        """Sizes differ: the last token only on one side, or really another shape."""
        for whole, part, side in ((oracle, traced, "the trace"), (traced, oracle, "the oracle")):
            found = last_token(whole, layout_of(key, self._sides.sizes, whole.size), part.size)
            if found is None:
                continue
            row, row_layout = found
            pair = (part, row) if side == "the trace" else (row, part)
            result = self._values(key, *pair, row_layout)
            note = f"{side} holds the last token only"
            if result.verdict is Verdict.PASS:
                return replace(result, verdict=Verdict.LAYOUT, reason=f"{note}; {result.reason}")
            return replace(result, reason=f"{result.reason} ({note})")
        return StageReport(
            key, layout, Verdict.SHAPE,
            f"the trace has {traced.size} values, the oracle {oracle.size}",
            trace=describe(traced), oracle=describe(oracle),
        )  # fmt: skip

    def _values(
        self, key: StageKey, traced: Floats, oracle: Floats, layout: Layout
    ) -> StageReport:
        bound = self._sides.header.bound
        a, b = (zero_above_diagonal(key, x, layout) for x in (traced, oracle))
        comparison = compare(a, b, self._top_k)
        verdict, reason = judge_values(comparison, bound, inputs_finite=self._inputs_finite(key))
        if verdict is not Verdict.PASS:
            for name, ours, theirs in self._readings(key, traced, oracle, layout):
                if within(compare(ours, theirs), bound):
                    a, b, comparison = ours, theirs, compare(ours, theirs, self._top_k)
                    verdict, reason = Verdict.LAYOUT, f"equal when read as: {name}"
                    break
        # Only what was judged counts: a NaN must come up once before it can be inherited.
        self._finite[key] = comparison.nonfinite_a == 0
        logits = None
        if key.stage == "lm_head" and a.size > 0:
            found = compare_logits(a, b, k=LOGITS_TOP_K)
            texts = self._sides.token_texts({*found.top_a, *found.top_b})
            logits = LogitsReport(found, texts)
        return StageReport(key, layout, verdict, reason, comparison, logits=logits)

    def _readings(
        self, key: StageKey, a: Floats, b: Floats, layout: Layout
    ) -> Iterator[tuple[str, Floats, Floats]]:
        """Both sides with one or each read in another layout. Our own trace is canonical."""

        def read(x: Floats, is_canonical: bool) -> Iterator[tuple[str, Floats]]:
            yield "", zero_above_diagonal(key, x, layout)
            for name, y in () if is_canonical else alternatives(key, x, layout):
                yield name, zero_above_diagonal(key, y, layout)

        for ours, x in read(a, is_canonical=self._sides.trace is None):
            for theirs, y in read(b, is_canonical=False):
                if ours == theirs:  # the same permutation on both sides changes nothing
                    continue
                parts = ((ours, "the trace"), (theirs, "the oracle"))
                yield "; ".join(f"{name} in {side}" for name, side in parts if name), x, y

    def _inputs_finite(self, key: StageKey) -> bool:
        """Whether the nearest judged ancestors of a stage were finite on the traced side."""
        if all(self._finite.values()):
            return True
        header = self._sides.header
        unseen, seen = [key], {key}
        while unseen:
            for source in input_keys(unseen.pop(), header.num_layers, self._sides.features):
                if source in seen:
                    continue
                seen.add(source)
                if source not in self._finite:
                    unseen.append(source)
                elif not self._finite[source]:
                    return False
        return True


def run(request: Request) -> Report:
    """Run a request to its end."""
    last: Any = None
    for last in bisect(request):
        pass
    assert isinstance(last, Report)
    return last

