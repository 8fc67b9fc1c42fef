"""The help screen, made from the bindings that the keys go through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from aprtui.theme import ALONE, MARKS, PENDING, Paint

# Signs of the figures, with what they say.
LEGEND = (
    ("M K", "the model and the kernel judgment: ✓ right on its own inputs, ✗ wrong, – not made"),
    ("◀", "the judgment that a FAIL rests on"),
    ("worst … at most", "the part of the output that stands out most: its error as a multiple of"
     " the predicted rounding noise, then the largest multiple that passes"),
    ("(1e-4)", "a bound for orientation: NOISE and INHERITED stages are not held to it"),
    ("passes at", "the smallest budget (--budget) under which a failing stage would pass"),
)  # fmt: skip


class HelpScreen(ModalScreen[None]):
    """Every key and what it does, and what the verdicts mean."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q", "dismiss", "close", id="help.close",
                tooltip="Close the help"),
    ]  # fmt: skip

    def __init__(self, bindings: Iterable[ActiveBinding]) -> None:
        super().__init__()
        self._shown = [active.binding for active in bindings]

    def compose(self) -> ComposeResult:
        """Keys, verdicts, then the signs of the figures."""
        paint = Paint(self.app.theme_variables)
        with VerticalScroll(id="help") as pane:
            pane.border_title = "Help"
            pane.border_subtitle = "esc close"
            yield Static(
                Group(
                    self._keys(paint), Text(""), self._marks(paint), Text(""), self._legend(paint)
                )
            )

    def _keys(self, paint: Paint) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        keys: dict[str, list[str]] = {}
        for binding in self._shown:
            # Those without a tooltip are the toolkit's own (copying, moving between panes).
            if binding.tooltip and not binding.system:
                keys.setdefault(binding.tooltip, []).append(self.app.get_key_display(binding))
        for tooltip, names in keys.items():
            table.add_row(Text(" ".join(names), paint("ink-trace", bold=True)), Text(tooltip))
        return table

    @staticmethod
    def _marks(paint: Paint) -> Table:
        table = Table.grid(padding=(0, 2))
        for mark in (PENDING, *MARKS.values(), ALONE):
            style = paint(mark.ink, bold=mark is not PENDING)
            table.add_row(Text(mark.glyph, style), Text(mark.word, style), Text(mark.meaning))
        return table

    @staticmethod
    def _legend(paint: Paint) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for sign, meaning in LEGEND:
            table.add_row(Text(sign, paint("ink-oracle", bold=True)), Text(meaning))
        return table
