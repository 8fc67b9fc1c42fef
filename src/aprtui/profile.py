"""The depth profile: how far off each stage is, from the first layer to the last, as curves.

A pure function of what the run has reported so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING

from aprcore.network.stages import StageKey
from aprcore.records.telling import JUDGMENTS, SEVERITY, error_of
from aprtui.measures import BASIS, Measure
from aprtui.run_state import RunState
from aprtui.theme import mark_of

if TYPE_CHECKING:
    from aprcore.records.report import StageReport


class Curve(Enum):
    """What a curve is of: relative L2 each. The value is what the screen calls it."""

    CUMULATIVE = "cumulative"
    MODEL = "model"
    KERNEL = "kernel"
    NOISE = "predicted noise"


# The curve that has a measure's figures.
CURVE_OF = {measure: Curve(BASIS.get(measure, measure).value) for measure in Measure}

# Rounding of float32 shows from about 1e-8 relative to a tensor; 10 is nonsense. Both are decades.
LEAST, MOST = -8, 1


@dataclass(frozen=True, slots=True)
class Point:
    """A stage, or the worst of several neighbours.

    Attributes:
        key: The stage that the point stands for: the gravest, then the one that is most off.
        keys: All of them.
        errors: Relative L2 by curve, the largest of the stages; a curve without one is absent.
        is_judged: Whether any of them is.
    """

    key: StageKey
    keys: tuple[StageKey, ...]
    errors: Mapping[Curve, float]
    is_judged: bool


def points_of(state: RunState, stage: str | None = None) -> list[Point]:
    """A point per tensor of the run in the order of computation, or per layer of one stage."""
    keys = [key for key in state.keys if stage is None or key.stage == stage]
    return [
        Point(key, (key,), errors_of(state.reports.get(key)), key in state.reports) for key in keys
    ]


def errors_of(report: StageReport | None) -> dict[Curve, float]:
    """Relative L2 of a stage by curve; NaN counts as infinite, as what it is is no small error."""
    if report is None:
        return {}
    errors = {Curve(name): error_of(report, name) for name in JUDGMENTS}
    found = {curve: error for curve, error in errors.items() if error is not None}
    judged = report.model or report.kernel
    if judged is not None:
        found[Curve.NOISE] = judged.assessment.floor
    return {c: math.inf if math.isnan(error) else error for c, error in found.items()}


def gather(state: RunState, points: Sequence[Point], columns: int) -> list[Point]:
    """Points put together so that no more than `columns` are left; a fault is never lost."""
    if columns < 1 or not points:
        return []
    count = min(columns, len(points))
    edges = [len(points) * n // count for n in range(count + 1)]
    return [_worst(state, points[a:b]) for a, b in pairwise(edges)]


def by_layer(state: RunState, measure: Measure = Measure.CUMULATIVE) -> list[Point]:
    """A point per layer, the stages of the whole model at either end, seen by a measure."""
    reports = state.reports_of(measure)
    found: list[Point] = []
    for keys in state.keys_by_layer.values():
        group = [Point(key, (key,), errors_of(reports.get(key)), key in reports) for key in keys]
        found.append(_worst(state, group, measure))
    return found


def _worst(
    state: RunState, points: Sequence[Point], measure: Measure = Measure.CUMULATIVE
) -> Point:
    if len(points) == 1:
        return points[0]
    errors: dict[Curve, float] = {}
    for point in points:
        for curve, error in point.errors.items():
            errors[curve] = max(error, errors.get(curve, 0.0))
    reports, first = state.reports_of(measure), state.faults_of(measure)[:1]

    def gravity(point: Point) -> tuple[bool, int, float]:
        word = mark_of(reports.get(point.key)).word
        severity = SEVERITY.index(word) if word in SEVERITY else -1
        return point.key in first, severity, point.errors.get(Curve.CUMULATIVE, 0.0)

    keys = tuple(key for point in points for key in point.keys)
    judged = any(point.is_judged for point in points)
    return Point(max(points, key=gravity).key, keys, errors, judged)


def height_of(error: float, levels: int) -> int:
    """Where an error is on a logarithmic axis of `levels`: 0 below the axis, else 1 to `levels`."""
    if error <= 0:
        return 0
    if math.isinf(error):
        return levels
    share = (math.log10(error) - LEAST) / (MOST - LEAST)
    return max(0, min(levels, math.ceil(share * levels)))
