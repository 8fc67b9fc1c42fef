"""What has changed from one run to the next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from aprcore.judging.compare import compare
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.changes import NOTABLE_FACTOR, Change, compare_runs
from aprcore.records.report import Report, RunHeader, Side, StageReport

KEY = StageKey(0, "ffn_out")
HEADER = RunHeader(
    trace=Side("trace", ""), oracle=Side("oracle", ""), model=None, architecture=None,
    num_layers=1, prompt=None, tokens=None, token_texts=None, keys=(KEY,), bound=1e-4, backend=None,
)  # fmt: skip


def stage(verdict: Verdict | None, error: float = 0.0, key: StageKey = KEY) -> StageReport:
    x = np.ones(64, np.float32)
    return StageReport(key, None, verdict, "", compare(x * np.float32(1 + error), x))


def run(*stages: StageReport) -> Report:
    return Report(replace(HEADER, keys=tuple(s.key for s in stages)), stages, 0.0)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (stage(Verdict.FAIL, 1), stage(Verdict.PASS), Change.FIXED),
        (stage(Verdict.INHERITED, 1), stage(Verdict.NOISE, 0.1), Change.FIXED),
        (stage(Verdict.FAIL, 1), stage(Verdict.INHERITED, 1), Change.BETTER),
        (stage(Verdict.PASS), stage(Verdict.FAIL, 1), Change.BROKEN),
        (stage(Verdict.PASS), stage(Verdict.MISSING), Change.BROKEN),
        (stage(Verdict.NOISE, 0.2), stage(Verdict.PASS, 1e-6), Change.SAME),
        (stage(Verdict.FAIL, 1), stage(Verdict.FAIL, 1), Change.SAME),
        (stage(Verdict.FAIL, 1), stage(Verdict.FAIL, 0.99 * NOTABLE_FACTOR), Change.SAME),
        (stage(Verdict.FAIL, 1), stage(Verdict.FAIL, 1.01 * NOTABLE_FACTOR), Change.WORSE),
        (stage(Verdict.INHERITED, 1), stage(Verdict.INHERITED, 0.5), Change.BETTER),
        (stage(Verdict.INHERITED, 1e-7), stage(Verdict.INHERITED, 5e-7), Change.SAME),
        (stage(Verdict.FAIL, 1), stage(Verdict.FAIL, np.nan), Change.WORSE),
        (stage(Verdict.FAIL, np.nan), stage(Verdict.FAIL, np.nan), Change.SAME),
        (stage(None), stage(None), Change.SAME),
    ],
)
def test_what_became_of_a_stage(before: StageReport, after: StageReport, change: Change) -> None:
    assert compare_runs(run(before), run(after)).stages[0].change is change


def test_stages_that_one_run_lacks() -> None:
    other = stage(Verdict.PASS, key=StageKey(None, "lm_head"))
    changes = compare_runs(run(stage(Verdict.PASS)), run(other))
    assert [(s.key, s.change) for s in changes.stages] == [
        (KEY, Change.GONE), (other.key, Change.NEW),
    ]  # fmt: skip
    assert changes.changed == changes.stages
    assert changes.summary() == "1 new, 1 gone"


def test_the_same_run_has_no_changes() -> None:
    found = compare_runs(run(stage(Verdict.FAIL, 1)), run(stage(Verdict.FAIL, 1)))
    assert found.changed == ()
    assert found.summary() == "1 unchanged"
