"""Consoles that draw on stdout and stderr; the text in what they draw is made visible."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from aprtui.outgoing import beneath
from aprtui.text import visible_lines


class VisibleConsole(Console):
    """Sends no control code but its own.

    Args:
        stderr: Whether it draws there rather than on stdout.
        options: As of `Console`.
    """

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        stream = beneath(sys.stderr if stderr else sys.stdout)
        super().__init__(file=stream, highlight=False, markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments, of which those that are text are made visible."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(visible_lines(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Tell the command line, which knows the exit code."""
        raise BrokenPipeError
