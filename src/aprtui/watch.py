"""Noticing that a run's files have changed: by looking at them now and then.

Looking works where notifications do not (network file systems, containers), and a file that is
replaced by another of its name is seen too.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# Often enough to feel at once; 2,000 files take about 10 ms to look at.
INTERVAL_S = 0.5
# Stage directories hold a directory per layer; models hold none.
DEPTH = 2

Signature = frozenset[tuple[str, int, int, int]]


def signature_of(paths: Iterable[Path], ours: Path | None = None) -> Signature:
    """Every file below some paths with its inode, size and time of change; absent ones left out.

    Args:
        paths: Files and directories to look at.
        ours: A file that does not count, as a run itself writes it.
    """
    found = frozenset(entry for path in paths for entry in _look(path, DEPTH))
    if ours is None:
        return found
    left_out = ours.absolute()
    return frozenset(entry for entry in found if Path(entry[0]).absolute() != left_out)


def _look(path: Path, depth: int) -> Iterator[tuple[str, int, int, int]]:
    try:
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            yield str(path), found.st_ino, found.st_size, found.st_mtime_ns
        elif depth >= 0:
            with os.scandir(path) as entries:
                # What a writer has not yet moved into its place begins with a dot.
                names = [entry.name for entry in entries if not entry.name.startswith(".")]
            for name in names:
                yield from _look(path / name, depth - 1)
    except OSError:  # gone between one look and the next, or not there yet
        return


def wait_for_change(
    paths: Iterable[Path], before: Signature, is_cancelled: Callable[[], bool],
    interval_s: float = INTERVAL_S, ours: Path | None = None,
) -> bool:  # fmt: skip
    """Block until files differ from what they were and have come to rest.

    Args:
        paths: Files and directories to look at.
        before: What they were like when they were last read.
        is_cancelled: Asked at every look.
        interval_s: Seconds between two looks.
        ours: As for `signature_of`.

    Returns:
        Whether they changed; False if it was cancelled.
    """
    watched = tuple(paths)
    latest = before
    while not is_cancelled():
        time.sleep(interval_s)
        now = signature_of(watched, ours)
        # An engine that is still writing would be read half done.
        if now not in (before, frozenset()) and now == latest:
            return True
        latest = now
    return False
