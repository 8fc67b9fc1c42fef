"""The explorer: the tree of stages, what is known of the one under the cursor, the finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.command import Provider
from textual.containers import Horizontal
from textual.reactive import reactive
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Input
from textual.worker import Worker, get_current_worker

from aprcore.stages import StageKey
from aprtui.measures import Measure
from aprtui.palette import ExplorerCommands
from aprtui.rows import Filter, SortOrder, matching_keys, place_among
from aprtui.run_state import RunState
from aprtui.screens.error import ErrorScreen
from aprtui.screens.help import HelpScreen
from aprtui.session import RunFailed, RunFinished, RunOpened, StageJudged, stream_run
from aprtui.text import visible
from aprtui.widgets.divergence_table import DEFAULT_TOP_K, TOP_K_STEPS
from aprtui.widgets.run_title import RunTitle, base_name
from aprtui.widgets.stage_detail import StageDetail
from aprtui.widgets.stage_tree import StageHeadings, StagePane, StageTree
from aprtui.widgets.tab_strip import DetailTab, TabStrip
from aprtui.widgets.verdict_bar import VerdictBar

if TYPE_CHECKING:
    from aprcore.request import Request
    from aprtui.session import Engine

# Stages can come every two milliseconds; the screen follows them this often.
REFRESH_S = 1 / 20
# Long enough that a held arrow key does not fill a table per row, too short to be noticed.
DETAIL_DELAY_S = 0.05


class ExplorerScreen(Screen[None]):
    """The first screen. It owns the run's state; its message handlers are all that change it.

    Attributes:
        state: What is known of the run.
        engine_worker: Runs the engine; None until the first screen is painted.
        top_k: How many of the largest differences are shown.
        tab: What the lower part of the detail pane shows.
    """

    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {ExplorerCommands}

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "next_divergence", "next", id="explorer.next",
                tooltip="Go to the next divergence"),
        Binding("p", "previous_divergence", "prev", id="explorer.previous",
                tooltip="Go to the previous divergence"),
        Binding("slash", "filter", "filter", id="explorer.filter", key_display="/",
                tooltip="Show only stages with these words: a name, a layer, a verdict"),
        Binding("escape", "clear_filter", "all stages", id="explorer.clear-filter",
                tooltip="Show all stages again; where only one pane fits, go back to them"),
        Binding("s", "sort", "sort", id="explorer.sort",
                tooltip="Sort by computation, cosine, relative L2, model or kernel error"),
        Binding("t", "measure", "figures", id="explorer.measure",
                tooltip="Show the cumulative, the model or the kernel judgment in the tree"),
        Binding("w", "why", "why", id="explorer.why",
                tooltip="Why this stage has its verdict, and back"),
        Binding("k", "top_k", "top-K", id="explorer.top-k",
                tooltip="Show 5, 10, 20, 50, 100 or 200 of the largest differences"),
        Binding("left_square_bracket", "tab(-1)", "previous tab", id="explorer.previous-tab",
                key_display="[", show=False, tooltip="The previous tab of the detail pane"),
        Binding("right_square_bracket", "tab(1)", "next tab", id="explorer.next-tab",
                key_display="]", show=False, tooltip="The next tab of the detail pane"),
        Binding("tab", "next_pane", "next pane", id="explorer.next-pane", show=False,
                tooltip="Go to the next pane: stages, figures, differences"),
        Binding("question_mark", "help", "help", id="explorer.help", key_display="?",
                tooltip="Every key, and what the verdicts mean"),
    ]  # fmt: skip

    top_k = reactive(DEFAULT_TOP_K)
    # No key comes or goes with the tab: the footer would be made anew, which takes a whole frame.
    tab = reactive(DetailTab.TOP_K)
    # What the footer offers depends on these; setting them draws it anew.
    is_open = reactive(False, bindings=True)
    is_filtered = reactive(False, bindings=True)
    has_divergence = reactive(False, bindings=True)

    def __init__(self, request: Request, engine: Engine | None = None) -> None:
        super().__init__()
        self._request = request
        self._engine = engine
        self.state = RunState()
        opening = f"opening {_subject(request)}…"
        self.tree_of_stages = StageTree(self.state, opening, id="tree")
        self.title_line = RunTitle(self.state, opening, id="title")
        self.verdict_bar = VerdictBar(self.state, opening, id="verdict")
        self.detail = StageDetail(self.state, id="detail")
        self.engine_worker: Worker[None] | None = None
        self._refresh_timer: Timer | None = None
        self._detail_timer: Timer | None = None
        self._is_detail_judged = False
        # On a tiny screen, in the place of the tree.
        self._is_detail_open = False

    def compose(self) -> ComposeResult:
        """Title, finding, stages and detail side by side, keys."""
        yield self.title_line
        yield self.verdict_bar
        with Horizontal(id="body"):
            pane = StagePane(self.tree_of_stages, id="stages")
            pane.border_title = "Stages"
            yield pane
            yield self.detail
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Paint first, then run."""
        self.tree_of_stages.focus()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._show_all())
        self.call_after_refresh(self._start_run)

    def _start_run(self) -> None:
        self.engine_worker = self._run_engine()

    @work(thread=True, exclusive=True, exit_on_error=False, group="run")
    def _run_engine(self) -> None:
        worker = get_current_worker()
        stream_run(self._request, self.post_message, lambda: worker.is_cancelled, self._engine)

    # The run

    @on(RunOpened)
    def _open_run(self, event: RunOpened) -> None:
        self.state.open(event.header)
        if self.state.layers:
            self.tree_of_stages.expanded.add(self.state.layers[0])
        if self.state.measures:
            self._choose(measure=self.state.measures[0])
        self.is_open = True
        self._show_all()
        if event.header.notes:
            notes = "\n".join(visible(note) for note in event.header.notes)
            self.notify(notes, severity="warning", timeout=8, markup=False)

    @on(StageJudged)
    def _add_stage(self, event: StageJudged) -> None:
        self.state.add(event.report)
        if self.state.divergences and not self.has_divergence:
            self.has_divergence = True
            layer = self.state.divergences[0].layer
            if layer is not None and not self.tree_of_stages.user_moved:
                self.tree_of_stages.expanded = {layer}
        if self._refresh_timer is None:
            self._refresh_timer = self.set_timer(REFRESH_S, self._show_progress)

    @on(RunFinished)
    def _finish_run(self, event: RunFinished) -> None:
        self.state.report = event.report
        if self.state.divergences and not self.tree_of_stages.user_moved:
            self.tree_of_stages.go_to(self.state.divergences[0])
        self._show_all()

    @on(RunFailed)
    def _fail_run(self, event: RunFailed) -> None:
        self.state.error = event.error
        self._show_all()
        self.app.push_screen(ErrorScreen(event.error, has_rows=self.state.header is not None))

    def _show_progress(self) -> None:
        """Draw what changes while stages come in; a stage's own figures change but once."""
        self._refresh_timer = None
        self.tree_of_stages.rearrange()
        self.verdict_bar.refresh()
        row = self.tree_of_stages.row
        if row.key is None or (row.key in self.state.reports) != self._is_detail_judged:
            self._show_detail()

    def _show_all(self) -> None:
        """Draw everything from the state."""
        self._make_room()
        self.query_one(StageHeadings).refresh()
        self.title_line.refresh()
        self._show_detail()
        self._show_progress()

    # The cursor and the detail pane

    @on(StageTree.Highlighted)
    def _highlight(self) -> None:
        if self._detail_timer is not None:
            self._detail_timer.stop()
        self._detail_timer = self.set_timer(DETAIL_DELAY_S, self._show_detail)

    def _show_detail(self) -> None:
        row = self.tree_of_stages.row
        self.detail.show(row, self.top_k, self.tab)
        report = None if row.key is None else self.state.reports.get(row.key)
        self._is_detail_judged = report is not None

    def on_resize(self) -> None:
        """Columns depend on the width."""
        self.call_after_refresh(self._show_all)

    def watch_top_k(self) -> None:
        """Fill the table anew."""
        if self.is_mounted:
            self._show_detail()

    def watch_tab(self) -> None:
        """Show the other tab; on a tiny screen Why takes the place of the tree."""
        if self.is_mounted:
            self._make_room()
            self._show_detail()

    def _make_room(self) -> None:
        """Give the detail pane the screen, or take it back."""
        # Elsewhere the class would mean nothing, and to set it costs what a whole key may.
        is_small = self.has_class("-tiny") or self.has_class("-short")
        needs_room = is_small and (self.tab is DetailTab.WHY or self._is_detail_open)
        if needs_room != self.has_class("-why"):
            self.set_class(needs_room, "-why")

    @on(TabStrip.Chosen)
    def _open_tab(self, event: TabStrip.Chosen) -> None:
        self.tab = event.tab

    @on(StageTree.Opened)
    def _open_stage(self) -> None:
        if self.has_class("-tiny"):
            self._swap_panes(to_detail=True)

    def _swap_panes(self, to_detail: bool) -> None:
        self._is_detail_open = to_detail
        if not to_detail:
            self.tab = DetailTab.TOP_K
        self._make_room()
        self.call_after_refresh((self.detail if to_detail else self.tree_of_stages).focus)

    @property
    def _hides_tree(self) -> bool:
        return self.has_class("-tiny") and self.has_class("-why")

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

    # Actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Which keys work now; the footer shows those."""
        match action:
            case "filter" | "next_divergence":
                return self.is_open
            case "previous_divergence":
                return self.has_divergence
            case "top_k":
                return self.is_open and self.state.has_oracle
            case "sort":
                return self.is_open and bool(self.state.measures)
            case "measure":
                return self.is_open and len(self.state.measures) > 1
            case "why" | "tab":
                return self.is_open
            case "clear_filter":
                return self.is_filtered or self._hides_tree
        return True

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

    async def action_clear_filter(self) -> None:
        """Show all stages again, or the tree before that."""
        if self._hides_tree:
            self._swap_panes(to_detail=False)
            return
        self.tree_of_stages.focus()
        await self.query("#filter").remove()
        self.is_filtered = False
        self.tree_of_stages.choose(filter=Filter())

    def action_next_pane(self) -> None:
        """Go to the next pane, or show it where only one fits."""
        if self.has_class("-tiny") and not isinstance(self.focused, Input):
            self._swap_panes(to_detail=not self._hides_tree)
        else:
            self.focus_next()

    def action_sort(self) -> None:
        """Sort another way; the tree shows the figures that it is sorted by."""
        order = self.tree_of_stages.order.following(self.state.measures)
        self._choose(order=order, measure=order.measure)

    def action_measure(self) -> None:
        """Show the figures of the next judgment; a sorted tree is sorted by them."""
        tree, measures = self.tree_of_stages, self.state.measures
        measure = measures[(measures.index(tree.measure) + 1) % len(measures)]
        is_sorted = tree.order is not SortOrder.COMPUTATION
        self._choose(order=SortOrder.by(measure) if is_sorted else None, measure=measure)

    def _choose(self, *, order: SortOrder | None = None, measure: Measure | None = None) -> None:
        tree = self.tree_of_stages
        tree.choose(order=order, measure=measure)
        told = ["Stages"]
        if tree.measure not in (Measure.CUMULATIVE, tree.order.measure):
            told.append(f"{tree.measure.value} judgment")
        if tree.order is not SortOrder.COMPUTATION:
            told.append(tree.order.value)
        self.query_one("#stages").border_title = ", ".join(told)
        self.query_one(StageHeadings).refresh()

    def action_why(self) -> None:
        """Show why, or what was shown before."""
        self.tab = DetailTab.TOP_K if self.tab is DetailTab.WHY else DetailTab.WHY

    def action_tab(self, step: int) -> None:
        """Show another tab."""
        self.tab = self.tab.step(step)

    def action_top_k(self) -> None:
        """Open the table; in it, show more of the largest differences, then few again."""
        if self.tab is DetailTab.TOP_K:
            self.top_k = TOP_K_STEPS[(TOP_K_STEPS.index(self.top_k) + 1) % len(TOP_K_STEPS)]
        self.tab = DetailTab.TOP_K

    def action_help(self) -> None:
        """Show every key."""
        self.app.push_screen(HelpScreen(self.active_bindings.values()))

    def palette_actions(self) -> Iterator[tuple[str, str, str]]:
        """What the palette offers: (name, tooltip, action) of every key that works now."""
        seen = set()
        for active in self.active_bindings.values():
            binding = active.binding
            name = binding.description
            if not binding.tooltip or binding.system or not active.enabled or name in seen:
                continue
            if active.node in (self, self.app) and binding.action != "command_palette":
                seen.add(name)
                space = "app." if active.node is self.app else ""
                action = binding.action.removeprefix("app.")
                yield name, binding.tooltip, f"{space}{action}"
        yield "theme", "Change the colours", "app.change_theme"


def _subject(request: Request) -> str:
    """What is being opened, in one name."""
    path = request.model or request.trace or request.oracle
    return "" if path is None else base_name(str(path))
