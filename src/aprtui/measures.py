"""The three judgments as the screen names them, and why one of them could not be made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from aprcore.network.graph import BY_NAME
from aprcore.records.wording import figures_of

if TYPE_CHECKING:
    from aprcore.judging.verdict import Judgment
    from aprcore.records.parity import StageParity
    from aprcore.records.report import RunHeader, StageReport


class Measure(Enum):
    """What the tree's figures are of. The value is what the screen calls it."""

    CUMULATIVE = "cumulative"
    MODEL = "model"
    KERNEL = "kernel"
    PARITY = "CPU vs GPU"
    TESTED = "GPU kernel"


# Measures of a second side, each with the one whose figures it has.
BASIS = {Measure.PARITY: Measure.CUMULATIVE, Measure.TESTED: Measure.KERNEL}

JUDGMENTS = (Measure.MODEL, Measure.KERNEL)


def measures_of(header: RunHeader | None) -> tuple[Measure, ...]:
    """The judgments that a run can make, the one to begin with first."""
    if header is None:
        return ()
    if not header.judged:
        own: tuple[Measure, ...] = () if header.oracle is None else (Measure.CUMULATIVE,)
    else:
        own = (Measure.KERNEL,)
        if header.oracle is not None:
            own = (Measure.CUMULATIVE, Measure.MODEL, Measure.KERNEL)
    if header.tested is None:
        return own
    return (*own, *([Measure.PARITY, Measure.TESTED] if header.model else [Measure.PARITY]))


def view_of(parity: StageParity, measure: Measure) -> StageReport:
    """What a measure of the second side shows of a stage, in the form of the first side's.

    PARITY compares both sides and has their verdict; TESTED has the kernel judgment of the tested
    side alone.
    """
    from aprcore.records.report import StageReport

    if measure is Measure.TESTED:
        side = parity.tested
        return StageReport(
            parity.key, parity.layout, side.verdict, side.fault, side.oracle, kernel=side.kernel
        )
    return StageReport(
        parity.key, parity.layout, parity.verdict, parity.reason, parity.comparison,
        kernel=parity.tested.kernel,
    )  # fmt: skip


def judgment_of(report: StageReport, measure: Measure) -> Judgment | None:
    """The model or the kernel judgment of a stage, if it was made."""
    return report.kernel if measure is Measure.KERNEL else (
        report.model if measure is Measure.MODEL else None
    )  # fmt: skip


def error_of(report: StageReport | None, measure: Measure) -> tuple[bool, float]:
    """For sorting, worst last: whether the judgment failed, and its relative L2; -1 without one."""
    if report is None:
        return False, -1.0
    measure = BASIS.get(measure, measure)
    if measure is Measure.CUMULATIVE:
        found = report.comparison
        # A NaN compares as neither more nor less, and would leave a list unsorted.
        error = -1.0 if found is None else figures_of(found)[1]
        return False, math.inf if math.isnan(error) else error
    judgment = judgment_of(report, measure)
    return (False, -1.0) if judgment is None else (not judgment.passed, judgment.relative_l2)


def worst_by(reports: Iterable[StageReport], measure: Measure) -> StageReport | None:
    """Of the stages that have a judgment, the one that fares worst in it."""
    made = [report for report in reports if error_of(report, measure)[1] >= 0]
    return max(made, key=lambda report: error_of(report, measure), default=None)


def absence(report: StageReport, measure: Measure, header: RunHeader) -> str:
    """Why a judgment of a stage was not made, in a clause."""
    if measure is not Measure.KERNEL and header.oracle is None:
        return "no oracle"
    if measure is Measure.CUMULATIVE:
        missing = [n for n, x in (("trace", report.trace), ("oracle", report.oracle)) if x is None]
        return f"the {missing[0]} lacks it" if len(missing) == 1 else (
            "both sides lack it" if missing else "the sizes differ"
        )  # fmt: skip
    if header.model is None:
        return "no model"
    if not header.judged:
        return "not asked for"
    if BY_NAME[report.key.stage].operation is None:
        return "no supported model computes this stage"
    is_model = measure is Measure.MODEL
    side, statistics = ("oracle", report.oracle) if is_model else ("trace", report.trace)
    found = report.comparison
    if found is None and statistics is None:
        return f"the {side} lacks it"
    if found is not None:
        nonfinite = found.nonfinite_b if is_model else found.nonfinite_a
    else:
        nonfinite = 0 if statistics is None else statistics.nonfinite
    if nonfinite:
        return "not all of its values are finite"
    if report.layout is not None and report.layout.axes == ("index",):
        return "its size is not this model's"
    return f"inputs missing or not finite in the {side}"
