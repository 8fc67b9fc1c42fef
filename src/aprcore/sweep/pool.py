"""The cases of a sweep on this machine: a process per worker, and each answers for its own case.

A pool of `concurrent.futures` breaks as a whole when one of its processes dies, and does not say
over which case. Here a death (the kernel's out-of-memory killer, a driver's fault) is one worker's
and one case's.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from aprcore.sweep.cases import Case
from aprcore.sweep.results import CaseResult, error_result
from aprcore.sweep.worker import run_case

# A case that was begun this often and killed its worker each time is given up. Once may be another
# process's doing.
ATTEMPTS = 3


@dataclass(slots=True)
class _Task:
    """A case on its way.

    Attributes:
        case: The case.
        deaths: What ended each worker that had it.
    """

    case: Case
    deaths: tuple[str, ...] = ()


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C is for the parent, which ends its workers: they inherit the mask.

    A worker whose start is interrupted half way would find nothing to read and say so at length.
    The mask alone does not hold it back here: another thread may take the signal.
    """
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda n, _: came.append(n)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


class _Worker:
    """A process that runs one case at a time."""

    def __init__(self, cache: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # OpenCL and BLAS do not survive a fork
        self.connection, theirs = context.Pipe()
        self.task: _Task | None = None
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, cache, threads), daemon=True
        )
        with _interrupt_held():
            self.process.start()
        theirs.close()

    def give(self, task: _Task) -> None:
        """Begin a case. If the worker is dead, `take` says so."""
        self.task = task
        try:
            self.connection.send(task.case)
        except OSError:
            pass

    def take(self) -> CaseResult | None:
        """The result that is ready, or None if the worker died over it."""
        try:
            result: CaseResult | None = self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            result = None
        return result

    def end(self) -> str:
        """End the process; what had ended it before, in words."""
        self.process.terminate()
        self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"


def run_locally(
    cases: Sequence[Case], *, jobs: int, cache: Path, threads: int
) -> Generator[CaseResult]:
    """Run cases in processes of their own, and yield each result as it comes.

    Closing the generator ends the processes.

    Args:
        cases: The cases.
        jobs: How many run at a time.
        cache: Where copies of what is behind a URL are kept.
        threads: Threads of each.
    """
    pending = deque(map(_Task, cases))
    workers: list[_Worker] = []
    try:
        while pending or any(worker.task for worker in workers):
            busy = sum(worker.task is not None for worker in workers)
            while len(workers) < min(jobs, busy + len(pending)):
                workers.append(_Worker(cache, threads))
            for worker in workers:
                if worker.task is None and pending:
                    worker.give(pending.popleft())
            for worker in _ready(workers):
                task, result = worker.task, worker.take()
                assert task is not None
                worker.task = None
                if result is not None:
                    yield _with_deaths(result, task)
                    continue
                workers.remove(worker)
                task = _Task(task.case, (*task.deaths, worker.end()))
                if len(task.deaths) < ATTEMPTS:
                    pending.append(task)
                else:
                    yield error_result(task.case.id, _given_up(task))
    finally:
        for worker in workers:
            worker.end()


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have a result or died, once there is one."""
    busy = [worker for worker in workers if worker.task is not None]
    watched = [(w.connection, w.process.sentinel) for w in busy]
    found = set(wait([item for pair in watched for item in pair]))
    return [worker for worker, pair in zip(busy, watched) if found.intersection(pair)]


def _given_up(task: _Task) -> str:
    causes = ", ".join(task.deaths)
    hint = "; out of memory? try fewer --jobs" if "SIGKILL" in task.deaths else ""
    return f"ended its worker process {len(task.deaths)} times ({causes}){hint}"


def _with_deaths(result: CaseResult, task: _Task) -> CaseResult:
    if not task.deaths:
        return result
    note = f"run again: its worker process ended before ({', '.join(task.deaths)})"
    return replace(result, notes=(*result.notes, note))


def _serve(connection: Connection, cache: Path, threads: int) -> None:
    """A worker's life: cases in, results out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        try:
            connection.send(run_case(case, cache, threads))
        except BrokenPipeError:
            return
