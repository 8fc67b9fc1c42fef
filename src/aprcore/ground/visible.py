"""Text out of files, made harmless: what every name and path passes on its way out."""

from __future__ import annotations

import re

LINE_LIMIT = 300

# Of what does not print, a terminal takes these as they are meant: line breaks and tabs.
_BREAKS = re.compile(r"[\n\t]")
_WITHIN_LINES = re.compile(r"[^\n\t]+")


def visible(text: str, limit: int = LINE_LIMIT) -> str:
    r"""`text` on one line with everything that does not print spelled out ("\x1b", "\u202e").

    Longer text ends in an ellipsis.
    """
    shown = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return _spelled_out(shown)


def visible_lines(text: str) -> str:
    """As `visible`, for text that may break lines and has no limit: what a model writes."""
    if _BREAKS.sub("", text).isprintable():
        return text
    return _WITHIN_LINES.sub(lambda part: _spelled_out(part[0]), text)


def _spelled_out(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
