"""The pane of pictures: one of them in view, made in a worker while the screen answers keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from textual import on, work
from textual.containers import Vertical
from textual.timer import Timer
from textual.widgets import Input
from textual.worker import get_current_worker

from aprtui.pictures import Ask, PictureMade, PictureMaker
from aprtui.text import visible
from aprtui.widgets.picture_view import PictureView
from aprtui.widgets.tabs import DetailTab

if TYPE_CHECKING:
    from aprcore.network.stages import StageKey
    from aprcore.records.report import RunHeader, StageReport
    from aprcore.records.tensor_source import TensorSource

# A picture that takes longer says so; a shorter wait would only flicker.
PATIENCE_S = 0.1


class _Making(NamedTuple):
    """What is being made, and for which view."""

    view: PictureView
    stage: StageKey
    ask: Ask


class Views(dict[DetailTab, PictureView]):
    """A picture for each tab that has one, made when it is first asked for.

    Most are never opened, and each takes milliseconds to read and to mount.
    """

    def __init__(self, mount: Callable[[PictureView], Any]) -> None:
        super().__init__()
        self._mount = mount

    def __missing__(self, tab: DetailTab) -> PictureView:
        widget = tab.load_picture()
        if widget is None:
            raise KeyError(tab)
        self[tab] = view = widget(id=tab.name.lower())
        self._mount(view)
        return view


class PicturePane(Vertical):
    """The pictures of a stage, of which a tab shows one.

    Attributes:
        views: The picture of each tab.
        open_view: The one that is shown.
    """

    DEFAULT_CSS = """
    PicturePane { height: 1fr; min-height: 5; display: none; }
    PicturePane PictureView { display: none; height: 1fr; overflow-x: hidden; }
    PicturePane #place { height: 1; border: none; padding: 0 1; }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.views = Views(self.mount)
        self.open_view: PictureView | None = None
        self._maker: PictureMaker | None = None
        self._making: _Making | None = None
        self._waiting_timer: Timer | None = None

    def use(self, tensors: TensorSource) -> None:
        """Take the tensors of a run, in place of those of the last."""
        self.workers.cancel_group(self, "picture")
        self._making = None
        self._maker = PictureMaker(tensors)

    def show(
        self, report: StageReport | None, header: RunHeader | None, tab: DetailTab, said: str
    ) -> None:
        """Show the picture of a tab, or what is said where a row has none."""
        if not self.is_attached:
            return  # the user is leaving
        view = self.views[tab] if tab.is_picture else None
        if view is not self.open_view:
            if self.open_view is not None:
                self.open_view.display = False
            if view is not None:
                view.display = True
            self.open_view = view
        is_shown = view is not None
        if self.display != is_shown:
            self.display = is_shown
        if view is None:
            return
        if report is None or header is None:
            view.forget(said)
        else:
            view.open(report, header)
            self._turn()

    @on(PictureView.Wanted)
    def _turn(self) -> None:
        """Have made what the open picture is missing."""
        view, maker = self.open_view, self._maker
        if view is None or view.report is None or view.size.height == 0 or maker is None:
            return
        stage = view.report.key
        ask = view.ask()
        while ask is not None and (found := maker.find(stage, ask)) is not None:
            view.take(ask, found)
            ask = view.ask()
        if ask is None:
            self._rest()
            return
        making = self._making
        if making is not None and making.stage == stage and ask.waits_for(making.ask):
            return  # it will be asked for again when that is done
        self._making = _Making(view, stage, ask)
        if self._waiting_timer is None:
            self._waiting_timer = self.set_timer(PATIENCE_S, self._say_waiting)
        self._make(maker, view.report, ask)

    # Described, for else the toolkit writes out every argument: a report's arrays in 10 ms.
    @work(thread=True, exclusive=True, exit_on_error=False, group="picture", description="picture")
    def _make(self, maker: PictureMaker, report: StageReport, ask: Ask) -> None:
        worker = get_current_worker()
        maker.make(report, ask, lambda: worker.is_cancelled, self.post_message)

    @on(PictureMade)
    def _take_picture(self, event: PictureMade) -> None:
        event.stop()
        making, view = self._making, self.open_view
        if making is None or (making.stage, making.ask) != (event.stage, event.ask):
            return
        self._making = None
        # Another tab may have been opened meanwhile, or another stage.
        if view is making.view and view.report is not None and view.report.key == event.stage:
            if event.error is None:
                view.take(event.ask, event.picture)
            else:
                self._rest()
                view.forget(f"no picture: {_said_of(event.error)}")
        self._turn()

    def _say_waiting(self) -> None:
        if self.open_view is not None:
            self.open_view.wait(True)

    def _rest(self) -> None:
        if self._waiting_timer is not None:
            self._waiting_timer.stop()
            self._waiting_timer = None
        for view in self.views.values():
            view.wait(False)

    @property
    def is_busy(self) -> bool:
        """Whether a picture that is wanted is being made."""
        return self._making is not None

    # Keys

    def can(self, command: str) -> bool:
        """Whether a key of the screen does something to the open picture."""
        return self.open_view is not None and command in self.open_view.commands

    def do(self, command: str) -> None:
        """Do it."""
        if self.open_view is not None:
            self.open_view.commands[command]()

    # A place that is typed

    @property
    def is_asking(self) -> bool:
        """Whether a place is being typed."""
        return bool(self.query("#place"))

    async def ask_place(self) -> None:
        """Ask for a place to go to."""
        if self.open_view is None or self.query("#place"):
            return
        words = Input(placeholder="index, or token, head, dim", id="place")
        await self.mount(words, before=0)
        self.screen.set_focus(words)

    @on(Input.Submitted, "#place")
    async def _go_to_place(self, event: Input.Submitted) -> None:
        event.stop()
        wrong = "" if self.open_view is None else self.open_view.jump(event.value)
        if wrong:
            self.notify(wrong, severity="warning", markup=False)
            return
        await self.leave_place()

    async def leave_place(self) -> None:
        """Take the question back."""
        if self.open_view is not None:
            self.open_view.focus()
        await self.query("#place").remove()


def _said_of(error: Exception) -> str:
    from aprcore.ground.errors import AprError

    is_ours = isinstance(error, AprError)
    return visible(str(error) if is_ours else f"a bug in aprtui: {error!r}")
