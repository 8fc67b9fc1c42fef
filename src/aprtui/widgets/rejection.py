"""The banner that says that a device's path was given up and the CPU carries on."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import Static

from aprtui.run_state import RunState
from aprtui.text import visible
from aprtui.theme import Paint


class Rejection(Static):
    """One line; absent unless the device's path was rejected."""

    DEFAULT_CSS = "Rejection { height: auto; max-height: 2; display: none; }"

    def __init__(self, state: RunState, id: str | None = None) -> None:
        super().__init__(id=id)
        self._state = state

    def refresh_run(self) -> None:
        """Come, or go, with what is known."""
        rejected = self._state.rejected
        if self.display != (rejected is not None):
            self.display = rejected is not None
        if rejected is not None:
            paint = Paint(self.app.theme_variables)
            line = Text(" ⚠ GPU path rejected, the CPU carries on: ",
                        paint("verdict-inherited", bold=True))  # fmt: skip
            self.update(line.append(visible(rejected.line_reason, 400), "not bold"))
