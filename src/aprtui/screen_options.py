"""What the command line asks of the screen. Light, so that arguments can be read before Textual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The server of a page says in it below which folder its explorers may write; "": nowhere.
ALLOW_WRITE_VARIABLE = "APRTUI_ALLOW_WRITE"


@dataclass(frozen=True, slots=True)
class ScreenOptions:
    """What the command line asks of the screen rather than of the run.

    Attributes:
        watch: Run again whenever a file of the run changes.
        save: Where to write the run when it is over; None for nowhere.
        command: The command line, for reports.
        may_write: Whether files may be written.
        folder: Below which they have to be, and where relative names begin; None: anywhere.
    """

    watch: bool = False
    save: Path | None = None
    command: Sequence[str] = ()
    may_write: bool = True
    folder: Path | None = None
