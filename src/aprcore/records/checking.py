"""Holding a report that came out of a file against itself.

Its types are right by then. What is left are the numbers that name places in each other, and names
that everything else takes for known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from aprcore.judging.compare import Comparison
from aprcore.judging.layouts import Layout
from aprcore.judging.verdict import Judgment
from aprcore.network.graph import known_stages
from aprcore.network.stages import MOST_LAYERS, Scope, StageKey
from aprcore.records.report import Report

MOST_AXES = 8  # of a layout: tokens, heads, dimensions
MOST_VALUES = 2**63 - 1


def check_report(report: Report) -> None:
    """Refuse a report whose parts contradict each other.

    Raises:
        ValueError: They do; it says where.
    """
    header = report.header
    if not 0 <= header.num_layers <= MOST_LAYERS:
        raise ValueError(f"{header.num_layers} layers")
    if not header.keys:
        raise ValueError("no stages")
    for key in _keys(report):
        _check_key(key, header.num_layers)
    if header.tokens is not None and min(header.tokens, default=0) < 0:
        raise ValueError("a token id below 0")
    texts = header.token_texts
    if texts is not None and len(texts) != len(header.tokens or ()):
        raise ValueError("as many texts as tokens are due")
    for stage in report.stages:
        _check_figures(stage.key, stage.layout, [stage.comparison])
        logits = stage.logits
        if logits is not None:
            found = logits.comparison
            sides = ((found.top_a, found.values_a), (found.top_b, found.values_b))
            if any(len(ids) != len(values) or not ids for ids, values in sides):
                raise ValueError(f"the best tokens of {stage.key.path}")
    for pair in report.parity:
        figures = [pair.comparison, pair.tested.oracle, pair.trusted.oracle]
        _check_figures(pair.key, pair.layout, figures)


def _keys(report: Report) -> Iterator[StageKey]:
    yield from report.header.keys
    judgments: list[Judgment | None] = []
    for stage in report.stages:
        yield stage.key
        judgments += (stage.kernel, stage.model)
    for pair in report.parity:
        yield pair.key
        judgments += (pair.tested.kernel, pair.trusted.kernel)
    for judgment in judgments:
        if judgment is not None:
            yield from judgment.span
            yield from judgment.recomputed
    if report.rejected is not None and report.rejected.key is not None:
        yield report.rejected.key


def _check_key(key: StageKey, num_layers: int) -> None:
    stage = known_stages().get(key.stage)
    if stage is None:
        raise ValueError(f"{key.stage!r} is no stage of this version")
    layers = {Scope.MODEL: (None,), Scope.FIRST_LAYER: (0,)}.get(stage.scope, range(num_layers))
    if key.layer not in layers:
        raise ValueError(f"{key.stage} of layer {key.layer}, where there are {num_layers}")


def _check_figures(
    key: StageKey, layout: Layout | None, figures: Iterable[Comparison | None]
) -> None:  # fmt: skip
    """Whether every index of a stage is in its layout, which names its place."""
    count = None if layout is None else _count(key, layout)
    for found in figures:
        if found is None:
            continue
        size = found.count if count is None else count
        if found.count != size or not 0 <= size <= MOST_VALUES:
            raise ValueError(f"the sizes of {key.path} contradict each other")
        top = found.top
        if not len(top.indices) == len(top.a) == len(top.b):
            raise ValueError(f"the largest differences of {key.path} are not pairs")
        places = np.append(top.indices, [max(0, found.max_index), max(0, found.first_nonfinite)])
        if np.any(places < 0) or (size and np.any(places >= size)) or (not size and len(top)):
            raise ValueError(f"a place in {key.path} beyond its {size} values")


def _count(key: StageKey, layout: Layout) -> int:
    shape, factors, axes = layout
    count = math.prod(factors) if len(factors) <= MOST_AXES >= len(shape) else -1
    same = len(axes) == len(factors) > 0 and math.prod(shape) == count
    if not same or min((*shape, *factors)) < 0 or count > MOST_VALUES:
        raise ValueError(f"the sizes of {key.path} contradict each other")
    return count
