"""Handing a run on: to a file, or to the clipboard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from textual.screen import Screen

from aprtui.screen_options import ScreenOptions
from aprtui.screens.running import Running
from aprtui.text import visible
from aprtui.widgets.stage_tree import StageTree


class HandingOn:
    """Writes what a screen knows of a run.

    Attributes:
        commands: What the screen's keys do here, by name.
    """

    def __init__(
        self, screen: Screen[Any], tree: StageTree, running: Running, options: ScreenOptions
    ) -> None:
        self.commands: dict[str, Callable[[], None]] = {"export": self._ask, "copy": self._copy}
        self._screen = screen
        self._tree = tree
        self._state = tree.state
        self._running = running
        self._options = options

    def _ask(self) -> None:
        """Ask for a file name; its suffix says what is written."""
        if not self._options.may_write:
            self._screen.notify("this page may not write: serve it with --allow-write DIR")
            return
        if self._state.report is None:
            self._screen.notify("the run is not over yet")
            return
        picture = self._screen.app.export_screenshot()
        header = self._state.report.header
        # The name is a file's, and an input shows what is typed as it is.
        name = visible(Path(header.model or header.trace.path).stem) or "run"

        def write(path: Path | None) -> None:
            if path is not None:
                self._write(path, picture)

        from aprtui.screens.export import ExportScreen

        suggested = Path(f"{name}-report.html")
        self._screen.app.push_screen(ExportScreen(suggested, self._options.folder), write)

    def save(self) -> None:
        """Write a run that is over to the file that was asked for with it, if one was."""
        if self._options.save is not None and self._options.may_write:
            self._write(self._options.save)

    def _copy(self) -> None:
        """Copy what is known of the row under the cursor."""
        row = self._tree.row
        from aprtui.exporting import describe_row

        # OSC 52: the terminal does it, so that it works over ssh and inside tmux.
        self._screen.app.copy_to_clipboard(describe_row(self._state, row))
        copied = "the run" if row.key is None else row.key
        self._screen.notify(f"copied {copied}", markup=False, timeout=3)

    def _write(self, path: Path, picture: str | None = None) -> None:
        work = partial(self._export, path, picture)
        self._screen.run_worker(work, thread=True, exit_on_error=False, group="export")

    def _export(self, path: Path, picture: str | None) -> None:
        """Write, and say so from the worker's thread, as `notify` may be."""
        from aprcore.ground.errors import AprError
        from aprtui.exporting import export

        report = self._state.report
        assert report is not None
        try:
            export(path, report, self._running.tensors, self._options.command, picture)
        except AprError as error:
            self._screen.notify(visible(str(error)), severity="error", markup=False)
        else:
            self._screen.notify(f"wrote {visible(str(path))}", markup=False)
