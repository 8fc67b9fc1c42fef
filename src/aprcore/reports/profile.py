"""The profile of a run over its depth, as inline SVG: how far off each stage is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aprcore.records.report import Report, StageReport
from aprcore.records.telling import (
    JUDGMENTS,
    error_of,
    faults_of,
    format_ratio,
    glyph_of,
    layers_of,
    plural,
    word_of,
)
from aprcore.reports.markup import Markup, element, join

WIDTH, HEIGHT = 1000, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 48, 40
LEGEND_STEP = 140
# The range of the axis, in powers of ten: from float32's roundoff to "wholly different". What is
# beyond is drawn at its edge; an exact zero at the lower one.
LOWEST, HIGHEST = -9, 1
# Layer numbers below the axis, at most, and the least distance between marks of faults above it.
TICKS, MARK_STEP = 16, 9


class DrawnCurve(NamedTuple):
    """One judgment over the depth.

    Attributes:
        name: Of the judgment; its class in the style sheet tells the line by dashes as well.
        errors: Relative L2 per stage; None where the judgment was not made.
    """

    name: str
    errors: tuple[float | None, ...]


def curves_of(report: Report) -> list[DrawnCurve]:
    """Those of the judgments that the run made."""
    stages = report.stages
    curves = [
        DrawnCurve(name, tuple(error_of(stage, name) for stage in stages)) for name in JUDGMENTS
    ]
    return [curve for curve in curves if any(error is not None for error in curve.errors)]


def draw_profile(report: Report) -> Markup | None:
    """The profile; None where nothing was judged."""
    curves = curves_of(report)
    if not curves:
        return None
    faults = faults_of(report)
    return element(
        "svg",
        element("title", "Relative L2 error of every stage, over the depth of the model",
                id="profile-title"),
        element("desc", describe_profile(report, curves), id="profile-desc"),
        *_ordinate(),
        *_layers(report),
        *(_curve(curve) for curve in curves),
        *_marks(report, faults),
        *_legend(curves),
        class_="profile", role="img", viewBox=f"0 0 {WIDTH} {HEIGHT}",
        aria_labelledby="profile-title profile-desc",
    )  # fmt: skip


def describe_profile(report: Report, curves: Sequence[DrawnCurve]) -> str:
    """The profile in words."""
    said = []
    for curve in curves:
        made = [(error, i) for i, error in enumerate(curve.errors) if error is not None]
        # A NaN is worse than any figure, and compares with none.
        error, i = max(made, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
        key = report.stages[i].key
        said.append(f"{curve.name}: at most {format_ratio(error)}, at {key}, of {len(made)}")
    faults = faults_of(report)
    if faults:
        said.append(f"{plural(len(faults), 'stage')} to blame, the first {faults[0].key}")
    return "; ".join(said) + "."


def _x(index: float, count: int) -> float:
    return LEFT + (index + 0.5) * (WIDTH - LEFT - RIGHT) / max(count, 1)


def _y(error: float) -> float:
    if math.isnan(error):
        power = float(HIGHEST)
    else:
        power = min(max(math.log10(error), LOWEST), HIGHEST) if error > 0 else float(LOWEST)
    return TOP + (HIGHEST - power) / (HIGHEST - LOWEST) * (HEIGHT - TOP - BOTTOM)


def _number(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


def _ordinate() -> Iterator[Markup]:
    for power in range(LOWEST, HIGHEST + 1, 2):
        y = _y(10.0**power)
        yield element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=_number(y),
                      y2=_number(y))  # fmt: skip
        text = "1" if power == 0 else f"1e{power}"
        yield element("text", text, x=LEFT - 8, y=_number(y + 4), text_anchor="end")
    yield element("text", "relative L2", x=4, y=18)


def _layers(report: Report) -> Iterator[Markup]:
    """A line where each layer begins, and the numbers of some."""
    layers = layers_of(report)
    count, start = len(report.stages), 0
    every = -(-len(layers) // TICKS)
    for number, layer in enumerate(layers):
        x = _number(_x(start - 0.5, count))
        if number % every == 0 or layer.layer is None:
            yield element("line", class_="grid", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM)
        if number % every == 0 and layer.layer is not None:
            middle = _number(_x(start + (len(layer.stages) - 1) / 2, count))
            name = str(layer.layer)
            yield element("text", name, x=middle, y=HEIGHT - BOTTOM + 18, text_anchor="middle")
        start += len(layer.stages)
    middle = _number((LEFT + WIDTH - RIGHT) / 2)
    yield element("text", "layer", x=middle, y=HEIGHT - 4, text_anchor="middle")


def _curve(curve: DrawnCurve) -> Markup:
    """A line with gaps where the judgment was not made."""
    pieces: list[list[str]] = [[]]
    for i, error in enumerate(curve.errors):
        if error is None:
            pieces.append([])
            continue
        pieces[-1].append(f"{_number(_x(i, len(curve.errors)))},{_number(_y(error))}")
    lines = []
    for piece in filter(None, pieces):
        # A stage between two gaps would be a line of no length.
        points = piece if len(piece) > 1 else [piece[0], piece[0]]
        # Longer than any text may be.
        lines.append(element("polyline", points=Markup(" ".join(points))))
    return element("g", *lines, class_=f"curve {curve.name}")


def _marks(report: Report, faults: Sequence[StageReport]) -> Iterator[Markup]:
    """The stages to blame; the first one by name."""
    places = {stage.key: i for i, stage in enumerate(report.stages)}
    drawn = -math.inf
    for fault in faults:
        x = _x(places[fault.key], len(report.stages))
        is_first = fault is faults[0]
        if is_first:
            yield element("line", class_="fault", x1=_number(x), x2=_number(x), y1=TOP - 4,
                          y2=HEIGHT - BOTTOM)  # fmt: skip
            anchor = "end" if x > WIDTH * 0.7 else "start"
            yield element("text", f"{glyph_of(word_of(fault.verdict))} {fault.key}", class_="fault",
                          x=_number(x), y=TOP - 10, text_anchor=anchor)  # fmt: skip
        elif x - drawn >= MARK_STEP:
            yield element("text", glyph_of(word_of(fault.verdict)), class_="fault", x=_number(x),
                          y=TOP + 8, text_anchor="middle")  # fmt: skip
            drawn = x


def _legend(curves: Sequence[DrawnCurve]) -> Iterator[Markup]:
    for number, curve in enumerate(curves):
        x = LEFT + 36 + LEGEND_STEP * number
        line = element("polyline", points=f"{x},14 {x + 28},14")
        yield element("g", line, class_=f"curve {curve.name}")
        yield element("text", curve.name, x=x + 34, y=18)


def legend_note(report: Report) -> Markup:
    """One line below the profile."""
    return join("Stages in the order of computation. ", _first_note(report))


def _first_note(report: Report) -> str:
    first = report.first_divergence
    if first is None:
        return "Nothing is to blame."
    return f"The vertical line is the first stage to blame, {first.key}."
