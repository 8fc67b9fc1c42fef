"""What an explorer behind a page of `aprtui serve` does when its server is gone."""

from __future__ import annotations

import os
import select
import signal
import sys
from threading import Thread

GONE = 128 + signal.SIGHUP  # what a shell says of a program whose terminal went away


def end_with_server() -> None:
    """End this process as soon as nobody holds the other end of its input any more.

    A server that is asked to end takes leave of its explorers. One that is killed cannot, and an
    explorer that has nothing to draw would wait for a key for ever.
    """
    descriptor = sys.__stdin__.fileno() if sys.__stdin__ is not None else 0
    Thread(target=_end_on_hang_up, args=(descriptor,), name="hang-up", daemon=True).start()


def _end_on_hang_up(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, 0)  # of a hang-up one is told unasked; keys are for the driver
    if any(told & select.POLLHUP for _, told in poller.poll()):
        # At once, as of a terminal that goes away: leaving in order would draw into a closed pipe.
        os._exit(GONE)
