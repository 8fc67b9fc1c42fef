"""The cases of a sweep on this machine: a process per worker, and each answers for its own case.

A pool of `concurrent.futures` breaks as a whole when one of its processes dies, and does not say
over which case. Here a death (the kernel's out-of-memory killer, a driver's fault) is one worker's
and one case's, and so is a case that takes too long: no thread can be ended in the middle of a
driver's call or of a read that does not return, but a process can.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
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

# A worker's first case waits for Python and numpy, which is not the case's doing; far longer than
# that takes on a busy machine.
START_S = 60.0

# What is killed is gone at once, unless it waits inside the kernel (for a file system or a driver)
# and cannot be: it is left behind then.
END_S = 5.0

# A wait is told in milliseconds to the system, which cannot count as far as a limit may say.
_MOST_WAIT_S = 3600.0


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
        self._deadline = math.inf  # of `time.monotonic`
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, cache, threads), daemon=True
        )
        with _interrupt_held():
            self.process.start()
        theirs.close()

    def give(self, task: _Task) -> None:
        """Begin a case. If the worker is dead, `take` says so."""
        self.task = task
        self._deadline = time.monotonic() + START_S + _limit_s(task.case)
        try:
            self.connection.send(task.case)
        except OSError:
            pass

    def take(self) -> CaseResult | float | None:
        """The worker's result, or when it began its case; None if it died over it.

        The time is of `time.monotonic`, which all processes of a machine share.
        """
        try:
            said: CaseResult | float | None = (
                self.connection.recv() if self.connection.poll() else None
            )
        except (EOFError, OSError):
            return None
        if isinstance(said, float):
            assert self.task is not None
            self._deadline = said + _limit_s(self.task.case)
        return said

    @property
    def left_s(self) -> float:
        """How long its case may still take; endless without a limit."""
        return self._deadline - time.monotonic()

    @property
    def is_late(self) -> bool:
        """Whether its case took too long, and there is no result after all."""
        return self.task is not None and self.left_s <= 0 and not self.connection.poll()

    def end(self) -> bool:
        """End the process, also one that is stopped and hears nothing else; whether that worked."""
        self.process.kill()
        self.process.join(END_S)
        self.connection.close()
        if not self.process.is_alive():
            return True
        # At its own end Python would wait for it; there is no public way to ask it not to.
        known = multiprocessing.process._children  # type: ignore[attr-defined]
        known.discard(self.process)
        return False

    def death(self) -> str:
        """What ended a process that is gone, in words."""
        self.process.join(END_S)  # it may only just have closed its end of the connection
        self.end()
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

    Closing the generator ends the processes. A case that takes longer than its `timeout_s` is an
    error, and its process is ended; the limit does not count the start of the process.

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
                task, said = worker.task, worker.take()
                assert task is not None
                if isinstance(said, float):
                    continue
                worker.task = None
                if said is not None:
                    yield _with_deaths(said, task)
                    continue
                workers.remove(worker)
                task = _Task(task.case, (*task.deaths, worker.death()))
                if len(task.deaths) < ATTEMPTS:
                    pending.append(task)
                else:
                    yield error_result(task.case.id, _given_up(task))
            for worker in [worker for worker in workers if worker.is_late]:
                # Not tried again, as a death is: it would cost as much time once more.
                workers.remove(worker)
                task = worker.task
                assert task is not None
                yield _with_deaths(_too_long(task.case, ended=worker.end()), task)
    finally:
        for worker in workers:
            worker.end()


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have something to say or died, once there is one, or a case is late."""
    busy = [worker for worker in workers if worker.task is not None]
    watched = [(w.connection, w.process.sentinel) for w in busy]
    left_s = min(_MOST_WAIT_S, *(worker.left_s for worker in busy))
    found = set(wait([item for pair in watched for item in pair], max(left_s, 0.0)))
    return [worker for worker, pair in zip(busy, watched) if found.intersection(pair)]


def _limit_s(case: Case) -> float:
    return math.inf if case.settings.timeout_s is None else case.settings.timeout_s


def _too_long(case: Case, *, ended: bool) -> CaseResult:
    limit_s = _limit_s(case)
    what = "was ended" if ended else "hangs in the system and cannot be ended"
    return error_result(case.id, f"took longer than {limit_s:g} s, and its process {what}",
                        elapsed_s=limit_s)  # fmt: skip


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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        try:
            connection.send(time.monotonic())
            connection.send(run_case(case, cache, threads))
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """Nobody else would end a case that hangs, once who watched over it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
