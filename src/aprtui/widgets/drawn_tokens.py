"""Tokens as they are drawn: a line per token with figures and bars, or its heads as colours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.geometry import Region
from textual.strip import Strip

from aprcore.records.telling import format_cosine, format_ratio, quoted
from aprtui.ramp import NONFINITE, Ramp, level_of
from aprtui.widgets.bars import bar, ramp_text
from aprtui.widgets.picture_view import PictureView

if TYPE_CHECKING:
    from aprcore.pictures import TokenFigures
    from aprtui.pictures import Figures

# The bars' scale of relative L2, the same for all stages: below is rounding of float32.
SCALE_FLOOR, SCALE_DECADES = "1e-8", 8
# Cells from which there are ids and a bar of the cosine.
WIDE_CELLS, WIDEST_CELLS = 56, 84
TEXT_CELLS = 14


class Columns(NamedTuple):
    """Cells of each column of a line, without the gap of one after it; 0 for none."""

    number: int
    text: int
    id: int
    bar: int
    cosine_bar: int


class DrawnTokens(PictureView):
    """Figures per token under headings that stay, or a square per head.

    Attributes:
        by_head: Whether heads are shown.
        token, head: The cursor.
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.by_head = False
        self.token = self.head = 0
        self._figures: Figures | None = None
        self._texts: tuple[str, ...] = ()
        self._ids: tuple[int, ...] = ()
        self._measured: Columns | None = None
        self._lines: dict[int, Strip] = {}
        self._drawn_in: tuple[object, ...] = ()

    def fit(self) -> None:
        """There are as many lines as tokens, and the headings; the columns fill them."""
        self._measured = None
        self._lines.clear()
        self.reserve(self._count + self._lines_above + self._lines_below)

    def refresh_cursor(self, *tokens: int) -> None:
        """Draw anew only what a move of the cursor changes: headings, its lines, what it is on."""
        top, size = self.scroll_offset.y, self.size
        changed = {0, *(y for token in tokens if 0 < (y := token + 1 - top) <= self._page)}
        changed.update(range(size.height - self._lines_below, size.height))
        self.refresh(*(Region(0, y, size.width, 1) for y in changed))

    def draw(self, y: int) -> Strip:
        """The headings, a token, or what is under the cursor."""
        if self._figures is None or self._figures.tokens is None:
            return self.strip(Text(""))
        heads = self._shown_heads
        if y == 0:
            return self.strip(self._headings() if heads is None else self._head_headings(heads))
        below = self.size.height - self._lines_below
        if y >= below and heads is not None:
            return self.strip(self._legend() if y > below else self._readout(heads))
        number = y - 1 + self.scroll_offset.y
        if number >= self._count:
            return self.strip(Text(""))
        drawn_in = self.app.theme, self.by_head, self._first_head
        if drawn_in != self._drawn_in:
            self._lines.clear()
            self._drawn_in = drawn_in
        is_marked = number == self.token and self.has_focus
        strip = None if is_marked else self._lines.get(number)
        if strip is not None:
            return strip
        line = self._line(number, self._figures.tokens) if heads is None else (
            self._head_line(number, heads)
        )  # fmt: skip
        ground = self.app.theme_variables["panel"]
        strip = self.strip(line, Style(bgcolor=ground, bold=True) if is_marked else None)
        if not is_marked:
            self._lines[number] = strip
        return strip

    @property
    def _page(self) -> int:
        """Tokens in view."""
        return max(1, self.size.height - self._lines_above - self._lines_below)

    @property
    def _lines_above(self) -> int:
        return 1

    @property
    def _lines_below(self) -> int:
        if self._shown_heads is None:
            return 0
        return 2 if self.size.height >= 8 else 1

    @property
    def _count(self) -> int:
        tokens = None if self._figures is None else self._figures.tokens
        return 0 if tokens is None else len(tokens.relative_l2)

    @property
    def _heads(self) -> int:
        heads = None if self._figures is None else self._figures.by_head
        return 1 if heads is None else int(heads.relative_l2.shape[1])

    @property
    def _shown_heads(self) -> TokenFigures | None:
        """Figures by head, where they are there and wanted."""
        return self._figures.by_head if self._figures is not None and self.by_head else None

    # A line per token

    def _columns(self) -> Columns:
        if self._measured is None:
            self._measured = self._measure_columns()
        return self._measured

    def _measure_columns(self) -> Columns:
        width = self.line_width
        index = max(3, len(str(self._count - 1)))
        longest = max((cell_len(quoted(text)) for text in self._texts), default=0)
        text = min(longest, TEXT_CELLS if width >= WIDE_CELLS else 8)
        ids = max((len(str(token)) for token in self._ids), default=0)
        ids = ids if width >= WIDE_CELLS or not text else 0
        places = self._cosine_cells
        figures = 7 + 1 + places + 1 + (8 if width >= WIDE_CELLS else 0)
        rest = width - index - 1 - text - bool(text) - ids - bool(ids) - figures
        cosine_bar = 10 if width >= WIDEST_CELLS else 0
        rest -= cosine_bar + bool(cosine_bar)
        return Columns(index, text, ids, max(0, rest), cosine_bar)

    @property
    def _cosine_cells(self) -> int:
        return 9 if self.line_width >= WIDE_CELLS else 7

    def _headings(self) -> Text:
        columns, quiet = self._columns(), self.paint("ink-quiet")
        scale = _scale_text(columns.bar)
        places = self._cosine_cells
        cells = [
            ("tok" if columns.number < 5 else "token").rjust(columns.number),
            "text".ljust(columns.text)[: columns.text],
            "id".rjust(columns.id)[: columns.id],
            "rel L2".rjust(7),
            scale,
            "cosine".rjust(places),
            ("0" + "1".rjust(columns.cosine_bar - 1))[: columns.cosine_bar],
            "max|d|".rjust(7) if self.line_width >= WIDE_CELLS else "",
        ]
        return Text(" ".join(cell for cell in cells if cell), quiet)

    def _line(self, number: int, found: TokenFigures) -> Text:
        columns, paint = self._columns(), self.paint
        bad = int(found.nonfinite[number])
        relative = math.nan if bad else float(found.relative_l2[number])
        cosine = math.nan if bad else float(found.cosine[number])
        ink = paint("verdict-nonfinite") if bad else paint.cosine(cosine)
        # Reversed, as a theme of one colour has it, a bar would be a gap.
        shape = ink if bad else Style(color=ink.color)
        quiet = paint("ink-quiet")
        places = self._cosine_cells
        pieces: list[tuple[str, Style]] = [(str(number).rjust(columns.number), quiet)]
        if columns.text:
            text = quoted(self._texts[number]) if number < len(self._texts) else ""
            pieces.append((_fitted(text, columns.text), paint("ink-trace")))
        if columns.id:
            token = str(self._ids[number]) if number < len(self._ids) else ""
            pieces.append((token.rjust(columns.id), quiet))
        pieces.append((format_ratio(relative).rjust(7), ink))
        if columns.bar:
            said = f"{NONFINITE} {bad:,} NaN/Inf" if bad else bar(_height(relative), columns.bar)
            pieces.append((said[: columns.bar].ljust(columns.bar), shape))
        decimals = places - 2 - (cosine < 0)
        pieces.append((format_cosine(cosine, decimals).rjust(places), ink))
        if columns.cosine_bar:
            drawn = "" if bad else bar(max(0.0, cosine), columns.cosine_bar)
            pieces.append((drawn.ljust(columns.cosine_bar), shape))
        if self.line_width >= WIDE_CELLS:
            largest = format_ratio(float(found.max_abs_diff[number]))
            pieces.append((largest.rjust(7), Style.null()))
        return Text(" ").join(Text(text, style) for text, style in pieces)

    # A line of heads per token

    @property
    def _head_start(self) -> int:
        columns = self._columns()
        return columns.number + 1 + (columns.text + 1 if columns.text else 0)

    @property
    def _head_cells(self) -> int:
        """Cells of one head."""
        room = self.line_width - self._head_start
        return next((cells for cells in (4, 3, 2) if self._heads * cells <= room), 1)

    @property
    def _first_head(self) -> int:
        room = max(1, (self.line_width - self._head_start) // self._head_cells)
        return max(0, min(self.head - room // 2, self._heads - room))

    def _head_headings(self, found: TokenFigures) -> Text:
        quiet, cells = self.paint("ink-quiet"), self._head_cells
        line = "head".ljust(self._head_start)
        for head in range(self._first_head, found.relative_l2.shape[1]):
            if (head * cells) % 8 < cells:
                line = line.ljust(self._head_start + (head - self._first_head) * cells) + str(head)
        text = Text(line[: self.line_width], quiet)
        at = self._head_start + (self.head - self._first_head) * cells
        if self.has_focus:
            text = Text(f"{line[:at].ljust(at)}{self.head}".ljust(at + cells), quiet)
        return text

    def _head_line(self, number: int, found: TokenFigures) -> list[Segment]:
        columns, paint, ramp = self._columns(), self.paint, self.ramp
        line = [Segment(str(number).rjust(columns.number) + " ", paint("ink-quiet"))]
        if columns.text:
            text = quoted(self._texts[number]) if number < len(self._texts) else ""
            line.append(Segment(f"{_fitted(text, columns.text)} ", paint("ink-trace")))
        cells, first = self._head_cells, self._first_head
        last = min(
            found.relative_l2.shape[1], first + (self.line_width - self._head_start) // cells
        )
        row = zip(
            found.relative_l2[number, first:last].tolist(),
            found.nonfinite[number, first:last].tolist(),
        )
        for head, (relative, bad) in enumerate(row, first):
            is_marked = self.has_focus and (number, head) == (self.token, self.head)
            line.append(self._head_cell(relative, bad, cells, ramp, is_marked))
        return line

    def _head_cell(
        self, relative: float, bad: int, cells: int, ramp: Ramp, is_marked: bool
    ) -> Segment:
        if bad:
            text, style = NONFINITE.center(cells), self.paint("verdict-nonfinite", bold=True)
        else:
            level = level_of(relative, 1.0, SCALE_DECADES) if math.isfinite(relative) else 0
            if math.isinf(relative):
                level = level_of(1.0, 1.0, SCALE_DECADES)
            if ramp.is_dense:
                text, style = ramp.density(level) * cells, Style.null()
            else:
                text, style = " " * cells, ramp.text_style(level, is_signed=False)
        if is_marked:
            ink, ground = (
                self.paint(f"block-cursor-{part}").color for part in ("foreground", "background")
            )
            style += Style(color=ink, bgcolor=ground)
            text = "+".center(cells) if not text.strip() or ramp.is_dense else text
        return Segment(text, style)

    def _readout(self, found: TokenFigures) -> Text:
        """What is under the cursor."""
        token, head = self.token, self.head
        bad = int(found.nonfinite[token, head])
        said = f"token {token}, head {head}"
        figures = f"  rel L2 {format_ratio(float(found.relative_l2[token, head]))}"
        cosine = f"  cosine {format_cosine(float(found.cosine[token, head]))}"
        if len(said) + len(figures) + len(cosine) <= self.line_width:
            figures += cosine
        if bad:
            figures = f"  {NONFINITE} {bad:,} NaN/Inf"
        line = Text.assemble((said, "bold"), figures)
        line.truncate(self.line_width, overflow="ellipsis")
        return line

    def _legend(self) -> Text:
        """The scale of the colours."""
        quiet = self.paint("ink-quiet")
        line = Text.assemble(("relative L2  0", quiet))
        line.append_text(ramp_text(self.ramp, 12, is_signed=False, low=SCALE_FLOOR, quiet=quiet))
        line.append(f" 1  {NONFINITE} NaN/Inf", quiet)
        line.truncate(self.line_width)
        return line


def _height(relative: float) -> float:
    """Where a relative L2 is on the bars' scale; anything but zero shows a sliver."""
    if relative <= 0:
        return 0.0
    return max(1e-3, 1 + math.log10(min(relative, 1.0)) / SCALE_DECADES)


def _scale_text(cells: int) -> str:
    if cells < len(SCALE_FLOOR) + 3:
        return " " * cells
    return SCALE_FLOOR + " log ".center(cells - len(SCALE_FLOOR) - 1, "┄") + "1"


def _fitted(text: str, cells: int) -> str:
    if cell_len(text) > cells:
        text = set_cell_size(text, cells - 1) + "…"
    return text + " " * (cells - cell_len(text))
