"""How a magnitude looks in a map: lighter for larger on a dark ground, darker on a light one.

The scale is logarithmic and runs over so many powers of ten below a top that panning and zooming
keep. Lightness alone carries it, so that it reads with any colour vision; where there are no
colours, or sixteen, density does.
Source of the ramp: Nunez, Anderton, Renslow, "Optimizing colormaps with consideration for color
vision deficiency" (2018), cividis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.style import Style
from textual.color import Color

if TYPE_CHECKING:
    from textual.app import App

# Steps of the ramp: finer ones could not be told apart.
LEVELS = 20
# Powers of ten that a ramp spans: from a float32's rounding to an error as large as the value.
DECADES = 8
# Values of one tensor are mostly this close together.
VALUE_DECADES = 3

DENSITIES = "·░▒▓█"
# What is not finite: a NaN, an infinity, and either where they are counted together.
NAN_GLYPH, INFINITE_GLYPH = "✕", "∞"
NONFINITE = NAN_GLYPH
# Their levels: beyond those of values, as `aprcore.pictures.levels_of` has them.
NAN_LEVEL, INFINITE_LEVEL = LEVELS + 1, LEVELS + 2
_CIVIDIS = (
    "#00224E", "#123570", "#3B496C", "#575D6D", "#707173", "#8A8678", "#A59C74", "#C3B369",
    "#E1CC55", "#FEE838",
)  # fmt: skip
# Either sign of a value; on a dark ground the larger ones are the lighter ones.
_NEGATIVE = ("#0B2038", "#0F4C81", "#2F86C8", "#7CC4F2", "#D6EEFF")
_POSITIVE = ("#33190A", "#7A3A0C", "#C06A12", "#F0A94A", "#FFE9C9")


class Ramp:
    """Levels and their colours for one theme.

    A level is 0 for nothing, 1 to `LEVELS` by magnitude, and negative for a negative value.

    Attributes:
        is_dense: Whether magnitude is shown by glyphs instead of colours, one value per character.
    """

    def __init__(self, *, dark: bool, is_dense: bool, ground: str) -> None:
        """A ramp.

        Args:
            dark: Whether the theme's ground is dark.
            is_dense: Whether glyphs stand for magnitudes.
            ground: The theme's ground, which an exact zero shows.
        """
        self.is_dense = is_dense
        sequential, negative, positive = (
            colors if dark else colors[::-1] for colors in (_CIVIDIS, _NEGATIVE, _POSITIVE)
        )
        zero = Color.parse(ground)
        self._sequential = [zero, *_stretch(sequential)]
        self._signed = {
            **dict(enumerate([zero, *_stretch(positive)])),
            **{-n: color for n, color in enumerate(_stretch(negative), 1)},
        }
        self._styles: dict[tuple[int, int, bool], Style] = {}
        self._figure_styles: dict[tuple[int, bool], Style] = {}

    def halves(self, upper: int, lower: int, is_signed: bool) -> Style:
        """The style of an upper half block: its colour is the upper value, its ground the lower."""
        found = self._styles.get((upper, lower, is_signed))
        if found is None:
            a, b = (self.color(level, is_signed) for level in (upper, lower))
            found = Style(color=a.rich_color, bgcolor=b.rich_color)
            self._styles[upper, lower, is_signed] = found
        return found

    def color(self, level: int, is_signed: bool) -> Color:
        """The colour of a level."""
        return self._signed[level] if is_signed else self._sequential[level]

    def text_style(self, level: int, is_signed: bool) -> Style:
        """The style of a figure on a level's colour."""
        found = self._figure_styles.get((level, is_signed))
        if found is None:
            ground = self.color(level, is_signed)
            found = Style(color=ground.get_contrast_text(1).rich_color, bgcolor=ground.rich_color)
            self._figure_styles[level, is_signed] = found
        return found

    @staticmethod
    def density(level: int) -> str:
        """The glyph of a level where there are no colours."""
        if level == 0:
            return " "
        return DENSITIES[min(len(DENSITIES) - 1, (abs(level) - 1) * len(DENSITIES) // LEVELS)]


def ramp_of(app: App[object]) -> Ramp:
    """The ramp for an app's theme and terminal."""
    theme = app.current_theme
    few = app.console.color_system not in ("256", "truecolor")
    is_dense = few or app.no_color or theme.name == "monochrome"
    return Ramp(dark=theme.dark, is_dense=is_dense, ground=app.theme_variables["surface"])


def level_of(value: float, top: float, decades: int) -> int:
    """The level of a finite value on a scale that ends at `top`."""
    if value == 0 or top == 0:
        return 0
    height = 1 + math.log10(abs(value) / top) / decades if abs(value) < top else 1.0
    level = max(1, min(LEVELS, math.ceil(height * LEVELS)))
    return level if value > 0 else -level


def _stretch(colors: Sequence[str]) -> list[Color]:
    """`LEVELS` colours evenly along a few."""
    parsed = [Color.parse(color) for color in colors]
    found = []
    for number in range(LEVELS):
        place = number * (len(parsed) - 1) / (LEVELS - 1)
        first = min(int(place), len(parsed) - 2)
        found.append(parsed[first].blend(parsed[first + 1], place - first))
    return found
