"""Text that came from a file, made safe to show.

A tensor's name is anybody's text: it may hold escape sequences that move the cursor, or a
direction mark that makes the line read otherwise.
"""

from __future__ import annotations

from aprcore.ground.errors import ERROR_LIMIT
from aprcore.ground.visible import visible, visible_lines

__all__ = ("ERROR_LIMIT", "byte_count", "visible", "visible_lines")


def byte_count(size: int) -> str:
    """A number of bytes for people: "1.2 GiB"."""
    number, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{size} B" if unit == "B" else f"{number:.1f} {unit}"
