"""The Why tab: what a verdict means here, in plain words. No widget and no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from aprcore.causes.records import CauseTried
from aprcore.ground.visible import visible
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from aprcore.records import telling
from aprcore.records.telling import Line, format_ratio
from aprtui.lineage import Lineage, trace_upstream
from aprtui.run_state import RunState
from aprtui.theme import Paint, mark_of

if TYPE_CHECKING:
    from aprcore.records.report import StageReport

# What an explanation is made of; the table is of the causes that do not explain the output.
Part = Line | CauseTried | telling.Table | None

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
    match telling.word_of(report.verdict):
        case "FAIL":
            parts = _failure(report, state)
        case "INHERITED":
            parts = _inheritance(report, state)
        case "NOISE":
            parts = _noise(report, state)
        case "PASS":
            parts = _pass(report)
        case "":
            assert state.header is not None
            absences = telling.absences(report, state.header)
            parts = iter([(f"Nothing could be judged: {absences}.",)])
        case _:
            parts = _finding(report)
    told = [_render(part, paint) for part in parts if part is not None]
    if figures and not telling.is_alone(report):
        told.append(_own_errors(report, paint))
    measured = telling.measured_line(report)
    if measured is not None:
        told.append(paint.line(measured))
    return Group(*told[:1], *(Padding(part, (1, 0, 0, 0)) for part in told[1:]))


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
        said = Text.assemble((str(key), "bold"), f"  {telling.finding_of(state.reports[key])}")
        table.add_row(Text(mark.glyph, paint(mark.ink, bold=True)), said)
    if len(faults) > FAULTS_LISTED:
        table.add_row("", Text(f"and {len(faults) - FAULTS_LISTED} more", paint("ink-quiet")))
    count = telling.plural(len(faults), "stage")
    verb = "is" if len(faults) == 1 else "are"
    return Group(Text(f"{count} {verb} to blame; each was judged on its own inputs:"), table)


def _render(part: Line | CauseTried | telling.Table, paint: Paint) -> RenderableType:
    if isinstance(part, telling.Table):
        return _others(part, paint("ink-quiet"))
    if isinstance(part, CauseTried):
        return Group(*map(paint.line, telling.cause_lines(part)))
    return paint.line(part)


def _others(others: telling.Table, quiet: Style) -> Table:
    """Figures first: names may take what is left of the width."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, *figures in (others.headings, *others.rows):
        is_cause = bool(figures[0]) and name != others.headings[0]
        cells = (Text(figure, quiet) if figure else "" for figure in figures)
        table.add_row(*cells, Text(name, "" if is_cause else quiet))
    return table


def _failure(report: StageReport, state: RunState) -> Iterator[Part]:
    assert state.header is not None
    yield from telling.fault_parts(report, state.header)
    if state.is_sought(report.key):
        yield ("Its cause is being looked for ...",)
    yield telling.others_table(report.explanation)
    if telling.is_alone(report) and report.comparison is not None:
        yield from _origin(trace_upstream(state, report.key), state)


def _inheritance(report: StageReport, state: RunState) -> Iterator[Part]:
    yield ("Not to blame: its own operation is right, its input was not.",)
    yield from _origin(trace_upstream(state, report.key), state)
    if report.reason and not report.reason.startswith("its own operation"):
        yield (telling.sentence_of(report.reason),)


def _origin(lineage: Lineage | None, state: RunState) -> Iterator[Line]:
    """Where the error came from: the fault by name, and the way from it."""
    if lineage is None:
        return
    origin = state.reports[lineage.origin]
    mark = mark_of(origin)
    name = f"{mark.glyph} {lineage.origin}", mark.word
    if lineage.faults:
        is_sure = not telling.is_alone(state.reports[lineage.path[0]])
        start = "Inherited from " if is_sure else "It may be inherited from "
        yield start, name, f"  {telling.finding_of(origin)}"
    elif origin.accepted:
        yield "Inherited from ", name, ", whose error is within your budget."
    else:
        yield ("Rounding that began at ", name, " and was carried on; nothing upstream is to blame."
               f" There, {origin.reason}.")  # fmt: skip
    yield ("the way  ", "quiet"), _way(lineage.path)
    others = [str(key) for key in lineage.faults if key != lineage.origin]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield (f"Also to blame upstream: {', '.join(others[:3])}{more}.",)


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


def _noise(report: StageReport, state: RunState) -> Iterator[Part]:
    if report.accepted:
        yield (f"Accepted: {visible(report.reason, telling.REASON_LIMIT)}.",)
        if report.explanation is not None:
            yield from telling.explanation_parts(report.explanation)
            yield telling.others_table(report.explanation)
        return
    yield ("Not to blame: its inputs are right, and its error is what rounding makes of it"
           f" ({report.reason}).",)  # fmt: skip
    found = report.comparison
    if found is not None and state.header is not None:
        yield (f"Against the oracle it is off by {format_ratio(found.relative_l2)}, more than"
               f" the {state.header.bound:g} of exact weights: the steps in which the weights"
               " are stored predict that much.",)  # fmt: skip


def _pass(report: StageReport) -> Iterator[Line]:
    if report.comparison is not None:
        yield (f"Nothing is wrong: {report.reason}.",)
    else:
        yield ("Nothing is wrong with this operation: on the inputs in the trace it gives the"
               " output in the trace, to within rounding. Whether the model's weights are"
               " right takes an oracle.",)  # fmt: skip


def _finding(report: StageReport) -> Iterator[Line]:
    """What was found where a comparison is not the point."""
    match telling.word_of(report.verdict):
        case "MISSING":
            yield (f"Not judged: {report.reason}.",)
            yield ("Nothing is held against it, and it does not count as wrong. Dump"
                   f" {report.key.stage} on that side to have it judged.",)  # fmt: skip
        case "UNJUDGED":
            yield (f"It could not be judged: {visible(report.reason, telling.REASON_LIMIT)}.",)
            yield ("That it is wrong is not said, nor that it is right.",)
        case "SHAPE":
            yield (f"The sizes differ: {report.reason}.",)
            expected = known_stages()[report.key.stage].shape
            yield (f"The stage is {expected} (T tokens, H heads, K kv heads, D head dim,"
                   " E hidden, F ffn, V vocab): look at what one side leaves out.",)  # fmt: skip
        case "LAYOUT":
            yield (f"Not to blame: {visible(report.reason, telling.REASON_LIMIT)}. The values are"
                   " right, they are written in another order.",)  # fmt: skip
        case "NONFINITE":
            yield (f"NaN or infinity appears here first: {report.reason}.",)
            found, layout = report.comparison, report.layout
            if found is not None and found.first_nonfinite >= 0 and layout is not None:
                place = telling.format_position(layout.axes, layout.position(found.first_nonfinite))
                yield ("the first at  ", "quiet"), place
            yield ("Look for an overflow (half precision above 65504, an exponential without its"
                   " maximum), a division by zero, or memory that was never written.",)  # fmt: skip


def _own_errors(report: StageReport, paint: Paint) -> RenderableType:
    """What the stage itself adds, against what rounding explains."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for name in telling.OWN_JUDGMENTS:
        judgment = telling.judgment_of(report, name)
        if judgment is None:
            continue
        side = "the oracle's" if name == "model" else "the trace's own"
        said = (
            f"on {side} inputs off by {format_ratio(judgment.relative_l2)}, where rounding"
            f" explains {format_ratio(judgment.bound)}:"
            f" {telling.format_times(judgment.assessment.ratio)} the predicted noise"
        )
        table.add_row(Text(name, paint("ink-quiet")), Text(said))
    return table
