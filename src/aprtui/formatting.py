"""Figures as text for columns of few cells; reports have theirs in `aprcore.records.telling`."""

from __future__ import annotations

from aprcore.records.telling import without_mantissa

# For narrow columns; the places of `format_cosine` tell rounding from equality.
NARROW_COSINE_PLACES = 4


def format_compact(figure: float, cells: int = 6) -> str:
    """An error figure in few cells: "3.2e-7", "1.1e0", and without its decimal where that helps."""
    text = without_mantissa(figure) or _short_exponent(f"{figure:.1e}")
    return text if len(text) <= cells else _short_exponent(f"{figure:.0e}")


def format_short(value: float) -> str:
    """A tensor's value in nine cells at most: "-3.31e-01"."""
    return without_mantissa(value) or f"{value:.2e}"


def _short_exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}"
