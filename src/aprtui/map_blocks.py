"""The blocks of a map: two values per character where there are colours, else one by density."""

from __future__ import annotations

from collections.abc import Sequence

from rich.segment import Segment
from rich.style import Style

from aprtui.formatting import format_compact
from aprtui.ramp import INFINITE_GLYPH, INFINITE_LEVEL, NAN_GLYPH, NAN_LEVEL, Ramp
from aprtui.theme import Paint

# A level of the ramp, or None below the last row of a map.
Level = int | None

GLYPHS = {NAN_LEVEL: NAN_GLYPH, INFINITE_LEVEL: INFINITE_GLYPH}
WORDS = {NAN_LEVEL: f"{NAN_GLYPH} NaN", INFINITE_LEVEL: f"{INFINITE_GLYPH} Inf"}


class MapBlocks:
    """Turns levels into pieces of lines, for one theme.

    What a pair of levels looks like is found once: a large map has thousands of cells and is drawn
    anew with every key.
    """

    def __init__(self, ramp: Ramp, paint: Paint, ground: Style, *, is_signed: bool) -> None:
        """Blocks of a map.

        Args:
            ramp: The colours.
            paint: The theme's inks.
            ground: The style of what has none.
            is_signed: Whether values have a sign.
        """
        self._ramp = ramp
        self._paint = paint
        self._ground = ground
        self._is_signed = is_signed
        self._looks: dict[tuple[Level, Level], tuple[str, Style]] = {}

    def line(self, upper: Sequence[Level], lower: Sequence[Level], wide: int) -> list[Segment]:
        """A line of two rows of cells, those of one look in one piece.

        Args:
            upper, lower: Levels of the upper and lower half of every cell; of equal length.
            wide: Characters per cell.
        """
        looks = self._looks
        segments: list[Segment] = []
        before: tuple[Level, Level] | None = None
        text, count = "", 0
        style = self._ground
        for pair in zip(upper, lower):
            if pair == before:
                count += 1
                continue
            if count:
                segments.append(Segment(text * count, style))
            look = looks.get(pair)
            if look is None:
                look = looks[pair] = self._look(*pair)
            glyph, style = look
            text = glyph if wide == 1 else self._widened(glyph, wide)
            before, count = pair, 1
        if count:
            segments.append(Segment(text * count, style))
        return segments

    def figures(
        self, levels: Sequence[int], values: Sequence[float], wide: int, *, is_first: bool
    ) -> list[Segment]:
        """A line of values large enough to have their figures written into them.

        Args:
            levels, values: One per cell.
            wide: Characters per cell.
            is_first: Whether it is the first line of its cells, which has the figures.
        """
        segments = []
        for level, value in zip(levels, values):
            text = WORDS.get(level) or format_compact(value, wide - 1)
            style = self._mark(0) if level in WORDS else self._ground
            if level not in WORDS and not self._ramp.is_dense:
                style = self._ramp.text_style(level, self._is_signed)
            segments.append(Segment((text if is_first else "").center(wide), style))
        return segments

    def cursor(
        self, cell: str, halves: Sequence[bool], other: Level, *, is_figure: bool
    ) -> Segment:
        """The cursor's cell.

        Args:
            cell: What is drawn there.
            halves: Whether the cursor is on the upper and on the lower half of the line.
            other: The level of the half that it is not on.
            is_figure: Whether that is a figure, and no block.
        """
        wide = len(cell)
        ink, ground = self._paint("block-cursor-foreground"), self._paint("block-cursor-background")
        if all(halves) or self._ramp.is_dense:
            # A density would not be told from those around it.
            is_told = is_figure or cell.strip() in GLYPHS.values()
            text = cell if is_told else "+".center(wide)
            return Segment(text, Style(color=ink.color, bgcolor=ground.color, bold=True))
        below = self._ground.bgcolor if other is None or other in GLYPHS else (
            self._ramp.color(other, self._is_signed).rich_color
        )  # fmt: skip
        block = "▀" if halves[0] else "▄"
        return Segment(block * wide, Style(color=ground.color, bgcolor=below))

    def _look(self, upper: Level, lower: Level) -> tuple[str, Style]:
        """A character and its style."""
        ramp, is_signed = self._ramp, self._is_signed
        for level in (NAN_LEVEL, INFINITE_LEVEL):
            if level in (upper, lower):
                other = lower if upper == level else upper
                return GLYPHS[level], self._mark(0 if other is None or other in GLYPHS else other)
        assert upper is not None
        if ramp.is_dense:
            inks = "ink-oracle" if upper < 0 else "ink-trace"
            style = self._paint(inks) if is_signed else Style.null()
            return ramp.density(upper), self._ground + style
        if lower is None:
            return "▀", self._ground + Style(color=ramp.color(upper, is_signed).rich_color)
        return " " if upper == lower else "▀", ramp.halves(upper, lower, is_signed)

    def _mark(self, level: int) -> Style:
        """The style of a glyph for what is not finite, on a level's colour."""
        style = self._ground + self._paint("verdict-nonfinite", bold=True)
        if self._ramp.is_dense:
            return style
        return style + Style(bgcolor=self._ramp.color(level, self._is_signed).rich_color)

    @staticmethod
    def _widened(glyph: str, wide: int) -> str:
        return glyph.center(wide) if glyph in GLYPHS.values() else glyph * wide
