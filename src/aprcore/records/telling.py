"""What a run, a stage and a judgment say in words: plain text in facts, lines and tables.

Said here once. The pages, Markdown, the terminal's tables and the explorer only lay it out, each in
its own way; text from a file is escaped there. Nothing here loads numpy: the explorer's first
screen is painted without the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from aprcore.ground.visible import visible

if TYPE_CHECKING:
    from aprcore.causes.records import CauseTried, Explanation
    from aprcore.judging.compare import Comparison
    from aprcore.judging.verdict import Judgment, Verdict
    from aprcore.records.environment import Environment
    from aprcore.records.report import LogitsReport, Report, RunHeader, Side, StageReport

# Characters of a reason of the engine, which may list stages.
REASON_LIMIT = 1000
# A cosine in seven decimals tells rounding (1 - 1e-7) from equality; four are for narrow columns.
COSINE_PLACES = 7

# What it means that a judgment fails.
MEANINGS = {
    "kernel": "The engine computes this stage wrongly: on the very inputs that it dumped, the"
    " operation gives another output.",
    "model": "The model file is wrong here: its weights or configuration, run on the oracle's"
    " inputs, do not give the oracle's output.",
    "cumulative": "The output differs from the oracle's.",
}
# Nothing but the two outputs is known: the one that differs may have inherited it.
TWO_DUMPS = (
    " Whether it is this stage or one before cannot be told from two dumps alone: name the model as"
    " well, and every stage is judged on its own inputs."
)
# One character per verdict, so that none is told by its colour alone.
GLYPHS = {
    "PASS": "✓", "NOISE": "≈", "INHERITED": "↳", "LAYOUT": "⇄", "MISSING": "∅",
    "UNJUDGED": "?", "FAIL": "✗", "NONFINITE": "∞", "SHAPE": "≠",
}  # fmt: skip
UNJUDGED_GLYPH = "–"
# Worst last: a layer is known by the last of these that it contains.
SEVERITY = (
    "PASS", "NOISE", "INHERITED", "LAYOUT", "MISSING", "UNJUDGED", "SHAPE", "NONFINITE", "FAIL",
)  # fmt: skip
# The judgments that a stage can have beside the comparison with the oracle.
OWN_JUDGMENTS = ("model", "kernel")
JUDGMENTS = ("cumulative", *OWN_JUDGMENTS)
TOP_ROWS = 10
NO_ORACLE = "none"
TOKENS_SHOWN = 200

# Text that goes on a line, or with what it is: "strong", "quiet", or a verdict's word.
Piece = str | tuple[str, str]
Line = tuple[Piece, ...]


class Fact(NamedTuple):
    """Something known under a name, and what is to be added about it in fewer words.

    Attributes:
        name: What it is called.
        text: What it is.
        details: What kind of thing that is.
    """

    name: str
    text: str
    details: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """Text and details: "model.apr (float32, numpy)"."""
        return f"{self.text} ({', '.join(self.details)})" if self.details else self.text


class Table(NamedTuple):
    """A table of text.

    Attributes:
        title: What it is called.
        headings: One per column.
        rows: As many cells each.
        numbers: Columns of figures, which are aligned to the right.
    """

    title: str
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
        return worst_of(stage.verdict for stage in self.stages if stage.verdict is not None)

    @property
    def lowest(self) -> StageReport | None:
        """The stage whose cosine is lowest; one that is not finite counts as lower than any."""
        compared = (stage for stage in self.stages if stage.comparison is not None)
        return min(compared, key=cosine_rank, default=None)

    def worst_by(self, name: str) -> StageReport | None:
        """Of the stages that have a judgment, the one that fares worst in it."""
        made = (stage for stage in self.stages if error_of(stage, name) is not None)
        return max(made, key=lambda stage: rank_of(stage, name), default=None)


def quoted(text: str) -> str:
    """Text from a file in double quotes, so that spaces at its ends can be seen."""
    return f'"{visible(text)}"'


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 token", "7 tokens"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def figures_of(found: Comparison) -> tuple[float, float]:
    """The cosine and the relative L2 to show and to sort by: NaN where a value is not finite.

    The engine's own cover the finite values only; alone, they would make such a stage look sound.
    """
    if found.nonfinite_a or found.nonfinite_b:
        return math.nan, math.nan
    return found.cosine, found.relative_l2


def format_cosine(cosine: float, places: int = COSINE_PLACES) -> str:
    """A cosine with a fixed number of decimals: "0.8312000"."""
    return "NaN" if math.isnan(cosine) else f"{cosine:.{places}f}"


def format_ratio(ratio: float) -> str:
    """An error figure, whose exponent is what matters: "3.2e-07"; an exact zero is "0"."""
    return without_mantissa(ratio) or f"{ratio:.1e}"


def format_times(ratio: float) -> str:
    """How many times what was predicted: "0.78x", "61x", "4e+07x"."""
    if not math.isfinite(ratio):
        return f"{without_mantissa(ratio)}x"
    if ratio < 1000:
        return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
    return f"{ratio:.0e}x"


def format_value(value: float) -> str:
    """A tensor's value: "-3.310e-01", "NaN", "-Inf"; an exact zero is "0"."""
    return without_mantissa(value) or f"{value:.3e}"


def format_tolerance(tolerance: float) -> str:
    """A tolerance in three digits, rounded up, so that what is shown is enough: "3.25e-03"."""
    shown = f"{tolerance:.2e}"
    if float(shown) < tolerance:
        mantissa, _, exponent = shown.partition("e")
        shown = f"{float(mantissa) + 0.01:.2f}e{exponent}"
    return shown


def format_position(axes: Sequence[str], position: Sequence[int]) -> str:
    """A position in words: "token 6, head 12, dim 63"."""
    return ", ".join(f"{axis} {index}" for axis, index in zip(axes, position))


def format_shape(shape: Sequence[int]) -> str:
    """A shape as numpy and torch print it: "[7, 3584]"."""
    return f"[{', '.join(str(size) for size in shape)}]"


def without_mantissa(x: float) -> str:
    """The text of a figure that has no mantissa ("NaN", "Inf", "-Inf", "0"), else nothing."""
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "Inf" if x > 0 else "-Inf"
    return "0" if x == 0 else ""


def token_name(logits: LogitsReport, token: int) -> str:
    """A token by its text, or by its id where no tokenizer is at hand."""
    text = logits.texts.get(token)
    return f"id {token}" if text is None else quoted(text)


def finding_of(report: StageReport) -> str:
    """The verdict, the judgment it rests on and the cause, for one line."""
    word = "" if report.verdict is None else report.verdict.value
    said = visible(report.reason, REASON_LIMIT)
    if report.blamed is None:
        return f"{word}: {said}"
    judgment = "" if report.blamed == "cumulative" else f"{report.blamed} "
    if report.explanation is not None:
        said = report.explanation.clause()
    said = said.removeprefix(f"{report.blamed}: ")
    return f"{judgment}{word}: {said}"


def word_of(verdict: Verdict | None) -> str:
    """The word of a verdict; nothing where there is none."""
    return "" if verdict is None else verdict.value


def glyph_of(word: str) -> str:
    """The character that stands for a verdict's word."""
    return GLYPHS.get(word, UNJUDGED_GLYPH)


def verdict_text(word: str) -> str:
    """Glyph and word: "✗ FAIL"."""
    return f"{glyph_of(word)} {word}".rstrip()


def worst_of(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The gravest of some verdicts."""
    return max(verdicts, key=lambda verdict: SEVERITY.index(verdict.value), default=None)


def judgment_of(stage: StageReport, name: str) -> Judgment | None:
    """The "model" or the "kernel" judgment of a stage, if it was made."""
    return stage.kernel if name == "kernel" else stage.model if name == "model" else None


def error_of(stage: StageReport, name: str) -> float | None:
    """The relative L2 of a stage in one of `JUDGMENTS`; NaN where a value is not finite."""
    if name == "cumulative":
        return None if stage.comparison is None else figures_of(stage.comparison)[1]
    judgment = judgment_of(stage, name)
    return None if judgment is None else judgment.relative_l2


def rank_of(stage: StageReport | None, name: str) -> tuple[bool, float]:
    """For sorting, worst last: whether a judgment failed, and its relative L2; -1 without one."""
    error = None if stage is None else error_of(stage, name)
    if stage is None or error is None:
        return False, -1.0
    judgment = judgment_of(stage, name)
    # A NaN compares as neither more nor less, and would leave a list unsorted.
    error = math.inf if math.isnan(error) else error
    return judgment is not None and not judgment.passed, error


def cosine_rank(stage: StageReport | None) -> float:
    """For sorting: NaN comes before all other cosines, a stage without one after them."""
    if stage is None or stage.comparison is None:
        return math.inf
    cosine, _ = figures_of(stage.comparison)
    return -math.inf if math.isnan(cosine) else cosine


def plain(line: Iterable[Piece]) -> str:
    """A line without what its pieces are, nor its indentation."""
    return "".join(piece if isinstance(piece, str) else piece[0] for piece in line).strip()


def sentence_of(clause: str) -> str:
    """A clause of the engine as a sentence of its own."""
    return f"{clause[:1].upper()}{visible(clause[1:], REASON_LIMIT)}."


def layers_of(report: Report) -> list[Layer]:
    """The stages by layer, in the order of computation."""
    grouped: dict[int | None, list[StageReport]] = {}
    for stage in report.stages:
        grouped.setdefault(stage.key.layer, []).append(stage)
    return [Layer(layer, tuple(stages)) for layer, stages in grouped.items()]


def faults_of(report: Report) -> list[StageReport]:
    """Every diverging stage, in the order of computation."""
    return [stage for stage in report.stages if stage.is_divergence]


def logits_of(report: Report) -> LogitsReport | None:
    """What the head says on both sides."""
    return next((stage.logits for stage in report.stages if stage.logits is not None), None)


# A whole run.


def headline(report: Report) -> tuple[str, str]:
    """The verdict's word and the finding of the run in a line, as the explorer's bar has it."""
    first = report.first_divergence
    if first is not None:
        return word_of(first.verdict), f"{first.key}  {finding_of(first)}"
    fault, rejected = report.first_parity_fault, report.rejected
    if fault is not None or (rejected is not None and rejected.by_gate):
        return "FAIL" if fault is None else fault.verdict.value, report.parity_summary()
    if report.header.oracle is None and not report.header.judged:
        return "", report.summary()
    if report.is_mostly_unjudged:
        return "UNJUDGED", report.unjudged_text
    return "PASS", soundness_text(report)


def soundness_text(report: Report) -> str:
    """What a run without a divergence found."""
    found = len(report.stages) - len(report.unjudged)
    stages = f"in {plural(found, 'stage')}"
    if report.unjudged:
        stages += f"; {report.unjudged_text}"
    if report.header.oracle is None:
        return f"no kernel fault {stages}; weights are taken on trust"
    return f"no divergence {stages}"


def opening_lines(report: Report) -> Iterator[str]:
    """What follows the headline: where to look, and the next token."""
    first = report.first_divergence
    if first is not None and first.explanation is not None and first.explanation.named:
        yield f"Look at: {first.explanation.named[0].advice}"
    logits = logits_of(report)
    if logits is not None:
        yield plain(next_token(logits))


def counts_text(report: Report) -> str:
    """How many stages got each verdict, gravest first: "✗ 1 FAIL, ↳ 22 INHERITED"."""
    counts = {verdict.value: count for verdict, count in report.counts.items()}
    words = [word for word in reversed(SEVERITY) if word in counts]
    return ", ".join(f"{GLYPHS[word]} {counts[word]} {word}" for word in words)


def run_facts(header: RunHeader) -> Iterator[Fact]:
    """What was held against what."""
    if header.model:
        yield Fact("model", header.model)
    if header.architecture:
        yield Fact("architecture", header.architecture)
    yield Fact("layers", str(header.num_layers))
    yield side_fact("trace", header.trace)
    if header.oracle is None:
        yield Fact("oracle", NO_ORACLE)
    else:
        yield side_fact("oracle", header.oracle)
        yield Fact("bound", f"relative L2 {header.bound:g}")
    if header.backend:
        yield Fact("backend", header.backend)


def prompt_facts(header: RunHeader) -> Iterator[Fact]:
    """What was run, in words and in token ids."""
    if header.prompt is not None:
        yield Fact("prompt", quoted(header.prompt))
    if header.tokens is None:
        yield Fact("tokens", "not recorded on either side")
        return
    texts = header.token_texts or ()
    shown = [
        f"{token} {quoted(texts[number])}" if number < len(texts) else str(token)
        for number, token in enumerate(header.tokens[:TOKENS_SHOWN])
    ]
    more = ", …" if len(header.tokens) > TOKENS_SHOWN else ""
    yield Fact("tokens", f"{len(header.tokens)}: {', '.join(shown)}{more}")


def side_fact(name: str, side: Side) -> Fact:
    """One side: where it is, and what kind of thing."""
    said = [side.path]
    # The label mostly names the type of the activations.
    for text in (side.label, side.dtype):
        if text and not any(text in other for other in said):
            said.append(text)
    return Fact(name, side.path, tuple(said[1:]))


def environment_facts(environment: Environment, elapsed_s: float) -> Iterator[Fact]:
    """The machine and the software."""
    processors = plural(environment.processors, "logical processor")
    yield Fact("platform", environment.platform)
    yield Fact("processor", f"{environment.cpu or 'unknown'}, {processors}")
    yield Fact("Python", environment.python)
    yield from (Fact(name, version) for name, version in environment.versions)
    yield Fact("run time", f"{elapsed_s:.1f} s")


# Its stages.


def stage_table(
    stages: Iterable[StageReport], header: RunHeader, title: str, *, full: bool
) -> Table:
    """One row per stage, as `aprtui bisect` prints them.

    Args:
        stages: In order.
        header: Says which judgments the run makes; columns of others are left out.
        title: Of the table.
        full: Name the layer of each stage.
    """
    has_oracle = header.oracle is not None
    made = [name for name in OWN_JUDGMENTS if header.judged and (has_oracle or name == "kernel")]
    figures = ("cosine", "cumulative") if has_oracle else ("RMS", "min", "max")
    headings = ("stage", "shape", "verdict", *figures, *(f"{name} / bound" for name in made), "why")
    rows = []
    for stage in stages:
        # For PASS the figures beside it have already told why.
        is_told = stage.verdict is not None and stage.verdict.value != "PASS"
        rows.append((
            str(stage.key) if full else stage.key.stage,
            UNJUDGED_GLYPH if stage.layout is None else format_shape(stage.layout.shape),
            verdict_text(word_of(stage.verdict)),
            *_figures(stage, has_oracle=has_oracle),
            *(judgment_text(judgment_of(stage, name)) for name in made),
            visible(finding_of(stage).partition(": ")[2], REASON_LIMIT) if is_told else "",
        ))  # fmt: skip
    return Table(title, headings, tuple(rows), frozenset(range(3, len(headings) - 1)))


def _figures(stage: StageReport, *, has_oracle: bool) -> tuple[str, ...]:
    if has_oracle:
        if stage.comparison is None:
            return (UNJUDGED_GLYPH,) * 2
        cosine, relative_l2 = figures_of(stage.comparison)
        return format_cosine(cosine), format_ratio(relative_l2)
    if stage.trace is None:
        return (UNJUDGED_GLYPH,) * 3
    return tuple(map(format_value, (stage.trace.rms, stage.trace.minimum, stage.trace.maximum)))


def judgment_text(judgment: Judgment | None) -> str:
    """Whether it passed, its relative L2 and its bound: "✓ 1.2e-07 / 3.0e-07".

    A part of the output can fail within the bound of the whole, or pass beyond it: no sign of
    order stands between the two.
    """
    if judgment is None:
        return UNJUDGED_GLYPH
    glyph = GLYPHS["PASS" if judgment.passed else "FAIL"]
    return f"{glyph} {format_ratio(judgment.relative_l2)} / {format_ratio(judgment.bound)}"


# One stage.


def absence(stage: StageReport, name: str, header: RunHeader) -> str:
    """Why a judgment of a stage was not made, in a clause."""
    if name != "kernel" and header.oracle is None:
        return "no oracle"
    if name == "cumulative":
        missing = [n for n, x in (("trace", stage.trace), ("oracle", stage.oracle)) if x is None]
        return f"the {missing[0]} lacks it" if len(missing) == 1 else (
            "both sides lack it" if missing else "the sizes differ"
        )  # fmt: skip
    if header.model is None:
        return "no model"
    if not header.judged:
        return "not asked for"
    from aprcore.network.graph import known_stages  # the command line words without it

    if known_stages()[stage.key.stage].operation is None:
        return "no supported model computes this stage"
    is_model = name == "model"
    side, statistics = ("oracle", stage.oracle) if is_model else ("trace", stage.trace)
    found = stage.comparison
    if found is None and statistics is None:
        return f"the {side} lacks it"
    if found is not None:
        nonfinite = found.nonfinite_b if is_model else found.nonfinite_a
    else:
        nonfinite = 0 if statistics is None else statistics.nonfinite
    if nonfinite:
        return "not all of its values are finite"
    if stage.layout is not None and stage.layout.axes == ("index",):
        return "its size is not this model's"
    return f"inputs missing or not finite in the {side}"


def absences(stage: StageReport, header: RunHeader) -> str:
    """Why neither of the stage's own judgments was made."""
    return "; ".join(f"{name}: {absence(stage, name, header)}" for name in OWN_JUDGMENTS)


def is_alone(stage: StageReport) -> bool:
    """Whether the comparison of both sides is all there is."""
    return stage.kernel is None and stage.model is None


def fault_parts(stage: StageReport, header: RunHeader) -> Iterator[Line | CauseTried]:
    """Why a stage fails, and what explains it."""
    blamed = stage.blamed
    is_beyond_budget = stage.explanation is None and stage.budget is not None
    if blamed is not None and not is_beyond_budget and (blamed != "cumulative" or stage.comparison):
        aside = ""
        if is_alone(stage):
            aside = f" It could not be judged on its own inputs: {absences(stage, header)}."
            aside = TWO_DUMPS if header.model is None else aside
        yield (MEANINGS[blamed] + aside,)
    if stage.explanation is None:
        yield (sentence_of(stage.reason),)
    else:
        yield from explanation_parts(stage.explanation)


def explanation_parts(explanation: Explanation) -> Iterator[Line | CauseTried]:
    """The causes that explain an output, or what is visible where none does."""
    named = explanation.named
    if len({cause.part for cause in named}) < len(named):
        yield ("These explain it equally well, and cannot be told apart here:",)
    yield from named
    if not named:
        tried = f"None of the {plural(explanation.tried, 'cause')} tried gives this output."
        nothing = "No cause in the catalogue fits this stage."
        yield ((tried if explanation.tried else nothing, "strong"),)
        if explanation.symptom:
            yield ("Visible: ", "quiet"), (explanation.symptom, "strong")


def cause_lines(cause: CauseTried) -> Iterator[Line]:
    """A cause by its name; below it its proof, unless it is read off the file, and what to do."""
    yield ("⇒ ", "FAIL"), (cause.name, "strong")
    if not cause.is_evidence:
        cosine = format_cosine(cause.cosine), "strong"
        error = format_ratio(cause.relative_l2)
        yield ("  when tried: cosine ", "quiet"), cosine, (", relative L2 ", "quiet"), error
    yield ("  look at: ", "quiet"), cause.advice


def others_table(explanation: Explanation | None) -> Table | None:
    """What was tried and does not explain the output, the nearest first."""
    causes = () if explanation is None else explanation.causes
    others = [cause for cause in causes if not cause.explains]
    if explanation is None or not others:
        return None
    rows = [
        (visible(c.name), format_cosine(c.cosine, 4), format_ratio(c.relative_l2)) for c in others
    ]
    rest = explanation.tried - len(explanation.causes)
    if rest > 0:
        rows.append((f"and {rest} more, further off", "", ""))
    headings = ("also tried", "cosine", "rel. L2")
    return Table("Other causes tried", headings, tuple(rows), frozenset({1, 2}))


def judgment_table(stage: StageReport, header: RunHeader) -> Table:
    """The three judgments of a stage."""
    rows = []
    if stage.comparison is not None:
        cosine, relative_l2 = figures_of(stage.comparison)
        figures = format_ratio(relative_l2), format_ratio(header.bound), format_cosine(cosine)
        rows.append(("cumulative", *figures, UNJUDGED_GLYPH, UNJUDGED_GLYPH, ""))
    for name in OWN_JUDGMENTS:
        judgment = judgment_of(stage, name)
        if judgment is not None:
            rows.append((
                name, format_ratio(judgment.relative_l2), format_ratio(judgment.bound),
                format_cosine(judgment.cosine), format_times(judgment.assessment.ratio),
                "".join(worst_part(judgment)), verdict_text("PASS" if judgment.passed else "FAIL"),
            ))  # fmt: skip
    headings = ("judgment", "rel. L2", "bound", "cosine", "noise", "worst part", "finding")
    return Table("Judgments", headings, tuple(rows), frozenset({1, 2, 3, 4}))


def worst_part(judgment: Judgment) -> tuple[str, str, str]:
    """The part that stands out most, how far, and what it may: "row 8: ", "31x", ", at most 8x"."""
    part = judgment.assessment.worst
    return f"{part.name}: ", format_times(part.ratio), f", at most {format_times(part.factor)}"


def span_lines(stage: StageReport) -> Iterator[Line]:
    """Where a judgment covers more than its stage: from what, and what to dump to narrow it."""
    for name in OWN_JUDGMENTS:
        judgment = judgment_of(stage, name)
        if judgment is not None and judgment.span:
            starts = ", ".join(map(str, judgment.span)), "strong"
            missing = ", ".join(key.stage for key in judgment.recomputed)
            yield (f"  {name} ", "quiet"), "judged from ", starts, f"; dump {missing} to narrow it"


def measured_line(stage: StageReport) -> Line | None:
    """What quantisation really does here, where the float weights are at hand."""
    if stage.quantisation is None:
        return None
    return (f"Measured with the reference weights: {stage.quantisation.describe()}.",)


def fault_finding(stage: StageReport, header: RunHeader) -> Iterator[Line | CauseTried | Table]:
    """All that a report says of a failing stage before its details."""
    yield from fault_parts(stage, header)
    if stage.passes_at is not None:
        yield (f"It passes at a tolerance of {format_tolerance(stage.passes_at)}.",)
    judgments = judgment_table(stage, header)
    if judgments.rows:
        yield judgments
    yield from span_lines(stage)
    measured = measured_line(stage)
    if measured is not None:
        yield measured


def place_of_largest(stage: StageReport) -> str:
    """Where the largest difference is, in words."""
    found, layout = stage.comparison, stage.layout
    if found is None or layout is None or found.max_index < 0:
        return ""
    return format_position(layout.axes, layout.position(found.max_index))


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
    numbers = frozenset(range(len(headings))) - {text}
    return Table("Largest differences", headings, tuple(rows), numbers)


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


# What the model says next.


def next_token(logits: LogitsReport) -> Line:
    """What each side would say next, the quickest sign that something is wrong."""
    found = logits.comparison
    ours = token_name(logits, found.argmax_a)
    if found.agree:
        return ("next token: ", "quiet"), (ours, "strong"), (" on both sides", "quiet")
    theirs = token_name(logits, found.argmax_b)
    tie = " (near-tie)" if found.near_tie else ""
    return (
        ("next token: ours ", "quiet"), (ours, "trace"),
        (" · oracle ", "quiet"), (theirs, "oracle"), (tie, "quiet"),
    )  # fmt: skip


def logits_table(logits: LogitsReport) -> Table:
    """The best tokens of both sides."""
    found = logits.comparison
    pairs = zip(found.top_a, found.values_a, found.top_b, found.values_b)
    rows = tuple(
        (str(rank), token_name(logits, a), f"{x:.3f}", token_name(logits, b), f"{y:.3f}")
        for rank, (a, x, b, y) in enumerate(pairs, 1)
    )
    headings = ("#", "trace", "logit", "oracle", "logit")
    return Table("Best next tokens", headings, rows, frozenset({0, 2, 4}))


def logits_facts(logits: LogitsReport) -> Iterator[Fact]:
    """How far apart the two distributions are."""
    found = logits.comparison
    tie = "near-tie" if found.near_tie else "not a near-tie"
    yield Fact("KL", f"{format_ratio(found.kl)} nats")
    yield Fact("gap", format_ratio(found.gap), ("same token" if found.agree else tie,))


# One side against the other.


def parity_title(header: RunHeader) -> str:
    """What the two sides are that are held against each other."""
    return "GPU against CPU" if header.backend is not None else "Against the other dump"


def parity_facts(report: Report) -> Iterator[Fact]:
    """Both sides, and whether they agree."""
    for name, side in (("tested", report.header.tested), ("trusted", report.header.trusted)):
        if side is not None:
            yield side_fact(name, side)
    if report.device is not None:
        driver = f", driver {report.device.driver}" if report.device.driver else ""
        yield Fact("device", f"{report.device.label}{driver}")
    yield Fact("finding", report.parity_summary())


def parity_table(report: Report) -> Table | None:
    """The tested side against the trusted one, stage by stage; None where nobody asked for it."""
    if not report.parity:
        return None
    rows = []
    for stage in report.parity:
        cosine = relative_l2 = UNJUDGED_GLYPH
        if stage.comparison is not None:
            found = figures_of(stage.comparison)
            cosine, relative_l2 = format_cosine(found[0]), format_ratio(found[1])
        kernels = judgment_text(stage.trusted.kernel), judgment_text(stage.tested.kernel)
        word = stage.verdict.value
        reason = "" if word == "PASS" else visible(stage.reason, REASON_LIMIT)
        rows.append((str(stage.key), verdict_text(word), cosine, relative_l2, *kernels, reason))
    own = ("CPU", "GPU") if report.header.backend is not None else ("trusted", "tested")
    kernel_headings = (f"{side} kernel / bound" for side in own)
    headings = ("stage", "verdict", "cosine", "rel. L2", *kernel_headings, "why")
    return Table(parity_title(report.header), headings, tuple(rows), frozenset({2, 3, 4, 5}))
