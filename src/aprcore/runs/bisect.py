"""The whole run: two sides, stage by stage, into a `Report`.

The screen and the headless commands are both driven by `bisect`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING

from aprcore.records.report import Report, RunEvent, StageReport
from aprcore.records.saved_run import SavedRun
from aprcore.runs.budget import NO_BUDGETS, run_dtype, settle
from aprcore.runs.open_sides import open_sides
from aprcore.runs.parity_steps import timed
from aprcore.runs.request import Request
from aprcore.runs.second_side import FirstSide, Floats, second_side
from aprcore.runs.stage_judge import StageJudge

if TYPE_CHECKING:
    from aprcore.runs.tensors import LayerInputs


def bisect(request: Request, kept: LayerInputs | None = None) -> Iterator[RunEvent]:
    """Run a request and stream what it finds.

    A tensor is compared as it is produced and then dropped. Closing the generator ends the run.

    Args:
        request: What to run.
        kept: Takes what any tensor of a traced model can be made again from: see `TensorStore`.

    Yields:
        One `RunHeader`, a `StageReport` per stage in the order of computation, then the `Report`.
        Before the report of a stage that fails, a `CauseSought`: looking for it takes a while.
        With a second side, a device or another dump: `DeviceOpened` once a device is open, a
        `StageParity` after the `StageReport` of each stage, and `PathRejected` if the device is
        given up, after which no more of it comes.

    Raises:
        RejectedError: A device is required and cannot be used, or the gate rejects it, which is
            raised after the last stage.
        AprError: The arguments or a file are unusable.
    """
    if request.saved is not None:
        with closing(SavedRun(request.saved)) as saved:
            yield from saved.events()
        return
    started = time.perf_counter()
    budgets = NO_BUDGETS if request.budgets is None else request.budgets
    with open_sides(request) as sides, ExitStack() as stack:
        budgets = budgets.resolved(sides.graph)
        dtype = run_dtype(sides.header)
        yield sides.header
        judge = StageJudge(sides, request.top_k, request.causes)
        second = second_side(request, sides)
        if second is not None:
            stack.callback(second.close)
            yield from second.open()
        rows = set(sides.header.keys)
        results = []
        unasked_s = 0.0  # of the stages that a row reads and that nobody asked about
        for (key, tensor), made_s in timed(sides.tensors()):
            is_kept = kept is not None and sides.trace is None and sides.graph.is_stream(key)
            if kept is not None and tensor is not None and is_kept:
                kept.keep(key, tensor)
            judged_at = time.perf_counter()
            budget = budgets.find(key, dtype)
            result: StageReport | None = None
            pair: tuple[Floats | None, Floats | None] = (tensor, None)
            if key in rows:
                judged = judge.judge(key, tensor)
                result = settle(judged, budget, strict=request.strict)
                sought = judge.sought(result)
                if sought is not None:
                    yield sought
                    result = settle(judge.explain(judged), budget, strict=request.strict)
                spent_s = unasked_s + made_s + time.perf_counter() - judged_at
                result, unasked_s = replace(result, elapsed_s=spent_s), 0.0
                pair = judge.tensors
                results.append(result)
                yield result
            else:
                assert tensor is not None
                judge.record(key, tensor)
                unasked_s += made_s + time.perf_counter() - judged_at
            if second is not None:
                yield from second.follow(FirstSide(key, *pair, result, budget, made_s))
            del tensor, pair  # large ones would stay while the next are made
        if second is not None:
            second.finish()
    report = Report(sides.header, tuple(results), time.perf_counter() - started)
    if second is not None:
        report = replace(
            report, parity=tuple(second.parity), device=second.device, rejected=second.rejected
        )
    yield report


def run(request: Request) -> Report:
    """Run a request to its end."""
    *_, report = bisect(request)
    assert isinstance(report, Report)
    return report
