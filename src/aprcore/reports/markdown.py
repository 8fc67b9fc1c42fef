"""The report as Markdown for an issue: within GitHub's size limit, the long tables folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from aprcore.causes.records import CauseTried
from aprcore.ground.visible import visible
from aprcore.judging.verdict import Verdict
from aprcore.records import telling
from aprcore.records.environment import Environment, format_command
from aprcore.records.report import Report, RunHeader, StageReport
from aprcore.records.telling import Fact, Table, plain, plural

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


def code(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text in a code span, whatever backticks it holds."""
    shown = visible(text, limit)
    fence = "`" * (_longest_run(shown) + 1)
    # A space on either side is dropped again, and keeps backticks apart from the fence.
    pad = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def table(content: Table) -> str:
    """A table, its figures to the right."""
    rule = [":--" if i not in content.numbers else "--:" for i in range(len(content.headings))]
    headings, *rows = [map(escape, cells) for cells in (content.headings, *content.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _front(report: Report, command: Sequence[str]) -> Iterator[str]:
    word, said = telling.headline(report)
    yield f"## {telling.glyph_of(word)} {escape(said)}"
    yield from map(paragraph, telling.opening_lines(report))
    if report.counts:
        yield paragraph(telling.counts_text(report))
    if command:
        line = visible(format_command(command), TEXT_LIMIT)
        fence = "`" * max(3, 1 + _longest_run(line))
        yield f"{fence}sh\n{line}\n{fence}"
    yield _facts([*telling.run_facts(report.header), *telling.prompt_facts(report.header)])
    for note in report.header.notes:
        yield f"**note** {escape(note)}"
    faults = telling.faults_of(report)
    if faults:
        yield f"### {plural(len(faults), 'stage')} to blame"
    for fault in faults[:FAULTS_TOLD]:
        yield from _fault(fault, report.header)
    if len(faults) > FAULTS_TOLD:
        yield f"and {len(faults) - FAULTS_TOLD} more"


def _fault(stage: StageReport, header: RunHeader) -> Iterator[str]:
    yield f"#### {telling.verdict_text(telling.word_of(stage.verdict))} {escape(str(stage.key))}"
    for part in telling.fault_finding(stage, header):
        if isinstance(part, Table):
            yield table(part)
        elif isinstance(part, CauseTried):
            proof = "; ".join(escape(plain(line)) for line in [*telling.cause_lines(part)][1:])
            yield f"- **{escape(part.name)}** {proof}"
        else:
            yield paragraph(plain(part))
    place = telling.place_of_largest(stage)
    if place:
        yield f"The largest difference is at {escape(place)}."
    for details in (telling.top_table(stage, header), telling.others_table(stage.explanation)):
        if details is not None:
            yield _folded(details.title, table(details))


def _tables(report: Report, room: int) -> Iterator[str]:
    """One line per layer, then the stages that are not PASS, as far as there is room."""
    tables = [telling.layers_table(telling.layers_of(report))]
    found = [stage for stage in report.stages if stage.verdict is not Verdict.PASS]
    if found:
        title = f"{plural(len(found), 'stage')} not PASS"
        tables.append(telling.stage_table(found, report.header, title, full=True))
    parity = telling.parity_table(report)
    if parity is not None:
        tables.append(parity._replace(title=f"{parity.title}, stage by stage"))
    parts = [_folded(each.title, table(each)) for each in tables]
    if report.header.tested is not None:
        title = telling.parity_title(report.header)
        parts.insert(0, f"### {title}\n\n{_facts(telling.parity_facts(report))}")
    for part in parts:
        fitting = _cut(part, room)
        room -= len(fitting) + 2
        if fitting:
            yield fitting


def _back(report: Report, environment: Environment) -> Iterator[str]:
    logits = telling.logits_of(report)
    if logits is not None:
        best = telling.logits_table(logits)
        yield _folded(best.title, table(best))
    yield _folded("Environment", _facts(telling.environment_facts(environment, report.elapsed_s)))


def _facts(facts: Iterable[Fact]) -> str:
    return "\n".join(f"- {fact.name}: {code(fact.said)}" for fact in facts)


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
