"""Many bisects as one job list: what is done, what is left, and how long that will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from statistics import fmean as mean

from aprcore.sweep.cases import Case
from aprcore.sweep.plan import Sweep
from aprcore.sweep.results import CaseResult, ResultsFile

Runner = Callable[[Sequence[Case]], Generator[CaseResult]]
"""Runs cases in any order and yields each result as it comes."""


@dataclass(frozen=True, slots=True)
class CaseFinished:
    """A case has its result.

    Attributes:
        case: The case.
        result: Its result.
        done: Cases that have one, those of earlier runs included.
        total: Cases in all.
        left_s: Seconds until the last one, as far as can be told.
    """

    case: Case
    result: CaseResult
    done: int
    total: int
    left_s: float | None


@dataclass(frozen=True, slots=True)
class SweepFinished:
    """Every case has its result.

    Attributes:
        results: Each case with its result, in the order of the job list.
        kept: How many of them an earlier run had finished.
        elapsed_s: Seconds of this run.
    """

    results: tuple[tuple[Case, CaseResult], ...]
    kept: int
    elapsed_s: float


def pending_cases(sweep: Sweep, results: ResultsFile) -> tuple[Case, ...]:
    """The cases that are still to be run: those without a result, and those that ended in an error.

    An error may be gone (memory, a device, a worker); a verdict is as it was, for the id says what
    was judged.
    """
    return tuple(
        case for case in sweep.cases
        if (held := results.get(case.id)) is None or held.is_error
    )  # fmt: skip


def run_sweep(
    sweep: Sweep, results: ResultsFile, runner: Runner
) -> Generator[CaseFinished | SweepFinished]:
    """Run what is left of a sweep.

    A result is in the file before it is yielded. Closing the generator ends the runner, and the
    next run goes on from what the file holds.

    Yields:
        A `CaseFinished` per case that was run, then `SweepFinished`.

    Raises:
        AprError: The results cannot be written, or the runner itself is of no use.
    """
    pending = {case.id: case for case in pending_cases(sweep, results)}
    total, kept = len(sweep.cases), len(sweep.cases) - len(pending)
    earlier = (
        (case, held) for case in sweep.cases
        if case.id not in pending and (held := results.get(case.id)) is not None
    )  # fmt: skip
    estimate = TimeEstimate(pending.values(), earlier)
    started = time.perf_counter()
    if pending:
        with closing(runner(tuple(pending.values()))) as stream:
            for result in stream:
                case = pending.pop(result.id, None)
                if case is None or not results.add(result):
                    continue  # it arrived before
                estimate.add(case, result)
                left_s = estimate.left_s(time.perf_counter() - started)
                yield CaseFinished(case, result, total - len(pending), total, left_s)
    found = [(case, results.get(case.id)) for case in sweep.cases]
    finished = tuple((case, result) for case, result in found if result is not None)
    assert len(finished) == total, "a runner yields a result for every case"
    yield SweepFinished(finished, kept, time.perf_counter() - started)


class TimeEstimate:
    """How long the rest will take, from what has been run.

    A case is taken to cost what others of its model and backend did, else what cases cost on
    average; how much of that is done in a second, by however many workers, shows by itself.
    """

    def __init__(
        self, pending: Iterable[Case], earlier: Iterable[tuple[Case, CaseResult]] = ()
    ) -> None:
        """Begin with what is to be run, and with what earlier runs came to."""
        self._pending = Counter(map(_kind, pending))
        self._known: dict[tuple[str, str], list[float]] = {}  # seconds of each case, by kind
        self._done_s = 0.0
        for case, result in earlier:
            self._note(case, result)

    def add(self, case: Case, result: CaseResult) -> None:
        """Note that a pending case has its result."""
        self._pending[_kind(case)] -= 1
        self._note(case, result)
        self._done_s += result.elapsed_s

    def left_s(self, elapsed_s: float) -> float | None:
        """Seconds until the pending cases are done; None while nothing is known.

        Args:
            elapsed_s: Seconds since this run began.
        """
        if not self._known or self._done_s <= 0:
            return None
        average = mean(chain.from_iterable(self._known.values()))
        work_s = sum(
            number * (mean(self._known[kind]) if kind in self._known else average)
            for kind, number in self._pending.items()
        )
        return work_s * elapsed_s / self._done_s

    def _note(self, case: Case, result: CaseResult) -> None:
        if not result.is_error:  # most end at once, and say nothing of the others
            self._known.setdefault(_kind(case), []).append(result.elapsed_s)


def _kind(case: Case) -> tuple[str, str]:
    return case.axes["model"], case.backend
