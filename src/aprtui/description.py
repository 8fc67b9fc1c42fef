"""What the detail pane says of a row, as renderables for any width. No widget and no arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from aprcore.ground.visible import visible
from aprcore.network.graph import known_stages
from aprcore.records import telling
from aprcore.records.telling import format_ratio, format_value
from aprtui.formatting import format_short
from aprtui.judgments import judgment_lines, parity_lines
from aprtui.rows import summarise_layer
from aprtui.run_state import RunState
from aprtui.theme import MARKS, PENDING, Mark, Paint, judgment_mark, mark_of, mark_of_verdict

if TYPE_CHECKING:
    from aprcore.judging.compare import Comparison
    from aprcore.judging.layouts import Layout
    from aprcore.records.report import LogitsReport, RunHeader, StageReport

# Facts that are about one side, and the ink of that.
SIDES = {"trace": "ink-trace", "oracle": "ink-oracle", "against": "ink-oracle"}
# What a tensor's statistics are called.
STATISTICS = {
    "values": "count", "mean": "mean", "std": "std", "min": "minimum", "max": "maximum",
    "RMS": "rms", "zeros": "zeros", "NaN": "nans", "Inf": "infinities",
}  # fmt: skip
Fact = tuple[str, Text]


def describe_run(state: RunState, paint: Paint) -> RenderableType:
    """The run: both sides, the tokens, the bound, the notes."""
    header = state.header
    if header is None:
        return Text("")
    known = telling.run_facts(header)
    facts = [_fact(fact, paint) for fact in known if fact.text != telling.NO_ORACLE]
    facts += _second_side(state, paint)
    # The ids and their texts are told apart by ink, and no text is broken over two lines.
    facts += [
        (fact.name, _tokens(header, paint) if fact.name == "tokens" else Text(fact.text))
        for fact in telling.prompt_facts(header)
    ]
    parts: list[RenderableType] = [_facts(facts, paint)]
    if state.counts:
        parts.append(Padding(_counts(state, paint), (1, 0, 0, 0)))
    for note in header.notes:
        label = ("note  ", paint("verdict-inherited", bold=True))
        parts.append(Padding(Text.assemble(label, visible(note)), (1, 0, 0, 0)))
    return Group(*parts)


def _second_side(state: RunState, paint: Paint) -> list[Fact]:
    """What the run is held against stage by stage, and what that comes to."""
    header = state.header
    if header is None or header.trusted is None:
        return []
    facts: list[Fact] = []
    if header.backend is None:
        facts.append(_fact(telling.side_fact("against", header.trusted), paint))
    else:
        label = "opening…" if state.is_running else "not opened"
        if state.device is not None:
            label = visible(state.device.label)
        if state.rejected is not None:
            label = "rejected"
            if not state.parity_faults:  # else those say why
                label += f": {visible(state.rejected.line_reason, telling.REASON_LIMIT)}"
        facts.append(("gpu", Text(label)))
    if state.report is not None and state.parity:
        _, _, found = state.report.parity_summary().partition(": ")
        mark = MARKS["FAIL" if state.parity_faults else "PASS"]
        said = Text(f"{mark.glyph} ", paint(mark.ink, bold=True))
        facts.append(("parity", said.append(visible(found, telling.REASON_LIMIT), "not bold")))
    return facts


def describe_layer(state: RunState, layer: int, paint: Paint) -> RenderableType:
    """A layer: how far it is, its worst verdict and its lowest cosine."""
    summary = summarise_layer(state, layer)
    facts: list[Fact] = [("judged", Text(f"{summary.done} of {summary.total} stages"))]
    if summary.worst is not None:
        facts.append(("worst", _mark(mark_of_verdict(summary.worst), paint)))
    lowest = summary.lowest
    if lowest is not None and lowest.comparison is not None:
        cosine, _ = telling.figures_of(lowest.comparison)
        shown = (telling.format_cosine(cosine), paint.cosine(cosine))
        text = Text.assemble(shown, (f"  {lowest.key.stage}", paint("ink-quiet")))
        facts.append(("lowest cosine", text))
    for name, worst in summary.worst_by.items():
        judgment = None if worst is None else telling.judgment_of(worst, name)
        if worst is not None and judgment is not None:
            mark = judgment_mark(judgment)
            text = Text(f"{mark.glyph} {format_ratio(judgment.relative_l2)}", paint(mark.ink))
            text.append(f"  {worst.key.stage}", paint("ink-quiet"))
            facts.append((f"worst {name}", text))
    diverging = [key for key in state.divergences if key.layer == layer]
    if diverging:
        facts.append(("diverging", Text(", ".join(key.stage for key in diverging))))
    return _facts(facts, paint)


def describe_pending(stage: str, paint: Paint) -> RenderableType:
    """A stage that is not judged yet."""
    return Group(Text(known_stages()[stage].title), _mark(PENDING, paint))


def describe_verdict(report: StageReport, paint: Paint) -> RenderableType:
    """A stage: what it is, its verdict and why in a sentence."""
    mark = mark_of(report)
    verdict = (f"{mark.glyph} ", paint(mark.ink, bold=True))
    tolerance = report.passes_at
    passes = "" if tolerance is None else f"; passes at {telling.format_tolerance(tolerance)}"
    said = f"{visible(report.reason, telling.REASON_LIMIT)}{passes}"
    if report.explanation is not None and report.blamed is not None:
        # Its figures stand in the table below, and the Why tab has the whole of it.
        said = f"{telling.finding_of(report)}{passes}"
    elif mark.word == "PASS" and report.comparison is None:
        said = "PASS by the kernel judgment"  # its reason repeats the table
    elif mark.word:
        said = f"{mark.word} {said}"
    return Group(_heading(report, paint), Text.assemble(verdict, said))


def describe_shortly(report: StageReport, paint: Paint) -> RenderableType:
    """A stage and its verdict in one line, where there is no room for more."""
    mark = mark_of(report)
    line = Text.assemble((f"{mark.glyph} {report.key}", paint(mark.ink, bold=True)))
    line.append(f"  {telling.finding_of(report).partition(':')[0]}")
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def describe_judgments(
    report: StageReport, state: RunState, paint: Paint, width: int
) -> RenderableType:
    """The three judgments, and what a second side makes of the stage, for `width` cells."""
    assert state.header is not None
    lines = [*judgment_lines(report, state.header, paint, width)]
    parity = state.parity.get(report.key)
    if parity is not None:
        lines += parity_lines(parity, state.side_names, paint, width)
    return Padding(Group(*lines), (1, 0, 0, 0))


def describe_figures(report: StageReport, header: RunHeader, paint: Paint) -> RenderableType:
    """Every other figure of a stage."""
    parts: list[RenderableType] = []
    if report.comparison is not None:
        parts.append(_facts(_comparison(report.comparison, report.layout, header, paint), paint))
        parts.append(_sides(report.comparison, paint))
    if report.trace is not None or report.oracle is not None:
        parts.append(_statistics(report, paint))
    if report.logits is not None:
        parts.append(_logits(report.logits, paint))
    return Group(*parts[:1], *(Padding(part, (1, 0, 0, 0)) for part in parts[1:]))


def _heading(report: StageReport, paint: Paint) -> Text:
    row = known_stages()[report.key.stage]
    text = Text(row.title)
    if report.layout is not None:
        text.append(f"  {telling.format_shape(report.layout.shape)}", "bold")
        if report.layout.axes != ("index",):
            text.append(f" = {row.shape}", paint("ink-quiet"))
    return text


def _comparison(
    found: Comparison, layout: Layout | None, header: RunHeader, paint: Paint
) -> list[Fact]:
    facts: list[Fact] = []
    if found.nonfinite_a or found.nonfinite_b:
        said = f"over {found.finite_count:,} of {found.count:,} finite"
        facts.append(("figures", Text(said, paint("verdict-nonfinite"))))
    facts += [
        ("NMSE", Text(format_value(found.nmse))),
        ("max|diff|", Text(format_value(found.max_abs_diff))),
    ]
    if found.max_index >= 0 and layout is not None and found.max_abs_diff > 0:
        facts.append(("  at", _position(found.max_index, layout, header, paint)))
    if found.first_nonfinite >= 0 and layout is not None:
        facts.append(("first NaN/Inf", _position(found.first_nonfinite, layout, header, paint)))
    return facts


def _position(index: int, layout: Layout, header: RunHeader, paint: Paint) -> Text:
    """A position in words, with the token's text where an axis counts tokens."""
    position = layout.position(index)
    text = Text(telling.format_position(layout.axes, position))
    texts = header.token_texts
    if texts is None or "token" not in layout.axes:
        return text
    token = position[layout.axes.index("token")]
    if layout.shape[0] == len(texts) or layout.axes[0] != "token":
        text.append(f" {_unbroken(texts[token])}" if token < len(texts) else "", paint("ink-trace"))
    return text


def _sides(found: Comparison, paint: Paint) -> Table:
    """Both sides next to each other, and their difference."""
    table = _columns(("", "trace", "oracle", "diff"), paint)
    rms = (found.rms_a, found.rms_b, found.rms_diff)
    table.add_row(_label("RMS", paint), *(Text(format_short(x)) for x in rms))
    counts = (found.nonfinite_a, found.nonfinite_b)
    table.add_row(
        _label("NaN/Inf", paint),
        *(Text(f"{n:,}", paint("verdict-nonfinite", bold=True) if n else "") for n in counts),
        Text(f"{found.unequal_nonfinite:,}"),
    )
    return table


def _statistics(report: StageReport, paint: Paint) -> Table:
    """The statistics of a side that stands alone, or of both when their sizes differ."""
    sides = [(name, x) for name, x in (("trace", report.trace), ("oracle", report.oracle)) if x]
    table = _columns(("", *(name for name, _ in sides)), paint)
    for name, attribute in STATISTICS.items():
        figures = [getattr(side, attribute) for _, side in sides]
        texts = [f"{x:,}" if isinstance(x, int) else format_value(x) for x in figures]
        table.add_row(_label(name, paint), *map(Text, texts))
    return table


def _logits(logits: LogitsReport, paint: Paint) -> Group:
    """The next token on both sides, and the five best of each."""
    facts = []
    for fact in telling.logits_facts(logits):
        text = Text(", ".join((fact.text, *fact.details)))
        if not logits.comparison.agree:
            text.stylize("bold", len(f"{fact.text}, "))
        facts.append((fact.name, text))
    table = Table.grid(padding=(0, 2))
    for number in range(5):
        table.add_column(justify="right" if number % 2 == 0 else "left", no_wrap=True)
    table.add_row("", Text("trace", paint("ink-trace")), "", Text("oracle", paint("ink-oracle")))
    for rank, ours, value, theirs, other in telling.logits_table(logits).rows:
        style = "" if ours == theirs else "bold"
        table.add_row(Text(rank, paint("ink-quiet")), Text(ours, style), Text(value),
                      Text(theirs, style), Text(other))  # fmt: skip
    return Group(_facts(facts, paint), table)


def _fact(fact: telling.Fact, paint: Paint) -> Fact:
    ink = SIDES.get(fact.name)
    text = Text.assemble((visible(fact.text), "" if ink is None else paint(ink, bold=True)))
    for said in fact.details:
        text.append(f"  {visible(said)}", paint("ink-quiet"))
    return fact.name, text


def _tokens(header: RunHeader, paint: Paint) -> Text:
    if header.tokens is None:
        return Text("not recorded on either side", paint("ink-quiet"))
    text = Text(f"{len(header.tokens)}: ")
    texts = header.token_texts or ()
    for number, token in enumerate(header.tokens[: telling.TOKENS_SHOWN]):
        text.append(f"{token}", paint("ink-quiet"))
        if number < len(texts):
            text.append(f"\N{NO-BREAK SPACE}{_unbroken(texts[number])}")
        text.append("  ")
    if len(header.tokens) > telling.TOKENS_SHOWN:
        text.append("…")
    return text


def _counts(state: RunState, paint: Paint) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    for verdict, count in state.counts.items():
        table.add_row(Text(f"{count}"), _mark(mark_of_verdict(verdict), paint))
    waiting = len(state.keys) - len(state.reports)
    if waiting and state.is_running:
        table.add_row(Text(f"{waiting}"), _mark(PENDING, paint))
    return table


def _mark(mark: Mark, paint: Paint) -> Text:
    return Text(f"{mark.glyph} {mark.word}", paint(mark.ink, bold=mark is not PENDING))


def _facts(facts: Iterable[Fact], paint: Paint) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(_label(name, paint), text)
    return table


def _columns(names: Sequence[str], paint: Paint) -> Table:
    table = Table.grid(padding=(0, 2))
    inks = {"trace": "ink-trace", "oracle": "ink-oracle"}
    table.add_column(no_wrap=True)
    for _ in names[1:]:
        table.add_column(justify="right", no_wrap=True)
    table.add_row(*(Text(name, paint(inks.get(name, "ink-quiet"))) for name in names))
    return table


def _unbroken(text: str) -> str:
    """A token's text in quotes that no line break comes into."""
    return telling.quoted(text).replace(" ", "\N{NO-BREAK SPACE}")


def _label(name: str, paint: Paint) -> Text:
    return Text(name, paint("ink-quiet"))
