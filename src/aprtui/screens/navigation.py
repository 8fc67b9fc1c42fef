"""Moving through the stages of a run: to faults, and along an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

from textual.screen import Screen

from aprcore.network.stages import StageKey
from aprtui.bindings import shown_key
from aprtui.rows import Row, matching_keys, place_among
from aprtui.widgets.breadcrumb import Breadcrumb
from aprtui.widgets.stage_pane import StagePane


class Navigation:
    """Moves the cursor of the tree because the user asked for it.

    Attributes:
        state: What is known of the run.
        breadcrumb: The way that `u` and `d` took.
        commands: What the screen's keys do here, by name.
    """

    def __init__(self, screen: Screen[Any], stages: StagePane) -> None:
        self.state = stages.tree_of_stages.state
        self.breadcrumb = Breadcrumb(self.state, id="breadcrumb")
        self.commands: dict[str, Callable[[], None]] = {
            "next": partial(self._go_to_fault, 1),
            "previous": partial(self._go_to_fault, -1),
            "upstream": self._go_upstream,
            "downstream": self._go_downstream,
        }
        self._screen = screen
        self._stages = stages
        self._tree = stages.tree_of_stages

    def go_to(self, key: StageKey) -> None:
        """Put the cursor on a stage."""
        if not self._tree.filter.accepts(key, self.state.reports.get(key)):
            self._stages.drop_filter()
        self._tree.user_moved = True
        self._tree.go_to(key)
        self._tree.focus()

    def go_if_chosen(self, key: StageKey | None) -> None:
        """The same with what another screen ended with, if that is a stage."""
        if key is not None:
            self.go_to(key)

    def go_to_layer(self, layer: int) -> None:
        """Unfold a layer and put the cursor on it; where rows are sorted, on its first stage."""
        self.go_to(self.state.keys_by_layer[layer][0])
        self._tree.go_to_row(Row(layer=layer))

    def go_to_blamed(self) -> bool:
        """Go to the stage to blame for the one under the cursor; returns whether there is one."""
        here, first = self._tree.row.key, self.state.first_divergence
        from aprtui.lineage import trace_upstream

        is_fault = here in self.state.divergences  # on its own account, whatever came before
        lineage = None if here is None or is_fault else trace_upstream(self.state, here)
        if lineage is not None:
            for start, to in pairwise(lineage.path):
                self.breadcrumb.walk(start, to)
            self.go_to(lineage.origin)
        elif not is_fault and first is not None:
            self.go_to(first.key)
        elif first is None:
            self._say_sound()
            return False
        return True

    def _say_sound(self) -> None:
        said = "no divergence so far" if self.state.is_running else "no divergence"
        self._screen.notify(said)

    def _go_to_fault(self, step: int) -> None:
        """Go to the next divergence in the order shown, or the previous one."""
        keys = matching_keys(self.state, self._tree.filter, self._tree.order)
        diverging = set(self.state.divergences)
        faults = [number for number, key in enumerate(keys) if key in diverging]
        found = following(faults, place_among(keys, self._tree.row), step)
        if found is not None:
            self.go_to(keys[found])
        elif not diverging:
            self._say_sound()
        else:
            said = "no divergence after this row" if step > 0 else "none before this row"
            self._screen.notify(said)

    def _go_upstream(self) -> None:
        """Go one step towards where this stage's error began."""
        here = self._stage_here()
        if here is None:
            return
        from aprtui.lineage import trace_upstream

        lineage = trace_upstream(self.state, here)
        if lineage is None:
            diverges = here in self.state.divergences
            said = "this stage is to blame" if diverges else "none of its inputs is off"
            self._screen.notify(said)
        else:
            self._walk(here, lineage.path[1])

    def _go_downstream(self) -> None:
        """Go one step back, or down to the first stage that this one spoils."""
        here = self._stage_here()
        if here is None:
            return
        target = self.breadcrumb.before(here)
        if target is None:
            from aprtui.lineage import spoiled_by

            target = next(iter(spoiled_by(self.state, here)), None)
        if target is None:
            self._screen.notify("nothing that reads it is off")
        else:
            self._walk(here, target)

    def _walk(self, here: StageKey, to: StageKey) -> None:
        self.breadcrumb.walk(here, to)
        self.go_to(to)

    def _stage_here(self) -> StageKey | None:
        """The stage under the cursor; without one the user is told how to get to one."""
        here = self._tree.row.key
        if here is None:
            key = shown_key(self._screen.app, "explorer.next")
            said = f"choose a stage first; {key} goes to the first divergence"
            self._screen.notify(said, markup=False)
        return here


def following(numbers: Iterable[int], here: int, step: int) -> int | None:
    """The nearest of some numbers above another, or below it where `step` is negative."""
    if step > 0:
        return min((number for number in numbers if number > here), default=None)
    return max((number for number in numbers if number < here), default=None)
