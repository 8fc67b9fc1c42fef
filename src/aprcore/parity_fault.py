"""Where two runs of one step part: stage by stage, each judged on its own inputs.

Run only when a step's logits have been rejected; it costs the step a second time on both sides.
"""

from __future__ import annotations

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


def find_fault(
    trusted: Decoder, tested: Decoder, tokens: Sequence[int], step: int
) -> StageFault | None:
    """The first stage of a step whose kernel is wrong on the tested side, or that differs.

    Args:
        trusted, tested: Decoders that are about to run the step. They are not advanced.
        tokens: Tokens of the pass.
        step: Its number, for the report.
    """
    judge = _KernelJudge(tested, tokens)
    different = None
    streams = zip(trusted.stages(tokens), tested.stages(tokens), strict=True)
    for (key, ours), (_, theirs) in streams:
        found = compare(theirs, ours)
        layout = layout_of(key, judge.sizes, theirs.size)
        if found.unequal_nonfinite:
            count = f"{found.unequal_nonfinite} values are NaN or infinite on one side only"
            return StageFault(step, key, found, layout, True, count)
        reason = judge.judge(key, theirs, layout)
        if reason is not None:
            return StageFault(step, key, found, layout, True, reason)
        if different is None and found.relative_l2 > FLOAT32_BOUND:
            reason = f"relative L2 {found.relative_l2:.3g} between both sides, by no single kernel"
            reason += _describe_past(trusted, tested)
            different = StageFault(step, key, found, layout, False, reason)
    return different


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
        self._side = RecordedSide(
            decoder.config, decoder.weights, tokens, len(tokens),
            Profile(ARITHMETICS["f32"], weights_rounded=False),
            past=past if self._has_past else None,
        )  # fmt: skip
        self.sizes = self._side.sizes()

    def judge(self, key: StageKey, tensor: Floats, layout: Layout) -> str | None:
        """What is wrong with a stage's operation; None if nothing is or it cannot be told."""
        side = self._side
        side.enter(key)
        expected = side.expect(key)
        side.record(key, tensor)
        judgment = None if expected is None else make_judgment(tensor, expected, layout)
        if judgment is None or judgment.passed or judgment.relative_l2 <= BLAME_FLOOR:
            return None
        assert expected is not None
        return self._reason(key, tensor, expected, layout, judgment)

    def _reason(
        self, key: StageKey, tensor: Floats, expected: Expectation, layout: Layout,
        judgment: Judgment,
    ) -> str:  # fmt: skip
        # The catalogue's alternatives of attention are written for a full pass.
        config = self._config
        keys = (key, *input_keys(key, config.num_layers, config.features))
        if self._has_past and any(("S",) in split_axes(BY_NAME[k.stage].shape) for k in keys):
            return f"kernel: {judgment.describe()}"
        cause = explain(self._side, key, tensor, expected, layout, in_file=False).clause()
        return f"kernel: {cause}; {judgment.describe()}"
