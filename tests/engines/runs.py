"""A run of the real llama.cpp, and its judgment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggufs import BLOCKS_RECIPE

from aprcore.capture.llama_cpp import LlamaCppRequest, capture_llama_cpp
from aprcore.judging.verdict import Verdict
from aprcore.records.report import Report
from aprcore.runs.bisect import run
from aprcore.runs.request import Request

STORIES_TOKENS = (1, 403, 407, 261, 378, 285, 432, 261, 396)
DEMO_TOKENS = (28, 72, 65, 84, 3, 4, 5, 6, 7, 8, 9)
DIVERGENCES = frozenset({Verdict.FAIL, Verdict.NONFINITE, Verdict.SHAPE})


def tokens_of(name: str) -> tuple[int, ...]:
    """Token ids for a model of the `models` fixture."""
    if name.startswith("stories"):
        return STORIES_TOKENS
    return DEMO_TOKENS if name == "demo" else BLOCKS_RECIPE.tokens


def capture(model: Path, tokens: tuple[int, ...], dump: Path, **settings: Any) -> Path:
    """Run llama.cpp; one thread, since two tests run at a time."""
    request = LlamaCppRequest(model, tokens=tokens, **{"threads": 1, **settings})
    capture_llama_cpp(request, dump)
    return dump


def judge(model: Path, dump: Path) -> Report:
    """The dump against the model, without an oracle."""
    return run(Request(model=model, trace=dump))


def divergences(report: Report) -> dict[str, str]:
    """The reason of every divergence, by the path of its stage."""
    return {s.key.path: f"{s.verdict.name}: {s.reason}" for s in report.stages
            if s.verdict in DIVERGENCES}  # fmt: skip


def judged(report: Report) -> set[str]:
    """The stages that have a verdict."""
    unjudged = (None, Verdict.MISSING, Verdict.UNJUDGED)
    return {stage.key.stage for stage in report.stages if stage.verdict not in unjudged}
