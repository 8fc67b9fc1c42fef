"""What a query of attention sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Mask(NamedTuple):
    """Which positions a query sees: an interval about its own.

    Attributes:
        behind: How many positions before its own; None: all.
        ahead: How many after its own; None: all.
    """

    behind: int | None = None
    ahead: int | None = 0

    @property
    def is_causal(self) -> bool:
        """Whether no query sees what comes after it."""
        return self.ahead == 0

    def span(self, position: int, num_positions: int) -> tuple[int, int]:
        """First and last (exclusive) position that the query at `position` sees."""
        first = 0 if self.behind is None else max(0, position - self.behind)
        stop = num_positions if self.ahead is None else position + self.ahead + 1
        return first, min(stop, num_positions)

    def allowed(self, num_queries: int, num_positions: int) -> NDArray[np.bool_]:
        """Which of the positions each of the last queries sees, [T, S]."""
        import numpy as np

        query = np.arange(num_positions - num_queries, num_positions)[:, None]
        position = np.arange(num_positions)[None, :]
        seen = np.ones((num_queries, num_positions), dtype=np.bool_)
        if self.ahead is not None:
            seen &= position <= query + self.ahead
        if self.behind is not None:
            seen &= position >= query - self.behind
        return seen

    def before(self, count: int) -> Mask:
        """The mask of queries that so many others follow, as if they were the last ones."""
        behind = None if self.behind is None else self.behind + count
        return Mask(behind, None if self.ahead is None else self.ahead - count)

    def describe(self) -> str:
        """In words: "causal", "causal, a window of 8"."""
        order = "causal" if self.is_causal else "in both directions"
        return order if self.behind is None else f"{order}, a window of {self.behind + 1}"


CAUSAL = Mask()
