"""How far off each token is."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.binding import Binding, BindingType

from aprtui.pictures import Figures, TokensAsk
from aprtui.widgets.drawn_tokens import DrawnTokens

if TYPE_CHECKING:
    from aprtui.pictures import Ask, Picture

NO_PAIR = "tokens are compared where both sides are there, in one layout"


class TokenBars(DrawnTokens):
    """One line per token; `h` shows its heads instead."""

    HINT = "h heads · : go to"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "up", id="tokens.up", show=False, tooltip="One token up"),
        Binding("down", "move(1)", "down", id="tokens.down", show=False,
                tooltip="One token down"),
        Binding("left", "move_head(-1)", "previous head", id="tokens.left", show=False,
                tooltip="The head to the left"),
        Binding("right", "move_head(1)", "next head", id="tokens.right", show=False,
                tooltip="The head to the right"),
        Binding("pageup", "page(-1)", "page up", id="tokens.page-up", show=False,
                tooltip="One page up"),
        Binding("pagedown", "page(1)", "page down", id="tokens.page-down", show=False,
                tooltip="One page down"),
        Binding("home", "move(-1000000000)", "first", id="tokens.home", show=False,
                tooltip="The first token"),
        Binding("end", "move(1000000000)", "last", id="tokens.end", show=False,
                tooltip="The last token"),
    ]  # fmt: skip

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.commands = {"next-head": self._toggle_heads, "previous-head": self._toggle_heads}

    def ask(self) -> Ask | None:
        """The figures, once."""
        return None if self._is_current else TokensAsk()

    def take(self, ask: Ask, picture: Picture) -> None:
        """Show figures."""
        assert isinstance(picture, Figures)
        self._figures, self._is_current = picture, True
        self.say("" if picture.tokens is not None else NO_PAIR)
        self._name_tokens()
        self.token = max(0, min(self.token, self._count - 1))
        self.head = max(0, min(self.head, self._heads - 1))
        self.fit()

    def fit(self) -> None:
        """The cursor stays in view."""
        super().fit()
        self._keep_in_view()
        self.refresh()

    def jump(self, text: str) -> str:
        """Go to a token by its number."""
        if not text.strip().lstrip("-").isdecimal():
            return "type the number of a token"
        number = int(text)
        number += self._count if number < 0 else 0
        if not 0 <= number < self._count:
            return f"there are tokens 0 to {self._count - 1}"
        self._point(number, self.head)
        return ""

    def on_click(self, event: events.Click) -> None:
        """A click moves the cursor."""
        number = event.y - 1 + self.scroll_offset.y
        if event.y >= 1 and number < self._count:
            place = event.x - self._head_start
            is_head = self._shown_heads is not None and place >= 0
            head = self._first_head + place // self._head_cells if is_head else self.head
            self._point(number, head)

    def action_move(self, step: int) -> None:
        """Move the cursor by tokens."""
        self._point(self.token + step, self.head)

    def action_page(self, pages: int) -> None:
        """Move the cursor by pages."""
        self.action_move(pages * max(1, self._page))

    def action_move_head(self, step: int) -> None:
        """Move the cursor by heads."""
        self._point(self.token, self.head + step)

    def _toggle_heads(self) -> None:
        if self._figures is None or self._figures.by_head is None:
            self.notify("this stage has no heads")
            return
        self.by_head = not self.by_head
        self.fit()

    def _point(self, token: int, head: int) -> None:
        before, top, first = self.token, self.scroll_offset.y, self._first_head
        self.token = max(0, min(token, self._count - 1))
        self.head = max(0, min(head, self._heads - 1))
        self._keep_in_view()
        if (top, first) == (self.scroll_offset.y, self._first_head):
            self.refresh_cursor(before, self.token)
        else:
            self.refresh()

    def _keep_in_view(self) -> None:
        top = self.scroll_offset.y
        y = min(self.token, max(top, self.token - self._page + 1))
        if y != top:
            self.scroll_to(y=y, animate=False, force=True)

    def _name_tokens(self) -> None:
        """Texts and ids, where a line is one of the run's tokens."""
        header, report = self.header, self.report
        self._texts, self._ids = (), ()
        if header is None or header.tokens is None or report is None or report.layout is None:
            return
        texts = header.token_texts or ()
        if self._count == len(header.tokens) and "token" in report.layout.axes:
            self._ids, self._texts = header.tokens, texts
        elif self._count == 1:  # logits, or one decoding step: the last token
            self._ids, self._texts = header.tokens[-1:], texts[-1:]
