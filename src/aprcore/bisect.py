"""The whole run: two sides, stage by stage, into a `Report`.

The screen and the headless commands are both driven by `bisect`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from aprcore.budget import NO_BUDGETS, run_dtype, settle
from aprcore.matching import open_sides
from aprcore.report import Report, RunHeader, StageReport
from aprcore.request import Request
from aprcore.stage_judge import StageJudge


def bisect(request: Request) -> Iterator[RunHeader | StageReport | Report]:
    """Run a request and stream what it finds.

    A tensor is compared as it is produced and then dropped. Closing the generator ends the run.

    Yields:
        One `RunHeader`, a `StageReport` per stage in the order of computation, then the `Report`.

    Raises:
        AprError: The arguments or a file are unusable.
    """
    started = time.perf_counter()
    budgets = NO_BUDGETS if request.budgets is None else request.budgets
    with open_sides(request) as sides:
        budgets.check(sides.header.num_layers)
        dtype = run_dtype(sides.header)
        yield sides.header
        judge = StageJudge(sides, request.top_k)
        rows = set(sides.header.keys)
        results = []
        lap = time.perf_counter()
        for key, tensor in sides.tensors():
            if key not in rows:
                assert tensor is not None
                judge.record(key, tensor)
                continue
            result = judge.judge(key, tensor)
            result = settle(result, budgets.find(key, dtype), strict=request.strict)
            now = time.perf_counter()
            result, lap = replace(result, elapsed_s=now - lap), now
            results.append(result)
            yield result
    yield Report(sides.header, tuple(results), time.perf_counter() - started)


def run(request: Request) -> Report:
    """Run a request to its end."""
    *_, report = bisect(request)
    assert isinstance(report, Report)
    return report
