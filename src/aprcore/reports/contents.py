"""What a report says, as plain text: sentences, facts and tables, for every format alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from aprcore.causes.records import CauseTried, Explanation
from aprcore.judging.verdict import Judgment, Verdict
from aprcore.network.graph import StageKey
from aprcore.records.environment import Environment
from aprcore.records.report import LogitsReport, Report, RunHeader, Side, StageReport
from aprcore.records.wording import (
    GLYPHS,
    MEANINGS,
    REASON_LIMIT,
    SEVERITY,
    TWO_DUMPS,
    UNJUDGED_GLYPH,
    figures_of,
    finding_of,
    format_cosine,
    format_position,
    format_ratio,
    format_shape,
    format_times,
    format_tolerance,
    format_value,
    plural,
    quoted,
    token_name,
    visible,
)

# Failing stages that are told in full: the first is the one to look at. Two dumps without a model
# differ at every stage after it.
FAULTS_TOLD = 24
TOP_ROWS = 10
TOKENS_SHOWN = 200
# Why there are no figures: the same dash as on the screen.
ABSENT = UNJUDGED_GLYPH

Fact = tuple[str, str]


class Table(NamedTuple):
    """A table of text.

    Attributes:
        headings: One per column.
        rows: As many cells each.
        numbers: Columns of figures, which are aligned to the right.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()


class Layer(NamedTuple):
    """The stages of one layer, or of the whole model (`layer` is None)."""

    layer: int | None
    stages: tuple[StageReport, ...]

    @property
    def title(self) -> str:
        """What it is called."""
        return "whole model" if self.layer is None else f"layer {self.layer}"

    @property
    def worst(self) -> Verdict | None:
        """The gravest verdict of its stages."""
        verdicts = [stage.verdict for stage in self.stages if stage.verdict is not None]
        return max(verdicts, key=lambda verdict: SEVERITY.index(verdict.value), default=None)

    @property
    def lowest(self) -> StageReport | None:
        """The stage whose cosine is lowest; one that is not finite counts as lower than any."""
        compared = [s for s in self.stages if s.comparison is not None]
        return min(compared, key=_cosine_rank, default=None)


def _cosine_rank(stage: StageReport) -> float:
    assert stage.comparison is not None
    cosine, _ = figures_of(stage.comparison)
    return -2.0 if cosine != cosine else cosine


def layers_of(report: Report) -> list[Layer]:
    """The stages by layer, in the order of computation."""
    grouped: dict[int | None, list[StageReport]] = {}
    for stage in report.stages:
        grouped.setdefault(stage.key.layer, []).append(stage)
    return [Layer(layer, tuple(stages)) for layer, stages in grouped.items()]


def faults_of(report: Report) -> list[StageReport]:
    """Every diverging stage, in the order of computation."""
    return [stage for stage in report.stages if stage.verdict and stage.verdict.is_divergence]


def glyph_of(verdict: Verdict | None) -> str:
    """The character that stands for a verdict."""
    return UNJUDGED_GLYPH if verdict is None else GLYPHS[verdict.value]


def verdict_text(verdict: Verdict | None) -> str:
    """Glyph and word: "✗ FAIL"."""
    return UNJUDGED_GLYPH if verdict is None else f"{GLYPHS[verdict.value]} {verdict.value}"


def headline(report: Report) -> tuple[Verdict | None, str]:
    """The finding of the run in a line, as the explorer's bar has it, and its verdict."""
    first = report.first_divergence
    if first is not None:
        return first.verdict, f"{first.key}  {finding_of(first)}"
    fault, rejected = report.first_parity_fault, report.rejected
    if fault is not None or (rejected is not None and rejected.by_gate):
        return Verdict.FAIL if fault is None else fault.verdict, report.parity_summary()
    if report.header.oracle is None and not report.header.judged:
        return None, report.summary()
    stages = f"in {plural(len(report.stages), 'stage')}"
    if report.header.oracle is None:
        return Verdict.PASS, f"no kernel fault {stages}; weights are taken on trust"
    return Verdict.PASS, f"no divergence {stages}"


def first_advice(report: Report) -> str | None:
    """Where to look for the first divergence, if its cause was found."""
    first = report.first_divergence
    if first is None or first.explanation is None or not first.explanation.named:
        return None
    return first.explanation.named[0].advice


def counts_text(report: Report) -> str:
    """How many stages got each verdict, gravest first: "✗ 1 FAIL, ↳ 22 INHERITED"."""
    counts = {verdict.value: count for verdict, count in report.counts.items()}
    words = [word for word in reversed(SEVERITY) if word in counts]
    return ", ".join(f"{GLYPHS[word]} {counts[word]} {word}" for word in words)


def run_facts(header: RunHeader) -> Iterator[Fact]:
    """What was held against what."""
    if header.model:
        yield "model", header.model
    if header.architecture:
        yield "architecture", header.architecture
    yield "layers", str(header.num_layers)
    yield "trace", _side(header.trace)
    yield "oracle", "none" if header.oracle is None else _side(header.oracle)
    if header.oracle is not None:
        yield "bound", f"relative L2 {header.bound:g}"
    if header.backend:
        yield "backend", header.backend
    if header.prompt is not None:
        yield "prompt", quoted(header.prompt)
    yield "tokens", _tokens(header)


def environment_facts(environment: Environment, elapsed_s: float) -> Iterator[Fact]:
    """The machine and the software."""
    yield "platform", environment.platform
    yield (
        "processor",
        (f"{environment.cpu or 'unknown'}, {plural(environment.processors, 'logical processor')}"),
    )
    yield "Python", environment.python
    yield from environment.versions
    yield "run time", f"{elapsed_s:.1f} s"


def stage_table(stages: Iterable[StageReport], header: RunHeader, *, full: bool) -> Table:
    """One row per stage, as `aprtui bisect` prints them.

    Args:
        stages: In order.
        header: Says which judgments the run makes; columns of others are left out.
        full: Name the layer of each stage.
    """
    makes_model = header.judged and header.oracle is not None
    headings = ["stage", "shape", "verdict"]
    headings += ["cosine", "cumulative"] if header.oracle is not None else ["RMS", "min", "max"]
    headings += [*(["model / bound"] if makes_model else [])]
    headings += [*(["kernel / bound"] if header.judged else []), "why"]
    rows = []
    for stage in stages:
        shape = ABSENT if stage.layout is None else format_shape(stage.layout.shape)
        row = [str(stage.key) if full else stage.key.stage, shape, verdict_text(stage.verdict)]
        row += _figures(stage, header)
        row += [judgment_text(stage.model)] if makes_model else []
        row += [judgment_text(stage.kernel)] if header.judged else []
        rows.append((*row, _why(stage)))
    return Table(tuple(headings), tuple(rows), frozenset(range(3, len(headings) - 1)))


def judgment_text(judgment: Judgment | None) -> str:
    """Whether it passed, its relative L2 and its bound: "✓ 1.2e-07 / 3.0e-07"."""
    if judgment is None:
        return ABSENT
    glyph = GLYPHS["PASS" if judgment.passed else "FAIL"]
    return f"{glyph} {format_ratio(judgment.relative_l2)} / {format_ratio(judgment.bound)}"


def fault_sentences(stage: StageReport, header: RunHeader) -> Iterator[str]:
    """Why a stage fails, as the explorer's Why tab says it; causes come apart from it."""
    blamed = stage.blamed
    is_alone = stage.kernel is None and stage.model is None
    beyond_budget = stage.explanation is None and stage.budget is not None
    if blamed is not None and not beyond_budget and (blamed != "cumulative" or stage.comparison):
        yield MEANINGS[blamed] + (TWO_DUMPS if is_alone and header.model is None else "")
    if stage.explanation is None:
        yield _sentence(stage.reason)
    elif not stage.explanation.named:
        count = stage.explanation.tried
        yield (
            f"None of the {plural(count, 'cause')} tried gives this output."
            if count
            else "No cause in the catalogue fits this stage."
        )
        if stage.explanation.symptom:
            yield f"Visible: {stage.explanation.symptom}."
    elif len({cause.part for cause in stage.explanation.named}) < len(stage.explanation.named):
        yield "These explain it equally well, and cannot be told apart here:"
    if stage.passes_at is not None:
        yield f"It passes at a tolerance of {format_tolerance(stage.passes_at)}."


def trial_text(cause: CauseTried) -> str:
    """How well a cause explains the output when it is tried; nothing where it is read off."""
    if cause.is_evidence:
        return ""
    cosine, relative_l2 = format_cosine(cause.cosine), format_ratio(cause.relative_l2)
    return f"when tried: cosine {cosine}, relative L2 {relative_l2}"


def others_table(explanation: Explanation) -> Table | None:
    """What was tried and does not explain the output, the nearest first."""
    others = [cause for cause in explanation.causes if not cause.explains]
    if not others:
        return None
    rows = [
        (visible(c.name), format_cosine(c.cosine, 4), format_ratio(c.relative_l2)) for c in others
    ]
    rest = explanation.tried - len(explanation.causes)
    if rest > 0:
        rows.append((f"and {rest} more, further off", "", ""))
    return Table(("also tried", "cosine", "rel. L2"), tuple(rows), frozenset({1, 2}))


def judgment_table(stage: StageReport, header: RunHeader) -> Table:
    """The three judgments of a stage, the one that a FAIL rests on marked."""
    rows = []
    if stage.comparison is not None:
        cosine, relative_l2 = figures_of(stage.comparison)
        figures = format_ratio(relative_l2), format_ratio(header.bound), format_cosine(cosine)
        rows.append(("cumulative", *figures, ABSENT, ABSENT, ""))
    for name, judgment in (("model", stage.model), ("kernel", stage.kernel)):
        if judgment is None:
            continue
        worst, found = judgment.assessment.worst, judgment.assessment
        figures = (
            format_ratio(judgment.relative_l2),
            format_ratio(judgment.bound),
            format_cosine(judgment.cosine),
        )
        part = f"{worst.name}: {format_times(worst.ratio)}, at most {format_times(worst.factor)}"
        word = "PASS" if judgment.passed else "FAIL"
        rows.append((name, *figures, format_times(found.ratio), part, f"{GLYPHS[word]} {word}"))
    headings = ("judgment", "rel. L2", "bound", "cosine", "noise", "worst part", "finding")
    return Table(headings, tuple(rows), frozenset({1, 2, 3, 4}))


def spans_of(stage: StageReport) -> Iterator[str]:
    """Where a judgment covers more than its stage: from what, and what to dump to narrow it."""
    for name, judgment in (("model", stage.model), ("kernel", stage.kernel)):
        if judgment is not None and judgment.span:
            starts = ", ".join(map(str, judgment.span))
            missing = ", ".join(key.stage for key in judgment.recomputed)
            yield f"{name}: judged from {starts}; dump {missing} to narrow it"


def top_table(stage: StageReport, header: RunHeader, count: int = TOP_ROWS) -> Table | None:
    """The largest differences of a stage, with the texts of their tokens."""
    found, layout = stage.comparison, stage.layout
    if found is None or layout is None or not len(found.top):
        return None
    texts = {} if stage.logits is None else stage.logits.texts
    rows = []
    for rank, (_, difference) in enumerate(zip(range(count), found.top), 1):
        position = layout.position(difference.index)
        figures = format_value(difference.a), format_value(difference.b)
        token = _token_text(layout.axes, position, header, texts)
        place = (*map(str, position), token)
        rows.append((str(rank), *place, *figures, format_ratio(difference.abs_diff)))
    headings = ("#", *layout.axes, "text", "trace", "oracle", "|diff|")
    text = len(layout.axes) + 1
    if not any(row[text] for row in rows):
        headings = headings[:text] + headings[text + 1 :]
        rows = [row[:text] + row[text + 1 :] for row in rows]
        text = -1
    return Table(headings, tuple(rows), frozenset(range(len(headings))) - {text})


def next_token(logits: LogitsReport) -> str:
    """What each side would say next, the quickest sign that something is wrong."""
    found = logits.comparison
    ours = token_name(logits, found.argmax_a)
    if found.agree:
        return f"next token: {ours} on both sides"
    tie = " (near-tie)" if found.near_tie else ""
    return f"next token: ours {ours} · oracle {token_name(logits, found.argmax_b)}{tie}"


def logits_table(logits: LogitsReport) -> Table:
    """The best tokens of both sides."""
    found = logits.comparison
    pairs = zip(found.top_a, found.values_a, found.top_b, found.values_b)
    rows = tuple(
        (str(rank), token_name(logits, a), f"{x:.3f}", token_name(logits, b), f"{y:.3f}")
        for rank, (a, x, b, y) in enumerate(pairs, 1)
    )
    return Table(("#", "trace", "logit", "oracle", "logit"), rows, frozenset({0, 2, 4}))


def logits_facts(logits: LogitsReport) -> Iterator[Fact]:
    """How far apart the two distributions are."""
    found = logits.comparison
    said = "same token" if found.agree else ("near-tie" if found.near_tie else "not a near-tie")
    yield "KL", f"{format_ratio(found.kl)} nats"
    yield "gap", f"{format_ratio(found.gap)}, {said}"


def parity_table(report: Report) -> Table | None:
    """The tested side against the trusted one, stage by stage; None where nobody asked for it."""
    if not report.parity:
        return None
    rows = []
    for stage in report.parity:
        cosine = relative_l2 = ABSENT
        if stage.comparison is not None:
            found = figures_of(stage.comparison)
            cosine, relative_l2 = format_cosine(found[0]), format_ratio(found[1])
        kernels = judgment_text(stage.trusted.kernel), judgment_text(stage.tested.kernel)
        reason = "" if stage.verdict is Verdict.PASS else visible(stage.reason, REASON_LIMIT)
        rows.append(
            (str(stage.key), verdict_text(stage.verdict), cosine, relative_l2, *kernels, reason)
        )
    own = ("CPU", "GPU") if report.header.backend is not None else ("trusted", "tested")
    own_headings = (f"{side} kernel / bound" for side in own)
    headings = ("stage", "verdict", "cosine", "rel. L2", *own_headings, "why")
    return Table(headings, tuple(rows), frozenset({2, 3, 4, 5}))


def parity_title(header: RunHeader) -> str:
    """What the two sides are that are held against each other."""
    return "GPU against CPU" if header.backend is not None else "Against the other dump"


def parity_facts(report: Report) -> Iterator[Fact]:
    """Both sides, and whether they agree."""
    for name, side in (("tested", report.header.tested), ("trusted", report.header.trusted)):
        if side is not None:
            yield name, _side(side)
    if report.device is not None:
        driver = f", driver {report.device.driver}" if report.device.driver else ""
        yield "device", f"{report.device.label}{driver}"
    yield "finding", report.parity_summary()


def logits_of(report: Report) -> LogitsReport | None:
    """What the head says on both sides."""
    return next((s.logits for s in report.stages if s.logits is not None), None)


def key_anchor(key: StageKey) -> str:
    """The id of a stage's section."""
    return f"fault-{key.path.replace('/', '-')}"


def _figures(stage: StageReport, header: RunHeader) -> list[str]:
    if header.oracle is not None:
        if stage.comparison is None:
            return [ABSENT, ABSENT]
        cosine, relative_l2 = figures_of(stage.comparison)
        return [format_cosine(cosine), format_ratio(relative_l2)]
    if stage.trace is None:
        return [ABSENT] * 3
    return [format_value(x) for x in (stage.trace.rms, stage.trace.minimum, stage.trace.maximum)]


def _why(stage: StageReport) -> str:
    """The reason; not for PASS, which the figures beside it have already told."""
    if stage.verdict in (None, Verdict.PASS):
        return ""
    return visible(finding_of(stage).partition(": ")[2], REASON_LIMIT)


def _side(side: Side) -> str:
    said = [text for text in (side.label, side.dtype) if text]
    # The label mostly names the type of the activations.
    words = [text for i, text in enumerate(said) if not any(text in other for other in said[:i])]
    return f"{side.path} ({', '.join(words)})" if words else side.path


def _tokens(header: RunHeader) -> str:
    if header.tokens is None:
        return "not recorded on either side"
    texts: Sequence[str] = header.token_texts or ()
    shown = [
        f"{token} {quoted(texts[number])}" if number < len(texts) else str(token)
        for number, token in enumerate(header.tokens[:TOKENS_SHOWN])
    ]
    more = ", …" if len(header.tokens) > TOKENS_SHOWN else ""
    return f"{len(header.tokens)}: {', '.join(shown)}{more}"


def _token_text(
    axes: Sequence[str], position: Sequence[int], header: RunHeader, texts: dict[int, str]
) -> str:
    """The text of the token that a position names, if it names one."""
    if "token id" in axes:
        token = position[axes.index("token id")]
        return quoted(texts[token]) if token in texts else ""
    if "token" not in axes or header.token_texts is None:
        return ""
    token = position[axes.index("token")]
    return quoted(header.token_texts[token]) if token < len(header.token_texts) else ""


def place_of_largest(stage: StageReport) -> str:
    """Where the largest difference is, in words."""
    found, layout = stage.comparison, stage.layout
    if found is None or layout is None or found.max_index < 0:
        return ""
    return format_position(layout.axes, layout.position(found.max_index))


def _sentence(clause: str) -> str:
    """A clause of the engine as a sentence of its own."""
    return f"{clause[:1].upper()}{visible(clause[1:], REASON_LIMIT)}."
