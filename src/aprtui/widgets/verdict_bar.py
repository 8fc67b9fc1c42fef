"""The bar under the title: the finding and its cause, and what the model says next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text
from textual.widget import Widget

from aprcore.records.telling import SEVERITY, finding_of, headline, token_name
from aprtui.bindings import shown_key
from aprtui.measures import Measure
from aprtui.run_state import RunState
from aprtui.text import visible
from aprtui.theme import MARKS, Paint, mark_of, mark_of_verdict

if TYPE_CHECKING:
    from aprcore.records.report import LogitsReport

BAR_CELLS = 10
# Width below which a line has one end only, unless both fit.
NARROW_CELLS = 64


class VerdictBar(Widget):
    """Two lines: the finding with its cause, then the next token with the progress."""

    def __init__(self, state: RunState, opening: str, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self._opening = opening

    def render(self) -> Text:
        """Both lines for the present width."""
        paint = Paint(self.app.theme_variables)
        state = self._state
        on = Text("", paint("ink-quiet"))
        if state.divergences:
            on.append(f" [{shown_key(self.app, 'explorer.next')}] next ")
        elif state.parity_faults:
            on.append(f" [{shown_key(self.app, 'explorer.parity')}] both sides ")
        token = self._next_token(paint)
        if state.is_running:
            right = self._progress(paint)
        else:
            right = self._counts(paint, self.size.width - token.cell_len)
        lines = self._join(self._finding(paint), on), self._join(token, right)
        return Text("\n").join(lines)

    def _join(self, left: Text, right: Text) -> Text:
        """A line of two ends; the left one loses its tail where both do not fit."""
        room = self.size.width - right.cell_len
        if left.cell_len > room and self.size.width < NARROW_CELLS:
            right, room = Text(), self.size.width
        left.truncate(max(0, room), overflow="ellipsis", pad=True)
        return left.append_text(right)

    def _finding(self, paint: Paint) -> Text:
        state = self._state
        divergence = state.first_divergence
        if divergence is not None:
            style = paint(mark_of(divergence).ink, bold=True)
            line = Text(f" {mark_of(divergence).glyph} {divergence.key}", style)
            verdict, _, why = finding_of(divergence).partition(":")
            return line.append(f"  {verdict}:", style).append(why)
        if state.error is not None:
            return Text(" ✗ the run failed", paint("verdict-fail", bold=True))
        if state.header is None:
            return Text(f" · {self._opening}", paint("verdict-pending"))
        if state.parity_faults:
            return self._parity_fault(paint)
        if state.report is None:
            said = "no divergence so far" if state.measures else "tracing"
            return Text(f" · {said}", paint("verdict-pending"))
        if not (state.has_oracle or state.is_judged):
            if not state.has_second_side:
                return Text(f" – {state.report.summary()}", paint("ink-oracle", bold=True))
            mark = MARKS["PASS"]
            said = f" {mark.glyph} {state.report.parity_summary()}"
            return Text(said, paint(mark.ink, bold=True))
        word, said = headline(state.report)
        mark = MARKS[word]
        return Text(f" {mark.glyph} {visible(said)}", paint(mark.ink, bold=True))

    def _parity_fault(self, paint: Paint) -> Text:
        """The first stage that is wrong on one side only, which the run's exit code counts."""
        state = self._state
        first = state.parity[state.parity_faults[0]]
        mark = mark_of_verdict(first.verdict)
        line = Text(f" {mark.glyph} {first.key}", paint(mark.ink, bold=True))
        line.append(f"  {state.title_of(Measure.PARITY)} {mark.word}:")
        return line.append(f" {visible(first.reason)}", "not bold")

    def _progress(self, paint: Paint) -> Text:
        state = self._state
        if state.header is None or not state.keys:
            return Text("")
        done, total = len(state.reports), len(state.keys)
        filled = BAR_CELLS * done // total
        latest = state.latest
        text = Text()
        if state.sought is not None:
            text.append(f"cause of {latest}, {state.sought.progress()} … ", paint("ink-quiet"))
        elif latest is not None and latest.layer is not None:
            text.append(f"layer {latest.layer}/{state.header.num_layers} … ", paint("ink-quiet"))
        text.append(f"{done} of {total} stages ")
        text.append("▓" * filled, paint("ink-oracle"))
        return text.append("░" * (BAR_CELLS - filled) + " ", paint("ink-quiet"))

    def _counts(self, paint: Paint, room: int) -> Text:
        """How many stages got each verdict, gravest first, as far as there is room."""
        counts = {verdict.value: count for verdict, count in self._state.counts.items()}
        text = Text()
        for word in reversed(SEVERITY):
            if word in counts:
                mark = MARKS[word]
                piece = Text(f" {mark.glyph} {counts[word]} {word} ", paint(mark.ink))
                if text.cell_len + piece.cell_len > room:
                    break
                text.append_text(piece)
        return text

    def _next_token(self, paint: Paint) -> Text:
        logits = self._state.logits
        if logits is None:
            return Text("")
        return Text.assemble("   ", next_token_line(logits, paint))


def next_token_line(logits: LogitsReport, paint: Paint) -> Text:
    """What each side would say next, the quickest sign that something is wrong."""
    found = logits.comparison
    ours = token_name(logits, found.argmax_a)
    quiet = paint("ink-quiet")
    if found.agree:
        return Text.assemble(("next token: ", quiet), (ours, "bold"), (" on both sides", quiet))
    return Text.assemble(
        ("next token: ours ", quiet),
        (ours, paint("ink-trace", bold=True)),
        (" · oracle ", quiet),
        (token_name(logits, found.argmax_b), paint("ink-oracle", bold=True)),
        (" (near-tie)" if found.near_tie else "", quiet),
    )
