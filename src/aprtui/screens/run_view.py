"""Other views of the run on screen, which follow it while it goes on."""

from __future__ import annotations

from abc import abstractmethod

from textual.screen import Screen

from aprcore.network.graph import StageKey


class RunView(Screen[StageKey | None]):
    """A view of the whole run. Ends with the stage to go to, or None."""

    @abstractmethod
    def refresh_run(self) -> None:
        """Stages were judged meanwhile."""
