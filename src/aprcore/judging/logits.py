"""What two sets of logits would make the model say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]

# Relative gap under which two candidates for the next token count as tied (docs/formats.md).
NEAR_TIE_GAP = 0.15


@dataclass(frozen=True, slots=True)
class LogitsComparison:
    """What two sets of logits would make the model say.

    Attributes:
        argmax_a, argmax_b: The greedy tokens (the first of equals).
        top_a, top_b: Token ids with the largest logits, best first.
        values_a, values_b: Their logits.
        kl: KL(softmax(b) || softmax(a)) in nats; NaN if a logit is not finite.
        gap: How far the tested side's token lies below the best on the reference side,
            (max b - b[argmax a]) / (max b - min b).
        near_tie: The tokens differ, but by no more than `NEAR_TIE_GAP`.
    """

    argmax_a: int
    argmax_b: int
    top_a: tuple[int, ...]
    top_b: tuple[int, ...]
    values_a: tuple[float, ...]
    values_b: tuple[float, ...]
    kl: float
    gap: float
    near_tie: bool

    @property
    def agree(self) -> bool:
        """Whether both sides choose the same token."""
        return self.argmax_a == self.argmax_b


def compare_logits(
    a: Floats, b: Floats, *, k: int = 5, temperature: float = 1.0
) -> LogitsComparison:
    """Compare two sets of logits of one token, [V] each, in float64.

    NaN counts as the lowest logit when tokens are ranked.

    Raises:
        ValueError: The sizes differ or are zero, or the temperature is not positive.
    """
    if a.size != b.size or a.size == 0:
        raise ValueError(f"cannot compare {a.size} logits with {b.size}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    wide_a, wide_b = (x.reshape(-1).astype(np.float64) for x in (a, b))
    rank_a, rank_b = (np.where(np.isnan(x), -np.inf, x) for x in (wide_a, wide_b))
    top_a, top_b = (_largest(x, k) for x in (rank_a, rank_b))
    argmax_a, argmax_b = int(top_a[0]), int(top_b[0])
    spread = float(rank_b.max()) - float(rank_b.min())
    gap = 0.0 if argmax_a == argmax_b else math.nan
    if argmax_a != argmax_b and math.isfinite(spread):
        gap = float(rank_b[argmax_b] - rank_b[argmax_a]) / spread if spread > 0 else 0.0
    kl = math.nan
    if np.isfinite(wide_a).all() and np.isfinite(wide_b).all():
        log_a, log_b = (_log_softmax(x / temperature) for x in (wide_a, wide_b))
        kl = max(0.0, float(np.exp(log_b) @ (log_b - log_a)))
    return LogitsComparison(
        argmax_a=argmax_a,
        argmax_b=argmax_b,
        top_a=tuple(int(i) for i in top_a),
        top_b=tuple(int(i) for i in top_b),
        values_a=tuple(float(x) for x in wide_a[top_a]),
        values_b=tuple(float(x) for x in wide_b[top_b]),
        kl=kl,
        gap=gap,
        near_tie=argmax_a != argmax_b and gap <= NEAR_TIE_GAP,
    )


# llama-perplexity stores nothing smaller than this much below the largest.
DEEPEST = 16.0


def log_probabilities(x: Floats) -> NDArray[np.float32]:
    """Logarithms of softmax(x), and what is more than `DEEPEST` below the largest as just that."""
    made = _log_softmax(x.reshape(-1).astype(np.float64))
    return np.maximum(made, made.max() - DEEPEST).astype(np.float32)


def _largest(x: Float64, k: int) -> NDArray[np.int64]:
    """Indices of the k largest values, best first, the first of equals first."""
    if x.size > 4 * k:  # sorting a whole vocabulary takes longer than comparing it
        floor = np.partition(x, x.size - k)[x.size - k]
        candidates = np.flatnonzero(x >= floor)
    else:
        candidates = np.arange(x.size)
    return candidates[np.argsort(-x[candidates], kind="stable")[:k]]


def _log_softmax(x: Float64) -> Float64:
    shifted = x - x.max()
    return np.asarray(shifted - math.log(float(np.exp(shifted).sum())), dtype=np.float64)
