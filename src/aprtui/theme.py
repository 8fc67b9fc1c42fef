"""How a verdict and a cosine look: a glyph and a word first, a colour last.

The colours are those of Okabe and Ito, which stay apart for every kind of colour vision. They are
theme variables, so that another theme can replace them; code asks for a variable by name and never
for a colour.
Source: Okabe, Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from rich.style import Style
from rich.text import Text
from textual.color import Color
from textual.theme import Theme

from aprcore.records.telling import GLYPHS, UNJUDGED_GLYPH
from aprtui.settings import DEFAULT_THEME

if TYPE_CHECKING:
    from aprcore.judging.verdict import Judgment, Verdict
    from aprcore.records.report import StageReport
    from aprcore.records.telling import Line


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
    word: Mark(GLYPHS[word], word, f"verdict-{word.lower()}", meaning)
    for word, meaning in (
        ("PASS", "within its bound"),
        ("NOISE", "explained by the rounding of the weights"),
        ("INHERITED", "its own operation is right, its input is not"),
        ("LAYOUT", "equal after a named permutation"),
        ("MISSING", "one side lacks it"),
        ("UNJUDGED", "it is there, and cannot be judged"),
        ("FAIL", "beyond its bound"),
        ("NONFINITE", "NaN or infinity appears here first"),
        ("SHAPE", "the sides have different sizes"),
    )
}
PENDING = Mark("·", "pending", "verdict-pending", "not judged yet")
ALONE = Mark(UNJUDGED_GLYPH, "", "verdict-pending", "nothing to judge it against")


class Palette(NamedTuple):
    """What the roles of a theme are painted in: inks of Okabe and Ito's hues, and grounds.

    Every ink keeps 4.5 to 1 (WCAG AA) on every ground; tests/tui/test_themes.py computes it.
    """

    green: str
    sky_blue: str
    orange: str
    yellow: str
    vermilion: str
    purple: str
    grey: str
    foreground: str
    background: str
    surface: str
    panel: str

    def inks(self) -> dict[str, str]:
        """Theme variable to colour."""
        return {
            "verdict-pass": self.green,
            "verdict-noise": self.sky_blue,
            "verdict-inherited": self.orange,
            "verdict-layout": self.sky_blue,
            "verdict-missing": self.yellow,
            "verdict-unjudged": self.yellow,
            "verdict-fail": self.vermilion,
            "verdict-nonfinite": self.purple,
            "verdict-shape": self.vermilion,
            "verdict-pending": self.grey,
            "ink-quiet": self.grey,
            "ink-trace": self.orange,
            "ink-oracle": self.sky_blue,
        }


# Green and vermilion lighter than the originals, as text on a dark ground needs it.
_DARK = Palette(
    green="#2CB88D", sky_blue="#56B4E9", orange="#E69F00", yellow="#F0E442", vermilion="#F0742B",
    purple="#CC79A7", grey="#8A93A0",
    foreground="#E4E7EB", background="#14171C", surface="#1A1E25", panel="#252B34",
)  # fmt: skip
# The same hues, as dark as text on paper must be.
_LIGHT = Palette(
    green="#00664B", sky_blue="#00558F", orange="#8A4B00", yellow="#6A5F00", vermilion="#A83200",
    purple="#8A2F66", grey="#56606B",
    foreground="#1B1F24", background="#FBFAF7", surface="#F3F2EE", panel="#E4E7EB",
)  # fmt: skip
# At least 7 to 1 (WCAG AAA).
_HIGH_CONTRAST = Palette(
    green="#3DE0AE", sky_blue="#7CCBFF", orange="#FFB52E", yellow="#FFF04D", vermilion="#FF9A5C",
    purple="#F2A6D0", grey="#B9C2CC",
    foreground="#FFFFFF", background="#000000", surface="#0A0A0A", panel="#1C1C1C",
)  # fmt: skip
_WHITE, _BLACK = "#FFFFFF", "#000000"
_MONOCHROME = Palette(*[_WHITE] * 8, *[_BLACK] * 3)

# What tells verdicts apart where there is one colour; an ink's style is in the variable beside it.
STYLE_SUFFIX = "-style"
_MONOCHROME_VARIABLES = {
    **{
        f"{ink}{STYLE_SUFFIX}": style
        for ink, style in {
            "verdict-inherited": "underline",
            "verdict-layout": "underline",
            "verdict-missing": "underline",
            "verdict-unjudged": "underline",
            "verdict-fail": "bold reverse",
            "verdict-nonfinite": "bold reverse",
            "verdict-shape": "bold reverse",
            "ink-trace": "bold",
            "ink-oracle": "underline",
        }.items()
    },
    # The toolkit would mix these of ink and ground.
    **dict.fromkeys(("frame", "frame-title", "bar", "bar-hover", "foreground-muted"), _WHITE),
    **dict.fromkeys(("focused", "veil", "panel-darken-1", "panel-lighten-1"), _BLACK),
}

# The inks where a theme is not asked (tables on a terminal), and what a theme may leave out.
VARIABLES: Mapping[str, str] = _DARK.inks()


def _make_theme(
    name: str,
    palette: Palette,
    variables: Mapping[str, str] = MappingProxyType({}),
    *,
    dark: bool = True,
    frames: tuple[str, str] | None = None,
) -> Theme:
    """A theme of a palette.

    Args:
        name: What the user calls it.
        palette: Its colours.
        variables: More variables, or others than follow from the palette.
        dark: Whether its grounds are darker than its inks.
        frames: Its green and vermilion where they are no text, which may be deeper.
    """
    ink, ground = palette.foreground, palette.background
    success, error = frames or (palette.green, palette.vermilion)
    return Theme(
        name=name,
        primary=palette.sky_blue,
        secondary=success,
        accent=palette.orange,
        warning=palette.orange,
        error=error,
        success=success,
        foreground=ink,
        background=ground,
        surface=palette.surface,
        panel=palette.panel,
        dark=dark,
        variables={
            **palette.inks(),
            "footer-key-foreground": palette.orange,
            "block-cursor-background": palette.sky_blue,
            "block-cursor-foreground": ground,
            "border": palette.sky_blue,
            # Frames and the like, between the ink and its ground.
            "frame": f"{ink} 30%",
            "frame-title": f"{ink} 80%",
            "bar": f"{ink} 25%",
            "bar-hover": f"{ink} 40%",
            "focused": f"{palette.panel} 40%",
            "veil": f"{ground} 60%",
            **variables,
        },
    )


THEMES: Mapping[str, Theme] = {
    theme.name: theme
    for theme in (
        _make_theme(DEFAULT_THEME, _DARK, frames=("#009E73", "#D55E00")),
        _make_theme("okabe-ito-light", _LIGHT, dark=False),
        _make_theme("high-contrast", _HIGH_CONTRAST),
        _make_theme("monochrome", _MONOCHROME, _MONOCHROME_VARIABLES),
    )
}

# A cosine from which the next ink holds: measured rounding of float32 stays above the first, of
# half precision above the second, of 4-bit weights mostly above the third (docs of the project).
COSINE_INKS = ((0.99999, "verdict-pass"), (0.999, "verdict-noise"), (0.98, "verdict-inherited"))
COSINE_THRESHOLDS = tuple(threshold for threshold, _ in COSINE_INKS)
# The theme variable of a user's own thresholds (aprtui.settings), separated by spaces.
COSINE_VARIABLE = "cosine-thresholds"


def mark_of(report: StageReport | None) -> Mark:
    """The mark of a stage; `None` is one that is not judged yet."""
    if report is None:
        return PENDING
    return ALONE if report.verdict is None else mark_of_verdict(report.verdict)


def mark_of_verdict(verdict: Verdict) -> Mark:
    """The mark of a verdict."""
    return MARKS[verdict.value]


def cosine_ink(cosine: float, thresholds: Sequence[float] = COSINE_THRESHOLDS) -> str:
    """The theme variable that a cosine is shown in; its figure always stands beside it."""
    for threshold, (_, ink) in zip(thresholds, COSINE_INKS):
        if cosine >= threshold:
            return ink
    return "verdict-fail"


def judgment_mark(judgment: Judgment | None) -> Mark:
    """The mark of a model or kernel judgment."""
    if judgment is None:
        return ALONE
    return MARKS["PASS"] if judgment.passed else MARKS["FAIL"]


class Paint:
    """Turns the names of theme variables into styles, for one theme."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def __call__(self, ink: str, *, bold: bool = False) -> Style:
        """The style of a theme variable."""
        color = self._variables.get(ink) or VARIABLES[ink]
        return _style(color, self._variables.get(f"{ink}{STYLE_SUFFIX}", ""), bold)

    def shape(self, ink: str, *, bold: bool = False) -> Style:
        """The colour alone, for bars and blocks: reversed, they would show what they are not."""
        return _style(self._variables.get(ink) or VARIABLES[ink], "", bold)

    def line(self, line: Line) -> Text:
        """A line of `aprcore.records.telling`, each piece in the style of what it is."""
        text = Text()
        for piece in line:
            said, role = (piece, "") if isinstance(piece, str) else piece
            if role in MARKS:
                text.append(said, self(MARKS[role].ink, bold=True))
            elif role in ("", "strong"):
                text.append(said, "bold" if role else "")
            else:
                text.append(said, self(f"ink-{role}", bold=role != "quiet"))
        return text

    def cosine(self, cosine: float) -> Style:
        """The style of a cosine, by the user's thresholds if there are any."""
        chosen = self._variables.get(COSINE_VARIABLE)
        thresholds = COSINE_THRESHOLDS if chosen is None else tuple(map(float, chosen.split()))
        return self(cosine_ink(cosine, thresholds))


@lru_cache(maxsize=256)
def _style(color: str, attributes: str, bold: bool) -> Style:
    style = Style.parse(attributes)
    return style + Style(color=Color.parse(color).rich_color, bold=bold or None)
