"""What went wrong, where, and what to do about it."""

from __future__ import annotations

from typing import ClassVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from aprcore.ground.errors import AprError
from aprtui.text import visible
from aprtui.theme import Paint


class ErrorScreen(ModalScreen[bool]):
    """The error that ended the run. What was judged before it stays readable behind.

    Ends with whether to run again.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "see what was judged", id="error.close",
                tooltip="Close this and look at what was judged"),
        Binding("r", "again", "try again", id="error.again",
                tooltip="Read the files again, once they are mended"),
        Binding("q,enter", "app.quit", "quit", id="error.quit", tooltip="Leave with exit code 2"),
    ]  # fmt: skip

    def __init__(self, error: Exception, *, has_rows: bool) -> None:
        super().__init__()
        self._error = error
        self._has_rows = has_rows

    def compose(self) -> ComposeResult:
        """The error in a box."""
        with VerticalScroll(id="error") as pane:
            pane.border_title = "✗ The run failed" if self._has_rows else "✗ Cannot run"
            yield Static(self._message())
        yield Footer(show_command_palette=False, compact=True)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """There is nothing behind this screen unless a run was opened."""
        return self._has_rows or action != "dismiss"

    def action_again(self) -> None:
        """Close this and run again."""
        self.dismiss(True)

    def _message(self) -> RenderableType:
        paint = Paint(self.app.theme_variables)
        error = self._error
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")

        def add(name: str, text: Text) -> None:
            table.add_row(Text(name, paint("ink-quiet")), text)

        if not isinstance(error, AprError):
            add("what", Text(f"{type(error).__name__}: {visible(str(error))}"))
            add("hint", Text("this is a bug in aprtui; please report it with the command you ran"))
        else:
            if error.where is not None:
                add("where", Text(visible(error.where), paint("ink-trace", bold=True)))
            add("what", Text(visible(error.what)))
            if error.hint:
                add("hint", Text(visible(error.hint)))
        return table
