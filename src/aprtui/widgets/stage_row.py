"""One line of the tree, drawn for a given width.

Columns from the left: the name, which takes what is left; then the figures and the verdict, whose
widths are fixed so that they line up through every depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from aprcore.network.stages import StageKey
from aprcore.records.telling import worst_of
from aprtui.measures import JUDGMENTS, Measure
from aprtui.rows import RUN_ROW, Row, SortOrder, summarise_layer
from aprtui.run_state import RunState
from aprtui.theme import ALONE, PENDING, Mark, Paint, mark_of, mark_of_verdict
from aprtui.widgets.stage_columns import MARKS_COLUMN, Column, FigurePainter, columns_for

if TYPE_CHECKING:
    from aprcore.judging.verdict import Verdict
    from aprcore.records.report import StageReport

VERDICT_CELLS = 11  # a glyph, a space and INHERITED
# Width of the whole line from which there is room for more decimals. Below it, 39 cells hold the
# longest name, its cosine and the longest verdict exactly.
LONG_WIDTH = 46
# What a name with the number of its layer takes more than one below its layer, and the longest name
# of that kind in full: "  layer 27 · post_attn_residual".
FLAT_CELLS = 4
LONG_NAME_CELLS = 31


@dataclass(frozen=True, slots=True)
class RowPainter:
    """Draws rows and their headings.

    Attributes:
        state: The run.
        paint: Styles of the theme.
        width: Cells of a line.
        expanded: Layers that are unfolded.
        order: A sorted list is flat, and its names carry their layer.
        measure: The judgment whose figures come first.
    """

    state: RunState
    paint: Paint
    width: int
    expanded: frozenset[int]
    order: SortOrder
    measure: Measure = Measure.CUMULATIVE

    @property
    def is_long(self) -> bool:
        """Whether there is room for more than the name, one short figure and the verdict."""
        return self.width >= LONG_WIDTH

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of figures that there is room for."""
        width = self.width - (FLAT_CELLS if self._is_flat else 0)
        by_error = self.order is SortOrder.RELATIVE_L2
        return columns_for(self.state.measures, self.measure, width, self.is_long, by_error)

    @property
    def _is_flat(self) -> bool:
        return self.order is not SortOrder.COMPUTATION

    @property
    def _name_cells(self) -> int:
        """What the figures and the verdict leave for the name."""
        figures = sum(column.cells + 1 for column in self.columns)
        return self.width - figures - VERDICT_CELLS - (2 if self.is_long else 1)

    def headings(self) -> Text:
        """The line above the rows."""
        quiet = self.paint("ink-quiet")
        has_verdicts = bool(self.state.measures) or bool(self.state.counts)
        counts_apart = any(column.name == "NaN/Inf" for column in self.columns)
        last = "verdict" if has_verdicts else ("" if counts_apart else "NaN/Inf")
        columns = [Text(column.heading, quiet) for column in self.columns]
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
        reports = self.state.reports_of(self.measure)
        for first in self.state.faults_of(self.measure)[:1]:
            return self._line(name, [], self._verdict(mark_of(reports[first])))
        if self.state.is_running:
            return self._line(name, [], self._verdict(PENDING))
        worst = worst_of(report.verdict for report in reports.values() if report.verdict)
        return self._line(name, [], self._verdict(mark_of_verdict(worst)) if worst else Text())

    def _layer(self, layer: int) -> Text:
        summary = summarise_layer(self.state, layer, self.measure)
        name = Text.assemble((f"{'▾' if layer in self.expanded else '▸'} layer {layer}", "bold"))
        if summary.done < summary.total:
            name.append(f"  {summary.done}/{summary.total}", self.paint("ink-quiet"))
        figures = FigurePainter(self.paint, self.is_long)
        columns = []
        for column in self.columns:
            # Every figure is that of the stage which fares worst in it.
            report = summary.lowest
            if column.measure in JUDGMENTS:
                report = summary.worst_by[column.measure]
            if column is MARKS_COLUMN:
                columns.append(figures.marks(summary.worst_by))
            elif column.name == "NaN/Inf":
                columns.append(figures.count(summary.nonfinite if summary.done else None))
            else:
                columns.append(Text() if report is None else figures.figure(column, report))
        nonfinite = 0 if self.state.has_oracle else summary.nonfinite
        if summary.done < summary.total and not (summary.worst and summary.worst.is_divergence):
            return self._line(name, columns, self._verdict(PENDING))
        return self._line(name, columns, self._last(summary.worst, nonfinite))

    def _stage(self, key: StageKey) -> Text:
        report = self.state.reports_of(self.measure).get(key)
        name = self._stage_name(key)
        if report is None:
            name.stylize(self.paint("ink-quiet"))
            return self._line(name, [], self._verdict(PENDING))
        figures = FigurePainter(self.paint, self.is_long)
        columns = []
        for column in self.columns:
            if column is MARKS_COLUMN:
                columns.append(figures.marks(dict.fromkeys(JUDGMENTS, report)))
            else:
                columns.append(figures.figure(column, report))
        nonfinite = 0
        if not self.state.has_oracle and report.trace is not None:
            nonfinite = report.trace.nonfinite
        return self._line(name, columns, self._last(report.verdict, nonfinite, report))

    def _stage_name(self, key: StageKey) -> Text:
        """The name below its layer, or with its layer in a sorted list; the first fault marked."""
        is_flat = self._is_flat or key.layer is None
        if key in self.state.faults_of(self.measure)[:1]:
            mark = mark_of(self.state.reports_of(self.measure).get(key))
            name = Text.assemble(("▶ ", self.paint(mark.ink, bold=True)))
        else:
            name = Text("  ")
        if not is_flat and self.is_long:
            name = Text.assemble("  ", name)
        if is_flat and key.layer is not None:
            prefix = "layer " if self._name_cells >= LONG_NAME_CELLS else ""
            name.append(f"{prefix}{key.layer} · ", self.paint("ink-quiet"))
        return name.append(key.stage)

    def _last(
        self, verdict: Verdict | None, nonfinite: int, report: StageReport | None = None
    ) -> Text:
        """The verdict; without one the count of NaN, unless that has a column of its own."""
        if verdict is not None:
            text = self._verdict(mark_of_verdict(verdict))
            blamed = None if report is None or not self.state.is_judged else report.blamed
            if blamed is not None and MARKS_COLUMN not in self.columns and not self._has_figures:
                text.append(f" {blamed[0].upper()}", self.paint(mark_of_verdict(verdict).ink))
            return text
        if any(column.name == "NaN/Inf" for column in self.columns):
            return Text(ALONE.glyph if self.state.measures else "", self.paint(ALONE.ink))
        if nonfinite == 0 and (self.state.measures or self.state.counts):
            return Text(ALONE.glyph, self.paint(ALONE.ink))
        return FigurePainter(self.paint, self.is_long).count(nonfinite)

    @property
    def _has_figures(self) -> bool:
        """Whether both judgments have a column of figures."""
        return {*JUDGMENTS} <= {column.measure for column in self.columns}

    def _verdict(self, mark: Mark) -> Text:
        quiet = mark is PENDING
        return Text(f"{mark.glyph} {mark.word}", self.paint(mark.ink, bold=not quiet))

    def _line(self, name: Text, columns: list[Text], verdict: Text) -> Text:
        """Put the cells of one line where they belong."""
        tail = Text()
        for number, column in enumerate(self.columns):
            cell = columns[number] if number < len(columns) else Text()
            tail.append(" " * max(1, column.cells + 1 - cell.cell_len)).append_text(cell)
        tail.append("  " if self.is_long else " ").append_text(verdict)
        tail.append(" " * max(0, VERDICT_CELLS - verdict.cell_len))
        room = max(1, self.width - tail.cell_len)
        name.truncate(room, overflow="ellipsis", pad=True)
        return Text.assemble(name, tail)
