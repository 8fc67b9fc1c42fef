"""What goes wrong where a block's output is added to the stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprcore.causes.scene import REFERENCE, RESIDUALS, Entry, Float64, Scene, Trial
from aprcore.causes.solving import round_number

# Norm stages in front of the block whose output is added.
_NORM_BEFORE = {"post_attn_residual": "attn_norm", "post_ffn_residual": "ffn_norm"}


def _missing(scene: Scene) -> Iterator[Trial]:
    x, y = scene.inputs
    yield "residual missing (the block's output alone)", y
    yield "block's output missing (the residual alone)", x


def _weights(scene: Scene) -> Iterator[Trial]:
    x, y = scene.inputs
    yield "residual added twice", 2 * x + y
    yield "block's output added twice", x + 2 * y
    yield "sum doubled", 2 * (x + y)
    yield "sum halved", (x + y) / 2
    yield "block's output subtracted", x - y
    yield "residual subtracted", y - x
    yield "residual multiplied instead of added", x * y
    yield "block's output scaled by 1/sqrt(2)", x + y / 2**0.5
    yield "sum scaled by 1/sqrt(2)", (x + y) / 2**0.5


def _other_streams(scene: Scene) -> Iterator[Trial]:
    """Another tensor of this layer in place of the stream."""
    y = scene.inputs[1]
    norm = _NORM_BEFORE[scene.key.stage]
    for name in ("attn_norm", "attn_out", "post_attn_residual", "ffn_norm", "ffn_out"):
        x = scene.tensor(name)
        if x is not None and x.shape == y.shape and name != scene.key.stage:
            what = "the normalised stream" if name == norm else f"{name}"
            yield f"{what} instead of the stream", x + y
    for name, x in _outside(scene):
        if x.shape == y.shape:
            yield f"{name} instead of the stream", x + y


def _outside(scene: Scene) -> Iterator[tuple[str, Float64]]:
    """The layer's input, and the embedding."""
    assert scene.key.layer is not None
    first = scene.tensor("embedding", 0)
    if scene.key.stage == "post_ffn_residual":
        before = first if scene.key.layer == 0 else scene.tensor(
            "post_ffn_residual", scene.key.layer - 1
        )  # fmt: skip
        if before is not None:
            yield "the layer's input", before
    if first is not None and scene.key.layer > 0:
        yield "the embedding", first


def _other_blocks(scene: Scene) -> Iterator[Trial]:
    """Another tensor in place of the block's output."""
    x = scene.inputs[0]
    for name in ("attention", "attn_norm", "attn_out", "ffn_norm", "ffn_out"):
        y = scene.tensor(name)
        if y is not None and y.shape == x.shape:
            yield name, x + y


def _normed(scene: Scene) -> Iterator[Trial]:
    """A norm between the block and the sum, as some models have."""
    x, y = scene.inputs
    eps = scene.config.rms_norm_eps
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    for name in names:
        weight = scene.site.find(name)
        if weight is not None:
            yield name.removesuffix(".weight"), x + REFERENCE.rms_norm(y, weight, eps)
            yield name.removesuffix(".weight"), REFERENCE.rms_norm(x, weight, eps) + y


def _moved(scene: Scene) -> Iterator[Trial]:
    x, y = scene.inputs
    if scene.num_tokens > 1:
        for name, step in (("earlier", 1), ("later", -1)):
            yield f"residual one token {name}", np.roll(x, step, axis=0) + y
            yield f"block's output one token {name}", x + np.roll(y, step, axis=0)


def _factors(scene: Scene) -> Iterator[Trial]:
    """Multipliers of the two addends, solved for together."""
    x, y = (value.reshape(-1) for value in scene.inputs)
    if x.size < 8:
        return
    columns = np.stack([x, y], axis=1)
    solved, *_ = np.linalg.lstsq(columns, scene.observed.reshape(-1), rcond=None)
    a, b = (round_number(float(c), 1e-3) if abs(c) > 1e-3 else 0.0 for c in solved)
    yield f"{a:g}·residual + {b:g}·block", (a * x + b * y).reshape(scene.plain.value.shape)


ENTRIES = (
    Entry("{}", RESIDUALS, _missing, "the sum of the stream and the block's output",
          "{} in the original model", "the architecture this file declares"),
    Entry("{}", RESIDUALS, _weights, "the sum of the stream and the block's output, once each"),
    Entry("{}", RESIDUALS, _other_streams, "which buffer the residual is taken from: the stream "
          "as it was before the norm", "{} in the original model",
          "the architecture this file declares"),
    Entry("{} added instead of the block's output", RESIDUALS, _other_blocks,
          "which buffer is added to the stream"),
    Entry("{} before the sum", RESIDUALS, _normed, "the norm belongs before the block",
          "{} before the sum in the original model", "the architecture this file declares"),
    Entry("{}", RESIDUALS, _moved, "the token index of the two addends", is_causal=False),
    Entry("sum is {}", RESIDUALS, _factors, "a multiplier on an addend",
          "sum is {} in the original model", "a residual multiplier that was lost",
          is_fallback=True),
)  # fmt: skip
