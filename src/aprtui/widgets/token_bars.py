"""How far off each token is: a line per token with figures and bars, or its heads as colours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType

from aprcore.records.telling import format_cosine, format_ratio, quoted
from aprtui.bindings import cursor_keys
from aprtui.pictures import Ask, OpenTensor
from aprtui.ramp import NONFINITE, level_of
from aprtui.widgets.bars import SCALE_DECADES, SCALE_FLOOR, bar, height_of, ramp_text, scale_text
from aprtui.widgets.line_picture import LinePicture

if TYPE_CHECKING:
    from aprcore.pictures import TokenFigures

NO_PAIR = "tokens are compared where both sides are there, in one layout"
# Cells from which there are ids and a bar of the cosine.
WIDE_CELLS, WIDEST_CELLS = 56, 84
TEXT_CELLS = 14


class BarFigures(NamedTuple):
    """What is known of the tokens.

    Attributes:
        tokens: BarFigures of each token; None where there are no two sides of one layout.
        by_head: BarFigures of each head of each token, where there are heads.
    """

    tokens: TokenFigures | None = None
    by_head: TokenFigures | None = None


@dataclass(frozen=True, slots=True)
class TokensAsk(Ask):
    """How far off each token is."""

    def make(self, tensor: OpenTensor, is_cancelled: Callable[[], bool]) -> BarFigures:
        """Compare both sides, token by token."""
        from aprcore.pictures import token_figures

        if not tensor.pair.comparable:
            return BarFigures()
        tokens = token_figures(tensor.pair, is_cancelled, by_head=False)
        by_head = token_figures(tensor.pair, is_cancelled)
        return BarFigures(tokens, by_head if by_head.heads else None)


class Columns(NamedTuple):
    """Cells of each column of a line, without the gap of one after it; 0 for none."""

    number: int
    text: int
    id: int
    bar: int
    cosine_bar: int


class TokenBars(LinePicture):
    """BarFigures per token under headings that stay; `h` shows a square per head instead.

    Attributes:
        by_head: Whether heads are shown.
        token, head: The cursor.
    """

    HINT = "h heads · : go to"

    BINDINGS: ClassVar[list[BindingType]] = [
        *cursor_keys(
            "tokens", "token", "token",
            Binding("left", "move_head(-1)", "previous head", id="tokens.left", show=False,
                    tooltip="The head to the left"),
            Binding("right", "move_head(1)", "next head", id="tokens.right", show=False,
                    tooltip="The head to the right"),
        ),
    ]  # fmt: skip

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.commands = {"next-head": self._toggle_heads, "previous-head": self._toggle_heads}
        self.by_head = False
        self.token = self.head = 0
        self._figures = BarFigures()
        self._texts: tuple[str, ...] = ()
        self._ids: tuple[int, ...] = ()
        self._measured: Columns | None = None

    def ask(self) -> Ask | None:
        """The figures, once."""
        return None if self._is_current else TokensAsk()

    def take(self, ask: Ask, picture: Any) -> None:
        """Show figures."""
        self._figures, self._is_current = picture, True
        self.say("" if self._figures.tokens is not None else NO_PAIR)
        self._name_tokens()
        self.token = max(0, min(self.token, self.line_count - 1))
        self.head = max(0, min(self.head, self._heads - 1))
        self.fit()

    def fit(self) -> None:
        """The columns fill the lines."""
        self._measured = None
        super().fit()

    @property
    def line_count(self) -> int:
        """A line per token."""
        tokens = self._figures.tokens
        return 0 if tokens is None else len(tokens.relative_l2)

    @property
    def cursor_line(self) -> int:
        """The token's."""
        return self.token

    @property
    def lines_below(self) -> int:
        """What is under the cursor, and the scale of the colours."""
        if self._shown_heads is None:
            return 0
        return 2 if self.size.height >= 8 else 1

    def heading(self) -> Text:
        """The names of the figures, or the numbers of heads."""
        heads = self._shown_heads
        return self._headings() if heads is None else self._head_headings(heads)

    def line(self, number: int, is_marked: bool) -> Text | list[Segment]:
        """A token."""
        assert self._figures.tokens is not None
        heads = self._shown_heads
        if heads is not None:
            return self._head_line(number, heads, is_marked)
        return self._line(number, self._figures.tokens)

    def below(self, number: int) -> Text:
        """What is under the cursor, then the scale."""
        assert self._shown_heads is not None
        return self._legend() if number else self._readout(self._shown_heads)

    @property
    def _heads(self) -> int:
        heads = self._figures.by_head
        return 1 if heads is None else int(heads.relative_l2.shape[1])

    @property
    def _shown_heads(self) -> TokenFigures | None:
        """BarFigures by head, where they are there and wanted."""
        return self._figures.by_head if self.by_head else None

    # A line per token

    def _columns(self) -> Columns:
        if self._measured is None:
            self._measured = self._measure_columns()
        return self._measured

    def _measure_columns(self) -> Columns:
        width = self.line_width
        index = max(3, len(str(self.line_count - 1)))
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

    def _text(self, number: int) -> str:
        """A token's text in its column, as much as fits."""
        cells = self._columns().text
        text = quoted(self._texts[number]) if number < len(self._texts) else ""
        if cell_len(text) > cells:
            text = set_cell_size(text, cells - 1) + "…"
        return text + " " * (cells - cell_len(text))

    @property
    def _cosine_cells(self) -> int:
        return 9 if self.line_width >= WIDE_CELLS else 7

    def _headings(self) -> Text:
        columns, quiet = self._columns(), self.paint("ink-quiet")
        scale = scale_text(columns.bar)
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
            pieces.append((self._text(number), paint("ink-trace")))
        if columns.id:
            token = str(self._ids[number]) if number < len(self._ids) else ""
            pieces.append((token.rjust(columns.id), quiet))
        pieces.append((format_ratio(relative).rjust(7), ink))
        if columns.bar:
            said = f"{NONFINITE} {bad:,} NaN/Inf" if bad else bar(height_of(relative), columns.bar)
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

    def _head_line(self, number: int, found: TokenFigures, has_cursor: bool) -> list[Segment]:
        columns, paint = self._columns(), self.paint
        line = [Segment(str(number).rjust(columns.number) + " ", paint("ink-quiet"))]
        if columns.text:
            line.append(Segment(f"{self._text(number)} ", paint("ink-trace")))
        cells, first = self._head_cells, self._first_head
        last = min(
            found.relative_l2.shape[1], first + (self.line_width - self._head_start) // cells
        )
        row = zip(
            found.relative_l2[number, first:last].tolist(),
            found.nonfinite[number, first:last].tolist(),
        )
        for head, (relative, bad) in enumerate(row, first):
            is_marked = has_cursor and head == self.head
            line.append(self._head_cell(relative, bad, cells, is_marked))
        return line

    def _head_cell(self, relative: float, bad: int, cells: int, is_marked: bool) -> Segment:
        ramp = self.ramp
        if bad:
            text, style = NONFINITE.center(cells), self.paint("verdict-nonfinite", bold=True)
        else:
            level = 0 if math.isnan(relative) else level_of(min(relative, 1.0), 1.0, SCALE_DECADES)
            if ramp.is_dense:
                text, style = ramp.density(level) * cells, Style.null()
            else:
                text, style = " " * cells, ramp.text_style(level, is_signed=False)
        if is_marked:
            style += self.cursor_style()
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

    # What the user does

    def jump(self, text: str) -> str:
        """Go to a token by its number."""
        if not text.strip().lstrip("-").isdecimal():
            return "type the number of a token"
        number = int(text)
        number += self.line_count if number < 0 else 0
        if not 0 <= number < self.line_count:
            return f"there are tokens 0 to {self.line_count - 1}"
        self._point(number, self.head)
        return ""

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor."""
        number = event.y - 1 + self.scroll_offset.y
        if event.y >= 1 and number < self.line_count:
            place = event.x - self._head_start
            is_head = self._shown_heads is not None and place >= 0
            head = self._first_head + place // self._head_cells if is_head else self.head
            self._point(number, head)

    def action_move(self, step: int) -> None:
        """Move the cursor by tokens."""
        self._point(self.token + step, self.head)

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self.action_move(pages * self.page)

    def action_move_head(self, step: int) -> None:
        """Move the cursor by heads."""
        self._point(self.token, self.head + step)

    def _toggle_heads(self) -> None:
        if self._figures.by_head is None:
            self.notify("this stage has no heads")
            return
        self.by_head = not self.by_head
        self.fit()

    def _point(self, token: int, head: int) -> None:
        before, first = self.token, self._first_head
        self.token = max(0, min(token, self.line_count - 1))
        self.head = max(0, min(head, self._heads - 1))
        if first != self._first_head:
            self.fit()
        elif not self.show_cursor():
            self.refresh_lines(before, self.token)

    def _name_tokens(self) -> None:
        """Texts and ids, where a line is one of the run's tokens."""
        header, report = self.header, self.report
        self._texts, self._ids = (), ()
        if header is None or header.tokens is None or report is None or report.layout is None:
            return
        texts = header.token_texts or ()
        if self.line_count == len(header.tokens) and "token" in report.layout.axes:
            self._ids, self._texts = header.tokens, texts
        elif self.line_count == 1:  # logits, or one decoding step: the last token
            self._ids, self._texts = header.tokens[-1:], texts[-1:]
