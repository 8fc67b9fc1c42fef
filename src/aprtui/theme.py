"""How a verdict and a cosine look: a glyph and a word first, a colour last.

The colours are those of Okabe and Ito, which stay apart for every kind of colour vision. They are
theme variables, so that another theme can replace them; code asks for a variable by name and never
for a colour.
Source: Okabe, Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from rich.style import Style
from textual.color import Color
from textual.theme import Theme

if TYPE_CHECKING:
    from aprcore.judge import Judgment, Verdict
    from aprcore.report import StageReport

ORANGE, SKY_BLUE, GREEN = "#E69F00", "#56B4E9", "#009E73"
YELLOW, VERMILION, PURPLE = "#F0E442", "#D55E00", "#CC79A7"
# Lighter than the originals where text on a dark ground needs it (WCAG AA, 4.5 to 1).
LIGHT_GREEN, LIGHT_VERMILION = "#2CB88D", "#F0742B"
GREY = "#8A93A0"


class Mark(NamedTuple):
    """How the state of a stage is shown.

    Attributes:
        glyph: One cell.
        word: What it is called.
        ink: Theme variable of its colour.
        meaning: One line for the help screen.
    """

    glyph: str
    word: str
    ink: str
    meaning: str


# By the verdict's word, so that the engine need not be imported to paint the first screen.
MARKS: Mapping[str, Mark] = {
    mark.word: mark
    for mark in (
        Mark("✓", "PASS", "verdict-pass", "within its bound"),
        Mark("≈", "NOISE", "verdict-noise", "explained by the rounding of the weights"),
        Mark("↳", "INHERITED", "verdict-inherited", "its own operation is right, its input is not"),
        Mark("⇄", "LAYOUT", "verdict-layout", "equal after a named permutation"),
        Mark("∅", "MISSING", "verdict-missing", "one side lacks it"),
        Mark("✗", "FAIL", "verdict-fail", "beyond its bound"),
        Mark("∞", "NONFINITE", "verdict-nonfinite", "NaN or infinity appears here first"),
        Mark("≠", "SHAPE", "verdict-shape", "the sides have different sizes"),
    )
}
PENDING = Mark("·", "pending", "verdict-pending", "not judged yet")
UNJUDGED = Mark("–", "", "verdict-pending", "nothing to judge it against")

# Worst last: a layer shows the last of these that it contains.
SEVERITY = ("PASS", "NOISE", "INHERITED", "LAYOUT", "MISSING", "SHAPE", "NONFINITE", "FAIL")

VARIABLES: Mapping[str, str] = {
    "verdict-pass": LIGHT_GREEN,
    "verdict-noise": SKY_BLUE,
    "verdict-inherited": ORANGE,
    "verdict-layout": SKY_BLUE,
    "verdict-missing": YELLOW,
    "verdict-fail": LIGHT_VERMILION,
    "verdict-nonfinite": PURPLE,
    "verdict-shape": LIGHT_VERMILION,
    "verdict-pending": GREY,
    "ink-quiet": GREY,
    "ink-trace": ORANGE,
    "ink-oracle": SKY_BLUE,
}

THEME = Theme(
    name="okabe-ito",
    primary=SKY_BLUE,
    secondary=GREEN,
    accent=ORANGE,
    warning=ORANGE,
    error=VERMILION,
    success=GREEN,
    foreground="#E4E7EB",
    background="#14171C",
    surface="#1A1E25",
    panel="#252B34",
    variables={
        **VARIABLES,
        "footer-key-foreground": ORANGE,
        "block-cursor-background": SKY_BLUE,
        "block-cursor-foreground": "#14171C",
        "border": SKY_BLUE,
    },
)

# A cosine from which the next ink holds: measured rounding of float32 stays above the first, of
# half precision above the second, of 4-bit weights mostly above the third (docs of the project).
COSINE_INKS = ((0.99999, "verdict-pass"), (0.999, "verdict-noise"), (0.98, "verdict-inherited"))


def mark_of(report: StageReport | None) -> Mark:
    """The mark of a stage; `None` is one that is not judged yet."""
    if report is None:
        return PENDING
    return UNJUDGED if report.verdict is None else mark_of_verdict(report.verdict)


def mark_of_verdict(verdict: Verdict) -> Mark:
    """The mark of a verdict."""
    return MARKS[verdict.value]


def cosine_ink(cosine: float) -> str:
    """The theme variable that a cosine is shown in; its figure always stands beside it."""
    for threshold, ink in COSINE_INKS:
        if cosine >= threshold:
            return ink
    return "verdict-fail"


def judgment_mark(judgment: Judgment | None) -> Mark:
    """The mark of a model or kernel judgment."""
    if judgment is None:
        return UNJUDGED
    return MARKS["PASS"] if judgment.passed else MARKS["FAIL"]


class Paint:
    """Turns the names of theme variables into styles, for one theme."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __call__(self, ink: str, *, bold: bool = False) -> Style:
        """The style of a theme variable."""
        return _style(self._variables.get(ink) or VARIABLES[ink], bold)


@lru_cache(maxsize=256)
def _style(color: str, bold: bool) -> Style:
    return Style(color=Color.parse(color).rich_color, bold=bold or None)
