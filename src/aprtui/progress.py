"""A progress bar on stderr for commands that stream a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
