"""The other screens that the explorer opens on a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from textual.screen import Screen

from aprtui.bindings import shown_key
from aprtui.screens.navigation import Navigation
from aprtui.widgets.stage_tree import StageTree

if TYPE_CHECKING:
    from aprtui.screens.run_view import RunView


class Views:
    """Opens them, each when it is asked for, and has one that shows the run follow it.

    Attributes:
        commands: What the screen's keys do here, by name.
    """

    def __init__(self, screen: Screen[Any], tree: StageTree, navigation: Navigation) -> None:
        self.commands: dict[str, Callable[[], None]] = {
            "profile": self._show_profile,
            "parity": self.show_parity,
            "changes": self._show_changes,
            "help": self._show_help,
        }
        self._screen = screen
        self._tree = tree
        self._state = tree.state
        self._navigation = navigation
        self._view: RunView | None = None

    def refresh(self) -> None:
        """Draw the run anew where it is shown."""
        view = self._view
        # One that was opened a moment ago has no widgets yet, and draws itself when it has.
        if view is not None and view is self._screen.app.screen and view.is_mounted:
            view.refresh_run()

    def show_parity(self) -> None:
        """Show two sides, stage by stage; it ends with the stage to go to."""
        from aprtui.screens.parity import ParityScreen

        self._open(ParityScreen(self._state, self._tree.row.key))

    def tell_changes(self) -> None:
        """Say in a line what has changed since the run before, if there was one."""
        before, after = self._state.previous, self._state.report
        if before is not None and after is not None:
            from aprcore.records.changes import compare_runs

            key = shown_key(self._screen.app, "explorer.changes")
            told = f"{compare_runs(before, after).summary()} · {key} shows them"
            self._screen.notify(told, markup=False)

    def _show_profile(self) -> None:
        """Show the depth profile; it ends with the stage to go to."""
        at = self._tree.row
        key = at.key or next(iter(self._state.keys_by_layer.get(at.layer, ())), None)
        from aprtui.screens.profile import ProfileScreen

        self._open(ProfileScreen(self._state, key))

    def _open(self, view: RunView) -> None:
        self._view = view
        self._screen.app.push_screen(view, self._navigation.go_if_chosen)

    def _show_changes(self) -> None:
        """Show what has changed since the run before."""
        before, after = self._state.previous, self._state.report
        if before is None:
            key = shown_key(self._screen.app, "explorer.rerun")
            said = f"there is no run before this one; {key} runs again"
            self._screen.notify(said, markup=False)
        elif after is None:
            self._screen.notify("the run is not over yet")
        else:
            # The line that says which key shows them has been read.
            self._screen.app.clear_notifications()
            from aprtui.screens.changes import ChangesScreen

            changes = ChangesScreen(before, after)
            self._screen.app.push_screen(changes, self._navigation.go_if_chosen)

    def _show_help(self) -> None:
        """Show every key."""
        from aprtui.screens.help import HelpScreen

        self._screen.app.push_screen(HelpScreen(self._screen.active_bindings.values()))
