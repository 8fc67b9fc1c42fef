"""What takes a while, on stderr where that is a terminal: files streamed, causes looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aprcore.records.report import RunEvent

ByteProgress = Callable[[int, int, str], None]
"""Called with the bytes done, those in all, and what is being worked on."""


@contextmanager
def byte_progress(title: str) -> Iterator[ByteProgress | None]:
    """A bar that counts bytes, or None where stderr is no terminal: logs stay free of it."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from aprtui.drawing import VisibleConsole

    console = VisibleConsole(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int, item: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {item}".rstrip())

        yield update


def with_searches_shown(events: Iterator[RunEvent]) -> Iterator[RunEvent]:
    """The events of a run; while a cause is looked for, a line says of which stage."""
    from rich.text import Text

    from aprcore.records.report import CauseSought
    from aprtui.drawing import VisibleConsole
    from aprtui.text import visible

    console = VisibleConsole(stderr=True)
    status = console.status("") if console.is_terminal else None
    try:
        for event in events:
            if status is not None:
                status.stop()
                if isinstance(event, CauseSought):
                    said = f"{event.stage.key} fails; looking for its cause: {event.progress()}"
                    status.update(Text(visible(said)))
                    status.start()
            yield event
    finally:
        if status is not None:
            status.stop()
