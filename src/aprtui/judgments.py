"""The three judgments of a stage as a small table, for any width. No widget and no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from aprcore.records import telling
from aprcore.records.telling import format_ratio
from aprtui.formatting import format_compact
from aprtui.theme import ALONE, MARKS, Mark, Paint, judgment_mark, mark_of, mark_of_verdict

if TYPE_CHECKING:
    from aprcore.judging.compare import Comparison
    from aprcore.judging.verdict import Judgment
    from aprcore.records.parity import StageParity
    from aprcore.records.report import RunHeader, StageReport

# Cells from which the table has all its columns, and from which the worst part stands in them.
WIDE_CELLS = 60
WIDEST_CELLS = 104
LABEL_CELLS = 12  # "✗ cumulative"
WORDS = {"PASS": "pass", "FAIL": "FAIL"}
# Verdicts that rest on what a stage does by itself: the bound stands in parentheses, "(1e-4)".
NOT_HELD = ("NOISE", "INHERITED")


def judgment_lines(
    report: StageReport, header: RunHeader, paint: Paint, width: int
) -> Iterator[Text]:
    """The lines of the table: headings, one per judgment, then worst parts and spans.

    Args:
        report: The stage.
        header: The run.
        paint: Styles of the theme.
        width: Cells of a line.
    """
    is_wide = width >= WIDE_CELLS
    quiet = paint("ink-quiet")
    headings = ["rel. L2", "bound", "cosine", *(["noise"] if is_wide else [])]
    yield Text(" " * LABEL_CELLS + _cells(headings, is_wide), quiet)
    yield _cumulative(report, header, paint, is_wide)
    worst = []
    for name in telling.OWN_JUDGMENTS:
        judgment = telling.judgment_of(report, name)
        line = _label(name, judgment_mark(judgment), report, paint)
        if judgment is None:
            yield line.append(f" {telling.absence(report, name, header)}", quiet)
            continue
        line.append_text(_figures(judgment, paint, is_wide)).append_text(_blame(report, name))
        if width >= WIDEST_CELLS:
            line.append("  " + " " * (7 - len(_blame(report, name)))).append_text(
                _worst(judgment, paint)
            )
        elif is_wide or not judgment.passed:
            # Narrow panes are short of lines, too: there only what failed.
            worst.append(Text.assemble((f"  {name} ", quiet), _worst(judgment, paint)))
        line.no_wrap = True
        yield line
    yield from worst
    yield from map(paint.line, telling.span_lines(report))


def parity_lines(
    parity: StageParity, names: tuple[str, str], paint: Paint, width: int
) -> Iterator[Text]:
    """Both sides against each other, then the tested side's own judgment and the times.

    Args:
        parity: The stage on both sides.
        names: What the tested and the trusted side are called.
        paint: Styles of the theme.
        width: Cells of a line.
    """
    is_wide = width >= WIDE_CELLS
    quiet, found = paint("ink-quiet"), parity.comparison
    mark = mark_of_verdict(parity.verdict)
    line = Text.assemble((f"{mark.glyph} ", paint(mark.ink, bold=True)))
    line.append(f"{names[1]} vs {names[0]}".ljust(LABEL_CELLS - 2), quiet)
    if found is None:
        line.append(f" {mark.word}", "" if mark.word == "PASS" else paint(mark.ink))
    else:
        line.append_text(_compared(found, format_ratio(parity.bound), mark, paint, is_wide))
    line.no_wrap = True
    yield line
    kernel = parity.tested.kernel
    if kernel is not None:
        line = Text.assemble((f"{judgment_mark(kernel).glyph} ", paint(judgment_mark(kernel).ink)))
        line.append(f"{names[0]} kernel".ljust(LABEL_CELLS - 2), quiet)
        line.append_text(_figures(kernel, paint, is_wide))
        line.no_wrap = True
        yield line
    if found is not None and found.max_index >= 0 and parity.layout is not None:
        layout = parity.layout
        position = telling.format_position(layout.axes, layout.position(found.max_index))
        yield Text(f"  max|diff| {format_ratio(found.max_abs_diff)} at {position}", quiet)
    times = (f"{1e3 * side.elapsed_s:.2f} ms" for side in (parity.tested, parity.trusted))
    yield Text("  " + ", ".join(f"{n} {t}" for n, t in zip(names, times)), quiet)


def _cumulative(report: StageReport, header: RunHeader, paint: Paint, is_wide: bool) -> Text:
    """The line of the cumulative comparison; beyond its bound it need not be a fault."""
    found = report.comparison
    if found is None:
        line = _label("cumulative", ALONE, report, paint)
        return line.append(f" {telling.absence(report, 'cumulative', header)}", paint("ink-quiet"))
    # Where neither other judgment was made, the bound allows for the weights and is in the reason.
    has_none = header.judged and telling.is_alone(report)
    # Figures leave out values that are not finite, and are not within anything if there are any.
    is_finite = not (found.nonfinite_a or found.nonfinite_b)
    is_within = is_finite and found.relative_l2 <= header.bound
    mark = mark_of(report) if has_none or not is_within else MARKS["PASS"]
    line = _label("cumulative", mark, report, paint)
    bound = telling.UNJUDGED_GLYPH if has_none else format_ratio(header.bound)
    if mark.word in NOT_HELD and not has_none:
        bound = f"({format_compact(header.bound).replace('.0e', 'e')})"
    line.append_text(_compared(found, bound, mark, paint, is_wide))
    line.append_text(_blame(report, "cumulative"))
    line.no_wrap = True
    return line


def _compared(found: Comparison, bound: str, mark: Mark, paint: Paint, is_wide: bool) -> Text:
    cosine, relative_l2 = telling.figures_of(found)
    ink = "" if mark.word == "PASS" else paint(mark.ink)
    figures = [format_ratio(relative_l2), bound, _cosine(cosine, is_wide)]
    text = Text.assemble((_cells(figures, is_wide), ink))
    if is_wide:
        text.append(" " * 9 + f"  {'pass' if mark.word == 'PASS' else mark.word}", ink)
    return text


def _figures(judgment: Judgment, paint: Paint, is_wide: bool) -> Text:
    mark = judgment_mark(judgment)
    style = "" if judgment.passed else paint(mark.ink, bold=True)
    figures = [format_ratio(judgment.relative_l2), format_ratio(judgment.bound)]
    figures.append(_cosine(judgment.cosine, is_wide))
    if is_wide:
        figures.append(telling.format_times(judgment.assessment.ratio))
    text = Text(_cells(figures, is_wide), style)
    return text.append(f"  {WORDS[mark.word]}", style) if is_wide else text


def _label(name: str, mark: Mark, report: StageReport, paint: Paint) -> Text:
    is_blamed = report.blamed == name
    label = Text.assemble((f"{mark.glyph} ", paint(mark.ink, bold=True)))
    label.append(name, "bold" if is_blamed else paint("ink-quiet"))
    label.append(" " * (LABEL_CELLS - label.cell_len))
    return label


def _blame(report: StageReport, name: str) -> Text:
    """Marks the judgment that a FAIL rests on."""
    return Text(" ◀", "bold") if report.blamed == name else Text()


def _worst(judgment: Judgment, paint: Paint) -> Text:
    """The part that stands out most, and what it may: "worst row 812: 31x, at most 8.50x"."""
    name, ratio, most = telling.worst_part(judgment)
    style = "" if judgment.passed else paint("verdict-fail", bold=True)
    quiet = paint("ink-quiet")
    return Text.assemble(("worst ", quiet), name, (ratio, style), (most, quiet))


def _cosine(cosine: float, is_wide: bool) -> str:
    return telling.format_cosine(cosine, 7 if is_wide else 4)


def _cells(figures: list[str], is_wide: bool) -> str:
    widths = (9, 9, 11, 9) if is_wide else (8, 8, 8)
    return "".join(figure.rjust(cells) for figure, cells in zip(figures, widths))
