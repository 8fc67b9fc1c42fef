"""What goes wrong with q, k and v as a whole: their biases, and the order of the three."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np

from aprcore.causes.scene import ORIGINAL, Entry, Float64, Scene, Trial
from aprcore.causes.solving import to_halves, to_pairs
from aprcore.judging.layouts import interleavings, is_joined
from aprcore.network.operations import PARTS, AddBias, K, Linear, Q, V
from aprcore.network.weights import read_all

BIAS = (AddBias,)
_MODULES = dict(zip(PARTS, (Q, K, V)))


def _biases(scene: Scene, layer: int | None) -> dict[str, Float64]:
    """The biases of q, k and v in a layer."""
    names = {p: f"model.layers.{layer}.{module.bias}" for p, module in _MODULES.items()}
    found = {part: scene.site.weights.get(name) for part, name in names.items()}
    return {part: read_all(weight).astype(np.float64)
            for part, weight in found.items() if weight is not None}  # fmt: skip


def _own(scene: Scene) -> dict[str, Float64]:
    return _biases(scene, scene.key.layer)


_SUBSETS = ("qkv", "q", "k", "v", "qk", "kv", "qv")


def _spelled(parts: str) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts


def _changed(scene: Scene, change: dict[str, Float64]) -> Float64:
    """The stage with these biases instead of its own."""
    own = _own(scene)
    return scene.inputs[0] + np.concatenate([change.get(part, own[part]) for part in "qkv"])


def _missing(scene: Scene) -> Iterator[Trial]:
    for parts in _SUBSETS:
        yield _spelled(parts), _changed(scene, {p: 0 * b for p, b in _own(scene).items()
                                                if p in parts})  # fmt: skip


def _multiplied(scene: Scene) -> Iterator[Trial]:
    own = _own(scene)
    factors = [("doubled", 2.0), ("subtracted", -1.0)]
    if scene.in_file:
        factors += [("halved", 0.5)]
    for parts in _SUBSETS:
        for name, factor in factors:
            changed = {p: factor * own[p] for p in parts}
            yield f"of {_spelled(parts)} {name}", _changed(scene, changed)


def _other_layers(scene: Scene) -> Iterator[Trial]:
    for layer in range(scene.config.num_layers):
        others = _biases(scene, layer) if layer != scene.key.layer else {}
        for parts in _SUBSETS if others else ():
            changed = {p: others[p] for p in parts if p in others}
            yield f"of {_spelled(parts)} of layer {layer}", _changed(scene, changed)


def _reordered(scene: Scene) -> Iterator[Trial]:
    own, dim = _own(scene), scene.config.head_dim
    if own["k"].size == own["v"].size:
        yield "of k and v exchanged", _changed(scene, {"k": own["v"], "v": own["k"]})
    for order in permutations("qkv"):
        if "".join(order) != "qkv":
            joined = np.concatenate([own[p] for p in order])
            yield f"in the order {', '.join(order)}", scene.inputs[0] + joined
    for parts in ("qk", "q", "k"):
        for name, moved in (("halves to pairs", to_pairs), ("pairs to halves", to_halves)):
            changed = {p: moved(own[p], dim) for p in parts}
            yield f"of {_spelled(parts)} permuted from {name}", _changed(scene, changed)
    for name, step in (("late", 1), ("early", -1)):
        joined = np.concatenate([own[p] for p in "qkv"])
        yield f"one index {name}", scene.inputs[0] + np.roll(joined, step)
        yield f"one head {name}", scene.inputs[0] + np.roll(joined, step * dim)
    first = {p: np.tile(own[p][:dim], own[p].size // dim) for p in "qkv"}
    yield "of the first head for all heads", _changed(scene, first)


def _lost(scene: Scene) -> Iterator[Trial]:
    """The oracle adds the same to every token: other biases than this file's."""
    if scene.num_tokens < 3:
        return
    observed = scene.observed.reshape(scene.plain.value.shape)
    addend = (observed - scene.inputs[0]).mean(axis=0)
    own, wrong, zero = _own(scene), "", True
    for part in "qkv":
        columns = slice(*scene.config.qkv_columns(part))
        if scene.wrong[:, columns].any():
            wrong, zero = wrong + part, zero and not own[part].any()
    if wrong:
        changed = {p: addend[slice(*scene.config.qkv_columns(p))] for p in wrong}
        state = "zeros" if zero else "other values"
        yield f"{_spelled(wrong)} lost: this file has {state}", _changed(scene, changed)


def _orders(scene: Scene) -> Iterator[Trial]:
    """The three blocks of columns in another order."""
    if not is_joined(scene.operation):
        return
    plain, config = scene.plain.value, scene.config
    blocks = {part: plain[:, slice(*config.qkv_columns(part))] for part in "qkv"}
    for order in permutations("qkv"):
        if "".join(order) != "qkv":
            joined = np.concatenate([blocks[part] for part in order], axis=1)
            yield ", ".join(order), joined
    for name, index in interleavings(config.num_heads, config.num_kv_heads, config.head_dim):
        yield name, plain[:, index]
        yield f"{name}, undone once more", plain[:, np.argsort(index)]


_ADDITION = "the addition of the biases"

ENTRIES = (
    Entry("bias of {} missing", BIAS, _missing, _ADDITION, "no bias of {}" + ORIGINAL,
          "whether these biases belong to this model"),
    Entry("bias {}", BIAS, _multiplied, _ADDITION, ORIGINAL, "the biases in the conversion"),
    Entry("bias {}", BIAS, _other_layers, "the offset of this layer's biases",
          "bias stored as that {}", "the layer numbers in the conversion"),
    Entry("bias {}", BIAS, _reordered, "the order of the biases: q, k, v, heads as the weights'",
          "bias stored {}", "the order of the biases in the conversion"),
    Entry("bias lost", BIAS, _lost, "", "bias of {}", "the biases in the conversion",
          is_fallback=True, in_engine=False),
    Entry("q, k and v in the order {}", (Linear, AddBias), _orders,
          "the order of the fused q, k and v", "q, k and v stored in the order {}",
          "the split of the fused q, k and v"),
)  # fmt: skip
