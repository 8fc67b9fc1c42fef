"""Where everything passes that a screen draws, as `aprtui.outgoing` is for what is printed."""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


class ScreenGate(LineFilter):
    """Lets no control code in text get to the terminal.

    Whoever draws a name makes it `visible` before it is laid out. What is forgotten there can only
    be taken out here, where every cell has its place: what takes none is dropped.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """A line without what does not print."""
        if all(map(_prints, segments)):
            return segments
        return [
            segment if _prints(segment)
            else Segment("".join(map(_printed, segment.text)), segment.style)
            for segment in segments
        ]  # fmt: skip


def _prints(segment: Segment) -> bool:
    # The explorer keeps words together with a space that does not break, which is no control code.
    return segment.text.replace(NO_BREAK_SPACE, " ").isprintable()


def _printed(character: str) -> str:
    is_text = character.isprintable() or character == NO_BREAK_SPACE
    return character if is_text else " " * cell_len(character)
