"""What a sweep found: where its cases differ, as records, JSON and Markdown."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aprcore.records.environment import without_home
from aprcore.records.report_json import json_ready, picked
from aprcore.records.telling import Table, format_ratio, plural
from aprcore.reports import markdown
from aprcore.sweep.cases import ABSENT, AXES, Case, Source
from aprcore.sweep.plan import Sweep
from aprcore.sweep.results import CaseResult, Fault
from aprcore.sweep.run import SweepFinished

SWEEP_SCHEMA = "aprtui-sweep-v1"

Finished = Sequence[tuple[Case, CaseResult]]


@dataclass(frozen=True, slots=True)
class Spread:
    """How a finding is spread over one axis.

    Attributes:
        axis: One of `aprcore.sweep.cases.AXES`.
        found: By value of the axis: in how many of its judged cases, and of how many.
    """

    axis: str
    found: Mapping[str, tuple[int, int]]

    @property
    def always(self) -> tuple[str, ...]:
        """Values that always have it."""
        return tuple(value for value, (count, total) in self.found.items() if count == total)

    @property
    def never(self) -> tuple[str, ...]:
        """Values that never have it."""
        return tuple(value for value, (count, _) in self.found.items() if count == 0)

    @property
    def sometimes(self) -> tuple[str, ...]:
        """Values that have it in some cases only."""
        settled = {*self.always, *self.never}
        return tuple(value for value in self.found if value not in settled)

    @property
    def matters(self) -> bool:
        """Whether the finding is more frequent with one value than with another."""
        first, *rest = self.found.values()
        return any(count * first[1] != first[0] * total for count, total in rest)

    def describe(self, shown: Callable[[str], str] = str) -> str:
        """The spread in a clause: "always with q4.gguf; never with q8.gguf"."""
        if not self.matters:
            return "makes no difference"
        parts = []
        if self.always:
            parts.append("always with " + ", ".join(map(shown, self.always)))
        for value in self.sometimes:
            count, total = self.found[value]
            parts.append(f"{count} of {total} with {shown(value)}")
        if self.never:
            parts.append("never with " + ", ".join(map(shown, self.never)))
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Finding:
    """Cases that first diverge at one stage for one cause.

    Attributes:
        path: The stage.
        verdict: Its verdict.
        blamed: The judgment that blames it.
        cause: The causes that explain it, or None.
        clause: What was found in the first of the cases, with its figures.
        cases: The cases that have it.
        spreads: Over each axis on which the sweep has more than one value.
    """

    path: str
    verdict: str
    blamed: str | None
    cause: str | None
    clause: str
    cases: tuple[Case, ...]
    spreads: tuple[Spread, ...]

    def describe(self) -> str:
        """The finding in a clause."""
        blame = f" {self.blamed}" if self.blamed else ""
        return f"{self.path} {self.verdict}{blame}: {self.cause or self.clause}"


def varying_axes(cases: Sequence[Case]) -> tuple[str, ...]:
    """The axes on which cases differ."""
    return tuple(axis for axis in AXES if len({case.axes[axis] for case in cases}) > 1)


def find_differences(results: Finished) -> tuple[Finding, ...]:
    """The cases that diverge, by first divergence and cause, the most frequent first.

    Cases that ended in an error say nothing either way and are left out.
    """
    judged = [(case, result) for case, result in results if not result.is_error]
    axes = varying_axes([case for case, _ in judged])
    groups: dict[tuple[str, str, str | None, str | None], list[tuple[Case, Fault]]] = {}
    for case, result in judged:
        first = result.first
        if first is not None:
            key = (first.path, first.verdict, first.blamed, first.cause)
            groups.setdefault(key, []).append((case, first))
    findings = []
    for key, having in groups.items():
        cases = [case for case, _ in having]
        spreads = tuple(_spread(axis, cases, [case for case, _ in judged]) for axis in axes)
        findings.append(Finding(*key, having[0][1].clause, tuple(cases), spreads))
    return tuple(sorted(findings, key=lambda finding: -len(finding.cases)))


def _spread(axis: str, having: Sequence[Case], judged: Sequence[Case]) -> Spread:
    counts = Counter(case.axes[axis] for case in having)
    totals = Counter(case.axes[axis] for case in judged)
    return Spread(axis, {value: (counts[value], total) for value, total in totals.items()})


def count_verdicts(results: Finished) -> dict[str, int]:
    """How many cases got each verdict."""
    return dict(Counter(result.verdict for _, result in results))


def to_json(sweep: Sweep, finished: SweepFinished) -> dict[str, Any]:
    """A finished sweep as JSON of schema `SWEEP_SCHEMA`; non-finite numbers are words."""
    results = finished.results
    cleaned: dict[str, Any] = json_ready({
        "schema": SWEEP_SCHEMA,
        "cases_file": str(sweep.path),
        "diverges": any(result.diverges for _, result in results),
        "counts": count_verdicts(results),
        "kept": finished.kept,
        "repeated": sweep.repeated,
        "elapsed_s": finished.elapsed_s,
        "axes": {
            axis: list(dict.fromkeys(case.axes[axis] for case, _ in results)) for axis in AXES
        },
        "cases": [_case(case, result) for case, result in results],
        "differences": [_finding(finding) for finding in find_differences(results)],
    })  # fmt: skip
    return cleaned


def without_homes(value: Any) -> Any:
    """The JSON of a sweep as it may be passed on: paths below the home directory begin with "~".

    Prompts are what was run, and stay as they are.
    """
    match value:
        case str():
            return without_home(value)
        case list():
            return [without_homes(item) for item in value]
        case dict():
            return {k: v if k == "prompt" else without_homes(v) for k, v in value.items()}
    return value


def _case(case: Case, result: CaseResult) -> dict[str, Any]:
    return {
        "id": case.id,
        "model": _source(case.model),
        "trace": _source(case.trace),
        "oracle": _source(case.oracle),
        "prompt": asdict(case.prompt),
        "backend": case.backend,
        "layers": case.layers,
        "command": case.command(),
        **picked(result, "verdict", "diverges", "summary"),
        "first_divergence": None if result.first is None else result.first.path,
        "cause": None if result.first is None else result.first.cause,
        "faults": [asdict(fault) for fault in result.faults],
        **picked(result, "counts", "worst_relative_l2", "worst_path", "elapsed_s", "notes"),
    }


def _source(source: Source | None) -> dict[str, Any] | None:
    return None if source is None else {"name": source.name, "path": source.location}


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        **picked(finding, "path", "verdict", "blamed", "cause", "clause"),
        "cases": [case.id for case in finding.cases],
        "spread": {
            spread.axis: picked(spread, "matters", "always", "sometimes", "never")
            for spread in finding.spreads
        },
    }


def shared_values(results: Finished) -> dict[str, str]:
    """What is the same in every case, by the axis that it is on."""
    varying = varying_axes([case for case, _ in results])
    same = results[0][0].axes if results else {}
    return {axis: value for axis, value in same.items() if axis not in varying and value != ABSENT}


def cases_table(results: Finished) -> Table:
    """A row per case, in text as it came from its files: its values, its verdict and the cause."""
    axes = varying_axes([case for case, _ in results])
    rows = []
    for case, result in results:
        first, worst = result.first, result.worst_relative_l2
        error = ABSENT if worst is None else format_ratio(float(worst))
        rows.append((
            case.short_id, *(case.axes[axis] for axis in axes), result.verdict,
            ABSENT if first is None else first.path, error, f"{result.elapsed_s:.2f}",
            result.clause,
        ))  # fmt: skip
    headings = ("id", *axes, "verdict", "first divergence", "worst L2", "seconds", "cause")
    return Table("Cases", headings, tuple(rows), frozenset({len(axes) + 3, len(axes) + 4}))


def counts_text(results: Finished) -> str:
    """How many cases got each verdict: "4 cases: 2 PASS, 2 FAIL"."""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in count_verdicts(results).items())
    return f"{len(results)} cases: {counts}"


def to_markdown(sweep: Sweep, finished: SweepFinished) -> str:
    """A finished sweep for an issue or a wiki; its paths are as `without_homes` has them."""
    results = finished.results
    table = cases_table(results)
    shared = table._replace(rows=tuple(tuple(map(without_home, row)) for row in table.rows))
    same = ", ".join(f"{axis} {_shared(value)}" for axis, value in shared_values(results).items())
    findings = [line for found in find_differences(results) for line in _finding_lines(found)]
    again = [
        # Whole, however long: it is there to be run.
        f"- {case.short_id}: {markdown.code(case.command(), limit=sys.maxsize)}"
        for case, result in results
        if result.diverges or result.is_error
    ]
    parts = [
        f"# Sweep of {_shared(Path(sweep.path).name)}",
        f"{counts_text(results)}.",
        f"In every case: {same}." if same else "",
        "## Where they differ",
        "\n".join(findings) or "No case diverges.",
        f"## {table.title}",
        markdown.table(shared),
        "## Again, one by one",
        "\n".join(again) or "Nothing to look at.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _finding_lines(finding: Finding) -> list[str]:
    spreads = [f"  - {spread.axis}: {spread.describe(_shared)}" for spread in finding.spreads]
    return [f"- **{_shared(finding.describe())}**, {plural(len(finding.cases), 'case')}", *spreads]


def _shared(text: str) -> str:
    return markdown.escape(without_home(text))
