"""Bars: one of a height, and one of a ramp's colours for a legend."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

from aprtui.ramp import LEVELS, Ramp

EIGHTHS = " ▏▎▍▌▋▊▉█"


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
