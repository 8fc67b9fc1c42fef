"""What has changed since the run before, stage by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import DataTable, Static

from aprcore.network.stages import StageKey
from aprcore.records.telling import figures_of, format_ratio
from aprtui.theme import MARKS, Paint, mark_of

if TYPE_CHECKING:
    from aprcore.records.changes import StageChange
    from aprcore.records.report import Report, StageReport

# By the word of a change: a glyph and the mark whose ink it has.
# In the order in which they are listed: what went wrong comes first.
LOOKS = {
    "broken": ("✗", "FAIL"),
    "worse": ("↘", "INHERITED"),
    "fixed": ("✓", "PASS"),
    "better": ("↗", "NOISE"),
    "new": ("+", "MISSING"),
    "gone": ("−", "MISSING"),
}
# A table of more rows takes too long to fill, and nobody reads it.
MOST_ROWS = 200


class ChangesScreen(ModalScreen[StageKey | None]):
    """A table of the stages that changed. Ends with the stage to go to, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,x", "dismiss", "close", id="changes.close", tooltip="Back to the stages"),
    ]

    def __init__(self, before: Report, after: Report) -> None:
        from aprcore.records.changes import compare_runs

        super().__init__()
        self._changes = compare_runs(before, after)
        order = list(LOOKS)
        changed = sorted(self._changes.changed, key=lambda c: order.index(c.change.value))
        self._shown = changed[:MOST_ROWS]

    def compose(self) -> ComposeResult:
        """The counts, then the stages."""
        with Vertical(id="changes") as pane:
            pane.border_title = "Since the run before"
            pane.border_subtitle = "enter go there   esc close"
            told = self._changes.summary()
            if len(self._shown) < len(self._changes.changed):
                told += f"; the first {MOST_ROWS}"
            yield Static(Text(told))
            if self._shown:
                yield DataTable(id="changed", cursor_type="row", zebra_stripes=False)

    def on_mount(self) -> None:
        """Fill the table."""
        if not self._shown:
            return
        table = self.query_one(DataTable)
        table.add_columns("", "stage", "before", "", "now", "rel. L2 before", "now")
        paint = Paint(self.app.theme_variables)
        for change in self._shown:
            table.add_row(*self._cells(change, paint))
        table.focus()

    @staticmethod
    def _cells(change: StageChange, paint: Paint) -> tuple[Text, ...]:
        glyph, mark = LOOKS[change.change.value]
        style = paint(MARKS[mark].ink, bold=True)
        return (
            Text(f"{glyph} {change.change.value}", style), Text(str(change.key)),
            _verdict(change.before, paint), Text("→", paint("ink-quiet")),
            _verdict(change.after, paint),
            _error(change.before, paint), _error(change.after, paint),
        )  # fmt: skip

    @on(DataTable.RowSelected)
    def _open(self, event: DataTable.RowSelected) -> None:
        self.dismiss(self._shown[event.cursor_row].key)


def _verdict(report: StageReport | None, paint: Paint) -> Text:
    if report is None:
        return Text("–", paint("ink-quiet"))
    mark = mark_of(report)
    return Text(f"{mark.glyph} {mark.word}", paint(mark.ink))


def _error(report: StageReport | None, paint: Paint) -> Text:
    if report is None or report.comparison is None:
        return Text("")
    return Text(format_ratio(figures_of(report.comparison)[1]), paint("ink-quiet"))
