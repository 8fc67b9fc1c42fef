"""Bars: one of a height, and one of a ramp's colours for a legend."""

from __future__ import annotations

import math

from rich.style import Style
from rich.text import Text

from aprtui.ramp import LEVELS, Ramp

EIGHTHS = " ▏▎▍▌▋▊▉█"
# The bars' scale of relative L2, the same for all stages: below is rounding of float32.
SCALE_FLOOR, SCALE_DECADES = "1e-8", 8


def ramp_text(ramp: Ramp, cells: int, *, is_signed: bool, low: str, quiet: Style) -> Text:
    """A ramp as a legend shows it, from its least magnitude on."""
    line = Text(f" {low} ", quiet)
    for cell in range(cells):
        level = 1 + cell * (LEVELS - 1) // max(1, cells - 1)
        if ramp.is_dense:
            line.append(ramp.density(level))
        else:
            line.append(" ", ramp.text_style(level, is_signed))
    return line


def bar(height: float, cells: int) -> str:
    """A bar of a height from 0 to 1, to an eighth of a cell."""
    eighths = round(max(0.0, min(1.0, height)) * cells * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (EIGHTHS[rest] if rest else "")


def height_of(relative: float) -> float:
    """Where a relative L2 is on the bars' scale; anything but zero shows a sliver."""
    if relative <= 0:
        return 0.0
    return max(1e-3, 1 + math.log10(min(relative, 1.0)) / SCALE_DECADES)


def scale_text(cells: int) -> str:
    """The ends of the bars' scale, above a column of them."""
    if cells < len(SCALE_FLOOR) + 3:
        return " " * cells
    return SCALE_FLOOR + " log ".center(cells - len(SCALE_FLOOR) - 1, "┄") + "1"
