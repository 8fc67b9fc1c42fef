"""The report as Markdown for an issue: within GitHub's size limit, the long tables folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from aprcore.causes.records import CauseTried
from aprcore.judging.verdict import Verdict
from aprcore.records.environment import Environment, format_command
from aprcore.records.report import Report, RunHeader, StageReport
from aprcore.records.wording import (
    figures_of,
    format_cosine,
    plural,
    visible,
)
from aprcore.reports import contents
from aprcore.reports.contents import Fact, Table

# GitHub refuses a comment of more than 65,536 characters; some room is for the writer's own words.
MOST_CHARACTERS = 60_000
# A text from a file, such as a prompt, may take this much of it.
TEXT_LIMIT = 1000
# Failing stages in full, of which the first is the one to look at.
FAULTS_TOLD = 6
# What CommonMark or GitHub reads as markup. A mention, a link to an issue and an address cannot
# be escaped by a backslash: an empty comment keeps them from being one.
_PUNCTUATION = re.compile(r"[\\`*\[\]<&|~$]|(?<!\w)_|_(?!\w)")
_LINK = re.compile(r"[@#](?=\w)|:(?=//)")
# At the start of a line these begin a list, a heading or a quote.
_LINE_START = re.compile(r"^(\s*\d*)([-+=#>]|(?<=\d)[.)])")


def render_markdown(report: Report, command: Sequence[str], environment: Environment) -> str:
    """The finding, the failing stages, a line per layer and the environment."""
    front = "\n\n".join(_front(report, command))
    back = "\n\n".join(_back(report, environment))
    room = MOST_CHARACTERS - len(front) - len(back) - 8
    middle = "\n\n".join(_tables(report, room))
    return "\n\n".join(part for part in (front, middle, back) if part) + "\n"


def escape(text: str) -> str:
    """Text that GitHub shows as it is."""
    shown = _PUNCTUATION.sub(r"\\\g<0>", visible(text, TEXT_LIMIT))
    return _LINK.sub(r"\g<0><!-- -->", shown)


def paragraph(text: str) -> str:
    """Text that begins a line, where a few more characters mean something."""
    return _LINE_START.sub(r"\1\\\2", escape(text))


def code(text: str) -> str:
    """Text in a code span, whatever backticks it holds."""
    shown = visible(text, TEXT_LIMIT)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    # A space on either side is dropped again, and keeps backticks apart from the fence.
    pad = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _front(report: Report, command: Sequence[str]) -> Iterator[str]:
    verdict, said = contents.headline(report)
    yield f"## {contents.glyph_of(verdict)} {escape(said)}"
    advice = contents.first_advice(report)
    if advice is not None:
        yield f"Look at: {escape(advice)}"
    logits = contents.logits_of(report)
    if logits is not None:
        yield paragraph(contents.next_token(logits))
    if report.counts:
        yield paragraph(contents.counts_text(report))
    if command:
        line = visible(format_command(command), TEXT_LIMIT)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
        yield f"{fence}sh\n{line}\n{fence}"
    yield _facts(contents.run_facts(report.header))
    for note in report.header.notes:
        yield f"**note** {escape(note)}"
    faults = contents.faults_of(report)
    if faults:
        yield f"### {plural(len(faults), 'stage')} to blame"
    for fault in faults[:FAULTS_TOLD]:
        yield from _fault(fault, report.header)
    if len(faults) > FAULTS_TOLD:
        yield f"and {len(faults) - FAULTS_TOLD} more"


def _fault(stage: StageReport, header: RunHeader) -> Iterator[str]:
    yield f"#### {contents.verdict_text(stage.verdict)} {escape(str(stage.key))}"
    yield from map(paragraph, contents.fault_sentences(stage, header))
    if stage.explanation is not None:
        yield from map(_cause, stage.explanation.named)
    judgments = contents.judgment_table(stage, header)
    if judgments.rows:
        yield _table(judgments)
    yield from map(paragraph, contents.spans_of(stage))
    place = contents.place_of_largest(stage)
    if place:
        yield f"The largest difference is at {escape(place)}."
    top = contents.top_table(stage, header)
    if top is not None:
        yield _folded("Largest differences", _table(top))
    others = None if stage.explanation is None else contents.others_table(stage.explanation)
    if others is not None:
        yield _folded("Other causes tried", _table(others))


def _cause(cause: CauseTried) -> str:
    tried = contents.trial_text(cause)
    told = f" {tried};" if tried else ""
    return f"- **{escape(cause.name)}**{told} look at: {escape(cause.advice)}"


def _tables(report: Report, room: int) -> Iterator[str]:
    """One line per layer, then the stages that are not PASS, as far as there is room."""
    parts = [_folded(plural(len(contents.layers_of(report)), "layer"), _table(_layers(report)))]
    parity = contents.parity_table(report)
    found = [stage for stage in report.stages if stage.verdict is not Verdict.PASS]
    if found:
        table = contents.stage_table(found, report.header, full=True)
        parts.append(_folded(f"{plural(len(found), 'stage')} not PASS", _table(table)))
    title = contents.parity_title(report.header)
    if report.header.tested is not None:
        parts.insert(0, f"### {title}\n\n{_facts(contents.parity_facts(report))}")
    if parity is not None:
        parts.append(_folded(f"{title}, stage by stage", _table(parity)))
    for part in parts:
        fitting = _cut(part, room)
        room -= len(fitting) + 2
        if fitting:
            yield fitting


def _layers(report: Report) -> Table:
    rows = []
    for layer in contents.layers_of(report):
        lowest = layer.lowest
        cosine = "" if lowest is None or lowest.comparison is None else (
            f"{format_cosine(figures_of(lowest.comparison)[0])} {lowest.key.stage}"
        )  # fmt: skip
        worst = []
        for name in ("model", "kernel"):
            made = [(stage, getattr(stage, name)) for stage in layer.stages]
            judged = [(stage, judgment) for stage, judgment in made if judgment is not None]
            stage, judgment = max(
                judged, key=lambda pair: (not pair[1].passed, pair[1].relative_l2),
                default=(None, None),
            )  # fmt: skip
            text = contents.judgment_text(judgment)
            worst.append("" if stage is None else f"{text} {stage.key.stage}")
        rows.append((layer.title, contents.verdict_text(layer.worst), cosine, *worst))
    headings = ("layer", "worst", "lowest cosine", "worst model / bound", "worst kernel / bound")
    return Table(headings, tuple(rows))


def _back(report: Report, environment: Environment) -> Iterator[str]:
    logits = contents.logits_of(report)
    if logits is not None:
        yield _folded("Best next tokens", _table(contents.logits_table(logits)))
    yield _folded("Environment", _facts(contents.environment_facts(environment, report.elapsed_s)))


def _facts(facts: Iterable[Fact]) -> str:
    return "\n".join(f"- {name}: {code(text)}" for name, text in facts)


def _table(table: Table) -> str:
    rule = [":--" if i not in table.numbers else "--:" for i in range(len(table.headings))]
    lines = [table.headings, tuple(rule), *table.rows]
    texts = [
        cells if number == 1 else tuple(escape(cell) for cell in cells)
        for number, cells in enumerate(lines)
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in texts)


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _cut(folded: str, room: int) -> str:
    """A folded table without the rows for which there is no room, and a line that says how many."""
    if len(folded) <= room:
        return folded
    end = "\n\nand {} more rows\n\n</details>"
    lines = folded.removesuffix("\n\n</details>").split("\n")
    kept, used = [], len(end) + 8
    for line in lines:
        used += len(line) + 1
        if used > room:
            break
        kept.append(line)
    # The summary, a blank line, the headings and the rule come before the first row.
    if len(kept) < 5:
        return ""
    return "\n".join(kept) + end.format(len(lines) - len(kept))
