"""What goes wrong between the gate and the down projection."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial, single
from aprcore.causes.solving import off_by_a_token
from aprcore.network.config import ACTIVATIONS
from aprcore.network.operations import Activate, Multiply

ACTIVATION, PRODUCT = (Activate,), (Multiply,)


def _sigmoid(x: Float64) -> Float64:
    power = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, power) / (1 + power)


def _other_kinds(own: str, x: Float64) -> Iterator[Trial]:
    """The other activations of published models, with their names."""
    for kind in ACTIVATIONS:
        if kind != own:
            yield kind, REFERENCE.activation(x, kind)


def _kinds(scene: Scene) -> Iterator[Trial]:
    x = scene.inputs[0]
    yield from _other_kinds(scene.operation.kind, x)
    yield "quick gelu", x * _sigmoid(1.702 * x)
    yield "sigmoid", _sigmoid(x)
    yield "tanh", np.tanh(x)
    yield "relu squared", np.square(np.maximum(x, 0))
    yield "softplus", np.logaddexp(0, x)
    yield "hard silu", x * np.clip(x / 6 + 0.5, 0, 1)
    yield "mish", x * np.tanh(np.logaddexp(0, x))
    yield "leaky relu", np.where(x < 0, 0.01 * x, x)
    yield "elu", np.where(x < 0, np.expm1(np.minimum(x, 0)), x)


def _slips(scene: Scene) -> Iterator[Trial]:
    x = scene.inputs[0]
    yield "not applied", x
    yield "applied twice", scene.run(scene.plain.value)
    yield "of -x", scene.run(-x)
    yield "with the sign of its exponent wrong", x * _sigmoid(-x)
    yield "of x/2", scene.run(x / 2)
    yield "with exp to base 2", x * _sigmoid(x * math.log(2))
    yield "clamped to 6", np.clip(scene.plain.value, -6, 6)


def _on_up(scene: Scene) -> Iterator[Trial]:
    """The activation of what its output is multiplied by."""
    for product in scene.graph.readers(scene.key):
        for other in scene.graph.inputs(product):
            up = scene.tensor(other) if other != scene.key else None
            if up is not None and up.shape == scene.inputs[0].shape:
                yield "", scene.run(up)


def _gate(scene: Scene) -> Float64 | None:
    """What the activation whose output is the first factor is of."""
    is_activated = isinstance(scene.graph.operation(scene.source(0)), Activate)
    return scene.tensor(scene.source(0, 0)) if is_activated else None


def _up_activated(scene: Scene) -> Float64 | None:
    gate = _gate(scene)
    return None if gate is None else gate * REFERENCE.activation(
        scene.inputs[1], scene.config.hidden_act
    )  # fmt: skip


def _products(scene: Scene) -> Iterator[Trial]:
    silu, up = scene.inputs
    kind = scene.config.hidden_act
    yield "act(gate) alone", silu
    yield "up alone", up
    yield "act(gate) + up", silu + up
    yield "act(gate)²", np.square(silu)
    yield "up²", np.square(up)
    yield "act(gate)·act(up)", silu * REFERENCE.activation(up, kind)
    yield "act(act(gate))·up", REFERENCE.activation(silu, kind) * up
    yield "act(act(gate)·up)", REFERENCE.activation(silu * up, kind)
    gate = _gate(scene)
    if gate is not None:
        yield "gate·up, without the activation", gate * up
        yield "act(gate·up)", REFERENCE.activation(gate * up, kind)
        yield "act(gate)·gate, without up", silu * gate
        for other, value in _other_kinds(kind, gate):
            yield f"{other}(gate)·up", value * up


def _up_moved(scene: Scene) -> Iterator[Trial]:
    silu, up = scene.inputs
    for name, moved in off_by_a_token(up):
        yield f"one token {name}", silu * moved
    if scene.num_tokens > 1:
        yield "of the last token", silu * up[-1:]
        yield "of the first token", silu * up[:1]
    for name, moved in off_by_a_token(up.T):
        yield f"one dimension {name}", silu * moved.T
    yield "with its halves exchanged", silu * np.roll(up, up.shape[1] // 2, axis=1)


ENTRIES = (
    Entry("{} as the activation", ACTIVATION, _kinds, "which activation function runs here",
          ORIGINAL, "hidden_act of this file"),
    Entry("activation {}", ACTIVATION, _slips, "the formula of the activation: x / (1 + exp(-x))"),
    Entry("activation of up instead of gate", ACTIVATION, _on_up,
          "which of gate and up goes through the activation", ORIGINAL,
          "gate and up exchanged in the conversion"),
    Entry("activation of up instead of gate", PRODUCT, single(_up_activated),
          "which of gate and up goes through the activation", ORIGINAL,
          "gate and up exchanged in the conversion"),
    Entry("product is {}", PRODUCT, _products, "the product act(gate)·up"),
    Entry("product with up {}", PRODUCT, _up_moved, "the index into up", is_causal=False),
)  # fmt: skip
