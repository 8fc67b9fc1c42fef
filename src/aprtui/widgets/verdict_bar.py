"""The bar under the title: the finding in one line, and what the model says next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text
from textual.widget import Widget

from aprtui.formatting import quoted
from aprtui.run_state import RunState
from aprtui.theme import MARKS, SEVERITY, Paint, mark_of

if TYPE_CHECKING:
    from aprcore.report import LogitsReport

BAR_CELLS = 10


class VerdictBar(Widget):
    """Two lines: the finding with the progress, and the next token."""

    def __init__(self, state: RunState, opening: str, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state
        self._opening = opening

    def render(self) -> Text:
        """Both lines for the present width."""
        paint = Paint(self.app.theme_variables)
        first = self._first_line(paint)
        first.truncate(self.size.width, overflow="ellipsis")
        second = self._next_token(paint)
        second.truncate(self.size.width, overflow="ellipsis")
        return Text("\n").join([first, second])

    def _first_line(self, paint: Paint) -> Text:
        """The finding, why, and at the right the progress or the counts: as much as fits."""
        finding, reason = self._finding(paint), self._reason()
        right = self._progress(paint) if self._state.is_running else self._counts(paint)
        choices = [(reason, right), (reason, Text()), (Text(), right), (Text(), Text())]
        if self._state.is_running:
            # Meanwhile the progress matters more than why.
            del choices[1]
        for middle, end in choices:
            room = self.size.width - finding.cell_len - middle.cell_len - end.cell_len
            if room >= 1:
                return Text.assemble(finding, middle, " " * room, end)
        return finding

    def _reason(self) -> Text:
        divergence = self._state.first_divergence
        return Text("" if divergence is None else f"  {divergence.reason}")

    def _finding(self, paint: Paint) -> Text:
        state = self._state
        divergence = state.first_divergence
        if divergence is not None:
            mark = mark_of(divergence)
            style = paint(mark.ink, bold=True)
            said = "first divergence: " if self.size.width >= 72 else ""
            return Text(f" {mark.glyph} {said}{divergence.key}  {mark.word}", style)
        if state.error is not None:
            return Text(" ✗ the run failed", paint("verdict-fail", bold=True))
        if state.header is None:
            return Text(f" · {self._opening}", paint("verdict-pending"))
        if state.report is None:
            said = "no divergence so far" if state.has_oracle else "tracing"
            return Text(f" · {said}", paint("verdict-pending"))
        if not state.has_oracle:
            return Text(f" – {state.report.summary()}", paint("ink-oracle", bold=True))
        mark = MARKS["PASS"]
        said = f" {mark.glyph} no divergence in {len(state.reports)} stages "
        return Text(said, paint(mark.ink, bold=True))

    def _progress(self, paint: Paint) -> Text:
        state = self._state
        if state.header is None or not state.keys:
            return Text("")
        done, total = len(state.reports), len(state.keys)
        filled = BAR_CELLS * done // total
        latest = state.latest
        text = Text()
        if latest is not None and latest.layer is not None:
            text.append(f"layer {latest.layer}/{state.header.num_layers} … ", paint("ink-quiet"))
        text.append(f"{done} of {total} stages ")
        text.append("▓" * filled, paint("ink-oracle"))
        return text.append("░" * (BAR_CELLS - filled) + " ", paint("ink-quiet"))

    def _counts(self, paint: Paint) -> Text:
        """How many stages got each verdict, gravest first, and the key that goes on."""
        counts = {verdict.value: count for verdict, count in self._state.counts.items()}
        text = Text()
        for word in reversed(SEVERITY):
            if word in counts:
                mark = MARKS[word]
                text.append(f"{mark.glyph} {counts[word]} {word}  ", paint(mark.ink))
        if self._state.divergences:
            text.append("[n] next ", paint("ink-quiet"))
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


def token_name(logits: LogitsReport, token: int) -> str:
    """A token by its text, or by its id where no tokenizer is at hand."""
    text = logits.texts.get(token)
    return f"id {token}" if text is None else quoted(text)
