"""Spans of attention and what is seen in them, for tests of every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from aprcore.network.mask import CAUSAL, Mask

MAX_TOKENS = 70


class Seen(NamedTuple):
    """A pass of some tokens, the last of some positions, and what each of them sees."""

    tokens: int
    positions: int
    mask: Mask = CAUSAL

    @property
    def span(self) -> tuple[int, int]:
        """Tokens and positions, as axes of the scores."""
        return self.tokens, self.positions

    def hidden(self) -> NDArray[np.bool_]:
        """Which positions no token may look at, [T, S]: each asked for on its own."""
        behind, ahead = self.mask
        hidden = np.zeros(self.span, bool)
        for token in range(self.tokens):
            own = self.positions - self.tokens + token
            for position in range(self.positions):
                too_early = behind is not None and own - position > behind
                too_late = ahead is not None and position - own > ahead
                hidden[token, position] = too_early or too_late
        return hidden


@st.composite
def seen(draw: Callable[..., int]) -> Seen:
    """Full passes and continued ones; causal, bidirectional, windows from one token to all."""
    tokens = draw(st.integers(1, MAX_TOKENS))
    positions = tokens + draw(st.one_of(st.just(0), st.integers(1, 20)))
    behind = draw(st.one_of(st.none(), st.integers(0, positions)))
    ahead = draw(st.one_of(st.just(0), st.none(), st.integers(1, positions)))
    return Seen(tokens, positions, Mask(behind, ahead))


# One of each kind, where a test has no room for drawn ones.
SOME_SEEN = (
    Seen(1, 1), Seen(7, 7), Seen(1, 9), Seen(4, 9),
    Seen(7, 7, Mask(0, 0)), Seen(9, 9, Mask(3, 0)), Seen(4, 9, Mask(2, 0)), Seen(1, 9, Mask(4, 0)),
    Seen(7, 7, Mask(None, None)), Seen(4, 9, Mask(None, None)), Seen(9, 9, Mask(2, 3)),
)  # fmt: skip
