"""The three judgments as the screen names them, and those of a second side."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aprcore.records.parity import StageParity
    from aprcore.records.report import RunHeader, StageReport


class Measure(StrEnum):
    """What the tree's figures are of. The value is what the screen calls it.

    The first three are the judgments of `aprcore.records.telling`.
    """

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
