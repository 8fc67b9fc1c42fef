"""Where everything passes that this program writes to a terminal or to a pipe.

Names and tokens are anybody's text, and an escape sequence among them would drive the terminal:
move its cursor, change its title, write its clipboard. Whoever prints a line makes its parts
`visible`, so that they read well. What is forgotten there is spelled out here, as nothing but text
and line breaks gets through. What draws (a table's colours, a bar, a line that is overwritten)
goes beneath the gate, through the functions of this module, which see to the text in it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from aprcore.ground.visible import visible, visible_lines

_ERASE_LINE = "\r\x1b[K"


class Gate(io.TextIOBase):
    """A stream of text that passes on what prints, and spells out the rest.

    Attributes:
        beneath: The stream that it writes to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.beneath = stream
        # Where the terminal has no ✓, say "\\u2713".
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """What the stream beneath encodes text in."""
        return self.beneath.encoding

    def write(self, text: str) -> int:
        """Write text, made visible."""
        self.beneath.write(visible_lines(text))
        return len(text)

    def flush(self) -> None:
        """Have what was written leave."""
        self.beneath.flush()

    def fileno(self) -> int:
        """The descriptor."""
        return self.beneath.fileno()

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """No: what asks this wants to draw, which takes `is_terminal` and a console."""
        return False

    def close(self) -> None:
        """Leave the stream beneath open: it is not the gate's."""


@contextmanager
def gated() -> Iterator[None]:
    """Put a gate before stdout and stderr."""
    before = sys.stdout, sys.stderr
    # Who was started without one of them has None there.
    sys.stdout = sys.stdout and Gate(beneath(sys.stdout))
    sys.stderr = sys.stderr and Gate(beneath(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream, gated or not, ends at a terminal."""
    return beneath(stream).isatty()


def overwrite(line: str) -> None:
    """Write a line to a terminal behind stderr, in place of the last one; "" leaves none."""
    stream = beneath(sys.stderr)
    stream.write(f"{_ERASE_LINE}{visible(line)}")
    stream.flush()


def beneath(stream: TextIO) -> TextIO:
    """What a stream writes to: for what draws, and makes its text visible itself."""
    return stream.beneath if isinstance(stream, Gate) else stream
