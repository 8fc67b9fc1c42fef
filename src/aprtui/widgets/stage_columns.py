"""The tree's columns of figures: which there is room for, and how each figure is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from rich.text import Text

from aprcore.records.telling import (
    COSINE_PLACES,
    figures_of,
    format_cosine,
    format_ratio,
    format_times,
    judgment_of,
)
from aprtui.formatting import NARROW_COSINE_PLACES, format_compact, format_short
from aprtui.measures import BASIS, JUDGMENTS, Measure
from aprtui.theme import Paint, judgment_mark

if TYPE_CHECKING:
    from aprcore.judging.verdict import Judgment
    from aprcore.records.report import StageReport

SMALL_CELLS = 8  # "3.2e-07", "✗1.1e+00", or a column's heading
SHORT_CELLS = 6  # "3.2e-7", "✗1.1e0"
# Widths of the whole line: the longest name in its layer takes 22 cells, a cosine in all decimals
# 10, the longest verdict 13, every other figure 9, and the two marks 4.
MARKS_WIDTH = 49
ONE_MORE_WIDTH = 58
TWO_MORE_WIDTH = 63
THREE_MORE_WIDTH = 72


class Column(NamedTuple):
    """A right-aligned column of figures.

    Attributes:
        name: Which figure.
        heading: What stands above it.
        cells: Its width, without the gap before it.
        measure: The judgment it is of.
    """

    name: str
    heading: str
    cells: int
    measure: Measure | None = None


# One glyph each for the model and the kernel judgment.
MARKS_COLUMN = Column("marks", "M K", 3)
# The headings of figures that have a column in wide trees only.
_MODEL = Column("relative L2", "model L2", SMALL_CELLS, Measure.MODEL)
_KERNEL = Column("relative L2", "kern. L2", SMALL_CELLS, Measure.KERNEL)
_CUMULATIVE = Column("relative L2", "rel. L2", SMALL_CELLS, Measure.CUMULATIVE)
_RMS, _COUNT = Column("RMS", "RMS", SMALL_CELLS), Column("NaN/Inf", "NaN/Inf", SMALL_CELLS)


@lru_cache(maxsize=32)
def columns_for(
    measures: Sequence[Measure],
    shown: Measure,
    width: int,
    is_long: bool,
    by_error: bool = False,
) -> tuple[Column, ...]:
    """The columns for a line's width, the judgment that is shown first.

    Args:
        measures: The judgments that the run makes; none: statistics only.
        shown: The one whose figures come first.
        width: Cells of the whole line.
        is_long: Whether figures have all their decimals.
        by_error: Whether the cumulative relative L2 comes before the cosine.
    """
    is_second = shown in BASIS
    if is_second:
        measures, shown = (BASIS[shown],), BASIS[shown]
    measures = [measure for measure in measures if measure not in BASIS]
    if not measures:
        cells = SMALL_CELLS if is_long else SHORT_CELLS
        return (_RMS._replace(cells=cells), *((_COUNT,) if width >= ONE_MORE_WIDTH else ()))
    if shown is Measure.CUMULATIVE:
        places = COSINE_PLACES if is_long else NARROW_COSINE_PLACES
        first, other = Column("cosine", "cosine", places + 2, shown), _CUMULATIVE
        if by_error:
            short = _CUMULATIVE._replace(heading="rel.L2", cells=SHORT_CELLS)
            first, other = (_CUMULATIVE if is_long else short), first
        more: tuple[Column, ...] = (other,)
        if len(measures) > 1:
            more = (_MODEL, _KERNEL)
            more = (other, *more) if width >= THREE_MORE_WIDTH else more
    else:
        column = _MODEL if shown is Measure.MODEL else _KERNEL
        first = column if is_long else column._replace(heading=shown.value, cells=SHORT_CELLS)
        more = tuple(Column(name, name, SMALL_CELLS, shown) for name in ("bound", "noise"))
        if len(measures) == 1 and not is_second:
            more = (_RMS, _COUNT)
    needed = ONE_MORE_WIDTH if len(more) == 1 else TWO_MORE_WIDTH
    if width >= needed:
        return (first, *more)
    marks = (MARKS_COLUMN,) if len(measures) > 1 and width >= MARKS_WIDTH else ()
    return (first, *marks)


class FigurePainter:
    """Draws the figures of a stage.

    Args:
        paint: Styles of the theme.
        is_long: Whether figures have all their decimals.
    """

    def __init__(self, paint: Paint, is_long: bool) -> None:
        self._paint = paint
        self._is_long = is_long

    def figure(self, column: Column, report: StageReport) -> Text:
        """One figure; empty where the stage has none."""
        if column.measure in JUDGMENTS:
            judgment = judgment_of(report, column.measure)
            return Text() if judgment is None else self._judged(column, judgment)
        alone = report.trace
        if column.name == "RMS":
            form = format_short if self._is_long else format_compact
            return Text("" if alone is None else form(alone.rms))
        if column.name == "NaN/Inf":
            return self.count(None if alone is None else alone.nonfinite)
        found = report.comparison
        if found is None:
            return Text()
        cosine, relative_l2 = figures_of(found)
        if column.name == "cosine":
            # A sign takes the place of a decimal: columns stay aligned.
            places = column.cells - 2 - (cosine < 0)
            return Text(format_cosine(cosine, places), self._paint.cosine(cosine))
        is_short = column.cells < SMALL_CELLS
        error = format_compact(relative_l2) if is_short else format_ratio(relative_l2)
        return Text(error, self._paint("ink-quiet"))

    def marks(self, reports: Mapping[Measure, StageReport | None]) -> Text:
        """A glyph for the model and one for the kernel judgment."""
        text = Text()
        for measure in JUDGMENTS:
            report = reports[measure]
            mark = judgment_mark(None if report is None else judgment_of(report, measure))
            text.append(" " if text else "").append(mark.glyph, self._paint(mark.ink))
        return text

    def count(self, nonfinite: int | None) -> Text:
        """How many NaN and infinities; None: not known."""
        if not nonfinite:
            return Text("" if nonfinite is None else "0", self._paint("ink-quiet"))
        return Text(f"∞ {nonfinite}", self._paint("verdict-nonfinite", bold=True))

    def _judged(self, column: Column, judgment: Judgment) -> Text:
        """A figure of a model or kernel judgment; a glyph shows one that failed."""
        if column.name == "bound":
            return Text(format_ratio(judgment.bound), self._paint("ink-quiet"))
        if column.name == "noise":
            return Text(format_times(judgment.assessment.ratio), self._paint("ink-quiet"))
        mark = judgment_mark(judgment)
        style = self._paint(mark.ink, bold=not judgment.passed)
        error = judgment.relative_l2
        if column.cells < SMALL_CELLS:
            glyph = "" if judgment.passed else mark.glyph
            return Text(glyph + format_compact(error, column.cells - len(glyph)), style)
        return Text(("" if judgment.passed else mark.glyph) + format_ratio(error), style)
