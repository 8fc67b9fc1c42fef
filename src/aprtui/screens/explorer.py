"""The explorer: the tree of stages, what is known of the one under the cursor, the finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.command import Provider
from textual.containers import Horizontal
from textual.reactive import reactive
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Input

from aprtui.keys import EXPLORER_KEYS
from aprtui.run_state import RunState
from aprtui.screen_options import ScreenOptions
from aprtui.screens.handing_on import HandingOn
from aprtui.screens.navigation import Navigation
from aprtui.screens.running import Running
from aprtui.screens.views import Views
from aprtui.session import DeviceTold, RunFailed, RunFinished, RunOpened, StageJudged
from aprtui.settings import DEFAULT_TOP_K, TOP_K_STEPS
from aprtui.text import visible
from aprtui.widgets.profile_strip import ProfileStrip
from aprtui.widgets.rejection import Rejection
from aprtui.widgets.run_title import RunTitle, base_name
from aprtui.widgets.stage_detail import StageDetail
from aprtui.widgets.stage_pane import StagePane
from aprtui.widgets.stage_tree import StageTree
from aprtui.widgets.tabs import DetailTab, TabStrip
from aprtui.widgets.verdict_bar import VerdictBar

if TYPE_CHECKING:
    from aprcore.records.report import StageReport
    from aprcore.runs.request import Request
    from aprtui.session import Engine

# Stages can come every two milliseconds; the screen follows them this often.
REFRESH_S = 1 / 20
# Long enough that a held arrow key does not fill a table per row, too short to be noticed.
DETAIL_DELAY_S = 0.05


def _palette() -> type[Provider]:
    """The palette's, which is read when it is opened: the first screen is painted without."""
    from aprtui.screens.palette import ExplorerCommands

    return ExplorerCommands


class ExplorerScreen(Screen[None]):
    """The first screen: draws what is known of a run, and gives each key to what answers it.

    Attributes:
        state: What is known of the run; only what the engine's messages are handled by changes it.
        tree_of_stages: The tree.
        stages: The tree's pane, where its rows are chosen.
        navigation: Moves the tree's cursor.
        running: Runs the request.
        views: Opens other screens on the run.
        is_open: Whether the run's files were opened.
        has_divergence: Whether a stage diverges.
        top_k: How many of the largest differences are shown.
        tab: What the lower part of the detail pane shows.
    """

    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {_palette}

    BINDINGS: ClassVar[list[BindingType]] = [*EXPLORER_KEYS]

    # What the footer offers depends on these; setting them draws it anew.
    is_open = reactive(False, bindings=True)
    has_divergence = reactive(False, bindings=True)
    top_k = reactive(DEFAULT_TOP_K)
    # No key comes or goes with the tab: the footer would be made anew, which takes a whole frame.
    tab = reactive(DetailTab.TOP_K)

    def __init__(
        self, request: Request, engine: Engine | None = None, options: ScreenOptions | None = None
    ) -> None:
        super().__init__()
        opening, options = f"opening {_subject(request)}…", options or ScreenOptions()
        self.state = RunState()
        self.tree_of_stages = StageTree(self.state, opening, id="tree")
        self.stages = StagePane(self.tree_of_stages, id="stages")
        self.navigation = Navigation(self, self.stages)
        self.running = Running(self, self.state, request, engine, options)
        self.views = Views(self, self.tree_of_stages, self.navigation)
        self._handing_on = HandingOn(self, self.tree_of_stages, self.running, options)
        # What the keys do, by name: each part brings its own.
        self._commands = {
            **self.navigation.commands,
            **self.stages.commands,
            **self.running.commands,
            **self.views.commands,
            **self._handing_on.commands,
        }
        self.title_line = RunTitle(self.state, opening, id="title")
        self.verdict_bar = VerdictBar(self.state, opening, id="verdict")
        self.rejection = Rejection(self.state, id="rejection")
        self.detail = StageDetail(self.state, id="detail")
        self._refresh_timer: Timer | None = None
        self._detail_timer: Timer | None = None
        # What the detail pane says its stage was found to be.
        self._detailed: StageReport | None = None
        # On a tiny screen, in the place of the tree.
        self._is_detail_open = False

    def compose(self) -> ComposeResult:
        """Title, finding, stages and detail side by side, keys."""
        yield self.title_line
        yield self.verdict_bar
        yield self.rejection
        yield self.navigation.breadcrumb
        with Horizontal(id="body"):
            yield self.stages
            yield self.detail
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Paint first, then run."""
        self.tree_of_stages.focus()
        self.app.theme_changed_signal.subscribe(self, lambda _: self.show_all())
        self.call_after_refresh(self._begin)

    async def _begin(self) -> None:
        """Open the run in its thread, and meanwhile make what will show it."""
        if self.is_attached:  # else the user has left already
            self.running.start()
            await self.detail.fill()
            self.show_all()

    # The run

    @on(RunOpened)
    def _open_run(self, event: RunOpened) -> None:
        """Unfold the first layer, choose what to show, and say what the user should read."""
        self.running.open(event)
        self.has_divergence = False
        was_open, self.is_open = self.is_open, True
        if not was_open and self.state.layers:
            self.tree_of_stages.expanded.add(self.state.layers[0])
        if self.tree_of_stages.measure not in self.state.measures or not was_open:
            for measure in self.state.measures[:1]:
                self.stages.choose(measure=measure)
        self.detail.pictures.use(event.tensors)
        self.show_all()
        if event.header.notes:
            notes = "\n".join(visible(note) for note in event.header.notes)
            self.notify(notes, severity="warning", timeout=8, markup=False)
        if self.running.request.against is not None and not was_open:
            self.views.show_parity()  # it is what two dumps were named for

    @on(StageJudged)
    def _add_stage(self, event: StageJudged) -> None:
        self.state.take(event.stage)
        if self.state.divergences and not self.has_divergence:
            self.has_divergence = True
            layer = self.state.divergences[0].layer
            if layer is not None and not self.tree_of_stages.user_moved:
                self.tree_of_stages.expanded = {layer}
        if self._refresh_timer is None:
            self._refresh_timer = self.set_timer(REFRESH_S, self._show_progress)

    @on(DeviceTold)
    def _take_device(self, event: DeviceTold) -> None:
        self.state.take(event.event)
        self.show_all()

    @on(RunFailed)
    def _fail_run(self, event: RunFailed) -> None:
        self.running.fail(event.error)
        self.show_all()

    @on(RunFinished)
    def _finish_run(self, event: RunFinished) -> None:
        """Go to the first divergence, unless the user has taken the cursor."""
        self.state.take(event.report)
        if self.state.divergences and not self.tree_of_stages.user_moved:
            self.tree_of_stages.go_to(self.state.divergences[0])
        self.show_all()
        self.views.tell_changes()
        self._handing_on.save()

    def on_unmount(self) -> None:
        """Close the files."""
        self.running.close()

    # What is drawn

    def _show_progress(self) -> None:
        """Draw what changes while stages come in; a stage's own figures change but rarely."""
        self._refresh_timer = None
        self.tree_of_stages.rearrange()
        self.verdict_bar.refresh()
        self.stages.profile.refresh()
        self.views.refresh()
        row = self.tree_of_stages.row
        if row.key is None or self.state.reports.get(row.key) is not self._detailed:
            self._show_detail()

    def show_all(self) -> None:
        """Draw everything from the state."""
        self._make_room()
        self.stages.headings.refresh()
        self.title_line.refresh()
        self.rejection.refresh_run()
        self._show_detail()
        self._show_progress()

    # The cursor and the detail pane

    @on(StageTree.Highlighted)
    def _highlight(self) -> None:
        self.navigation.breadcrumb.leave(self.tree_of_stages.row.key)
        if self._detail_timer is not None:
            self._detail_timer.stop()
        self._detail_timer = self.set_timer(DETAIL_DELAY_S, self._show_detail)

    def _show_detail(self) -> None:
        if self._detail_timer is not None:
            self._detail_timer.stop()
            self._detail_timer = None
        row = self.tree_of_stages.row
        self.detail.show(row, self.top_k, self.tab)
        self._detailed = None if row.key is None else self.state.reports.get(row.key)

    def on_resize(self) -> None:
        """Columns depend on the width; a run that is not open has none."""
        if self.detail.is_filled:
            self.call_after_refresh(self.show_all)

    def watch_top_k(self) -> None:
        """Fill the table anew."""
        if self.is_mounted:
            self._show_detail()

    def watch_tab(self) -> None:
        """Show the other tab; on a tiny screen it takes the place of the tree."""
        if self.is_mounted:
            self._make_room()
            self._show_detail()
            if self._hides_tree and self.tab.is_picture:
                self.call_after_refresh(self.detail.focus_inside)
            elif self.detail.has_focused_picture and self.tab.is_picture:
                self.detail.focus_inside()
            elif self.detail.has_focused_picture:
                self.tree_of_stages.focus()

    def _make_room(self) -> None:
        """Give the detail pane the screen, or take it back."""
        # Elsewhere the class would mean nothing, and to set it costs what a whole key may.
        is_small = self.has_class("-tiny") or self.has_class("-short")
        needs_room = is_small and (self.tab is not DetailTab.TOP_K or self._is_detail_open)
        if needs_room != self.has_class("-why"):
            self.set_class(needs_room, "-why")

    @on(TabStrip.Chosen)
    def _open_tab(self, event: TabStrip.Chosen) -> None:
        self.tab = event.tab

    @on(StageTree.Opened)
    def _open_stage(self) -> None:
        if self.has_class("-tiny"):
            self._swap_panes(to_detail=True)
        elif self.tab.is_picture:
            self.detail.focus_inside()

    def on_picture_view_left(self) -> None:
        """Go back to the stages; named as the toolkit has it, for a view is read when it opens."""
        if self._hides_tree:
            self._swap_panes(to_detail=False)
        else:
            self.tree_of_stages.focus()

    def _swap_panes(self, to_detail: bool) -> None:
        self._is_detail_open = to_detail
        if not to_detail:
            self.tab = DetailTab.TOP_K
        self._make_room()
        focus = self.detail.focus_inside if to_detail else self.tree_of_stages.focus
        self.call_after_refresh(focus)

    @property
    def _hides_tree(self) -> bool:
        return self.has_class("-tiny") and self.has_class("-why")

    @property
    def _hides_detail(self) -> bool:
        return self.has_class("-tiny") and not self.has_class("-why")

    # Actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Which keys work now; the footer shows those."""
        if action == "picture":
            return self.is_open and self.detail.pictures.can(str(parameters[0]))
        match parameters[0] if action == "do" else action:
            case "previous":
                return self.has_divergence
            case "top_k":
                return self.is_open and self.state.has_oracle
            case "sort":
                return self.is_open and bool(self.state.measures)
            case "measure":
                return self.is_open and len(self.state.measures) > 1
            case "parity":
                return self.state.has_second_side
            case "place":
                return self.is_open and self.tab.is_picture
            case "clear_filter":
                is_asking = self.is_open and self.detail.pictures.is_asking
                return self.stages.is_filtered or self._hides_tree or is_asking
            case "next" | "upstream" | "downstream" | "blame" | "filter" | "why" | "profile":
                return self.is_open
            case "rerun" | "changes" | "export" | "copy":
                return self.is_open
        return True

    def action_do(self, command: str) -> None:
        """Have a part of the screen do something."""
        self._commands[command]()

    async def action_filter(self) -> None:
        """Ask for words that stages must have."""
        await self.stages.ask_filter()

    async def action_clear_filter(self) -> None:
        """Show all stages again, or the tree before that."""
        if self.is_open and self.detail.pictures.is_asking:
            await self.detail.pictures.leave_place()
        elif self._hides_tree:
            self._swap_panes(to_detail=False)
        else:
            self.tree_of_stages.focus()
            self.stages.drop_filter()

    def action_next_pane(self) -> None:
        """Go to the next pane, or show it where only one fits."""
        if self.has_class("-tiny") and not isinstance(self.focused, Input):
            self._swap_panes(to_detail=not self._hides_tree)
        else:
            self.focus_next()

    def action_why(self) -> None:
        """Show why, or what was shown before."""
        self.tab = DetailTab.TOP_K if self.tab is DetailTab.WHY else DetailTab.WHY

    def action_blame(self) -> None:
        """Go to the stage to blame for the one under the cursor, and show why."""
        if self.navigation.go_to_blamed():
            self.tab = DetailTab.WHY

    def action_tab(self, step: int) -> None:
        """Show another tab."""
        self.tab = self.tab.step(step)

    def action_open_tab(self, name: str) -> None:
        """Show a tab by its name."""
        self._open_detail(DetailTab[name])

    def _open_detail(self, tab: DetailTab) -> None:
        """Show a tab, also on a tiny screen, where the tree gives way to it."""
        self.tab = tab
        if self._hides_detail:
            self._swap_panes(to_detail=True)

    def action_picture(self, command: str) -> None:
        """Do something to the open picture."""
        self.detail.pictures.do(command)

    async def action_place(self) -> None:
        """Ask for a place in the open picture."""
        await self.detail.pictures.ask_place()

    def action_top_k(self) -> None:
        """Open the table; in it, show more of the largest differences, then few again."""
        if self.tab is DetailTab.TOP_K and not self._hides_detail:
            self.top_k = TOP_K_STEPS[(TOP_K_STEPS.index(self.top_k) + 1) % len(TOP_K_STEPS)]
        self._open_detail(DetailTab.TOP_K)

    @on(ProfileStrip.Chosen)
    def _open_layer(self, event: ProfileStrip.Chosen) -> None:
        self.navigation.go_to(event.key)


def _subject(request: Request) -> str:
    """What is being opened, in one name."""
    path = request.model or request.trace or request.oracle
    return "" if path is None else base_name(str(path))
