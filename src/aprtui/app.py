"""The explorer as a Textual app: its theme, its first screen and its exit code."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.command import Provider

from aprtui.screens.explorer import ExplorerScreen
from aprtui.theme import THEME, VARIABLES

if TYPE_CHECKING:
    from aprcore.request import Request
    from aprtui.session import Engine


class ExplorerApp(App[None]):
    """Explores one run.

    Args:
        request: What to run.
        engine: Yields the run's events; default: `aprcore.bisect.bisect`.
    """

    TITLE = "aprtui"
    CSS_PATH = "app.tcss"
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = set()
    # Narrow screens do without the frames and some decimals, tiny ones without the detail pane.
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (64, "-narrow"), (100, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-short"), (16, "-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit", id="app.quit", tooltip="Leave; a run in progress is stopped"),
        # Everywhere, also while typing: in a terminal Ctrl-C means leave.
        Binding("ctrl+c,ctrl+q", "quit", "quit", id="app.interrupt", show=False, priority=True,
                tooltip="Leave; a run in progress is stopped"),
    ]  # fmt: skip

    def __init__(self, request: Request, engine: Engine | None = None) -> None:
        super().__init__()
        self.register_theme(THEME)
        self.theme = THEME.name
        self.explorer = ExplorerScreen(request, engine)

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """The inks, for themes that do not define them."""
        return dict(VARIABLES)

    def get_default_screen(self) -> ExplorerScreen:
        """The explorer."""
        return self.explorer

    def on_mount(self) -> None:
        """Leave in order when asked to from outside, too.

        SIGHUP keeps its default, the end: the terminal is gone, and writing to it would block.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Only the main thread can; the browser and the tests run elsewhere.
            try:
                loop.add_signal_handler(number, self.exit)
            except (NotImplementedError, RuntimeError, ValueError):
                return

    @property
    def exit_code(self) -> int:
        """0 nothing wrong found, 1 a divergence was found, 2 the run failed."""
        # A crash of the screen must not pass for a divergence.
        return 2 if self.return_code else self.explorer.state.exit_code


def run_explorer(request: Request) -> int:
    """Open the explorer on a request; returns the exit code of the command."""
    app = ExplorerApp(request)
    app.run()
    return app.exit_code
