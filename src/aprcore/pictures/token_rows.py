"""Figures per token and head, and the values themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.pictures.plane import TensorPair, ranges
from aprcore.pictures.records import (
    PIECE_VALUES,
    IsCancelled,
    TokenFigures,
    ValueWindow,
    check,
    never,
)

Float32 = NDArray[np.float32]


def token_figures(
    pair: TensorPair, is_cancelled: IsCancelled = never, *, by_head: bool = True
) -> TokenFigures:
    """How far off each token is.

    A tensor without a token axis (logits of the last token, an unknown layout) counts as one token.

    Args:
        pair: Two sides that are comparable.
        is_cancelled: Asked between pieces.
        by_head: Whether heads are kept apart where there are any.

    Raises:
        Cancelled: It was given up.
        ValueError: The pair is not comparable.
        AprError: A file is gone or has changed.
    """
    trace, oracle = pair.both()
    *outer, length = trace.layout.factors
    groups = math.prod(outer)
    aa, bb, ab, dd, largest = (np.zeros(groups) for _ in range(5))
    nonfinite = np.zeros(groups, np.int64)
    for first, last, start, stop in _runs(groups, length):
        check(is_cancelled)
        a, b = (
            side.read_flat(start, stop).reshape(last - first, -1).astype(np.float64)
            for side in (trace, oracle)
        )
        bad = ~(np.isfinite(a) & np.isfinite(b))
        if bad.any():
            a[bad] = b[bad] = 0
            nonfinite[first:last] += bad.sum(axis=1)
        diff = a - b
        for total, x, y in ((aa, a, a), (bb, b, b), (ab, a, b), (dd, diff, diff)):
            total[first:last] += np.vecdot(x, y)
        np.abs(diff, out=diff)
        part = largest[first:last]
        np.maximum(part, diff.max(axis=1, initial=0), out=part)
    heads = trace.layout.axes.index("head") if "head" in trace.layout.axes else None

    def arrange(x: NDArray[Any], combine: np.ufunc = np.add) -> NDArray[Any]:
        """Runs as [T], or tokens first and then heads."""
        if heads is None:
            return x
        by_token = np.moveaxis(x.reshape(outer), heads, 1)
        return by_token if by_head else combine.reduce(by_token, axis=1)

    aa, bb, ab, dd = arrange(aa), arrange(bb), arrange(ab), arrange(dd)
    with np.errstate(all="ignore"):
        relative = np.where(bb > 0, np.sqrt(dd / bb), np.where(dd > 0, np.inf, 0.0))
        cosine = np.clip(ab / (np.sqrt(aa) * np.sqrt(bb)), -1, 1)
    cosine = np.where((aa > 0) & (bb > 0), cosine, np.where((aa > 0) | (bb > 0), 0.0, 1.0))
    return TokenFigures(
        relative, cosine, arrange(largest, np.maximum), heads is not None and by_head,
        arrange(nonfinite),
    )  # fmt: skip


def _runs(groups: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Pieces of whole runs of `length` values, or parts of one: (first, last run, start, stop)."""
    if length == 0:
        return
    if length > PIECE_VALUES:
        for group in range(groups):
            for start, stop in ranges(length, PIECE_VALUES):
                yield group, group + 1, group * length + start, group * length + stop
        return
    for first, last in ranges(groups, PIECE_VALUES // length):
        yield first, last, first * length, last * length


def values(pair: TensorPair, start: int, count: int) -> ValueWindow:
    """Up to `count` values from a flat index, of both sides."""
    windows: list[Float32 | None] = []
    total = 0
    for side in (pair.trace, pair.oracle):
        if side is None:
            windows.append(None)
            continue
        size = math.prod(side.layout.shape)
        total = max(total, size)
        first = min(max(0, start), size)
        windows.append(side.read_flat(first, min(first + max(0, count), size)))
    return ValueWindow(max(0, start), windows[0], windows[1], total)
