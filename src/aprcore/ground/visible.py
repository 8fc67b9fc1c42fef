"""Text out of files, made harmless: what every name and path passes on its way out."""

from __future__ import annotations

LINE_LIMIT = 300


def visible(text: str, limit: int = LINE_LIMIT) -> str:
    r"""`text` on one line with everything that does not print spelled out ("\x1b", "\u202e").

    Longer text ends in an ellipsis.
    """
    shown = text if len(text) <= limit else f"{text[: limit - 1]}…"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
