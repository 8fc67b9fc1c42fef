"""Moving through the stages of a run: to faults, along an error, by words, in another order."""

from __future__ import annotations

from textual import on
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Input

from aprcore.network.graph import StageKey
from aprtui.bindings import shown_key
from aprtui.measures import Measure
from aprtui.rows import Filter, Row, SortOrder, matching_keys, place_among
from aprtui.run_state import RunState
from aprtui.widgets.breadcrumb import Breadcrumb
from aprtui.widgets.stage_tree import StageHeadings, StageTree


class StageNavigation(Screen[None]):
    """A screen with the tree of stages, and all that moves its cursor or changes its rows.

    Attributes:
        state: What is known of the run.
        tree_of_stages: The tree.
        breadcrumb: The way that `u` and `d` took.
    """

    # What the footer offers depends on these; setting them draws it anew.
    is_open = reactive(False, bindings=True)
    is_filtered = reactive(False, bindings=True)
    has_divergence = reactive(False, bindings=True)

    def __init__(self, opening: str) -> None:
        super().__init__()
        self.state = RunState()
        self.tree_of_stages = StageTree(self.state, opening, id="tree")
        self.breadcrumb = Breadcrumb(self.state, id="breadcrumb")

    def go_to(self, key: StageKey) -> None:
        """Put the cursor on a stage because the user asked for it."""
        tree = self.tree_of_stages
        if not tree.filter.accepts(key, self.state.reports.get(key)):
            # The tree drops a filter that hides the stage; its words must go with it.
            self.query("#filter").remove()
            self.is_filtered = False
        tree.user_moved = True
        tree.go_to(key)
        tree.focus()

    def go_to_layer(self, layer: int) -> None:
        """Unfold a layer and put the cursor on it; where rows are sorted, on its first stage."""
        tree = self.tree_of_stages
        first = self.state.keys_by_layer[layer][0]
        self.go_to(first)
        if Row(layer=layer) in tree.rows:
            tree.go_to_row(Row(layer=layer))

    # Faults

    def action_next_divergence(self) -> None:
        """Go to the next divergence in the order shown."""
        self._step(1)

    def action_previous_divergence(self) -> None:
        """Go to the previous divergence in the order shown."""
        self._step(-1)

    def _step(self, step: int) -> None:
        tree = self.tree_of_stages
        keys = matching_keys(self.state, tree.filter, tree.order)
        diverging = set(self.state.divergences)
        here = place_among(keys, tree.row)
        if step < 0:
            found = next((key for key in reversed(keys[: max(0, here)]) if key in diverging), None)
        else:
            found = next((key for key in keys[max(-1, here) + 1 :] if key in diverging), None)
        if found is not None:
            self.go_to(found)
        elif not diverging:
            self.notify("no divergence so far" if self.state.is_running else "no divergence")
        else:
            self.notify("no divergence after this row" if step > 0 else "none before this row")

    # Along an error

    def action_upstream(self) -> None:
        """Go one step towards where this stage's error began."""
        here = self.tree_of_stages.row.key
        if here is None:
            self._ask_for_a_stage()
            return
        from aprtui.lineage import trace_upstream

        lineage = trace_upstream(self.state, here)
        if lineage is None:
            diverges = here in self.state.divergences
            self.notify("this stage is to blame" if diverges else "none of its inputs is off")
            return
        self.breadcrumb.walk(here, lineage.path[1])
        self.go_to(lineage.path[1])

    def action_downstream(self) -> None:
        """Go one step back, or down to the first stage that this one spoils."""
        here = self.tree_of_stages.row.key
        if here is None:
            self._ask_for_a_stage()
            return
        target = self.breadcrumb.before(here)
        if target is None:
            from aprtui.lineage import spoiled_by

            target = next(iter(spoiled_by(self.state, here)), None)
        if target is None:
            self.notify("nothing that reads it is off")
            return
        self.breadcrumb.walk(here, target)
        self.go_to(target)

    def _ask_for_a_stage(self) -> None:
        key = shown_key(self.app, "explorer.next")
        self.notify(f"choose a stage first; {key} goes to the first divergence", markup=False)

    # Rows

    async def action_filter(self) -> None:
        """Ask for words."""
        if not self.is_filtered:
            self.is_filtered = True
            words = Input(placeholder="words: q_post_rope, layer 3, fail", id="filter")
            await self.query_one("#stages").mount(words, before=0)
        # At once: `focus()` waits its turn, and the first letters would go to the tree.
        self.set_focus(self.query_one("#filter", Input))

    @on(Input.Changed, "#filter")
    def _filter_rows(self, event: Input.Changed) -> None:
        self.tree_of_stages.choose(filter=Filter.parse(event.value))

    @on(Input.Submitted, "#filter")
    def _leave_filter(self) -> None:
        self.tree_of_stages.focus()

    async def show_all_stages(self) -> None:
        """Drop the filter."""
        self.tree_of_stages.focus()
        await self.query("#filter").remove()
        self.is_filtered = False
        self.tree_of_stages.choose(filter=Filter())

    def action_sort(self) -> None:
        """Sort another way; the tree shows the figures that it is sorted by."""
        order = self.tree_of_stages.order.following(self.state.measures)
        self.choose(order=order, measure=order.measure)

    def action_measure(self) -> None:
        """Show the figures of the next judgment; a sorted tree is sorted by them."""
        tree, measures = self.tree_of_stages, self.state.measures
        measure = measures[(measures.index(tree.measure) + 1) % len(measures)]
        is_sorted = tree.order is not SortOrder.COMPUTATION
        self.choose(order=SortOrder.by(measure) if is_sorted else None, measure=measure)

    def choose(self, *, order: SortOrder | None = None, measure: Measure | None = None) -> None:
        """Show the rows in another order, or other figures, and say so above them."""
        tree = self.tree_of_stages
        tree.choose(order=order, measure=measure)
        told = ["Stages"]
        if tree.measure not in (Measure.CUMULATIVE, tree.order.measure):
            told.append(self.state.title_of(tree.measure))
        if tree.order is not SortOrder.COMPUTATION:
            told.append(tree.order.value)
        self.query_one("#stages").border_title = ", ".join(told)
        self.query_one(StageHeadings).refresh()
        self.query_one("#profile").refresh()
