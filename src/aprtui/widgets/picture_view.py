"""What the pictures of a tensor have in common: what they want, and what they say meanwhile."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.filter import ANSIToTruecolor
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from aprtui.ramp import Ramp, ramp_of
from aprtui.theme import Paint
from aprtui.widgets.lines import cells_of, strip_of

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout
    from aprcore.records.report import RunHeader, StageReport
    from aprtui.pictures import Ask

COMPUTING = "computing…"


class PictureView(ScrollView, can_focus=True):
    """A picture of one stage, drawn line by line where it is in view.

    A view says what it needs with `ask`, gets it with `take`, and posts `Wanted` when that changes.
    Until a picture of another stage is there, the last one stays: a flash would be worse.

    Attributes:
        report: The stage that is shown.
        header: Its run.
        commands: What the screen's keys do here, by name.
    """

    ALLOW_SELECT = False
    # Keys of this picture, in few words.
    HINT = ""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "back", id="picture.leave", tooltip="Back to the stages"),
    ]

    class Wanted(Message):
        """Another picture is needed for what is in view."""

    class Left(Message):
        """The user goes back to the stages."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.report: StageReport | None = None
        self.header: RunHeader | None = None
        self.commands: Mapping[str, Callable[[], None]] = {}
        self._notice: list[Text] = []
        self._said = ""
        self._is_waiting = False
        self._is_current = False
        self._ramp: Ramp | None = None
        self._ground = Style.null()
        self._theme = ""

    def on_focus(self) -> None:
        """The cursor shows."""
        self.refresh()

    def on_blur(self) -> None:
        """The cursor hides."""
        self.refresh()

    def open(self, report: StageReport, header: RunHeader) -> None:
        """Show another stage, or the same with other figures."""
        if report is self.report:
            return
        self.report, self.header = report, header
        self.start()
        self.post_message(self.Wanted())

    def forget(self, said: str) -> None:
        """Show no stage, and say why."""
        self.report = self.header = None
        self.reserve(0)
        self.say(said)

    @property
    def layout_of_stage(self) -> Layout | None:
        """The layout of the stage's tensor, where one is known."""
        return None if self.report is None else self.report.layout

    @property
    def ranked(self) -> list[int]:
        """Where the largest differences are, the largest first."""
        found = None if self.report is None else self.report.comparison
        return [] if found is None else found.top.indices.tolist()

    def start(self) -> None:
        """Begin a stage anew; what is drawn stays until its picture comes."""
        self._is_current = False

    @property
    def is_stale(self) -> bool:
        """Whether what is drawn is of another stage, or nothing yet."""
        return not self._is_current

    @abstractmethod
    def ask(self) -> Ask | None:
        """The next picture that is missing for what is in view."""

    @abstractmethod
    def take(self, ask: Ask, picture: Any) -> None:
        """A picture has come."""

    @abstractmethod
    def draw(self, y: int) -> Strip:
        """The line at `y`."""

    @abstractmethod
    def jump(self, text: str) -> str:
        """Go to the place that was typed; returns what is wrong with it, or nothing."""

    def say(self, text: str) -> None:
        """Say something in place of a picture; empty: show the picture."""
        self._said = text
        self._notice = []
        self.refresh()

    def wait(self, is_waiting: bool) -> None:
        """Whether a picture is taking its time."""
        if is_waiting and self.is_stale:
            self.say(COMPUTING)
        if is_waiting != self._is_waiting:
            self._is_waiting = is_waiting
            self.refresh()

    def action_leave(self) -> None:
        """Go back to the stages."""
        self.post_message(self.Left())

    def on_resize(self) -> None:
        """There may be more in view."""
        self._notice = []
        self.fit()
        self.post_message(self.Wanted())

    def fit(self) -> None:
        """Take over the size."""

    @property
    def line_width(self) -> int:
        """Cells of a line."""
        return cells_of(self)

    @property
    def paint(self) -> Paint:
        """The theme's inks."""
        return Paint(self.app.theme_variables)

    @property
    def ramp(self) -> Ramp:
        """The theme's ramp."""
        if self._ramp is None or self._theme != self.app.theme:
            # The toolkit finds a widget's own style anew for every line: a tenth of a millisecond.
            self._ramp, self._ground = ramp_of(self.app), self.rich_style
            self._theme = self.app.theme
        return self._ramp

    @property
    def ground(self) -> Style:
        """The widget's own style."""
        _ = self.ramp
        return self._ground

    def render_lines(self, crop: Region) -> list[Strip]:
        """Lines as they are: the toolkit would add the widget's style to every piece of them again.

        They have no frame, and their colours are true ones already.
        """
        strips = [self.render_line(y) for y in crop.line_range]
        for line_filter in self.get_line_filters():
            if not isinstance(line_filter, ANSIToTruecolor):
                ground = self.background_colors[1]
                strips = [strip.apply_filter(line_filter, ground) for strip in strips]
        return [strip.crop(*crop.column_span) for strip in strips]

    def render_line(self, y: int) -> Strip:
        """A line of the picture, or of what is said in its place."""
        if not self._said:
            return self.draw(y)
        if not self._notice:
            text = Text(self._said, self.paint("ink-quiet"))
            self._notice = list(text.wrap(self.app.console, max(1, self.line_width)))
        return self.strip(self._notice[y] if y < len(self._notice) else Text(""))

    def strip(self, content: Text | list[Segment], style: Style | None = None) -> Strip:
        """A whole line of text or segments."""
        ground = self.ground if style is None else self.ground + style
        return strip_of(self.app, content, ground, self.outer_size.width)

    def cursor_style(self) -> Style:
        """What the value under the cursor is drawn in."""
        ink, ground = (self.paint(f"block-cursor-{part}") for part in ("foreground", "background"))
        return Style(color=ink.color, bgcolor=ground.color)

    def reserve(self, lines: int) -> None:
        """Say how many lines there are to scroll through."""
        self.virtual_size = Size(self.line_width, lines)


def both_sides(trace: float | None, oracle: float | None) -> list[tuple[str, str, float]]:
    """Name, ink and value of each side that there is of a place, and of their distance."""
    found = [("trace", "ink-trace", trace), ("oracle", "ink-oracle", oracle)]
    if trace is not None and oracle is not None:
        found.append(("|d|", "ink-quiet", abs(trace - oracle)))
    return [(name, ink, value) for name, ink, value in found if value is not None]
