"""What happens to a run on screen: it is started, watched, run again and closed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.screen import Screen
from textual.worker import Worker, get_current_worker

from aprtui.run_state import RunState
from aprtui.screen_options import ScreenOptions
from aprtui.session import RunOpened, stream_run
from aprtui.text import visible
from aprtui.watch import Signature, signature_of, wait_for_change

if TYPE_CHECKING:
    from aprcore.records.tensor_source import TensorSource
    from aprcore.runs.request import Request
    from aprtui.screens.error import ErrorScreen
    from aprtui.session import Engine


class Running:
    """A request that is run for a screen, and again when it is asked to.

    Attributes:
        request: What is run.
        worker: Runs the engine; None until the first screen is painted.
        tensors: Gives the tensors of the run; None until it is open.
        commands: What the screen's keys do here, by name.
    """

    def __init__(
        self,
        screen: Screen[Any],
        state: RunState,
        request: Request,
        engine: Engine | None,
        options: ScreenOptions,
    ) -> None:
        self.request = request
        self.worker: Worker[None] | None = None
        self.tensors: TensorSource | None = None
        self.commands: dict[str, Callable[[], None]] = {
            "rerun": self.start_again,
            "devices": self._choose_device,
        }
        self._screen = screen
        self._state = state
        self._engine = engine
        self._options = options
        self._error_screen: ErrorScreen | None = None

    def start(self) -> None:
        """Run the request; a run that is under way is given up."""
        # Before anything is read: what changes while the run reads it will be read again.
        before = self._look_at_files() if self._options.watch else None
        self.worker = self._work(self._stream, "run")
        if before is not None:
            self._work(partial(self._watch_files, before), "watch")

    def start_again(self) -> None:
        """Run again, from the files as they are now."""
        if self.worker is not None:
            self._screen.notify("running again", timeout=2)
            self.start()

    def open(self, event: RunOpened) -> None:
        """The files are open: what is known of the last run and its tensors are given up."""
        before, self.tensors = self.tensors, event.tensors
        if before is not None:
            # It may be at work for a picture; the screen does not wait for that.
            self._screen.run_worker(before.close, thread=True, group="close", exit_on_error=False)
        self._state.open(event.header)
        if self._error_screen is not None and self._error_screen.is_active:
            # Files that changed have started the run; what was wrong with them is over.
            self._error_screen.dismiss(False)

    def fail(self, error: Exception) -> None:
        """Say why the run could not go on; the user may try it again."""
        if self._state.report is not None:
            # The files of a re-run cannot be used: what is on screen is still true of the last.
            hint = " (waiting for the files to change)" if self._options.watch else ""
            self._screen.notify(f"{visible(str(error))}{hint}", severity="error", markup=False)
            return
        self._state.error = error
        if self._error_screen is None or not self._error_screen.is_active:
            from aprtui.screens.error import ErrorScreen

            has_rows = self._state.header is not None
            self._error_screen = ErrorScreen(error, has_rows=has_rows)
            self._screen.app.push_screen(self._error_screen, self._leave_error)

    def close(self) -> None:
        """Close the files."""
        if self.tensors is not None:
            self.tensors.close()

    def _choose_device(self) -> None:
        """Show the devices; one that is chosen is run on."""
        from aprtui.screens.devices import DevicesScreen

        self._screen.app.push_screen(DevicesScreen(self.request.device), self._run_on)

    def _run_on(self, device: int | None) -> None:
        if device is None:
            return
        if self.request.model is None or self.request.trace is not None:
            self._screen.notify("a device runs a model, and this run judges stage files")
            return
        self.request = replace(self.request, gpu=True, device=str(device))
        self.start_again()

    def _leave_error(self, again: bool | None) -> None:
        if again:
            self.start_again()

    def _work(self, work: Callable[[], None], group: str) -> Worker[None]:
        """Have something done in a thread, in place of what that group does now."""
        return self._screen.run_worker(
            work, thread=True, exclusive=True, exit_on_error=False, group=group
        )

    def _stream(self) -> None:
        worker = get_current_worker()
        post = self._screen.post_message
        stream_run(self.request, post, lambda: worker.is_cancelled, self._engine)

    def _watch_files(self, before: Signature) -> None:
        worker = get_current_worker()
        files, ours = self._files(), self._options.save
        if wait_for_change(files, before, lambda: worker.is_cancelled, ours=ours):
            self._screen.call_later(self.start_again)

    def _look_at_files(self) -> Signature:
        # What every run writes would start the next one, where it is saved beside its dump.
        return signature_of(self._files(), self._options.save)

    def _files(self) -> list[Path]:
        asked = self.request
        given = (
            asked.model, asked.trace, asked.oracle, asked.against, asked.names,
            asked.reference_weights, asked.saved, *asked.shards,
        )  # fmt: skip
        return [path for path in given if path is not None]
