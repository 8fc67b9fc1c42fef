"""Threads for numpy: our own, over pieces that fit a cache, instead of the BLAS library's.

Two Python threads that each run a single-threaded product over their own rows are about twice as
fast on a streamed weight as one product with two BLAS threads, and the result does not depend on
the number of threads. numpy and file reads release the interpreter lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")


def available_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def executor(threads: int) -> ThreadPoolExecutor:
    """A pool of that many threads, kept for the life of the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="aprcore")


def for_each(function: Callable[[Item], None], items: Iterable[Item], threads: int) -> None:
    """Call `function` on every item, on up to `threads` threads; the first error is raised.

    The calling thread takes its share. Threads draw the next item from one iterator (a list's is
    safe to share), since handing each item over on its own costs as much as a small item.
    """
    work = list(items)
    helpers = min(threads, len(work)) - 1
    if helpers < 1:
        for item in work:
            function(item)
        return
    pending = iter(work)
    stopped = threading.Event()

    def drain() -> None:
        try:
            for item in pending:
                if stopped.is_set():
                    return
                function(item)
        except BaseException:
            stopped.set()
            raise

    pool = executor(threads)
    futures: list[Future[None]] = []
    try:
        for _ in range(helpers):
            futures.append(pool.submit(drain))
        drain()
    except KeyboardInterrupt:
        stopped.set()
        # Ctrl-C inside `submit` can leave a thread that the pool does not know of; unless it is
        # told to end as well, the interpreter waits for it for ever.
        pool.shutdown(wait=False, cancel_futures=True)
        executor.cache_clear()
        raise
    finally:
        # After an error or Ctrl-C nothing may still write into the caller's buffers.
        for future in futures:
            if not future.cancel():
                future.exception()
    for future in futures:
        if not future.cancelled():
            future.result()


@cache
def _blas() -> object:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Keep the BLAS library to one thread per caller while our own threads do the sharing."""
    with _blas().limit(limits=1, user_api="blas"):  # type: ignore[attr-defined]
        yield
