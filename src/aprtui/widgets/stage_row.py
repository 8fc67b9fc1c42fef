"""One line of the tree, drawn for a given width.

Columns from the left: the name, which takes what is left; then the figures and the verdict, whose
widths are fixed so that they line up through every depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from aprcore.stages import StageKey
from aprtui.formatting import (
    COSINE_PLACES,
    NARROW_COSINE_PLACES,
    format_cosine,
    format_ratio,
    format_short,
)
from aprtui.rows import RUN_ROW, Row, SortOrder, summarise_layer, worst_of
from aprtui.run_state import RunState
from aprtui.theme import PENDING, UNJUDGED, Mark, Paint, cosine_ink, mark_of, mark_of_verdict

if TYPE_CHECKING:
    from aprcore.judge import Verdict
    from aprcore.report import StageReport

VERDICT_CELLS = 11  # a glyph, a space and INHERITED
SMALL_CELLS = 8  # "3.2e-07", "0.8312", or a column's heading
# Widths of the whole line from which there is room for more decimals, and for another figure. Below
# the first, 39 cells hold the longest name, its cosine and the longest verdict exactly.
LONG_WIDTH = 46
ROOMY_WIDTH = 58


@dataclass(frozen=True, slots=True)
class RowPainter:
    """Draws rows and their headings.

    Attributes:
        state: The run.
        paint: Styles of the theme.
        width: Cells of a line.
        expanded: Layers that are unfolded.
        order: A sorted list is flat, and its names carry their layer.
    """

    state: RunState
    paint: Paint
    width: int
    expanded: frozenset[int]
    order: SortOrder

    @property
    def is_long(self) -> bool:
        """Whether there is room for more than the name, four decimals and the verdict."""
        return self.width >= LONG_WIDTH

    @property
    def places(self) -> int:
        """Decimals of a cosine."""
        return COSINE_PLACES if self.is_long else NARROW_COSINE_PLACES

    @property
    def cosine_cells(self) -> int:
        """Width of the column of cosines: a digit, a point and the decimals."""
        return self.places + 2

    @property
    def is_roomy(self) -> bool:
        """Whether there is room for a second figure."""
        return self.width >= ROOMY_WIDTH

    @property
    def _has_verdicts(self) -> bool:
        return self.state.has_oracle or bool(self.state.counts)

    def headings(self) -> Text:
        """The line above the rows."""
        quiet = self.paint("ink-quiet")
        names = ["cosine", "rel. L2"] if self.state.has_oracle else ["RMS", "NaN/Inf"]
        last = "verdict" if self._has_verdicts else ("" if self.is_roomy else "NaN/Inf")
        columns = [Text(name, quiet) for name in names[: len(self._column_cells())]]
        return self._line(Text("  stage", quiet), columns, Text(last, quiet))

    def row(self, row: Row) -> Text:
        """One row."""
        if row == RUN_ROW:
            return self._run()
        if row.key is not None:
            return self._stage(row.key)
        assert row.layer is not None
        return self._layer(row.layer)

    def _run(self) -> Text:
        name = Text("◆ run", self.paint("ink-oracle", bold=True))
        first = self.state.first_divergence
        if first is not None:
            return self._line(name, [], self._verdict(mark_of(first)))
        if self.state.is_running:
            return self._line(name, [], self._verdict(PENDING))
        worst = worst_of(self.state.counts)
        return self._line(name, [], self._verdict(mark_of_verdict(worst)) if worst else Text())

    def _layer(self, layer: int) -> Text:
        summary = summarise_layer(self.state, layer)
        is_open = layer in self.expanded
        name = Text.assemble((f"{'▾' if is_open else '▸'} layer {layer}", "bold"))
        if summary.done < summary.total:
            name.append(f"  {summary.done}/{summary.total}", self.paint("ink-quiet"))
        lowest = summary.lowest
        columns = self._figures(lowest) if lowest is not None else []
        if not self.state.has_oracle:
            return self._alone(name, None, summary.nonfinite, summary.worst, summary.done > 0)
        mark = PENDING if summary.done < summary.total else None
        if summary.worst is not None and (mark is None or summary.worst.is_divergence):
            mark = mark_of_verdict(summary.worst)
        return self._line(name, columns, self._verdict(mark) if mark else Text())

    def _stage(self, key: StageKey) -> Text:
        report = self.state.reports.get(key)
        mark = mark_of(report)
        name = self._stage_name(key)
        if report is None:
            name.stylize(self.paint("ink-quiet"))
            return self._line(name, [], self._verdict(mark))
        if not self.state.has_oracle and report.trace is not None:
            alone = report.trace
            return self._alone(name, alone.rms, alone.nonfinite, report.verdict, True)
        return self._line(name, self._figures(report), self._verdict(mark))

    def _stage_name(self, key: StageKey) -> Text:
        """The name below its layer, or with its layer in a sorted list; the first fault marked."""
        is_flat = self.order is not SortOrder.COMPUTATION or key.layer is None
        first = self.state.first_divergence
        if first is not None and first.key == key:
            name = Text.assemble(("▶ ", self.paint(mark_of(first).ink, bold=True)))
        else:
            name = Text("  ")
        if not is_flat and self.is_long:
            name = Text.assemble("  ", name)
        if is_flat and key.layer is not None:
            prefix = "layer " if self.is_long else ""
            name.append(f"{prefix}{key.layer} · ", self.paint("ink-quiet"))
        return name.append(key.stage)

    def _figures(self, report: StageReport) -> list[Text]:
        found = report.comparison
        if found is None:
            return []
        # A sign takes the place of a decimal: columns stay aligned.
        cosine = format_cosine(found.cosine, self.places - (found.cosine < 0))
        columns = [Text(cosine, self.paint(cosine_ink(found.cosine)))]
        if self.is_roomy:
            columns.append(Text(format_ratio(found.relative_l2), self.paint("ink-quiet")))
        return columns

    def _alone(
        self, name: Text, rms: float | None, nonfinite: int, verdict: Verdict | None, is_known: bool
    ) -> Text:
        """A row without an oracle: RMS and the count of NaN and infinities.

        The count has a column of its own only where there is room; else a verdict takes its place.
        """
        count = Text(f"∞ {nonfinite}", self.paint("verdict-nonfinite", bold=True))
        if nonfinite == 0:
            count = Text("0" if is_known else "", self.paint("ink-quiet"))
        form = format_short if self.is_long else format_ratio
        columns = [Text("" if rms is None else form(rms))]
        last = count if verdict is None else self._verdict(mark_of_verdict(verdict))
        if self.is_roomy:
            columns.append(count)
            last = Text() if verdict is None else last
        elif not is_known:
            last = self._verdict(PENDING)
        elif verdict is None and nonfinite == 0 and self._has_verdicts:
            last = Text(UNJUDGED.glyph, self.paint(UNJUDGED.ink))
        return self._line(name, columns, last)

    def _verdict(self, mark: Mark) -> Text:
        quiet = mark is PENDING
        return Text(f"{mark.glyph} {mark.word}", self.paint(mark.ink, bold=not quiet))

    def _line(self, name: Text, columns: list[Text], verdict: Text) -> Text:
        """Put the cells of one line where they belong."""
        widths = self._column_cells()
        tail = Text()
        for width, column in zip(widths, [*columns, *[Text()] * len(widths)]):
            tail.append(" " * max(1, width + 1 - column.cell_len)).append_text(column)
        tail.append("  " if self.is_long else " ").append_text(verdict)
        tail.append(" " * max(0, VERDICT_CELLS - verdict.cell_len))
        room = max(1, self.width - tail.cell_len)
        name.truncate(room, overflow="ellipsis", pad=True)
        return Text.assemble(name, tail)

    def _column_cells(self) -> list[int]:
        alone = SMALL_CELLS if self.is_long else SMALL_CELLS - 1
        first = self.cosine_cells if self.state.has_oracle else alone
        return [first, *([SMALL_CELLS] if self.is_roomy else [])]
