"""Places in a tensor as people type them: "1234", or "token, head, dim"."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout


def parse_place(text: str, layout: Layout) -> int | str:
    """The flat index of a place, or what is wrong with it.

    Args:
        text: A flat index, or a coordinate per axis with commas or spaces between them; a negative
            one counts from the end.
        layout: The tensor's.
    """
    words = [word for word in re.split(r"[\s,]+", text.strip()) if word]
    sizes = (math.prod(layout.factors),) if len(words) == 1 else layout.factors
    axes = ("index",) if len(words) == 1 else layout.axes
    if len(words) != len(sizes) or not all(re.fullmatch(r"-?[0-9]{1,18}", w) for w in words):
        if layout.axes in (("index",), ("token id",)):
            return "type an index"
        return f"type an index, or {', '.join(layout.axes)}"
    index = 0
    for word, size, axis in zip(words, sizes, axes):
        number = int(word) + (size if word.startswith("-") else 0)
        if not 0 <= number < size:
            return f"{axis} goes from 0 to {size - 1}"
        index = index * size + number
    return index
