"""What happens to a run on screen: it is started, watched, run again, compared and handed on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from textual import on, work
from textual.worker import Worker, get_current_worker

from aprtui.bindings import shown_key
from aprtui.screen_options import ScreenOptions
from aprtui.screens.navigation import StageNavigation
from aprtui.session import (
    DeviceFound,
    ExportFinished,
    FilesChanged,
    ParityJudged,
    PathGivenUp,
    RunFailed,
    RunFinished,
    RunOpened,
    stream_run,
)
from aprtui.text import visible
from aprtui.watch import Signature, signature_of, wait_for_change

if TYPE_CHECKING:
    from aprcore.network.graph import StageKey
    from aprcore.records.report import RunHeader
    from aprcore.records.tensor_source import TensorSource
    from aprcore.runs.request import Request
    from aprtui.screens.error import ErrorScreen
    from aprtui.session import Engine


class RunningScreen(StageNavigation):
    """A screen that runs a request, and again when it is asked to.

    Attributes:
        engine_worker: Runs the engine; None until the first screen is painted.
        tensors: Gives the tensors of the run; None until it is open.
    """

    def __init__(
        self, request: Request, engine: Engine | None, options: ScreenOptions, opening: str
    ) -> None:
        super().__init__(opening)
        self.request = request
        self.options = options
        self.engine_worker: Worker[None] | None = None
        self.tensors: TensorSource | None = None
        self._engine = engine
        self._error_screen: ErrorScreen | None = None

    # A run

    def start_run(self) -> None:
        """Run the request; a run that is under way is given up."""
        # Before anything is read: what changes while the run reads it will be read again.
        before = self._look_at_files() if self.options.watch else None
        self.engine_worker = self._run_engine()
        if before is not None:
            self._watch_files(before)

    @work(thread=True, exclusive=True, exit_on_error=False, group="run")
    def _run_engine(self) -> None:
        worker = get_current_worker()
        stream_run(self.request, self.post_message, lambda: worker.is_cancelled, self._engine)

    @on(RunOpened)
    def _open_run(self, event: RunOpened) -> None:
        before, self.tensors = self.tensors, event.tensors
        if before is not None:
            # It may be at work for a picture; the screen does not wait for that.
            self.run_worker(before.close, thread=True, group="close", exit_on_error=False)
        self.state.open(event.header)
        self.has_divergence = False
        if self._error_screen is not None and self._error_screen.is_active:
            # Files that changed have started the run; what was wrong with them is over.
            self._error_screen.dismiss(False)
        self.show_opened(event.header)

    def on_unmount(self) -> None:
        """Close the files."""
        if self.tensors is not None:
            self.tensors.close()

    @on(RunFinished)
    def _finish_run(self, event: RunFinished) -> None:
        self.state.report = event.report
        self.show_finished()
        if self.state.previous is not None:
            self._tell_changes()
        if self.options.save is not None:
            self._export(self.options.save, None)

    @on(RunFailed)
    def _fail_run(self, event: RunFailed) -> None:
        if self.state.report is not None:
            # The files of a re-run cannot be used: what is on screen is still true of the last.
            hint = " (waiting for the files to change)" if self.options.watch else ""
            self.notify(f"{visible(str(event.error))}{hint}", severity="error", markup=False)
            return
        self.state.error = event.error
        self.show_all()
        has_rows = self.state.header is not None
        if self._error_screen is None or not self._error_screen.is_active:
            from aprtui.screens.error import ErrorScreen

            self._error_screen = ErrorScreen(event.error, has_rows=has_rows)
            self.app.push_screen(self._error_screen, self._leave_error)

    def _leave_error(self, again: bool | None) -> None:
        if again:
            self.action_rerun()

    def show_opened(self, header: RunHeader) -> None:
        """Draw the rows of a run whose files are open."""
        raise NotImplementedError

    def show_finished(self) -> None:
        """Draw a run that is over."""
        raise NotImplementedError

    def show_soon(self) -> None:
        """Draw what has changed, together with what changes in a moment."""
        raise NotImplementedError

    def show_all(self) -> None:
        """Draw everything from the state."""
        raise NotImplementedError

    @on(ParityJudged)
    def _add_parity(self, event: ParityJudged) -> None:
        self.state.add_parity(event.parity)
        self.show_soon()

    @on(DeviceFound)
    def _name_device(self, event: DeviceFound) -> None:
        self.state.device = event.device
        self.show_all()

    @on(PathGivenUp)
    def _tell_rejection(self, event: PathGivenUp) -> None:
        self.state.rejected = event.rejected
        self.show_all()

    # Again

    def action_rerun(self) -> None:
        """Run again, from the files as they are now."""
        if self.engine_worker is not None:
            self.notify("running again", timeout=2)
            self.start_run()

    def _files(self) -> list[Path]:
        asked = self.request
        given = (
            asked.model, asked.trace, asked.oracle, asked.against, asked.names,
            asked.reference_weights, asked.saved,
        )  # fmt: skip
        return [path for path in given if path is not None]

    def _look_at_files(self) -> Signature:
        # What every run writes would start the next one, where it is saved beside its dump.
        return signature_of(self._files(), self.options.save)

    @work(thread=True, exclusive=True, exit_on_error=False, group="watch")
    def _watch_files(self, before: Signature) -> None:
        worker = get_current_worker()
        files, ours = self._files(), self.options.save
        if wait_for_change(files, before, lambda: worker.is_cancelled, ours=ours):
            self.post_message(FilesChanged())

    @on(FilesChanged)
    def _run_changed_files(self) -> None:
        self.action_rerun()

    def _tell_changes(self) -> None:
        from aprcore.records.changes import compare_runs

        before, after = self.state.previous, self.state.report
        if before is not None and after is not None:
            key = shown_key(self.app, "explorer.changes")
            told = f"{compare_runs(before, after).summary()} · {key} shows them"
            self.notify(told, markup=False)

    def action_devices(self) -> None:
        """Show the devices; one that is chosen is run on."""
        from aprtui.screens.devices import DevicesScreen

        self.app.push_screen(DevicesScreen(self.request.device), self._run_on)

    def _run_on(self, device: int | None) -> None:
        if device is None:
            return
        if self.request.model is None or self.request.trace is not None:
            self.notify("a device runs a model, and this run judges stage files")
            return
        self.request = replace(self.request, gpu=True, device=str(device))
        self.action_rerun()

    def action_changes(self) -> None:
        """Show what has changed since the run before."""
        before, after = self.state.previous, self.state.report
        if before is None:
            key = shown_key(self.app, "explorer.rerun")
            self.notify(f"there is no run before this one; {key} runs again", markup=False)
        elif after is None:
            self.notify("the run is not over yet")
        else:
            from aprtui.screens.changes import ChangesScreen

            self.app.push_screen(ChangesScreen(before, after), self._leave_changes)

    def _leave_changes(self, key: StageKey | None) -> None:
        if key is not None:
            self.go_to(key)

    # Handing it on

    def action_export(self) -> None:
        """Ask for a file name; its suffix says what is written."""
        if self.state.report is None:
            self.notify("the run is not over yet")
            return
        picture = self.app.export_screenshot()
        header = self.state.report.header
        name = Path(header.model or header.trace.path).stem or "run"

        def write(path: Path | None) -> None:
            if path is not None:
                self._export(path, picture)

        from aprtui.screens.export import ExportScreen

        self.app.push_screen(ExportScreen(Path(f"{name}-report.html")), write)

    @work(thread=True, exit_on_error=False, group="export")
    def _export(self, path: Path, picture: str | None) -> None:
        from aprcore.ground.errors import AprError
        from aprtui.exporting import export

        report = self.state.report
        assert report is not None
        try:
            export(path, report, self.tensors, self.options.command, picture)
        except AprError as error:
            self.post_message(ExportFinished(path, error))
        else:
            self.post_message(ExportFinished(path, None))

    @on(ExportFinished)
    def _tell_export(self, event: ExportFinished) -> None:
        if event.error is not None:
            self.notify(visible(str(event.error)), severity="error", markup=False)
        else:
            self.notify(f"wrote {visible(str(event.path))}", markup=False)

    def action_copy(self) -> None:
        """Copy what is known of the row under the cursor."""
        row = self.tree_of_stages.row
        from aprtui.exporting import describe_row

        # OSC 52: the terminal does it, so that it works over ssh and inside tmux.
        self.app.copy_to_clipboard(describe_row(self.state, row))
        self.notify(f"copied {'the run' if row.key is None else row.key}", markup=False, timeout=3)
