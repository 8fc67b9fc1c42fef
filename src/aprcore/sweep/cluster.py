"""The cases of a sweep on a Dask cluster.

The scheduler runs a lost worker's cases elsewhere, as often as its `allowed-failures` says. Workers
need this package, and see files as they are on their own machine: a shared file system, or URLs.

Dask can forget a task that hangs, but not end it: its thread would keep its place in the worker. So
a case with a limit runs in a process of its own beside the worker, which ends it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

from aprcore.ground.errors import BackendError
from aprcore.sweep.cases import Case
from aprcore.sweep.pool import run_locally
from aprcore.sweep.results import CaseResult, error_result
from aprcore.sweep.worker import run_case

# Longer than a scheduler on another continent takes to answer.
CONNECT_TIMEOUT_S = 20


def run_on_cluster(
    cases: Sequence[Case], *, scheduler: str, cache: Path | None, threads: int,
    warn: Callable[[str], None],
) -> Generator[CaseResult]:  # fmt: skip
    """Run cases on the workers of a cluster, and yield each result as it comes.

    Closing the generator cancels what is left.

    Args:
        cases: The cases.
        scheduler: Address of the scheduler: "tcp://10.0.0.1:8786".
        cache: Where workers keep copies of what is behind a URL; None for a directory of each
            worker, which goes with it.
        threads: Threads of each case.
        warn: Told what a user should know.

    Raises:
        BackendError: There is no such scheduler, or it went away.
    """
    try:
        from distributed import CancelledError, Client, as_completed
    except ImportError as error:
        raise BackendError("a cluster needs distributed, which is not installed", where=scheduler,
                           hint="pip install 'aprtui[cluster]'") from error  # fmt: skip
    try:
        client = Client(scheduler, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise BackendError("no scheduler answers", where=scheduler,
                           hint="start one with `dask scheduler`") from error  # fmt: skip
    with client:
        if not client.nthreads():
            warn(f"{scheduler}: the cluster has no worker yet; cases wait for one")
        run_id = uuid4().hex  # a scheduler may still hold the keys of a sweep before this one
        held = {
            client.submit(
                run_on_worker, case, cache, threads, key=f"aprtui-{run_id}-{case.id}", pure=False
            ): case
            for case in cases
        }
        for future in as_completed(list(held), loop=client.loop):
            case = held.pop(future)
            try:
                yield future.result()
            except CancelledError as error:
                raise BackendError("the scheduler went away", where=scheduler,
                                   hint="run the sweep again to go on") from error  # fmt: skip
            except Exception as error:
                # `run_case` raises nothing: the worker itself was lost, or cannot run it.
                yield error_result(case.id, _describe(error))


def run_on_worker(case: Case, cache: Path | None, threads: int) -> CaseResult:
    """`run_case` in a worker of the cluster, in a process of its own if it may take so long only.

    A case that kills that process is tried again beside the same worker.
    """
    if cache is None:
        from distributed import get_worker

        cache = Path(get_worker().local_directory) / "aprtui-cache"
    if case.settings.timeout_s is None:
        return run_case(case, cache, threads)
    # A worker is its nanny's daemon, which may have no children, lest they outlive it. This one
    # ends with it: see `aprcore.sweep.pool`.
    multiprocessing.current_process().daemon = False
    with closing(run_locally([case], jobs=1, cache=cache, threads=threads)) as results:
        return next(results)


def _describe(error: Any) -> str:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return "ended every worker that it ran on; out of memory?"
    return f"the worker cannot run it: {type(error).__name__}: {error}"
