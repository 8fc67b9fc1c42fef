"""The Why tab: what a verdict means here, in plain words. No widget and no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from aprcore.network.graph import BY_NAME, StageKey
from aprcore.records.wording import (
    MEANINGS,
    REASON_LIMIT,
    TWO_DUMPS,
    finding_of,
    format_cosine,
    format_position,
    format_ratio,
    format_times,
    plural,
)
from aprtui.lineage import Lineage, trace_upstream
from aprtui.measures import JUDGMENTS, Measure, absence, judgment_of
from aprtui.run_state import RunState
from aprtui.text import visible
from aprtui.theme import Paint, mark_of

if TYPE_CHECKING:
    from aprcore.causes.records import CauseTried, Explanation
    from aprcore.records.report import StageReport

# Steps of a way upstream that are named; the middle of a longer one is counted.
STEPS_NAMED = 6
# Faults of a run that are listed: while it runs, the list is drawn anew with every stage.
FAULTS_LISTED = 12


def explain_stage(
    report: StageReport, state: RunState, paint: Paint, *, figures: bool
) -> RenderableType:
    """Why a stage has its verdict.

    Args:
        report: The stage.
        state: The run.
        paint: Styles of the theme.
        figures: Whether to give the figures of its judgments, which may stand beside it already.
    """
    verdict = None if report.verdict is None else report.verdict.value
    parts: Iterator[RenderableType]
    match verdict:
        case "FAIL":
            parts = _failure(report, state, paint)
        case "INHERITED":
            parts = _inheritance(report, state, paint)
        case "NOISE":
            parts = _noise(report, state, paint)
        case "PASS":
            parts = _pass(report, state, paint)
        case None:
            parts = iter([Text(f"Nothing could be judged: {_absences(report, state)}.")])
        case _:
            parts = _finding(report, paint)
    told = list(parts)
    if figures and (report.kernel is not None or report.model is not None):
        told.append(_own_errors(report, paint))
    if report.quantisation is not None:
        told.append(Text(f"Measured with the reference weights: {report.quantisation.describe()}."))
    spaced = [Padding(part, (1, 0, 0, 0)) for part in told[1:]]
    return Group(*told[:1], *spaced)


def explain_run(state: RunState, layer: int | None, paint: Paint) -> RenderableType:
    """Every fault of the run, or of one layer, with its cause."""
    faults = [key for key in state.divergences if layer is None or key.layer == layer]
    if not faults:
        where = "" if layer is None else f" in layer {layer}"
        so_far = " so far" if state.is_running else ""
        return Text(f"Nothing is to blame{where}{so_far}.")
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for key in faults[:FAULTS_LISTED]:
        mark = mark_of(state.reports[key])
        said = Text.assemble((str(key), "bold"), f"  {finding_of(state.reports[key])}")
        table.add_row(Text(mark.glyph, paint(mark.ink, bold=True)), said)
    if len(faults) > FAULTS_LISTED:
        table.add_row("", Text(f"and {len(faults) - FAULTS_LISTED} more", paint("ink-quiet")))
    count = plural(len(faults), "stage")
    verb = "is" if len(faults) == 1 else "are"
    return Group(Text(f"{count} {verb} to blame; each was judged on its own inputs:"), table)


def _failure(report: StageReport, state: RunState, paint: Paint) -> Iterator[RenderableType]:
    blamed = report.blamed or "cumulative"
    is_beyond_budget = report.explanation is None and report.budget is not None
    if is_beyond_budget or (blamed == "cumulative" and report.comparison is None):
        yield Text(_sentence(report.reason))
        return
    yield Text(MEANINGS[blamed] + (_no_own_judgment(report, state) if _is_alone(report) else ""))
    if report.explanation is None:
        yield Text(_sentence(report.reason))
    else:
        yield from _causes(report.explanation, paint)
        yield from _others(report.explanation, paint)
    if _is_alone(report):
        yield from _origin(trace_upstream(state, report.key), state, paint)


def _is_alone(report: StageReport) -> bool:
    """Whether the comparison of both sides is all there is."""
    return report.kernel is None and report.model is None


def _no_own_judgment(report: StageReport, state: RunState) -> str:
    """Why a FAIL by the comparison alone may be inherited."""
    if state.header is None or state.header.model is None:
        return TWO_DUMPS
    return f" It could not be judged on its own inputs: {_absences(report, state)}."


def _absences(report: StageReport, state: RunState) -> str:
    assert state.header is not None
    told = {measure: absence(report, measure, state.header) for measure in JUDGMENTS}
    return "; ".join(f"{measure.value}: {said}" for measure, said in told.items())


def _causes(explanation: Explanation, paint: Paint) -> Iterator[RenderableType]:
    """The causes that explain the output, or what is visible; then what else was tried."""
    named = explanation.named
    several = len({cause.part for cause in named}) < len(named)
    if several:
        yield Text("These explain it equally well, and cannot be told apart here:")
    for cause in named:
        yield _cause(cause, paint)
    if not named:
        count = explanation.tried
        yield Text.assemble(
            (f"None of the {plural(count, 'cause')} tried gives this output.", "bold")
            if count
            else ("No cause in the catalogue fits this stage.", "bold")
        )
        if explanation.symptom:
            yield Text.assemble(("Visible: ", paint("ink-quiet")), (explanation.symptom, "bold"))


def _cause(cause: CauseTried, paint: Paint) -> RenderableType:
    """A cause with its proof and what to look at."""
    quiet = paint("ink-quiet")
    return Group(
        Text.assemble(("⇒ ", paint("verdict-fail", bold=True)), (cause.name, "bold")),
        Text.assemble(
            ("  when tried: cosine ", quiet), (format_cosine(cause.cosine), "bold"),
            (", relative L2 ", quiet), format_ratio(cause.relative_l2),
        ),
        Text.assemble(("  look at: ", quiet), cause.advice),
    )  # fmt: skip


def _others(explanation: Explanation, paint: Paint) -> Iterator[RenderableType]:
    """What does not explain the output, the nearest first."""
    others = [cause for cause in explanation.causes if not cause.explains]
    if not others:
        return
    quiet = paint("ink-quiet")
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    table.add_row(Text("cosine", quiet), Text("rel. L2", quiet), Text("also tried", quiet))
    for cause in others:
        figures = format_cosine(cause.cosine, 4), format_ratio(cause.relative_l2)
        table.add_row(*(Text(figure, quiet) for figure in figures), Text(cause.name))
    rest = explanation.tried - len(explanation.causes)
    if rest > 0:
        table.add_row("", "", Text(f"and {rest} more, further off", quiet))
    yield table


def _inheritance(report: StageReport, state: RunState, paint: Paint) -> Iterator[RenderableType]:
    yield Text("Not to blame: its own operation is right, its input was not.")
    yield from _origin(trace_upstream(state, report.key), state, paint)
    if report.reason and not report.reason.startswith("its own operation"):
        yield Text(_sentence(report.reason))


def _origin(lineage: Lineage | None, state: RunState, paint: Paint) -> Iterator[RenderableType]:
    """Where the error came from: the fault by name, and the way from it."""
    if lineage is None:
        return
    origin = state.reports[lineage.origin]
    mark = mark_of(origin)
    name = (f"{mark.glyph} {lineage.origin}", paint(mark.ink, bold=True))
    if lineage.faults:
        is_sure = not _is_alone(state.reports[lineage.path[0]])
        start = "Inherited from " if is_sure else "It may be inherited from "
        said = Text.assemble(start, name, f"  {finding_of(origin)}")
    elif origin.accepted:
        said = Text.assemble("Inherited from ", name, ", whose error is within your budget.")
    else:
        said = Text.assemble("Rounding that began at ", name, " and was carried on; nothing"
                             f" upstream is to blame. There, {origin.reason}.")  # fmt: skip
    yield said
    yield Text.assemble(("the way  ", paint("ink-quiet")), _way(lineage.path))
    others = [str(key) for key in lineage.faults if key != lineage.origin]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield Text(f"Also to blame upstream: {', '.join(others[:3])}{more}.")


def _way(path: tuple[StageKey, ...]) -> str:
    """Stages from the origin down to this one, each layer named where it begins."""
    down = path[::-1]
    if len(down) > STEPS_NAMED + 1:
        half = STEPS_NAMED // 2
        between = f"… {len(down) - STEPS_NAMED} more …"
        return " → ".join([*_names(down[:half]), between, *_names(down[-half:])])
    return " → ".join(_names(down))


def _names(keys: tuple[StageKey, ...]) -> Iterator[str]:
    layer: int | None = -1
    for key in keys:
        yield key.stage if key.layer == layer else str(key)
        layer = key.layer


def _noise(report: StageReport, state: RunState, paint: Paint) -> Iterator[RenderableType]:
    if report.accepted:
        yield Text(f"Accepted: {visible(report.reason, REASON_LIMIT)}.")
        if report.explanation is not None:
            yield from _causes(report.explanation, paint)
            yield from _others(report.explanation, paint)
        return
    yield Text("Not to blame: its inputs are right, and its error is what rounding makes of it"
               f" ({report.reason}).")  # fmt: skip
    found = report.comparison
    if found is not None and state.header is not None:
        yield Text(f"Against the oracle it is off by {format_ratio(found.relative_l2)}, more than"
                   f" the {state.header.bound:g} of exact weights: the steps in which the weights"
                   " are stored predict that much.")  # fmt: skip


def _pass(report: StageReport, state: RunState, paint: Paint) -> Iterator[RenderableType]:
    if report.comparison is not None:
        yield Text(f"Nothing is wrong: {report.reason}.")
    else:
        yield Text("Nothing is wrong with this operation: on the inputs in the trace it gives the"
                   " output in the trace, to within rounding. Whether the model's weights are"
                   " right takes an oracle.")  # fmt: skip


def _finding(report: StageReport, paint: Paint) -> Iterator[RenderableType]:
    """What was found where a comparison is not the point."""
    assert report.verdict is not None
    match report.verdict.value:
        case "MISSING":
            yield Text(f"Not judged: {report.reason}.")
            yield Text("Nothing is held against it, and it does not count as wrong. Dump"
                       f" {report.key.stage} on that side to have it judged.")  # fmt: skip
        case "SHAPE":
            yield Text(f"The sizes differ: {report.reason}.")
            expected = BY_NAME[report.key.stage].shape
            yield Text(f"The stage is {expected} (T tokens, H heads, K kv heads, D head dim,"
                       " E hidden, F ffn, V vocab): look at what one side leaves out.")  # fmt: skip
        case "LAYOUT":
            yield Text(f"Not to blame: {visible(report.reason, REASON_LIMIT)}. The values are"
                       " right, they are written in another order.")  # fmt: skip
        case "NONFINITE":
            yield Text(f"NaN or infinity appears here first: {report.reason}.")
            yield from _first_nonfinite(report, paint)


def _first_nonfinite(report: StageReport, paint: Paint) -> Iterator[RenderableType]:
    found, layout = report.comparison, report.layout
    if found is not None and found.first_nonfinite >= 0 and layout is not None:
        place = format_position(layout.axes, layout.position(found.first_nonfinite))
        yield Text.assemble(("the first at  ", paint("ink-quiet")), place)
    yield Text("Look for an overflow (half precision above 65504, an exponential without its"
               " maximum), a division by zero, or memory that was never written.")  # fmt: skip


def _own_errors(report: StageReport, paint: Paint) -> RenderableType:
    """What the stage itself adds, against what rounding explains."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for measure in JUDGMENTS:
        judgment = judgment_of(report, measure)
        if judgment is None:
            continue
        side = "the oracle's" if measure is Measure.MODEL else "the trace's own"
        said = (
            f"on {side} inputs off by {format_ratio(judgment.relative_l2)}, where rounding"
            f" explains {format_ratio(judgment.bound)}:"
            f" {format_times(judgment.assessment.ratio)} the predicted noise"
        )
        table.add_row(Text(measure.value, paint("ink-quiet")), Text(said))
    return table


def _sentence(clause: str) -> str:
    """A clause of the engine as a sentence of its own."""
    return f"{clause[:1].upper()}{visible(clause[1:], REASON_LIMIT)}."
