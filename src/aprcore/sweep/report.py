"""What a sweep found: where its cases differ, as records, JSON and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aprcore.records.environment import without_home
from aprcore.records.report_json import json_ready
from aprcore.sweep.cases import AXES, Case, Source
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
        "verdict": result.verdict,
        "diverges": result.diverges,
        "summary": result.summary,
        "first_divergence": None if result.first is None else result.first.path,
        "cause": None if result.first is None else result.first.cause,
        "faults": [asdict(fault) for fault in result.faults],
        "counts": result.counts,
        "worst_relative_l2": result.worst_relative_l2,
        "worst_path": result.worst_path,
        "elapsed_s": result.elapsed_s,
        "notes": result.notes,
    }


def _source(source: Source | None) -> dict[str, Any] | None:
    return None if source is None else {"name": source.name, "path": source.location}


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "path": finding.path,
        "verdict": finding.verdict,
        "blamed": finding.blamed,
        "cause": finding.cause,
        "clause": finding.clause,
        "cases": [case.id for case in finding.cases],
        "spread": {
            spread.axis: {
                "matters": spread.matters,
                "always": spread.always,
                "sometimes": spread.sometimes,
                "never": spread.never,
            }
            for spread in finding.spreads
        },
    }


def to_markdown(sweep: Sweep, finished: SweepFinished) -> str:
    """A finished sweep for an issue or a wiki; its paths are as `without_homes` has them."""
    results = finished.results
    axes = varying_axes([case for case, _ in results])
    counts = ", ".join(f"{count} {verdict}" for verdict, count in count_verdicts(results).items())
    lines = [
        f"# Sweep of {_cell(Path(sweep.path).name)}",
        "",
        f"{len(results)} cases: {counts}.",
    ]
    fixed = [axis for axis in AXES if axis not in axes and results]
    if fixed:
        same = results[0][0].axes
        named = [f"{axis} {_cell(same[axis])}" for axis in fixed if same[axis] != "-"]
        lines += ["", f"In every case: {', '.join(named)}."]
    lines += ["", "## Where they differ", ""]
    lines += [line for finding in find_differences(results) for line in _finding_lines(finding)] \
        or ["No case diverges.", ""]  # fmt: skip
    heads = ("id", *axes, "verdict", "first divergence", "cause", "worst relative L2", "s")
    lines += ["## Cases", "", _row(heads), _row(["---"] * len(heads))]
    for case, result in results:
        first = result.first
        lines.append(_row([
            case.short_id, *(_cell(case.axes[axis]) for axis in axes), result.verdict,
            "" if first is None else _cell(first.path),
            _cell(result.clause),
            _worst(result), f"{result.elapsed_s:.2f}",
        ]))  # fmt: skip
    lines += ["", "## Again, one by one", ""]
    lines += [
        f"- {case.short_id}: {_code(case.command())}"
        for case, result in results if result.diverges or result.is_error
    ] or ["Nothing to look at."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _finding_lines(finding: Finding) -> list[str]:
    count = len(finding.cases)
    lines = [f"- **{_cell(finding.describe())}**, {count} case{'s' if count > 1 else ''}"]
    lines += [f"  - {spread.axis}: {spread.describe(_cell)}" for spread in finding.spreads]
    return [*lines, ""]


def _worst(result: CaseResult) -> str:
    worst = result.worst_relative_l2
    return "" if worst is None else worst if isinstance(worst, str) else f"{worst:.1e}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text from anywhere, on one line, with nothing that Markdown or HTML would read."""
    line = _on_one_line(without_home(text))
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#!~&$" else c for c in line)


def _code(text: str) -> str:
    """Text as a code span, which holds any run of backticks shorter than its own."""
    line = _on_one_line(text)
    longest = max(map(len, "".join(c if c == "`" else " " for c in line).split()), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"`{line}`"


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
