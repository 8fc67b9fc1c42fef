"""What the tests of a whole run share: reading a report, and other engines' layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aprcore.network.stages import StageKey
from aprcore.records.report import Report, StageReport
from tiny import SIZES, TOKENS, Tensors

Change = Callable[[np.ndarray], np.ndarray]

SCORES, SOFTMAX = StageKey(1, "attn_scores"), StageKey(1, "attn_softmax")
Q, K = StageKey(1, "q_post_rope"), StageKey(1, "k_post_rope")
LOGITS, EMBEDDING = StageKey(None, "lm_head"), StageKey(0, "embedding")
T, H, D = len(TOKENS), SIZES["H"], SIZES["D"]


def verdicts(report: Report) -> dict[str, str | None]:
    return {s.key.path: s.verdict and s.verdict.value for s in report.stages}


def found_at(report: Report, key: StageKey) -> StageReport:
    return next(stage for stage in report.stages if stage.key == key)


def only_pass(report: Report) -> bool:
    return set(verdicts(report).values()) == {"PASS"}


def masked(scores: np.ndarray, junk: float | None) -> np.ndarray:
    """Scores as other engines dump them: `junk`, or anything at all, above the diagonal."""
    above = np.triu(np.ones(scores.shape, bool), 1)
    raw = np.random.default_rng(0).standard_normal(scores.shape)
    return np.where(above, raw if junk is None else junk, scores)


def heads_first(x: np.ndarray) -> np.ndarray:
    """[T, N·D] as [N, T, D]."""
    return np.ascontiguousarray(x.reshape(T, -1, D).swapaxes(0, 1))


def pairs(x: np.ndarray) -> np.ndarray:
    """[T, N·D] with adjacent pairs in place of halves."""
    return x.reshape(T, -1, 2, D // 2).swapaxes(-1, -2).reshape(T, -1)


def last_token(x: np.ndarray) -> np.ndarray:
    return x[-1:] if x.ndim == 2 else x[:, -1:] if x.ndim == 3 else x


def everywhere(tensors: Tensors, stage: str, change: Change) -> dict[StageKey, Any]:
    return {k: change(x) if k.stage == stage else x for k, x in tensors.items()}


LAYOUTS: dict[str, Callable[[Tensors], dict[StageKey, Any]]] = {
    "q with heads first": lambda t: everywhere(t, "q_post_rope", heads_first),
    "k with heads first": lambda t: everywhere(t, "k_post_rope", heads_first),
    "q in pairs": lambda t: everywhere(t, "q_post_rope", pairs),
    "k in pairs": lambda t: everywhere(t, "k_post_rope", pairs),
    "q with heads first, in pairs": lambda t: everywhere(
        t, "q_post_rope", lambda x: heads_first(pairs(x))
    ),
    "scores with tokens first": lambda t: everywhere(
        t, "attn_scores", lambda x: np.ascontiguousarray(x.swapaxes(0, 1))
    ),
    "scores with -inf": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, -np.inf)),
    "scores with -65504": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, -65504)),
    "scores with -3.4e38": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, -3.4e38)),
    "raw scores": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, None)),
    "the last token only": lambda t: {k: last_token(x) for k, x in t.items()},
    "the last token only, in pairs": lambda t: {
        k: last_token(pairs(x) if k.stage in ("q_post_rope", "k_post_rope") else x)
        for k, x in t.items()
    },
}  # fmt: skip
