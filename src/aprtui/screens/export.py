"""Asking where to write a run, and as what."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from aprcore.ground.home import expand_user
from aprtui.exporting import check_export_path, place_export
from aprtui.text import visible
from aprtui.theme import Paint

KINDS = (
    (".html", "the whole run to read and print, with maps of the failing stages"),
    (".md", "the finding and a table, for an issue"),
    (".json", "every figure, for programs (docs/report.schema.json)"),
    (".svg", "this screen"),
    (".aprx", "the run itself: opens again without model and oracle"),
)


class ExportScreen(ModalScreen[Path | None]):
    """A file name, whose suffix says what is written. Ends with the path, or None.

    A file that exists is replaced when that is said a second time.

    Args:
        suggested: The name that stands there.
        folder: Below which the file has to be; None: anywhere.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "cancel", id="export.close", tooltip="Write nothing"),
    ]

    def __init__(self, suggested: Path, folder: Path | None = None) -> None:
        super().__init__()
        self._folder = folder
        self._suggested = suggested
        self._warned_of: Path | None = None

    def compose(self) -> ComposeResult:
        """The name, and what the suffixes mean."""
        paint = Paint(self.app.theme_variables)
        with Vertical(id="export") as pane:
            pane.border_title = "Export"
            pane.border_subtitle = "enter write   esc cancel"
            yield Input(str(self._suggested), id="export-path", select_on_focus=False)
            lines = Text("\n").join(
                Text.assemble((suffix.ljust(7), paint("ink-oracle", bold=True)), what)
                for suffix, what in KINDS
            )
            yield Static(id="export-problem")
            yield Static(lines)

    def on_mount(self) -> None:
        """Begin where the suffix is."""
        self.query_one(Input).focus()

    @on(Input.Submitted)
    def _accept(self, event: Input.Submitted) -> None:
        from aprcore.ground.errors import AprError

        try:
            path = place_export(expand_user(event.value.strip() or "."), self._folder)
            check_export_path(path, has_screen=True)
        except AprError as error:
            self._tell(visible(str(error)), "verdict-fail")
            return
        if path.exists() and path != self._warned_of:
            self._warned_of = path
            self._tell(f"{visible(str(path))} exists: enter again replaces it", "verdict-missing")
            return
        self.dismiss(path)

    def _tell(self, words: str, ink: str) -> None:
        problem = self.query_one("#export-problem", Static)
        problem.update(Text(words, Paint(self.app.theme_variables)(ink)))
        problem.display = True

    def action_dismiss(self, result: Path | None = None) -> None:  # type: ignore[override]
        """Write nothing."""
        self.dismiss(result)
