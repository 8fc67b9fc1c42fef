"""The report as one HTML page: no script, nothing from the network, light and dark, and it prints.

A content security policy on the page says so to the browser, too: should text from a file ever get
past the escaping, it could run nothing and fetch nothing.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files

from aprcore.causes.records import CauseTried
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey
from aprcore.records import telling
from aprcore.records.environment import Environment, format_command
from aprcore.records.report import Report, StageReport
from aprcore.records.telling import Fact, Layer, Table, plain, verdict_text, word_of
from aprcore.reports import maps
from aprcore.reports.maps import StageMap
from aprcore.reports.markup import Markup, element, join
from aprcore.reports.profile import draw_profile, legend_note

STYLE = "page.css"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Height of a map, and of a row in it; names of rows need as much each.
MAP_HEIGHT_PX, LEAST_ROW_PX, MOST_ROW_PX, NAMED_ROW_PX = 400, 4, 18, 14
# Failing stages that are told in full: the first is the one to look at. Two dumps without a model
# differ at every stage after it.
FAULTS_TOLD = 24
THEMES = (("system", "as the system"), ("light", "light"), ("dark", "dark"))


def render_page(
    report: Report, shown: Sequence[StageMap], command: Sequence[str], environment: Environment
) -> str:
    """The page of a finished run.

    Args:
        report: The run.
        shown: Pictures of failing stages.
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
        *_faults(report, {stage_map.key: stage_map for stage_map in shown}),
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
    word, said = telling.headline(report)
    parts = [
        element("h1", element("span", telling.glyph_of(word), class_="glyph"), f" {said}",
                class_=f"finding {_ink(word)}"),
    ]  # fmt: skip
    parts.extend(element("p", line) for line in telling.opening_lines(report))
    parts.append(element("p", telling.counts_text(report), class_="counts"))
    parts.extend(element("p", element("strong", "note "), note) for note in report.header.notes)
    header = report.header
    parts.append(_facts([*telling.run_facts(header), *telling.prompt_facts(header)]))
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
    told = {stage.key for stage in telling.faults_of(report)[:FAULTS_TOLD]}
    return element(
        "section",
        element("h2", "Stages"),
        element("p", element("label", only, " only what is not PASS"), class_="filter"),
        *(_layer(layer, report, told) for layer in telling.layers_of(report)),
    )


def _layer(layer: Layer, report: Report, told: Collection[StageKey]) -> Markup:
    worst, lowest = layer.worst, layer.lowest
    said = [f" · {telling.plural(len(layer.stages), 'stage')}"]
    if lowest is not None and lowest.comparison is not None:
        cosine = telling.format_cosine(telling.figures_of(lowest.comparison)[0], 4)
        said.append(f" · lowest cosine {cosine}, {lowest.key.stage}")
    title, mark = element("strong", layer.title), _verdict(worst)
    title_of_table = f"Stages of {layer.title}"
    table = telling.stage_table(layer.stages, report.header, title_of_table, full=False)
    inks = [_ink(word_of(stage.verdict)) for stage in layer.stages]
    links = [_anchor(stage.key) if stage.key in told else "" for stage in layer.stages]
    body = _table(table, inks=inks, links=links)
    diverges = worst is not None and worst.is_divergence
    sound = "sound" if all(stage.verdict is Verdict.PASS for stage in layer.stages) else ""
    summary = element("summary", title, " ", mark, *said)
    return element("details", summary, body, open=diverges, class_=sound)


def _faults(report: Report, shown: Mapping[StageKey, StageMap]) -> Iterator[Markup]:
    faults = telling.faults_of(report)
    if not faults:
        return
    parts = [element("h2", f"{telling.plural(len(faults), 'stage')} to blame")]
    parts += [_fault(stage, report, shown.get(stage.key)) for stage in faults[:FAULTS_TOLD]]
    if len(faults) > FAULTS_TOLD:
        more = len(faults) - FAULTS_TOLD
        parts.append(element("p", f"and {more} more: see the stages above"))
    yield element("section", *parts)


def _fault(stage: StageReport, report: Report, shown: StageMap | None) -> Markup:
    shape = "" if stage.layout is None else f" {telling.format_shape(stage.layout.shape)}"
    parts = [
        element("h3", _verdict(stage.verdict), f" {stage.key}"),
        element("p", f"{known_stages()[stage.key.stage].title}{shape}", class_="quiet"),
    ]
    for part in telling.fault_finding(stage, report.header):
        if isinstance(part, Table):
            parts.append(_table(part, of=f" of {stage.key}", marked=stage.blamed))
        elif isinstance(part, CauseTried):
            parts.append(_cause(part))
        else:
            parts.append(element("p", plain(part)))
    if shown is not None:
        parts.append(_map(shown, telling.place_of_largest(stage)))
    top = telling.top_table(stage, report.header)
    if top is not None:
        parts += [element("h4", top.title), _table(top, of=f" of {stage.key}")]
    others = telling.others_table(stage.explanation)
    if others is not None:
        table = _table(others, of=f" at {stage.key}")
        parts.append(element("details", element("summary", others.title), table))
    return element("article", *parts, id=_anchor(stage.key))


def _cause(cause: CauseTried) -> Markup:
    name, *lines = map(plain, telling.cause_lines(cause))
    below = [join(element("br"), line) for line in lines]
    return element("p", element("strong", name), *below, class_="cause")


def _map(shown: StageMap, place: str) -> Markup:
    """A heat map with its row names, a scale and a description."""
    grid = shown.grid
    rows, columns = grid.values.shape
    row_px = min(max(MAP_HEIGHT_PX // rows, LEAST_ROW_PX), MOST_ROW_PX)
    labels = maps.row_labels(shown)
    png = Markup("data:image/png;base64," + b64encode(maps.encode_png(grid)).decode())
    image = element(
        "img", src=png, alt=maps.describe_map(shown), width=columns, height=rows,
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
        f"≤ {telling.format_ratio(grid.largest / 10**maps.DECADES)} ",
        element("span", class_="ramp"),
        f" {telling.format_ratio(grid.largest)} (logarithmic)",
        class_="scale",
    )
    if grid.fold:
        across = f"{grid.columns}, {grid.fold} a line,"
    lost = maps.lost_text(grid)
    swatch = [element("span", class_="lost"), f" {lost}; "]
    largest = f"; the largest at {place}" if place else ""
    return element(
        "figure",
        element("div", element("div", *names, class_="rows", aria_hidden="true"), image,
                class_="map"),
        element("figcaption", f"{grid.kind.value} ", scale, element("br"),
                *(swatch if lost else []), *down, f"{across} rightwards; {maps.cell_text(grid)}",
                largest),
    )  # fmt: skip


def _parity(report: Report) -> Iterator[Markup]:
    if report.header.tested is None:
        return
    title, table = telling.parity_title(report.header), telling.parity_table(report)
    parts = [element("h2", title), _facts(telling.parity_facts(report))]
    if table is not None:
        body = _table(table, inks=[_ink(stage.verdict.value) for stage in report.parity])
        summary = element("summary", telling.plural(len(table.rows), "stage"))
        is_open = report.first_parity_fault is not None
        parts.append(element("details", summary, body, open=is_open))
    yield element("section", *parts)


def _logits(report: Report) -> Iterator[Markup]:
    logits = telling.logits_of(report)
    if logits is not None:
        yield element(
            "section",
            element("h2", "What the model says next"),
            element("p", plain(telling.next_token(logits))),
            _facts(telling.logits_facts(logits)),
            _table(telling.logits_table(logits), of=" of both sides"),
        )


def _environment(report: Report, environment: Environment) -> Markup:
    facts = _facts(telling.environment_facts(environment, report.elapsed_s))
    return element("section", element("h2", "Environment"), facts)


def _facts(facts: Iterable[Fact]) -> Markup:
    pairs = (join(element("dt", fact.name), element("dd", fact.said)) for fact in facts)
    return element("dl", *pairs)


def _table(
    table: Table,
    *,
    of: str = "",
    inks: Sequence[str] = (),
    links: Sequence[str] = (),
    marked: str | None = None,
) -> Markup:
    """A table that scrolls by itself where it is too wide.

    Args:
        table: Its text.
        of: What the table is of; with its title, a name for those who do not see it.
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
    return _scrolled(body, f"{table.title}{of}")


def _cell_class(cell: str, is_number: bool, ink: str) -> str:
    """Figures to the right; a verdict, or a judgment that failed, in its ink."""
    if is_number:
        return "number fail" if cell.startswith(telling.GLYPHS["FAIL"]) else "number"
    return ink if cell[:1] in telling.GLYPHS.values() else ""


def _scrolled(content: Markup, label: str) -> Markup:
    return element("div", content, class_="scrolled", role="region", tabindex="0", aria_label=label)


def _verdict(verdict: Verdict | None) -> Markup:
    word = word_of(verdict)
    return element("span", verdict_text(word), class_=_ink(word))


def _ink(word: str) -> str:
    """The class of the style sheet that colours a verdict."""
    return word.lower() or "alone"


def _anchor(key: StageKey) -> str:
    """The id of a stage's section."""
    return f"fault-{key.path.replace('/', '-')}"
