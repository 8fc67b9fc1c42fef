"""What has changed from one run to the next, stage by stage: fixed, better, worse, or the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from aprcore.judging.verdict import Verdict
from aprcore.network.graph import computation_order
from aprcore.network.stages import StageKey
from aprcore.records.report import Report, StageReport

# The error of a stage that stays wrong has changed if it did so by this factor: an engine that sums
# in another order each time moves it by less than a percent.
NOTABLE_FACTOR = 1.1
# Below this relative L2 a change is one of rounding, whatever its factor.
ROUNDING = 1e-6


class Change(Enum):
    """What became of a stage. The value is its word."""

    FIXED = "fixed"
    BETTER = "better"
    SAME = "unchanged"
    WORSE = "worse"
    BROKEN = "broken"
    NEW = "new"
    GONE = "gone"


# From sound to wrong. What is only absent is no fault of the operation.
_GRAVITY = {
    None: 0,
    Verdict.PASS: 0,
    Verdict.NOISE: 0,
    Verdict.LAYOUT: 0,
    Verdict.MISSING: 1,
    Verdict.UNJUDGED: 1,
    Verdict.INHERITED: 2,
    Verdict.SHAPE: 3,
    Verdict.NONFINITE: 3,
    Verdict.FAIL: 3,
}


@dataclass(frozen=True, slots=True)
class StageChange:
    """A stage in two runs.

    Attributes:
        key: Which stage.
        change: What became of it.
        before, after: What either run said; None where it did not have the stage.
    """

    key: StageKey
    change: Change
    before: StageReport | None
    after: StageReport | None


@dataclass(frozen=True, slots=True)
class RunChanges:
    """Two runs, compared.

    Attributes:
        stages: Every stage of either, in the order of computation.
    """

    stages: tuple[StageChange, ...]

    @property
    def counts(self) -> dict[Change, int]:
        """How many stages changed how, in the order of `Change`; absent ones left out."""
        found = [stage.change for stage in self.stages]
        return {change: found.count(change) for change in Change if change in found}

    @property
    def changed(self) -> tuple[StageChange, ...]:
        """The stages that are not the same."""
        return tuple(stage for stage in self.stages if stage.change is not Change.SAME)

    def summary(self) -> str:
        """In a clause: "2 fixed, 1 worse, 71 unchanged"."""
        return ", ".join(f"{n} {change.value}" for change, n in self.counts.items())


def compare_runs(before: Report, after: Report) -> RunChanges:
    """Hold a run against the one before it.

    A stage is FIXED or BROKEN when it changed between sound, inherited and wrong; one that stays
    off is BETTER or WORSE by its relative L2 against the oracle, or else by its own error.
    """
    old = {stage.key: stage for stage in before.stages}
    new = {stage.key: stage for stage in after.stages}
    keys = sorted({*old, *new}, key=computation_order)
    return RunChanges(tuple(_compare(key, old.get(key), new.get(key)) for key in keys))


def _compare(key: StageKey, before: StageReport | None, after: StageReport | None) -> StageChange:
    if before is None or after is None:
        change = Change.NEW if before is None else Change.GONE
        return StageChange(key, change, before, after)
    was, now = _GRAVITY[before.verdict], _GRAVITY[after.verdict]
    if was != now:
        change = Change.FIXED if now == 0 else Change.BETTER if now < was else Change.BROKEN
        return StageChange(key, change, before, after)
    if now == 0:
        return StageChange(key, Change.SAME, before, after)
    old, new = _error(before), _error(after)
    if old == new or max(old, new) < ROUNDING or max(old, new) <= NOTABLE_FACTOR * min(old, new):
        change = Change.SAME
    else:
        change = Change.WORSE if new > old else Change.BETTER
    return StageChange(key, change, before, after)


def _error(report: StageReport) -> float:
    """How far off a stage is; NaN counts as infinite, a stage without figures as 0."""
    found = report.comparison
    if found is not None:
        error = math.inf if found.unequal_nonfinite else found.relative_l2
    else:
        judged = report.kernel or report.model
        error = 0.0 if judged is None else judged.relative_l2
    return math.inf if math.isnan(error) else error
