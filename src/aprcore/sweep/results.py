"""What the cases of a sweep came to, and the file that remembers it while a sweep runs.

One JSON line per finished case, appended and synchronised: whatever ends a sweep, what was finished
is kept, and the next run goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from aprcore.ground.errors import FormatError, PlanError, TraceError
from aprcore.ground.fields import convert, parse_object
from aprcore.judging.compare import Comparison
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import computation_order
from aprcore.network.stages import StageKey
from aprcore.records.parity import StageParity
from aprcore.records.report import Report, StageReport
from aprcore.records.report_json import json_ready
from aprcore.records.telling import figures_of
from aprcore.sweep.cases import CASE_SCHEMA

# In place of a verdict: the case could not be judged.
ERROR = "ERROR"

# In place of a judgment: the device, held against the CPU, is to blame.
DEVICE = "device"

OTHER_FILE = "choose another file with -o"


@dataclass(frozen=True, slots=True)
class Fault:
    """A stage that diverges.

    Attributes:
        path: The stage: "layer-2/qkv_matmul".
        verdict: Its verdict.
        blamed: As `aprcore.records.report.StageReport.blamed`, or `DEVICE`.
        cause: The causes that explain it, without figures; None if none was found.
        clause: The finding for the middle of a sentence, with its figures.
        relative_l2: The cumulative error; a word where it is not finite, None without an oracle.
    """

    path: str
    verdict: str
    blamed: str | None
    cause: str | None
    clause: str
    relative_l2: float | str | None


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A finished case.

    Attributes:
        id: Of the case.
        verdict: Of the first divergence, else the gravest of any stage; `ERROR` if it could not be
            judged.
        diverges: Whether it ends with exit code 1 on its own.
        summary: The finding in one sentence, or what went wrong.
        faults: Every diverging stage, in the order of computation.
        counts: Stages by verdict.
        worst_relative_l2: The largest cumulative error; a word where it is not finite, None without
            an oracle.
        worst_path: The stage that has it.
        elapsed_s: Seconds that it took.
        notes: Of the run, and of workers that were lost over it.
    """

    id: str
    verdict: str
    diverges: bool
    summary: str
    faults: tuple[Fault, ...] = ()
    counts: Mapping[str, int] | None = None
    worst_relative_l2: float | str | None = None
    worst_path: str | None = None
    elapsed_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_error(self) -> bool:
        """Whether it could not be judged."""
        return self.verdict == ERROR

    @property
    def clause(self) -> str:
        """What is to be said of it in a table: why it diverges or could not be judged."""
        if self.first is not None:
            return self.first.clause
        return self.summary if self.is_error or self.diverges else ""

    @property
    def first(self) -> Fault | None:
        """The first divergence."""
        return self.faults[0] if self.faults else None


def summarise(case_id: str, report: Report, *, strict: bool) -> CaseResult:
    """A case's result, from its report.

    A device that was given up gives no result: what the CPU went on to compute is another case's.
    """
    rejected = report.rejected
    if rejected is not None and not rejected.by_gate:
        return error_result(case_id, rejected.line_reason, elapsed_s=report.elapsed_s)
    faults = _faults(report)
    worst = max(_errors(report), key=_rank, default=(None, None))
    verdicts = list(report.counts)  # in the order of gravity
    return CaseResult(
        id=case_id,
        verdict=faults[0].verdict if faults else (verdicts or [Verdict.PASS])[-1].value,
        diverges=report.diverges(strict=strict),
        summary=report.summary(),
        faults=faults,
        counts={verdict.value: count for verdict, count in report.counts.items()},
        worst_relative_l2=worst[1],
        worst_path=worst[0],
        elapsed_s=report.elapsed_s,
        notes=report.header.notes,
    )


def error_result(case_id: str, message: str, *, elapsed_s: float = 0.0) -> CaseResult:
    """The result of a case that could not be judged."""
    line = " ".join(message.splitlines())
    return CaseResult(case_id, ERROR, diverges=False, summary=line, elapsed_s=elapsed_s)


def _faults(report: Report) -> tuple[Fault, ...]:
    """Every diverging stage in the order of computation; the CPU's before the device's."""
    found = [(s.key, _fault(s)) for s in report.stages if s.is_divergence]
    of_device = [(s.key, _device_fault(s)) for s in report.parity if s.verdict.is_divergence]
    rejected = report.rejected
    if rejected is not None and not of_device:  # both sides' logits differ, by no single stage
        key = rejected.key or report.header.keys[-1]
        of_device.append((key, Fault(
            key.path, Verdict.FAIL.value, DEVICE, None, rejected.line_reason, None
        )))  # fmt: skip
    both = sorted([*found, *of_device], key=lambda pair: computation_order(pair[0]))
    return tuple(fault for _, fault in both)


def _fault(stage: StageReport) -> Fault:
    assert stage.verdict is not None
    found = stage.explanation
    named = () if found is None else found.named
    return Fault(
        path=stage.key.path,
        verdict=stage.verdict.value,
        blamed=stage.blamed,
        cause=" or ".join(dict.fromkeys(cause.name for cause in named)) or None,
        clause=stage.reason if found is None else found.clause(),
        relative_l2=_error(stage.comparison),
    )


def _device_fault(stage: StageParity) -> Fault:
    return Fault(stage.key.path, stage.verdict.value, DEVICE, None, stage.fault or stage.reason,
                 _error(stage.tested.oracle))  # fmt: skip


def _errors(report: Report) -> list[tuple[str, float | str]]:
    """The cumulative error of every stage: the device's, where there is one."""
    sides: list[tuple[StageKey, Comparison | None]]
    if report.device is not None:
        sides = [(stage.key, stage.tested.oracle) for stage in report.parity]
    else:
        sides = [(stage.key, stage.comparison) for stage in report.stages]
    found = [(key.path, _error(comparison)) for key, comparison in sides]
    return [(path, error) for path, error in found if error is not None]


def _error(found: Comparison | None) -> float | str | None:
    """A cumulative error; "nan" where a value is not finite."""
    error: float | str | None = None if found is None else json_ready(figures_of(found)[1])
    return error


def _rank(found: tuple[str, float | str]) -> float:
    """By which the worst stage is found: what is not finite is worse than any figure."""
    return found[1] if isinstance(found[1], float) else math.inf


def result_to_json(result: CaseResult) -> dict[str, Any]:
    """A result as JSON-ready values."""
    data: dict[str, Any] = json_ready({"schema": CASE_SCHEMA, **asdict(result)})
    return data


def parse_result(line: bytes) -> CaseResult:
    """A result from a line of a results file.

    Raises:
        FormatError: It is nothing of the kind, or has a verdict that there is not.
    """
    data = parse_object(line, None, "the line")
    if data.get("schema") != CASE_SCHEMA:
        raise FormatError("no result of a sweep")
    result = convert(data, CaseResult, None)
    told = {result.verdict, *(result.counts or ()), *(fault.verdict for fault in result.faults)}
    unknown = sorted(told - {ERROR, *(verdict.value for verdict in Verdict)})
    if unknown:
        raise FormatError(f"there is no verdict {unknown[0]!r}")
    return result


class ResultsFile:
    """The results of a sweep, on disk and by id. Only one sweep at a time writes to a file.

    A file without a result does not stay.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Open the file, or make it, and read what it holds.

        Args:
            path: The file.
            fresh: Whether to forget what it holds.

        Raises:
            TraceError: It cannot be opened or written.
            FormatError: It holds something else.
            PlanError: Another sweep is writing to it.
        """
        self.path = path
        self._results: dict[str, CaseResult] = {}
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise TraceError(f"cannot be written ({error.strerror})", where=path,
                             hint=OTHER_FILE) from error  # fmt: skip
        try:
            self._begin(fresh=fresh)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if os.fstat(self._descriptor).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def get(self, case_id: str) -> CaseResult | None:
        """The result of a case, if it has one."""
        return self._results.get(case_id)

    def add(self, result: CaseResult) -> bool:
        """Remember a result; whether it was news.

        One that arrives again is dropped: a case is counted once, whoever ran it twice. Only an
        error gives way.

        Raises:
            TraceError: The file cannot be written.
        """
        if not self._keep(result):
            return False
        line = (json.dumps(result_to_json(result), allow_nan=False) + "\n").encode()
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError(None, "the disk is full")
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._unwritable(error) from error
        return True

    def _keep(self, result: CaseResult) -> bool:
        held = self._results.get(result.id)
        if held is not None and not held.is_error:
            return False
        self._results[result.id] = result
        return True

    def _begin(self, *, fresh: bool) -> None:
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):  # a device may have no end
            raise TraceError("is no regular file", where=self.path, hint=OTHER_FILE)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PlanError("another sweep is writing to it", where=self.path,
                            hint=f"wait for it, or {OTHER_FILE}") from error  # fmt: skip
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise TraceError(f"cannot be read ({error.strerror})", where=self.path) from error
        whole = self._parse(data, fresh=fresh)
        if fresh:
            self._results.clear()
        try:
            # A sweep may have been cut off while it wrote its last line.
            os.ftruncate(self._descriptor, 0 if fresh else whole)
        except OSError as error:
            raise self._unwritable(error) from error

    def _parse(self, data: bytes, *, fresh: bool) -> int:
        """Keep the results in `data`; how many of its bytes are whole lines.

        Raises:
            FormatError: A whole line is no result.
        """
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self._keep(parse_result(line))
            except FormatError as error:
                if fresh and number > 1:
                    return whole
                raise FormatError(f"line {number} is no result of a sweep ({error})",
                                  where=self.path, hint=OTHER_FILE) from error  # fmt: skip
        # What is no line yet is the start of one, or somebody else's file.
        if not whole and data and not data.startswith(_line_start(len(data))):
            raise FormatError("is no file of a sweep's results", where=self.path,
                              hint=OTHER_FILE)  # fmt: skip
        return whole

    def _unwritable(self, error: OSError) -> TraceError:
        return TraceError(f"cannot be written ({error.strerror})", where=self.path,
                          hint="make room and run the sweep again")  # fmt: skip


def _line_start(length: int) -> bytes:
    """The first bytes of every line, at most `length` of them."""
    return f'{{"schema": "{CASE_SCHEMA}"'.encode()[:length]
