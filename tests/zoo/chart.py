"""The picture of the noise floor, as SVG, written directly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aprcore.judging.noise import CALIBRATION, allowed_ratio

WIDTH, HEIGHT = 960, 400
TOP, BOTTOM = 40, 350
LEFT = (60, 450)  # of the panels
RIGHT = (400, 940)
RATIOS = (0.01, 100.0)
DOFS = (1.0, 40000.0)
COLOURS = {"Gaussian": "#0072B2", "outlier": "#E69F00", "demo": "#009E73", "stories260k": "#CC79A7"}


@dataclass(frozen=True)
class Mark:
    """A point: `kind` is "type" (left), "row" or "whole" (right).

    Attributes:
        kind: Which panel and shape.
        x: The stored type, or degrees of freedom.
        ratio: Measured over predicted.
        source: What was measured.
    """

    kind: str
    x: str | float
    ratio: float
    source: str


def draw(marks: Sequence[Mark], types: Sequence[str]) -> str:
    """The whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT[0], 20, "measured / predicted error energy, whole tensor", weight="bold"),
        _text(LEFT[1], 20, "the same for one output row and whole tensors, and what is allowed",
              weight="bold"),
    ]  # fmt: skip
    parts += [*_frame(0), *_frame(1), *_types(marks, types), *_parts(marks), "</svg>"]
    return "\n".join(parts) + "\n"


def _frame(panel: int) -> list[str]:
    left, right = LEFT[panel], RIGHT[panel]
    out = []
    for power in range(-2, 3):
        y = _y(10.0**power)
        dash = "" if power == 0 else ' stroke-dasharray="2 4"'
        out.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#999"{dash}/>')
        out.append(_text(left - 6, y + 4, f"{10.0**power:g}", anchor="end"))
    return out


def _types(marks: Sequence[Mark], types: Sequence[str]) -> list[str]:
    out = []
    width = (RIGHT[0] - LEFT[0]) / len(types)
    for number, name in enumerate(types):
        middle = LEFT[0] + (number + 0.5) * width
        out.append(_text(middle, BOTTOM + 18, name, anchor="middle"))
        for place, (source, colour) in enumerate(COLOURS.items()):
            ratios = [
                m.ratio for m in marks if m.kind == "type" and (m.x, m.source) == (name, source)
            ]
            if not ratios:
                continue
            x = middle + (place - 1.5) * 7
            ratios.sort()
            low, high, centre = _y(ratios[0]), _y(ratios[-1]), _y(ratios[len(ratios) // 2])
            out.append(
                f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="3"/>'
            )
            out.append(f'<circle cx="{x:.1f}" cy="{centre:.1f}" r="3.5" fill="{colour}"/>')
    for place, (source, colour) in enumerate(COLOURS.items()):
        x = LEFT[0] + place * 85
        out.append(f'<circle cx="{x + 4}" cy="{BOTTOM + 38}" r="4" fill="{colour}"/>')
        out.append(_text(x + 12, BOTTOM + 42, source))
    return out


def _parts(marks: Sequence[Mark]) -> list[str]:
    out = []
    for mark in marks:
        if mark.kind == "type":
            continue
        colour = "#0072B2" if mark.kind == "whole" else "#777"
        x, y = _x(float(mark.x)), _y(mark.ratio)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8" fill="{colour}"/>')
    dofs = [10 ** (i / 20) for i in range(int(20 * math.log10(DOFS[1])) + 1)]
    for factor, colour in ((1.0, "#D55E00"), (1 / CALIBRATION, "#E69F00")):
        line = " ".join(f"{_x(n):.1f},{_y(factor * float(allowed_ratio(n))):.1f}" for n in dofs)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for power in range(5):
        out.append(_text(_x(10.0**power), BOTTOM + 18, f"{10**power:,}", anchor="middle"))
    middle = (LEFT[1] + RIGHT[1]) / 2
    out.append(_text(middle, BOTTOM + 42, "independent errors in the part", anchor="middle"))
    out.append(_text(_x(120), _y(3.6), "allowed", colour="#D55E00"))
    out.append(_text(_x(110), _y(0.55), "chi-squared at 1 in 1e11", colour="#E69F00"))
    return out


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal",
    colour: str = "#222",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{text}</text>'
    )


def _y(ratio: float) -> float:
    low, high = (math.log(r) for r in RATIOS)
    share = (math.log(min(max(ratio, RATIOS[0]), RATIOS[1])) - low) / (high - low)
    return BOTTOM - share * (BOTTOM - TOP)


def _x(dof: float) -> float:
    low, high = (math.log(n) for n in DOFS)
    share = (math.log(min(max(dof, DOFS[0]), DOFS[1])) - low) / (high - low)
    return LEFT[1] + share * (RIGHT[1] - LEFT[1])
