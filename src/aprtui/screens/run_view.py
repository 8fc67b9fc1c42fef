"""Other views of the run on screen, which follow it while it goes on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from textual.command import Provider
from textual.screen import Screen

from aprcore.network.stages import StageKey
from aprtui.run_state import RunState
from aprtui.screens.palette import ScreenCommands


class RunView(Screen[StageKey | None]):
    """A view of the whole run. Ends with the stage to go to, or None."""

    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {ScreenCommands}

    def __init__(self, state: RunState) -> None:
        super().__init__()
        self._state = state

    @abstractmethod
    def refresh_run(self) -> None:
        """Stages were judged meanwhile."""
