"""Threads for numpy: our own, over pieces that fit a cache, instead of the BLAS library's.

Two Python threads that each run a single-threaded product over their own rows are about twice as
fast on a streamed weight as one product with two BLAS threads, and the result does not depend on
the number of threads. numpy and file reads release the interpreter lock.
"""

from __future__ import annotations

import os
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
    """Call `function` on every item, on up to `threads` threads; the first error is raised."""
    work = list(items)
    if threads <= 1 or len(work) <= 1:
        for item in work:
            function(item)
        return
    pool = executor(threads)
    futures: list[Future[None]] = []
    try:
        for item in work:
            futures.append(pool.submit(function, item))
        for future in futures:
            future.result()
    except KeyboardInterrupt:
        # Ctrl-C inside `submit` can leave a thread that the pool does not know of; unless it is
        # told to end as well, the interpreter waits for it for ever.
        pool.shutdown(wait=False, cancel_futures=True)
        executor.cache_clear()
        raise
    finally:
        # After an error or Ctrl-C nothing may still write into the caller's buffers.
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()


@cache
def _blas() -> object:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Keep the BLAS library to one thread per caller while our own threads do the sharing."""
    with _blas().limit(limits=1, user_api="blas"):  # type: ignore[attr-defined]
        yield
