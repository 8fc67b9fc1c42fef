"""The explorer as a Textual app: its theme, its first screen and its exit code."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.command import Provider
from textual.filter import LineFilter
from textual.widgets import Footer, Static

from aprtui.bindings import shown_key
from aprtui.keymap import check_keys
from aprtui.screen_gate import ScreenGate
from aprtui.screens.explorer import ExplorerScreen
from aprtui.served import end_with_server
from aprtui.settings import Settings, is_first_use, remember_use
from aprtui.theme import COSINE_VARIABLE, THEMES, VARIABLES

if TYPE_CHECKING:
    from aprcore.runs.request import Request
    from aprtui.screen_options import ScreenOptions
    from aprtui.session import Engine

# A first user is told these, by the keys that they have; long enough to be read twice.
HINTED = {"explorer.help": "help", "explorer.next": "next divergence", "explorer.why": "why"}
HINT_S = 12
SCREEN_GATE = ScreenGate()


class ExplorerApp(App[None]):
    """Explores one run.

    Args:
        request: What to run.
        engine: Yields the run's events; default: `aprcore.runs.bisect.bisect`.
        settings: What the user has chosen; default: nothing.
        options: What is asked of the screen rather than of the run.
        is_new: Whether the user is told the first keys.

    Raises:
        SettingsError: The settings give a key to two actions, or to none that there is.
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

    def __init__(
        self,
        request: Request,
        engine: Engine | None = None,
        *,
        settings: Settings | None = None,
        options: ScreenOptions | None = None,
        is_new: bool = False,
    ) -> None:
        self.settings = settings or Settings()
        self._is_new = is_new
        super().__init__()
        for theme in THEMES.values():
            self.register_theme(theme)
        self.theme = self.settings.theme
        # Only what has our inks in readable shades is offered.
        for name in self.available_themes.keys() - THEMES.keys():
            self.unregister_theme(name)
        self.explorer = ExplorerScreen(request, engine, options)
        if self.settings.top_k is not None:
            self.explorer.set_reactive(ExplorerScreen.top_k, self.settings.top_k)
        check_keys(self.settings.keys, self.settings.path)

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """The inks, for themes that do not define them, and the user's thresholds."""
        variables = dict(VARIABLES)
        if self.settings.cosine is not None:
            variables[COSINE_VARIABLE] = " ".join(map(str, self.settings.cosine))
        return variables

    def refresh_css(self, animate: bool = True) -> None:
        """Apply other variables; before there is a screen, nothing need be read anew."""
        if self.screen_stack:
            super().refresh_css(animate)
        else:
            self.stylesheet.set_variables(self.get_css_variables())

    def get_line_filters(self) -> Sequence[LineFilter]:
        """What every line passes before it is drawn."""
        return [*super().get_line_filters(), SCREEN_GATE]

    def get_default_screen(self) -> ExplorerScreen:
        """The explorer, made for the size that there is: it would be laid out again for it."""
        for size, breakpoints in zip(
            self.size, (self.HORIZONTAL_BREAKPOINTS, self.VERTICAL_BREAKPOINTS)
        ):
            name = max(one for one in breakpoints if one[0] <= size)[1]
            self.explorer.add_class(name, update=False)
        return self.explorer

    def on_mount(self) -> None:
        """Take over the user's keys, and greet who is new."""
        self.set_keymap(self.settings.keys)
        self._leave_on_signals()
        if self.is_web:
            end_with_server()
        if self._is_new:
            self.call_after_refresh(self._show_hint)

    def _show_hint(self) -> None:
        if not self.explorer.is_attached:
            return  # the user is leaving
        told = " · ".join(f"{shown_key(self, name)} {what}" for name, what in HINTED.items())
        # A line of its own: a notification would lie over half of a small screen, and over Help.
        line = Static(f" {told}", id="hint", markup=False)
        self.explorer.mount(line, before=self.explorer.query_one(Footer))
        self.set_timer(HINT_S, line.remove)

    def _leave_on_signals(self) -> None:
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


def run_explorer(
    request: Request, settings: Settings | None = None, options: ScreenOptions | None = None
) -> int:
    """Open the explorer on a request; returns the exit code of the command.

    Raises:
        SettingsError: The settings' keys cannot be used.
    """
    settings = settings or Settings()
    is_new = settings.hints and is_first_use()
    app = ExplorerApp(request, settings=settings, options=options, is_new=is_new)
    # What there is now stays to the end: to look through it for garbage would hold up the screen,
    # the first time before it is painted.
    gc.freeze()
    app.run()
    if not app.return_code:
        remember_use()
    rejected = app.explorer.state.rejected
    if rejected is not None:  # the screen with its banner is gone; a log shall have the line
        from aprtui.rejection import announce

        announce(rejected.line_reason)
    return app.exit_code
