"""Where two runs of one step part: stage by stage, each judged on its own inputs.

It costs the step a second time on both sides, and the float64 judge on top.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.backends.prediction import Profile
from aprcore.causes import explain
from aprcore.compare import Comparison, compare
from aprcore.generate import Decoder
from aprcore.judge import FLOAT32_BOUND, Judgment
from aprcore.layouts import Layout, layout_of
from aprcore.precision import ARITHMETICS
from aprcore.replay import Expectation, RecordedSide
from aprcore.stage_judge import make_judgment
from aprcore.stages import BY_NAME, StageKey, input_keys, split_axes

Floats = NDArray[np.floating[Any]]

# A kernel whose own error is below this cannot have turned logits by the 14 percent that a cosine
# of 0.99 leaves. Drivers round exp and sqrt a little worse than predicted, and are not to blame.
BLAME_FLOOR = 1e-5


@dataclass(frozen=True, slots=True)
class StageFault:
    """The stage at which two runs of a step part.

    Attributes:
        step: The step.
        key: The stage.
        comparison: The tested side against the other.
        layout: Names the axes of its tensor.
        kernel: Whether its operation is wrong on its own inputs. Else this is the first stage that
            differs by more than float32 explains.
        reason: What was found, in a clause.
    """

    step: int
    key: StageKey
    comparison: Comparison
    layout: Layout
    kernel: bool
    reason: str

    def describe(self) -> str:
        """The finding in a clause: "step 2, layer 1 · attention: ..."."""
        return f"step {self.step}, {self.key}: {self.reason}"


@dataclass(frozen=True, slots=True)
class StageParity:
    """One stage of a step on both sides.

    Attributes:
        step: The step.
        key: The stage.
        comparison: The tested side against the other.
        layout: Names the axes of its tensor.
        kernel: The tested side's operation on its own inputs; None where that cannot be told.
        fault: What is wrong with that operation, in a clause; nothing if it is sound.
        cpu_s, tested_s: Time that either side took, with the way to the host.
    """

    step: int
    key: StageKey
    comparison: Comparison
    layout: Layout
    kernel: Judgment | None
    fault: str
    cpu_s: float
    tested_s: float

    @property
    def differs(self) -> bool:
        """Whether the two sides differ by more than float32 explains."""
        found = self.comparison
        return found.unequal_nonfinite > 0 or found.relative_l2 > FLOAT32_BOUND


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
    judge = _KernelJudge(tested, tokens)
    streams = _timed(trusted.stages(tokens)), _timed(tested.stages(tokens))
    for (key, ours, cpu_s), (_, theirs, tested_s) in zip(*streams, strict=True):
        found = compare(theirs, ours, top_k)
        layout = layout_of(key, judge.sizes, theirs.size)
        kernel, fault = judge.judge(key, theirs, layout)
        if found.unequal_nonfinite and judge.inputs_finite(key):
            fault = f"{found.unequal_nonfinite} values are NaN or infinite on one side only"
        yield StageParity(step, key, found, layout, kernel, fault, cpu_s, tested_s)


def find_fault(
    trusted: Decoder, tested: Decoder, tokens: Sequence[int], step: int
) -> StageFault | None:
    """The first stage of a step whose kernel is wrong on the tested side, or that differs.

    Takes the arguments of `compare_stages`.
    """
    different = None
    for stage in compare_stages(trusted, tested, tokens, step):
        if stage.fault:
            return StageFault(step, stage.key, stage.comparison, stage.layout, True, stage.fault)
        if different is None and stage.differs:
            different = stage
    if different is None:
        return None
    error = different.comparison.relative_l2
    reason = f"relative L2 {error:.3g} between both sides, by no single kernel"
    reason += _describe_past(trusted, tested)
    return StageFault(step, different.key, different.comparison, different.layout, False, reason)


def _describe_past(trusted: Decoder, tested: Decoder) -> str:
    """Where the caches differed before the step, for the end of a sentence; nothing if nowhere."""
    ours, theirs = trusted.past().held, tested.past().held
    for (layer, name), rows in theirs.items():
        found = compare(rows, ours[layer, name])
        if found.unequal_nonfinite or found.relative_l2 > FLOAT32_BOUND:
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
    sizes = before.config.sizes(1, len(history) + 1)
    whole = _last_rows(before.fresh().stages([*history, *tokens]))
    for (key, full), (_, cached) in zip(whole, before.stages(tokens), strict=True):
        found = compare(cached, full)
        if found.unequal_nonfinite or found.relative_l2 > FLOAT32_BOUND:
            layout = layout_of(key, sizes, cached.size)
            reason = f"relative L2 {found.relative_l2:.3g} against the full pass"
            return StageFault(step, key, found, layout, False, reason)
    return None


def _timed(
    stream: Iterator[tuple[StageKey, Floats]],
) -> Iterator[tuple[StageKey, Floats, float]]:
    """A stream with the seconds that each of its tensors took."""
    started = time.perf_counter()
    for key, tensor in stream:
        yield key, tensor, time.perf_counter() - started
        started = time.perf_counter()


def _last_rows(
    stream: Iterator[tuple[StageKey, Floats]],
) -> Iterator[tuple[StageKey, Floats]]:
    """The tensors of a pass, of its last token only."""
    for key, tensor in stream:
        axes = split_axes(BY_NAME[key.stage].shape)
        if ("T",) in axes:
            tensor = np.take(tensor, [-1], axis=axes.index(("T",)))
        yield key, tensor


class _KernelJudge:
    """Judges each stage of one pass of a decoder on the inputs that it had there."""

    def __init__(self, decoder: Decoder, tokens: Sequence[int]) -> None:
        past = decoder.past()
        self._has_past = past.num_positions > 0
        self._config = decoder.config
        self._finite: dict[StageKey, bool] = {}
        self._side = RecordedSide(
            decoder.config, decoder.weights, tokens, len(tokens),
            Profile(ARITHMETICS["f32"], weights_rounded=False),
            past=past if self._has_past else None,
        )  # fmt: skip
        self.sizes = self._side.sizes()

    def judge(self, key: StageKey, tensor: Floats, layout: Layout) -> tuple[Judgment | None, str]:
        """A stage's operation on its own inputs, and what is wrong with it, if anything."""
        side = self._side
        side.enter(key)
        expected = side.expect(key)
        side.record(key, tensor)
        self._finite[key] = bool(np.isfinite(tensor).all())
        judgment = None if expected is None else make_judgment(tensor, expected, layout)
        if judgment is None or judgment.passed or judgment.relative_l2 <= BLAME_FLOOR:
            return judgment, ""
        assert expected is not None
        return judgment, self._reason(key, tensor, expected, layout, judgment)

    def inputs_finite(self, key: StageKey) -> bool:
        """Whether every tensor that a stage reads was finite."""
        return all(self._finite[source] for source in self._sources(key))

    def _sources(self, key: StageKey) -> tuple[StageKey, ...]:
        return input_keys(key, self._config.num_layers, self._config.features)

    def _reason(
        self, key: StageKey, tensor: Floats, expected: Expectation, layout: Layout,
        judgment: Judgment,
    ) -> str:  # fmt: skip
        # The catalogue's alternatives of attention are written for a full pass.
        keys = (key, *self._sources(key))
        if self._has_past and any(("S",) in split_axes(BY_NAME[k.stage].shape) for k in keys):
            return f"kernel: {judgment.describe()}"
        cause = explain(self._side, key, tensor, expected, layout, in_file=False).clause()
        return f"kernel: {cause}; {judgment.describe()}"
