"""Sharing work between threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from aprcore.ground.parallel import available_threads, for_each


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_every_item_is_done_once(threads: int) -> None:
    done: list[int] = []
    for_each(done.append, range(50), threads)
    assert sorted(done) == list(range(50))


def test_items_are_shared() -> None:
    meeting = threading.Barrier(2, timeout=60)
    for_each(lambda _: meeting.wait(), range(2), 2)  # alone, either would wait in vain


def test_the_first_error_is_raised_and_nothing_runs_on() -> None:
    running = []

    def work(item: int) -> None:
        running.append(item)
        try:
            if item == 1:
                raise ValueError("one")
            time.sleep(0.05)
        finally:
            running.remove(item)

    with pytest.raises(ValueError, match="one"):
        for_each(work, range(20), 3)
    assert running == []


def test_at_least_one_processor() -> None:
    assert available_threads() >= 1


INTERRUPTED = """
import threading
from aprcore.ground.parallel import for_each

start = threading.Thread.start

def interrupted(thread):
    start(thread)
    raise KeyboardInterrupt  # before the pool has noted the thread

threading.Thread.start = interrupted
try:
    for_each(print, range(4), 2)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_a_thread_starts_does_not_keep_the_process_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True,
                          timeout=60, check=True)  # fmt: skip
    assert "interrupted" in done.stdout


def test_after_an_interrupt_there_is_a_new_pool() -> None:
    def interrupt(item: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for_each(interrupt, range(2), 2)
    done: list[int] = []
    for_each(done.append, range(9), 2)
    assert sorted(done) == list(range(9))
