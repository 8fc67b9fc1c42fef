"""What goes wrong where a block's output is added to the stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial, single
from aprcore.causes.solving import off_by_a_token, round_number
from aprcore.network.operations import Add, Norm

RESIDUALS = (Add,)


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
    y, graph = scene.inputs[1], scene.graph
    norms = [key for key in graph.readers(scene.source(0))
             if isinstance(graph.operation(key), Norm)]  # fmt: skip
    found = [("the normalised stream" if key in norms else key.stage, x)
             for key, x in scene.around()]  # fmt: skip
    for what, key in (("the layer's input", graph.stream(scene.key.layer)),
                      ("the embedding", graph.embedding)):  # fmt: skip
        outside = scene.tensor(key)
        if outside is not None:
            found.append((what, outside))
    for what, x in found:
        if x.shape == y.shape:
            yield f"{what} instead of the stream", x + y


def _other_blocks(scene: Scene) -> Iterator[Trial]:
    """Another tensor in place of the block's output."""
    x = scene.inputs[0]
    before_norm = scene.source(1, 0) if _post_norm(scene) else None  # has a row of its own
    for key, y in scene.around():
        if y.shape == x.shape and key != before_norm:
            yield key.stage, x + y


def _post_norm(scene: Scene) -> Norm | None:
    """The norm between the block and the sum, if the model has one."""
    found = scene.graph.operation(scene.source(1))
    return found if isinstance(found, Norm) else None


def _post_norm_missing(scene: Scene) -> Float64 | None:
    bare = scene.tensor(scene.source(1, 0)) if _post_norm(scene) else None
    return None if bare is None else scene.inputs[0] + bare


def _post_norm_twice(scene: Scene) -> Float64 | None:
    norm = _post_norm(scene)
    x, y = scene.inputs
    return None if norm is None else x + norm(REFERENCE, scene.site, y)


def _normed(scene: Scene) -> Iterator[Trial]:
    """A norm between the block and the sum, as some models have."""
    x, y = scene.inputs
    for key in scene.graph.of_kind(scene.key.layer, Norm):
        norm = scene.graph.operation(key)
        assert isinstance(norm, Norm)
        name = norm.weight.removesuffix(".weight")
        if norm != _post_norm(scene):
            yield name, x + norm(REFERENCE, scene.site, y)
        yield name, norm(REFERENCE, scene.site, x) + y


def _moved(scene: Scene) -> Iterator[Trial]:
    x, y = scene.inputs
    for name, moved in off_by_a_token(x):
        yield f"residual one token {name}", moved + y
    for name, moved in off_by_a_token(y):
        yield f"block's output one token {name}", x + moved


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
    Entry("{}", RESIDUALS, _missing, "the sum of the stream and the block's output", ORIGINAL,
          "the architecture this file declares"),
    Entry("{}", RESIDUALS, _weights, "the sum of the stream and the block's output, once each"),
    Entry("{}", RESIDUALS, _other_streams, "which buffer the residual is taken from: the stream "
          "as it was before the norm", ORIGINAL, "the architecture this file declares"),
    Entry("{} added instead of the block's output", RESIDUALS, _other_blocks,
          "which buffer is added to the stream"),
    Entry("post-norm missing: the block's output is added before its norm", RESIDUALS,
          single(_post_norm_missing), "the norm between the block and the sum",
          "no norm between the block and the sum in the original model",
          "the architecture this file declares"),
    Entry("post-norm applied twice", RESIDUALS, single(_post_norm_twice),
          "the norm between the block and the sum"),
    Entry("{} before the sum", RESIDUALS, _normed,
          "which norms come before the block, and which before the sum", ORIGINAL,
          "the architecture this file declares"),
    Entry("{}", RESIDUALS, _moved, "the token index of the two addends", is_causal=False),
    Entry("sum is {}", RESIDUALS, _factors, "a multiplier on an addend", ORIGINAL,
          "a residual multiplier that was lost", is_fallback=True),
)  # fmt: skip
