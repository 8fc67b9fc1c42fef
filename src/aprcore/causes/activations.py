"""What goes wrong between the gate and the down projection."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from aprcore.causes.scene import REFERENCE, Entry, Float64, Scene, Trial, single, stages
from aprcore.network.config import ACTIVATIONS

ACTIVATION, PRODUCT = stages("ffn_silu"), stages("ffn_swigl")


def _sigmoid(x: Float64) -> Float64:
    power = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, power) / (1 + power)


def _kinds(scene: Scene) -> Iterator[Trial]:
    x = scene.inputs[0]
    for kind in ACTIVATIONS:
        if kind != scene.config.hidden_act:
            yield kind, REFERENCE.activation(x, kind)
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
    x, kind = scene.inputs[0], scene.config.hidden_act
    yield "not applied", x
    yield "applied twice", REFERENCE.activation(scene.plain.value, kind)
    yield "of -x", REFERENCE.activation(-x, kind)
    yield "with the sign of its exponent wrong", x * _sigmoid(-x)
    yield "of x/2", REFERENCE.activation(x / 2, kind)
    yield "with exp to base 2", x * _sigmoid(x * math.log(2))
    yield "clamped to 6", np.clip(scene.plain.value, -6, 6)


def _on_up(scene: Scene) -> Float64 | None:
    up = scene.tensor("ffn_up")
    return None if up is None else REFERENCE.activation(up, scene.config.hidden_act)


def _up_activated(scene: Scene) -> Float64 | None:
    gate = scene.tensor("ffn_gate")
    if gate is None:
        return None
    return gate * REFERENCE.activation(scene.inputs[1], scene.config.hidden_act)


def _products(scene: Scene) -> Iterator[Trial]:
    silu, up = scene.inputs
    kind = scene.config.hidden_act
    gate = scene.tensor("ffn_gate")
    yield "act(gate) alone", silu
    yield "up alone", up
    yield "act(gate) + up", silu + up
    yield "act(gate)²", np.square(silu)
    yield "up²", np.square(up)
    yield "act(gate)·act(up)", silu * REFERENCE.activation(up, kind)
    yield "act(act(gate))·up", REFERENCE.activation(silu, kind) * up
    yield "act(act(gate)·up)", REFERENCE.activation(silu * up, kind)
    if gate is not None:
        yield "gate·up, without the activation", gate * up
        yield "act(gate·up)", REFERENCE.activation(gate * up, kind)
        yield "act(gate)·gate, without up", silu * gate
        for other in ACTIVATIONS:
            if other != kind:
                yield f"{other}(gate)·up", REFERENCE.activation(gate, other) * up


def _up_moved(scene: Scene) -> Iterator[Trial]:
    silu, up = scene.inputs
    if scene.num_tokens > 1:
        yield "one token earlier", silu * np.roll(up, 1, axis=0)
        yield "one token later", silu * np.roll(up, -1, axis=0)
        yield "of the last token", silu * up[-1:]
        yield "of the first token", silu * up[:1]
    yield "one dimension earlier", silu * np.roll(up, 1, axis=1)
    yield "one dimension later", silu * np.roll(up, -1, axis=1)
    yield "with its halves exchanged", silu * np.roll(up, up.shape[1] // 2, axis=1)


ENTRIES = (
    Entry("{} as the activation", ACTIVATION, _kinds, "which activation function runs here",
          "{} as the activation in the original model", "hidden_act of this file"),
    Entry("activation {}", ACTIVATION, _slips, "the formula of the activation: x / (1 + exp(-x))"),
    Entry("activation of up instead of gate", ACTIVATION, single(_on_up),
          "which of gate and up goes through the activation",
          "activation of up instead of gate in the original model",
          "gate and up exchanged in the conversion"),
    Entry("activation of up instead of gate", PRODUCT, single(_up_activated),
          "which of gate and up goes through the activation",
          "activation of up instead of gate in the original model",
          "gate and up exchanged in the conversion"),
    Entry("product is {}", PRODUCT, _products, "the product act(gate)·up"),
    Entry("product with up {}", PRODUCT, _up_moved, "the index into up", is_causal=False),
)  # fmt: skip
