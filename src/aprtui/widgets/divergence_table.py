"""The largest differences of a stage, with their positions unravelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.style import Style
from rich.text import Text
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from aprcore.records.telling import format_ratio, format_value, quoted
from aprtui.formatting import format_short
from aprtui.theme import Paint
from aprtui.widgets.lines import strip_of

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout
    from aprcore.judging.ranking import Ranking
    from aprcore.records.report import StageReport

SHORT_AXES = {"token": "tok", "head": "hd", "position": "pos", "token id": "id", "index": "at"}
# Cells from which there is a rank and values have all their decimals.
WIDE_CELLS = 56
# A token's text takes what is left, if its heading fits, and no more than this.
TEXT_HEADING, TEXT_CELLS = "text", 16


class DivergenceColumn(NamedTuple):
    """A right-aligned column; `cells` includes the gap before it."""

    heading: str
    cells: int
    ink: str


class DivergenceTable(ScrollView):
    """Rank, one column per axis, both values and |diff|, under headings that stay.

    Rows are drawn from the ranking when they come into view: moving through stages fills no table,
    which costs most of the time that a key press may take.
    """

    ALLOW_SELECT = False

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._top: Ranking | None = None
        self._layout_of_stage: Layout | None = None
        self._texts: Sequence[str] = ()
        self.row_count = 0

    def show(self, report: StageReport | None, top_k: int) -> None:
        """Show a stage's largest differences, or nothing where there are none."""
        found = None if report is None else report.comparison
        self._top = None if found is None else found.top
        self._layout_of_stage = None if report is None else report.layout
        if self._top is None or self._layout_of_stage is None:
            self.row_count = 0
        else:
            self.row_count = min(top_k, len(self._top))
        self._texts = self._texts_of(report)
        self.display = self.row_count > 0
        self.virtual_size = Size(self.size.width, self.row_count + 1)
        self.scroll_to(y=0, animate=False)
        self.refresh()

    def _texts_of(self, report: StageReport | None) -> Sequence[str]:
        """The text of every row's token, empty where it is not known; none for other stages."""
        known = {} if report is None or report.logits is None else report.logits.texts
        if self._top is None or self._layout_of_stage is None or not known:
            return ()
        if "token id" not in self._layout_of_stage.axes:
            return ()
        axis = self._layout_of_stage.axes.index("token id")
        indices = self._top.indices[: self.row_count].tolist()
        tokens = [self._layout_of_stage.position(index)[axis] for index in indices]
        return [quoted(known[token]) if token in known else "" for token in tokens]

    def render_line(self, y: int) -> Strip:
        """The headings at the top, below them the rows that are scrolled to."""
        style = self.rich_style
        number = y - 1 + self.scroll_offset.y
        text = Text("")
        if self._top is not None and self._layout_of_stage is not None:
            columns = self._columns(self._layout_of_stage)
            if y == 0:
                text = self._headings(columns)
            elif number < self.row_count:
                text = self._row(number, columns, self._top, self._layout_of_stage)
        return strip_of(self.app, text, style, self.size.width)

    @property
    def _is_wide(self) -> bool:
        return self.size.width >= WIDE_CELLS

    def _columns(self, layout: Layout) -> list[DivergenceColumn]:
        """As wide as what can come, and a gap: a smaller one where they would not fit."""
        columns: list[DivergenceColumn] = []
        for gap in (3, 2) if self._is_wide else (1,):
            columns = self._columns_apart(layout, gap)
            if sum(column.cells for column in columns) <= self.size.width:
                break
        left = self.size.width - sum(column.cells for column in columns) - gap
        longest = max(map(cell_len, self._texts), default=0)
        if any(self._texts) and left >= len(TEXT_HEADING):
            cells = min(left, max(longest, len(TEXT_HEADING)), TEXT_CELLS)
            columns.insert(-3, DivergenceColumn(TEXT_HEADING, cells + gap, "ink-quiet"))
        return columns

    def _columns_apart(self, layout: Layout, gap: int) -> list[DivergenceColumn]:
        value_cells = 10 if self._is_wide else 9
        columns = [DivergenceColumn("#", 3, "ink-quiet")] if self._is_wide else []
        for axis, size in zip(layout.axes, layout.factors):
            heading = axis if self._is_wide else SHORT_AXES.get(axis, axis)
            cells = max(len(heading), len(str(size - 1))) + (gap if columns else 0)
            columns.append(DivergenceColumn(heading, cells, "ink-quiet"))
        return [
            *columns,
            DivergenceColumn("trace", value_cells + gap, "ink-trace"),
            DivergenceColumn("oracle", value_cells + gap, "ink-oracle"),
            DivergenceColumn("|diff|", 7 + gap, "ink-quiet"),
        ]

    def _headings(self, columns: list[DivergenceColumn]) -> Text:
        paint = Paint(self.app.theme_variables)
        return Text.assemble(
            *((column.heading.rjust(column.cells), paint(column.ink)) for column in columns)
        )

    def _row(
        self, number: int, columns: list[DivergenceColumn], top: Ranking, layout: Layout
    ) -> Text:
        form = format_value if self._is_wide else format_short
        a, b = float(top.a[number]), float(top.b[number])
        texts = [str(number + 1)] if self._is_wide else []
        texts += [str(i) for i in layout.position(int(top.indices[number]))]
        if len(columns) == len(texts) + 4:
            texts.append(_clipped(self._texts[number], columns[-4].cells - 1))
        texts += [form(a), form(b), format_ratio(abs(a - b))]
        quiet = Paint(self.app.theme_variables)("ink-quiet")
        styles = [quiet if self._is_wide else Style.null(), *[Style.null()] * len(texts)]
        return Text.assemble(
            *(
                (" " * (column.cells - cell_len(text)) + text, style)
                for text, column, style in zip(texts, columns, styles)
            )
        )


def _clipped(text: str, cells: int) -> str:
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"
