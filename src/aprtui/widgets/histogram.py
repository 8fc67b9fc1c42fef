"""How large the values of both sides and of their difference are, as bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.style import Style
from rich.text import Text
from textual.strip import Strip

from aprcore.records.telling import format_ratio
from aprtui.pictures import Ask, OpenTensor
from aprtui.ramp import NONFINITE
from aprtui.widgets.bars import bar
from aprtui.widgets.picture_view import PictureView

if TYPE_CHECKING:
    from aprcore.pictures import Histogram

LABEL_CELLS = 7
# Cells from which the number stands behind its bar.
FIGURE_COLUMNS, FIGURE_CELLS = 18, 7
# Bins of a small pane: fewer would hide the shape, so it scrolls instead.
LEAST_LINES = 6
BINS = 60


@dataclass(frozen=True, slots=True)
class HistogramAsk(Ask):
    """How large the values are."""

    def make(self, tensor: OpenTensor, is_cancelled: Callable[[], bool]) -> Histogram:
        """Count them."""
        from aprcore.pictures import histogram

        return histogram(tensor.pair, BINS, is_cancelled)


class Series(NamedTuple):
    """The bars of one side, or of the difference."""

    name: str
    ink: str
    counts: list[int]


class HistogramView(PictureView):
    """A line per range of magnitudes, the largest first; counts on a logarithmic scale."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._histogram: Histogram | None = None
        self._lines: list[Text] = []
        self._drawn_for: tuple[object, ...] = ()

    def ask(self) -> Ask | None:
        """The counts, once."""
        return None if self._is_current else HistogramAsk()

    def take(self, ask: Ask, picture: Any) -> None:
        """Show counts."""
        self._histogram, self._is_current = picture, True
        self.say("")
        self._drawn_for = ()
        self.fit()

    def fit(self) -> None:
        """Ranges are as fine as the lines allow."""
        if self._histogram is not None:
            self.reserve(len(self._drawn(self._histogram)))
        self.refresh()

    def jump(self, text: str) -> str:
        """There is nowhere to go."""
        return "a histogram has no places; open the values"

    def draw(self, y: int) -> Strip:
        """The headings, which stay, and the lines scrolled to."""
        if self._histogram is None:
            return self.strip(Text(""))
        lines = self._drawn(self._histogram)
        number = 0 if y == 0 else y + self.scroll_offset.y
        return self.strip(lines[number] if number < len(lines) else Text(""))

    def _drawn(self, found: Histogram) -> list[Text]:
        drawn_for = (found, self.line_width, self.size.height, self.app.theme)
        if drawn_for != self._drawn_for:
            words = self._words(found)
            room = self.size.height - len(words) - 2
            self._lines = [*self._bars(found, max(LEAST_LINES, room)), Text(""), *words]
            self._drawn_for = drawn_for
        return self._lines

    def _bars(self, found: Histogram, lines: int) -> list[Text]:
        """The headings, then a line per range, the largest magnitudes first."""
        quiet = self.paint("ink-quiet")
        series = _series(found)
        cells = self._cells(series)
        heading = Text("|value|".rjust(LABEL_CELLS), quiet)
        for one in series:
            heading.append(f" {one.name.ljust(cells)}", self.paint(one.ink))
        used = [n for one in series for n, count in enumerate(one.counts) if count]
        if not used or cells < 1:
            return [heading, Text("no value but zeros and what is not finite", quiet)]
        first, last = min(used), max(used) + 1
        step = max(1, -(-(last - first) // lines))
        most = max(sum(one.counts[n : n + step]) for one in series
                   for n in range(first, last, step))  # fmt: skip
        edges = found.edges.tolist()
        found_lines = [heading]
        for start in reversed(range(first, last, step)):
            line = Text(format_ratio(edges[start]).rjust(LABEL_CELLS), quiet)
            for one in series:
                count = sum(one.counts[start : min(start + step, last)])
                line.append(" ").append_text(
                    self._bar(count, most, cells, self.paint.shape(one.ink))
                )
            found_lines.append(line)
        return found_lines

    def _bar(self, count: int, most: int, cells: int, style: Style) -> Text:
        figure = ""
        if cells >= FIGURE_COLUMNS:
            cells -= FIGURE_CELLS + 1
            text = f"{count:,}" if count < 1_000_000 else f"{count:.1e}"
            figure = " " + (text if count else "").rjust(FIGURE_CELLS)
        height = math.log1p(count) / math.log1p(most)
        return Text.assemble(
            (bar(height, cells).ljust(cells), style), (figure, self.paint("ink-quiet"))
        )

    def _words(self, found: Histogram) -> list[Text]:
        """What the bars do not show, in figures under them."""
        columns = _series(found)
        cells = self._cells(columns)
        outliers: list[tuple[int, str]] = [
            (count, f" beyond {format_ratio(bound)}")
            for count, bound in zip(found.outliers, found.outlier_bound)
        ]
        rows = (
            ("zeros", [(count, "") for count in found.zeros]),
            ("NaN/Inf", [(count, "") for count in found.nonfinite]),
            ("> 6 RMS", outliers),
        )
        lines = []
        for label, figures in rows:
            line = Text(label.rjust(LABEL_CELLS), self.paint("ink-quiet"))
            by_name = dict(zip(("trace", "oracle", "|diff|"), figures))
            for one in columns:
                count, more = by_name.get(one.name, (None, ""))
                text = "" if count is None else f"{count:,}"
                is_bad = label == "NaN/Inf" and bool(count)
                ink = self.paint("verdict-nonfinite", bold=True) if is_bad else Style.null()
                text = f"{NONFINITE} {text}" if is_bad else text
                more = more if len(text) + len(more) <= cells and count else ""
                line.append(" ").append(text, ink).append(more, self.paint("ink-quiet"))
                line.append(" " * (cells - len(text) - len(more)))
            lines.append(line)
        return lines

    def _cells(self, columns: list[Series]) -> int:
        """Cells of each side's column."""
        return (self.line_width - LABEL_CELLS - len(columns)) // max(1, len(columns))


def _series(found: Histogram) -> list[Series]:
    named = (
        ("trace", "ink-trace", found.trace),
        ("oracle", "ink-oracle", found.oracle),
        ("|diff|", "verdict-missing", found.diff),
    )
    return [Series(name, ink, counts.tolist()) for name, ink, counts in named if counts is not None]
