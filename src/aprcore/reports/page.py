"""The report as one HTML page: no script, nothing from the network, light and dark, and it prints.

A content security policy on the page says so to the browser, too: should text from a file ever get
past the escaping, it could run nothing and fetch nothing.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files

from aprcore.causes.records import CauseTried
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import BY_NAME, StageKey
from aprcore.records.environment import Environment, format_command
from aprcore.records.report import Report, StageReport
from aprcore.records.wording import (
    figures_of,
    format_cosine,
    format_ratio,
    format_shape,
    plural,
)
from aprcore.reports import contents
from aprcore.reports.contents import Fact, Layer, Table
from aprcore.reports.maps import (
    DECADES,
    StageMap,
    cell_text,
    describe_map,
    encode_png,
    lost_text,
    row_labels,
)
from aprcore.reports.markup import Markup, element, join
from aprcore.reports.profile import draw_profile, legend_note

STYLE = "page.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Height of a map, and of a row in it; names of rows need as much each.
MAP_HEIGHT_PX, LEAST_ROW_PX, MOST_ROW_PX, NAMED_ROW_PX = 400, 4, 18, 14
THEMES = (("system", "as the system"), ("light", "light"), ("dark", "dark"))


def render_page(
    report: Report, maps: Sequence[StageMap], command: Sequence[str], environment: Environment
) -> str:
    """The page of a finished run.

    Args:
        report: The run.
        maps: Pictures of failing stages.
        command: The command line that made it; empty if there was none.
        environment: Where it was made.
    """
    title = f"aprtui: {report.header.model or report.header.trace.path}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(files(__package__).joinpath(STYLE).read_text("utf-8"))),
    )
    main = element(
        "main",
        _opening(report, command),
        _profile(report),
        _stages(report),
        *_faults(report, {shown.key: shown for shown in maps}),
        *_parity(report),
        *_logits(report),
        _environment(report, environment),
    )
    page = element("html", head, element("body", _banner(), main), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _banner() -> Markup:
    choices = [
        element("label", element("input", type="radio", name="theme", id=f"theme-{name}",
                                 checked=name == "system"), label)
        for name, label in THEMES
    ]  # fmt: skip
    return element(
        "header",
        element("p", element("strong", "aprtui"), " report"),
        element("fieldset", element("legend", "Theme"), *choices, class_="themes"),
    )


def _opening(report: Report, command: Sequence[str]) -> Markup:
    verdict, said = contents.headline(report)
    parts = [
        element("h1", element("span", contents.glyph_of(verdict), class_="glyph"), f" {said}",
                class_=f"finding {_ink(verdict)}"),
    ]  # fmt: skip
    advice = contents.first_advice(report)
    if advice is not None:
        parts.append(element("p", f"Look at: {advice}"))
    logits = contents.logits_of(report)
    if logits is not None:
        parts.append(element("p", contents.next_token(logits)))
    parts.append(element("p", contents.counts_text(report), class_="counts"))
    parts.extend(element("p", element("strong", "note "), note) for note in report.header.notes)
    parts.append(_facts(contents.run_facts(report.header)))
    if command:
        line = element("pre", element("code", format_command(command)), tabindex="0")
        parts += [element("h2", "To reproduce"), line]
    return element("section", *parts)


def _profile(report: Report) -> Markup:
    drawing = draw_profile(report)
    if drawing is None:
        return join()
    figure = element(
        "figure", _scrolled(drawing, "profile"), element("figcaption", legend_note(report))
    )
    return element("section", element("h2", "Profile over the depth"), figure)


def _stages(report: Report) -> Markup:
    only = element("input", type="checkbox", id="findings-only")
    groups = [_layer(layer, report) for layer in contents.layers_of(report)]
    return element(
        "section",
        element("h2", "Stages"),
        element("p", element("label", only, " only what is not PASS"), class_="filter"),
        *groups,
    )


def _layer(layer: Layer, report: Report) -> Markup:
    worst, lowest = layer.worst, layer.lowest
    said = [f" · {plural(len(layer.stages), 'stage')}"]
    if lowest is not None and lowest.comparison is not None:
        cosine = format_cosine(figures_of(lowest.comparison)[0], 4)
        said.append(f" · lowest cosine {cosine}, {lowest.key.stage}")
    summary = element(
        "summary",
        element("strong", layer.title),
        " ",
        element("span", contents.verdict_text(worst), class_=_ink(worst)),
        *said,
    )
    table = contents.stage_table(layer.stages, report.header, full=False)
    inks = [_ink(stage.verdict) for stage in layer.stages]
    told = {stage.key for stage in contents.faults_of(report)[: contents.FAULTS_TOLD]}
    links = [contents.key_anchor(s.key) if s.key in told else "" for s in layer.stages]
    body = _table(table, f"Stages of {layer.title}", inks=inks, links=links)
    diverges = worst is not None and worst.is_divergence
    sound = "sound" if all(stage.verdict is Verdict.PASS for stage in layer.stages) else ""
    return element("details", summary, body, open=diverges, class_=sound)


def _faults(report: Report, maps: Mapping[StageKey, StageMap]) -> Iterator[Markup]:
    faults = contents.faults_of(report)
    if not faults:
        return
    told = [_fault(stage, report, maps.get(stage.key)) for stage in faults[: contents.FAULTS_TOLD]]
    parts = [element("h2", f"{plural(len(faults), 'stage')} to blame"), *told]
    if len(faults) > contents.FAULTS_TOLD:
        more = len(faults) - contents.FAULTS_TOLD
        parts.append(element("p", f"and {more} more: see the stages above"))
    yield element("section", *parts)


def _fault(stage: StageReport, report: Report, shown: StageMap | None) -> Markup:
    header = report.header
    shape = "" if stage.layout is None else f" {format_shape(stage.layout.shape)}"
    verdict = element("span", contents.verdict_text(stage.verdict), class_=_ink(stage.verdict))
    parts: list[Markup] = [
        element("h3", verdict, f" {stage.key}"),
        element("p", f"{BY_NAME[stage.key.stage].title}{shape}", class_="quiet"),
        *(element("p", sentence) for sentence in contents.fault_sentences(stage, header)),
    ]
    if stage.explanation is not None:
        parts += [_cause(cause) for cause in stage.explanation.named]
    judgments = contents.judgment_table(stage, header)
    if judgments.rows:
        parts.append(_table(judgments, f"Judgments of {stage.key}", marked=stage.blamed))
    parts += [element("p", span) for span in contents.spans_of(stage)]
    if stage.quantisation is not None:
        measured = f"Measured with the reference weights: {stage.quantisation.describe()}."
        parts.append(element("p", measured))
    if shown is not None:
        parts.append(_map(shown, contents.place_of_largest(stage)))
    top = contents.top_table(stage, header)
    if top is not None:
        parts += [element("h4", "Largest differences")]
        parts += [_table(top, f"Largest differences of {stage.key}")]
    others = None if stage.explanation is None else contents.others_table(stage.explanation)
    if others is not None:
        table = _table(others, f"Other causes tried at {stage.key}")
        parts.append(element("details", element("summary", "Other causes tried"), table))
    return element("article", *parts, id=contents.key_anchor(stage.key))


def _cause(cause: CauseTried) -> Markup:
    tried = contents.trial_text(cause)
    return element(
        "p",
        element("strong", f"⇒ {cause.name}"),
        element("br"),
        *([tried, element("br")] if tried else []),
        f"look at: {cause.advice}",
        class_="cause",
    )


def _map(shown: StageMap, place: str) -> Markup:
    """A heat map with its row names, a scale and a description."""
    grid = shown.grid
    rows, columns = grid.values.shape
    row_px = min(max(MAP_HEIGHT_PX // rows, LEAST_ROW_PX), MOST_ROW_PX)
    labels = row_labels(shown)
    png = Markup("data:image/png;base64," + b64encode(encode_png(grid)).decode())
    image = element(
        "img", src=png, alt=describe_map(shown), width=columns, height=rows,
        style=f"height:{rows * row_px}px",
    )  # fmt: skip
    if labels and row_px * labels[0][1] < NAMED_ROW_PX:
        labels = []
    names = [element("span", name, style=f"height:{row_px * cells:g}px") for name, cells in labels]
    across = f"{grid.columns} {grid.left} to {grid.left + columns * grid.cell_columns - 1}"
    down = (
        [f"{grid.rows} {grid.top} to {grid.top + rows * grid.cell_rows - 1}, downwards; "]
        if grid.rows
        else []
    )
    scale = element(
        "span",
        f"≤ {format_ratio(grid.largest / 10**DECADES)} ",
        element("span", class_="ramp"),
        f" {format_ratio(grid.largest)} (logarithmic)",
        class_="scale",
    )
    if grid.fold:
        across = f"{grid.columns}, {grid.fold} a line,"
    lost = lost_text(grid)
    swatch = [element("span", class_="lost"), f" {lost}; "]
    largest = f"; the largest at {place}" if place else ""
    return element(
        "figure",
        element("div", element("div", *names, class_="rows", aria_hidden="true"), image,
                class_="map"),
        element("figcaption", f"{grid.kind.value} ", scale, element("br"),
                *(swatch if lost else []), *down, f"{across} rightwards; {cell_text(grid)}",
                largest),
    )  # fmt: skip


def _parity(report: Report) -> Iterator[Markup]:
    if report.header.tested is None:
        return
    title, table = contents.parity_title(report.header), contents.parity_table(report)
    parts = [element("h2", title), _facts(contents.parity_facts(report))]
    if table is not None:
        body = _table(table, title, inks=[_ink(stage.verdict) for stage in report.parity])
        summary = element("summary", plural(len(table.rows), "stage"))
        is_open = report.first_parity_fault is not None
        parts.append(element("details", summary, body, open=is_open))
    yield element("section", *parts)


def _logits(report: Report) -> Iterator[Markup]:
    logits = contents.logits_of(report)
    if logits is None:
        return
    yield element(
        "section",
        element("h2", "What the model says next"),
        element("p", contents.next_token(logits)),
        _facts(contents.logits_facts(logits)),
        _table(contents.logits_table(logits), "Best next tokens of both sides"),
    )


def _environment(report: Report, environment: Environment) -> Markup:
    facts = _facts(contents.environment_facts(environment, report.elapsed_s))
    return element("section", element("h2", "Environment"), facts)


def _facts(facts: Iterable[Fact]) -> Markup:
    pairs = [join(element("dt", name), element("dd", text)) for name, text in facts]
    return element("dl", *pairs)


def _table(
    table: Table,
    caption: str,
    *,
    inks: Sequence[str] = (),
    links: Sequence[str] = (),
    marked: str | None = None,
) -> Markup:
    """A table that scrolls by itself where it is too wide.

    Args:
        table: Its text.
        caption: Its name for those who do not see it.
        inks: The class of each row, for the column of verdicts.
        links: The section that each row's first cell leads to, if any.
        marked: The first cell of a row to stress.
    """
    heads = [
        element("th", heading, scope="col", class_="number" if i in table.numbers else "")
        for i, heading in enumerate(table.headings)
    ]
    rows = []
    for number, cells in enumerate(table.rows):
        ink = inks[number] if inks else ""
        link = links[number] if links else ""
        name: str = element("a", cells[0], href=f"#{link}") if link else cells[0]
        first = element("th", name, scope="row", class_="number" if 0 in table.numbers else "")
        others = [
            element("td", cell, class_=_cell_class(cell, i in table.numbers, ink))
            for i, cell in enumerate(cells[1:], 1)
        ]
        is_sound = ink == "pass"
        is_marked = marked is not None and cells[0] == marked
        names = " ".join(filter(None, ["sound" if is_sound else "", "marked" if is_marked else ""]))
        rows.append(element("tr", first, *others, class_=names))
    body = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    return _scrolled(body, caption)


def _cell_class(cell: str, is_number: bool, ink: str) -> str:
    """Figures to the right; a verdict, or a judgment that failed, in its ink."""
    if is_number:
        return "number fail" if cell.startswith(contents.glyph_of(Verdict.FAIL)) else "number"
    return ink if cell[:1] in _GLYPHS else ""


def _scrolled(content: Markup, label: str) -> Markup:
    return element("div", content, class_="scrolled", role="region", tabindex="0", aria_label=label)


def _ink(verdict: Verdict | None) -> str:
    """The class of the style sheet that colours a verdict."""
    return "unjudged" if verdict is None else verdict.value.lower()


_GLYPHS = frozenset(map(contents.glyph_of, Verdict))
