"""The tree of stages with what stands above it: what its rows are is chosen here."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Input

from aprtui.measures import Measure
from aprtui.rows import Filter, SortOrder
from aprtui.widgets.profile_strip import ProfileStrip
from aprtui.widgets.stage_tree import StageTree


class StageHeadings(Widget):
    """The headings above the tree's columns."""

    DEFAULT_CSS = "StageHeadings { height: 1; }"

    def __init__(self, tree: StageTree) -> None:
        super().__init__()
        self._tree = tree

    def render(self) -> Text:
        """The headings for the tree's width."""
        if self._tree.state.header is None:
            return Text("")
        headings = self._tree.painter().headings()
        headings.no_wrap = True
        return headings


class StagePane(Vertical):
    """The tree under its headings and the depth profile.

    Attributes:
        tree_of_stages: The tree.
        profile: The depth profile.
        commands: What the screen's keys do here, by name.
        is_filtered: Whether only stages with some words are shown.
    """

    is_filtered = reactive(False, bindings=True)

    def __init__(self, tree: StageTree, id: str | None = None) -> None:
        super().__init__(id=id)
        self.tree_of_stages = tree
        self.profile = ProfileStrip(tree.state, tree, id="profile")
        self.headings = StageHeadings(tree)
        self.commands: dict[str, Callable[[], None]] = {
            "sort": self._sort,
            "measure": self._show_next_measure,
        }
        self.border_title = "Stages"

    def compose(self) -> ComposeResult:
        """The profile, the headings and the tree; a filter is mounted above them."""
        yield self.profile
        yield self.headings
        yield self.tree_of_stages

    async def ask_filter(self) -> None:
        """Ask for words."""
        if not self.is_filtered:
            self.is_filtered = True
            words = Input(placeholder="words: q_post_rope, layer 3, fail", id="filter")
            await self.mount(words, before=0)
        # At once: `focus()` waits its turn, and the first letters would go to the tree.
        self.screen.set_focus(self.query_one("#filter", Input))

    @on(Input.Changed, "#filter")
    def _filter_rows(self, event: Input.Changed) -> None:
        self.tree_of_stages.choose(filter=Filter.parse(event.value))

    @on(Input.Submitted, "#filter")
    def _leave_filter(self) -> None:
        self.tree_of_stages.focus()

    def drop_filter(self) -> None:
        """Show all stages again."""
        self.query("#filter").remove()
        self.is_filtered = False
        self.tree_of_stages.choose(filter=Filter())

    def _sort(self) -> None:
        """Sort another way; the tree shows the figures that it is sorted by."""
        order = self.tree_of_stages.order.following(self.tree_of_stages.state.measures)
        self.choose(order=order, measure=order.measure)

    def _show_next_measure(self) -> None:
        """Show the figures of the next judgment; a sorted tree is sorted by them."""
        tree, measures = self.tree_of_stages, self.tree_of_stages.state.measures
        measure = measures[(measures.index(tree.measure) + 1) % len(measures)]
        is_sorted = tree.order is not SortOrder.COMPUTATION
        self.choose(order=SortOrder.by(measure) if is_sorted else None, measure=measure)

    def choose(self, *, order: SortOrder | None = None, measure: Measure | None = None) -> None:
        """Show the rows in another order, or other figures, and say so above them."""
        tree = self.tree_of_stages
        tree.choose(order=order, measure=measure)
        told = ["Stages"]
        if tree.measure not in (Measure.CUMULATIVE, tree.order.measure):
            told.append(tree.state.title_of(tree.measure))
        if tree.order is not SortOrder.COMPUTATION:
            told.append(tree.order.value)
        self.border_title = ", ".join(told)
        self.headings.refresh()
        self.profile.refresh()
