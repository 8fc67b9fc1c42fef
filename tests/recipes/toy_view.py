"""The first values of a stage, in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from textual.strip import Strip

from aprtui.pictures import Ask, OpenTensor
from aprtui.widgets.picture_view import PictureView


@dataclass(frozen=True, slots=True)
class FirstAsk(Ask):
    """How many values there are, up to a number."""

    most: int

    def make(self, tensor: OpenTensor, is_cancelled: Callable[[], bool]) -> int:
        """Read them."""
        from aprcore.pictures import values

        window = values(tensor.pair, 0, self.most)
        assert window.trace is not None
        return len(window.trace)


class FirstValues(PictureView):
    """A line that says how many values were read."""

    count = 0

    def ask(self) -> Ask | None:
        """The number, once."""
        return None if self._is_current else FirstAsk(10)

    def take(self, ask: Ask, picture: Any) -> None:
        """Show it."""
        self.count, self._is_current = picture, True
        self.say("")

    def jump(self, text: str) -> str:
        """Nowhere."""
        return "there is one line"

    def draw(self, y: int) -> Strip:
        """The line."""
        return self.strip(Text(f"{self.count} values" if y == 0 else ""))
