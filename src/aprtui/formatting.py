"""Figures as text, in widths that stay put while they change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aprtui.text import visible

if TYPE_CHECKING:
    from aprcore.compare import Comparison

# A cosine in seven decimals tells rounding (1 - 1e-7) from equality; four are for narrow columns.
COSINE_PLACES = 7
NARROW_COSINE_PLACES = 4


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
    return _plain(ratio) or f"{ratio:.1e}"


def format_compact(figure: float, cells: int = 6) -> str:
    """An error figure in few cells: "3.2e-7", "1.1e0", and without its decimal where that helps."""
    text = _plain(figure) or _short_exponent(f"{figure:.1e}")
    return text if len(text) <= cells else _short_exponent(f"{figure:.0e}")


def format_times(ratio: float) -> str:
    """How many times what was predicted: "0.78x", "61x", "4e+07x"."""
    if not math.isfinite(ratio):
        return f"{_plain(ratio)}x"
    if ratio < 1000:
        return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"
    return f"{ratio:.0e}x"


def format_figure(figure: float) -> str:
    """A figure for reading closely: "8.312e-01"; an exact zero is "0"."""
    return _plain(figure) or f"{figure:.3e}"


def format_value(value: float) -> str:
    """A tensor's value: "-3.310e-01", "NaN", "-Inf"."""
    return _plain(value) or f"{value:.3e}"


def format_short(value: float) -> str:
    """A tensor's value in nine cells at most: "-3.31e-01"."""
    return _plain(value) or f"{value:.2e}"


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


def quoted(text: str) -> str:
    """Text from a file in double quotes, so that spaces at its ends can be seen."""
    return f'"{visible(text)}"'


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 token", "7 tokens"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _plain(x: float) -> str:
    """The text of a figure that has no mantissa, else nothing."""
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "Inf" if x > 0 else "-Inf"
    return "0" if x == 0 else ""


def _short_exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}"
