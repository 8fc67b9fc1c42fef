"""Where two runs of one step part: stage by stage, each judged on its own inputs.

It costs the step a second time on both sides, and the float64 judge on top.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.engines.decode import Decoder
from aprcore.judging.compare import compare
from aprcore.judging.layouts import layout_of
from aprcore.judging.replay import RecordedSide
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey, split_axes
from aprcore.records.parity import SideJudgment, StageFault, StageParity, is_different
from aprcore.runs.pair_judge import KernelJudge, PairJudge

Floats = NDArray[np.floating[Any]]
Item = TypeVar("Item")


def compare_stages(
    trusted: Decoder, tested: Decoder, tokens: Sequence[int], step: int, top_k: int = 0
) -> Iterator[StageParity]:
    """Every stage of a step on both sides, the tested one judged on the inputs that it had.

    Args:
        trusted, tested: Decoders that are about to run the step. They are not advanced.
        tokens: Tokens of the pass.
        step: Its number, for the report.
        top_k: How many of the largest differences to keep.
    """
    graph, past = tested.graph, tested.past()
    has_past = past.num_positions > 0
    side = RecordedSide(
        graph, tested.weights, tokens, len(tokens),
        arithmetic_of_dtype("float32"), past=past if has_past else None,
    )  # fmt: skip
    sizes = side.sizes()
    kernels = KernelJudge(side, has_past=has_past)
    pairs = PairJudge(sizes, graph, top_k=top_k, step=step)
    streams = timed(trusted.stages(tokens)), timed(tested.stages(tokens))
    for ((key, ours), trusted_s), ((_, theirs), tested_s) in zip(*streams, strict=True):
        judged = kernels.judge(key, theirs, layout_of(key, sizes, theirs.size))
        yield pairs.judge(
            key,
            theirs,
            ours,
            replace(judged, elapsed_s=tested_s),
            SideJudgment(elapsed_s=trusted_s),
        )


def find_fault(
    trusted: Decoder, tested: Decoder, tokens: Sequence[int], step: int
) -> StageFault | None:
    """The first stage of a step whose kernel is wrong on the tested side, or that differs.

    Takes the arguments of `compare_stages`.
    """
    different = None
    for stage in compare_stages(trusted, tested, tokens, step):
        assert stage.comparison is not None and stage.layout is not None
        if stage.fault:
            return StageFault(step, stage.key, stage.comparison, stage.layout, True, stage.fault)
        if different is None and stage.differs:
            different = stage
    if different is None:
        return None
    assert different.comparison is not None and different.layout is not None
    error = different.comparison.relative_l2
    reason = f"relative L2 {error:.3g} between both sides, by no single kernel"
    reason += _describe_past(trusted, tested)
    return StageFault(step, different.key, different.comparison, different.layout, False, reason)


def _describe_past(trusted: Decoder, tested: Decoder) -> str:
    """Where the caches differed before the step, for the end of a sentence; nothing if nowhere."""
    ours, theirs = trusted.past().held, tested.past().held
    for (layer, name), rows in theirs.items():
        found = compare(rows, ours[layer, name])
        if is_different(found):
            kind = {"k": "keys", "v": "values"}[name]
            return (
                f"; the cached {kind} of layer {layer} differed before, by {found.relative_l2:.3g}"
            )
    return ""


def find_cache_fault(
    before: Decoder, tokens: Sequence[int], history: Sequence[int], step: int
) -> StageFault | None:
    """The first stage of a decoding step that differs from the same token's row in a full pass.

    Args:
        before: The decoder that is about to run the step.
        tokens: The token of the step.
        history: The tokens before it.
        step: Its number, for the report.
    """
    sizes = before.graph.config.sizes(1, len(history) + 1)
    whole = _last_rows(before.graph, before.fresh().stages([*history, *tokens]))
    for (key, full), (_, cached) in zip(whole, before.stages(tokens), strict=True):
        found = compare(cached, full)
        if is_different(found):
            layout = layout_of(key, sizes, cached.size)
            reason = f"relative L2 {found.relative_l2:.3g} against the full pass"
            return StageFault(step, key, found, layout, False, reason)
    return None


def timed(stream: Iterable[Item]) -> Iterator[tuple[Item, float]]:
    """A stream with the seconds that each of its items took to come."""
    started = time.perf_counter()
    for item in stream:
        yield item, time.perf_counter() - started
        del item  # a large tensor would stay while the next one is made
        started = time.perf_counter()


def _last_rows(
    graph: Graph,
    stream: Iterator[tuple[StageKey, Floats]],
) -> Iterator[tuple[StageKey, Floats]]:
    """The tensors of a pass, of its last token only."""
    for key, tensor in stream:
        axes = split_axes(graph.stage(key).shape)
        if ("T",) in axes:
            tensor = np.take(tensor, [-1], axis=axes.index(("T",)))
        yield key, tensor
