"""How figures and findings are worded, so that the screen and every report use the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aprcore.judging.compare import Comparison
    from aprcore.records.report import LogitsReport, StageReport

LINE_LIMIT = 300
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
    "PASS": "✓", "NOISE": "≈", "INHERITED": "↳", "LAYOUT": "⇄", "MISSING": "∅", "FAIL": "✗",
    "NONFINITE": "∞", "SHAPE": "≠",
}  # fmt: skip
UNJUDGED_GLYPH = "–"
# Worst last: a layer is known by the last of these that it contains.
SEVERITY = ("PASS", "NOISE", "INHERITED", "LAYOUT", "MISSING", "SHAPE", "NONFINITE", "FAIL")


def visible(text: str, limit: int = LINE_LIMIT) -> str:
    r"""`text` on one line with everything that does not print spelled out ("\x1b", "\u202e").

    Longer text ends in an ellipsis.
    """
    shown = text if len(text) <= limit else f"{text[: limit - 1]}…"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


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
