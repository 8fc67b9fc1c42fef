"""The largest differences of a stage, with their positions unravelled."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from rich.text import Text
from textual.widgets import DataTable

from aprtui.formatting import format_ratio, format_short, format_value
from aprtui.theme import Paint

if TYPE_CHECKING:
    from aprcore.report import StageReport

TOP_K_STEPS = (5, 10, 20, 50, 100, 200)
DEFAULT_TOP_K = 10
SHORT_AXES = {"token": "tok", "head": "hd", "position": "pos", "token id": "id", "index": "at"}
# Cells from which values are shown with all their decimals.
WIDE_CELLS = 56


class DivergenceTable(DataTable[Text]):
    """Rank, one column per axis, both values and |diff|; filled anew for every stage."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, cursor_type="row", zebra_stripes=False, cell_padding=0)

    def show(self, report: StageReport | None, top_k: int, paint: Paint) -> None:
        """Show a stage's largest differences, or nothing where there are none.

        Columns have fixed widths: measuring every cell is most of what filling a table costs.
        """
        self.clear(columns=True)
        found = None if report is None else report.comparison
        self.display = found is not None and len(found.top) > 0
        if report is None or found is None or report.layout is None:
            return
        axes = report.layout.axes
        is_wide = self.container_size.width >= WIDE_CELLS
        form = format_value if is_wide else format_short
        self._add_columns(axes, report.layout.factors, is_wide, paint)
        quiet = paint("ink-quiet")
        for rank, difference in enumerate(islice(found.top, top_k), 1):
            position = report.layout.position(difference.index)
            texts = [str(rank)] if is_wide else []
            texts += [str(coordinate) for coordinate in position]
            texts += [form(difference.a), form(difference.b), format_ratio(difference.abs_diff)]
            cells = [Text(text, justify="right") for text in texts]
            if is_wide:
                cells[0].style = quiet
            self.add_row(*cells)

    def _add_columns(
        self, axes: tuple[str, ...], factors: tuple[int, ...], is_wide: bool, paint: Paint
    ) -> None:
        """Headings over right-aligned columns, as wide as what can come and a gap."""
        value_cells, gap = (10, 3) if is_wide else (9, 1)
        columns = [("#", 3, "ink-quiet")] if is_wide else []
        for axis, size in zip(axes, factors):
            digits = len(str(size - 1))
            heading = axis if is_wide else SHORT_AXES.get(axis, axis)
            lead = gap if columns else 0
            columns.append((heading, max(len(heading), digits) + lead, "ink-quiet"))
        columns.append(("trace", value_cells + gap, "ink-trace"))
        columns.append(("oracle", value_cells + gap, "ink-oracle"))
        columns.append(("|diff|", 7 + gap, "ink-quiet"))
        for heading, cells, ink in columns:
            self.add_column(Text(heading, paint(ink), justify="right"), width=cells)
