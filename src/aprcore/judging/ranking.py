"""The largest differences of two tensors, found while they are compared chunk by chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """One position: flat index, both values and |a - b|."""

    index: int
    a: float
    b: float
    abs_diff: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The largest differences in order, as arrays because a report keeps thousands of them.

    Attributes:
        indices: Flat indices: unequal non-finite positions first, then by |a - b|, ties by index.
        a, b: The values there, float64.
    """

    indices: NDArray[np.int64]
    a: Float64
    b: Float64

    def __len__(self) -> int:
        return int(self.indices.size)

    def __iter__(self) -> Iterator[Difference]:
        for index, a, b in zip(self.indices.tolist(), self.a.tolist(), self.b.tolist()):
            yield Difference(index, a, b, abs(a - b))


class Floor:
    """The k-th largest difference seen so far (the largest for k = 0): below it, no ranking.

    Threads share it without a lock on the reading side: a stale floor is only lower, which costs
    work and never a candidate.
    """

    def __init__(self, k: int, *, is_shared: bool = True) -> None:
        self.k = k
        self._is_shared = is_shared  # a tensor of one chunk has nothing to learn from it
        self.value = 0.0
        self._best = np.empty(0)
        self._lock = threading.Lock()

    def offer(self, diffs: Float64) -> None:
        """Raise the floor to the smallest of some differences that are all still in the ranking."""
        if not self._is_shared:
            return
        with self._lock:
            merged = np.sort(np.concatenate([self._best, diffs]))[-max(1, self.k) :]
            self._best = merged
            if merged.size >= self.k:
                self.value = float(merged[0])


NOWHERE = np.empty(0, dtype=np.int64)
NO_RANKING = Ranking(NOWHERE, np.empty(0), np.empty(0))


def find_candidates(diff: Float64, largest: float, floor: Floor) -> NDArray[np.int64]:
    """Positions of a chunk that may be among the k largest of the tensor; `diff` is |a - b|."""
    k = floor.k
    if k == 0:
        floor.offer(np.array([largest]))
        return NOWHERE
    if largest == 0:  # equal tensors: the first k finite positions
        first = np.flatnonzero(diff == 0)[:k]
        floor.offer(diff[first])
        return first
    (indices,) = (diff >= max(floor.value, _lower_bound(diff, k))).nonzero()
    diffs = diff[indices]
    if diffs.size > 2 * k:  # a few too many are cut off where they are put in order
        threshold = float(np.partition(diffs, diffs.size - k)[diffs.size - k])
        # Of ties at the threshold (zeros, say) the first k suffice.
        ties = np.flatnonzero(diffs == threshold)[:k]
        kept = np.sort(np.concatenate([np.flatnonzero(diffs > threshold), ties]))
        indices, diffs = indices[kept], diffs[kept]
    floor.offer(diffs)
    return indices


def _lower_bound(diff: Float64, k: int) -> float:
    """A value that at least k of a chunk's reach, and not many more.

    Deals the values into 4 k groups or more: where k groups have a maximum that large, k values
    are. Ten times faster than ranking all of them.
    """
    groups = max(4 * k, diff.size // 64)
    if diff.size < groups:
        return -1.0
    maxima = diff[: diff.size // groups * groups].reshape(-1, groups).max(axis=0)
    maxima.partition(groups - k)
    return float(maxima[groups - k])


def rank(indices: NDArray[np.int64], a: Floats, b: Floats, start: int) -> Ranking:
    """Positions of a chunk that begins at flat index `start`, with both sides' values there."""
    if indices.size == 0:
        return NO_RANKING
    wide_a, wide_b = (x[indices].astype(np.float64) for x in (a, b))
    return Ranking(indices + start, wide_a, wide_b)


def join_rankings(rankings: list[Ranking]) -> Ranking:
    """Rankings one after the other, in the order given."""
    present = [ranking for ranking in rankings if len(ranking)]
    if len(present) < 2:
        return present[0] if present else NO_RANKING
    columns = [[r.indices, r.a, r.b] for r in present]
    return Ranking(*(np.concatenate(column) for column in zip(*columns)))
