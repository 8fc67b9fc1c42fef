"""What goes wrong with RMSNorm: before attention and the network, and per head on q and k."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from aprcore.causes.caches import other_layers
from aprcore.causes.projections import order_note
from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial
from aprcore.causes.solving import round_number
from aprcore.network.operations import Norm, Rotate
from aprcore.network.weights import Weight, read_all

ROTATED = (Rotate,)
NORMED = (Norm, Rotate)
# The eps of published models; others are solved for.
USUAL_EPS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm's input in groups [T, N, size], what it multiplies by [size], and where it is."""

    scene: Scene
    weight: Weight
    x: Float64
    gain: Float64

    def finish(self, y: Float64) -> Float64:
        """The stage's output from the normalised groups: rotated, for q and k."""
        flat = y.reshape(self.x.shape[0], -1)
        if not self.is_rotated:
            return flat
        return self.scene.backend.rope(flat, self.scene.positions, self.scene.config.rope)

    @property
    def is_rotated(self) -> bool:
        """Whether a rotation follows."""
        return isinstance(self.scene.operation, Rotate)

    @property
    def mean_square(self) -> Float64:
        """[T, N, 1]."""
        return np.square(self.x).mean(axis=2, keepdims=True)

    @property
    def eps(self) -> float:
        """As the model states it."""
        return float(self.scene.operation.eps)

    @property
    def offset(self) -> float:
        """What the model adds to the weight."""
        return float(self.scene.operation.offset)

    @property
    def normed(self) -> Float64:
        """Without the gain."""
        return self.x / np.sqrt(self.mean_square + self.eps)

    def over(self, mean_square: Float64) -> Float64:
        """Normalised by another mean square."""
        return self.gain * self.x / np.sqrt(mean_square + self.eps)


def _norm_of(scene: Scene) -> _Norm | None:
    own: Norm | Rotate = scene.operation
    weight = scene.site.find(own.norm if isinstance(own, Rotate) else own.weight)
    if weight is None:
        return None
    x = scene.inputs[0]
    if isinstance(own, Rotate):
        x = REFERENCE.columns(x, *scene.config.qkv_columns(own.part))
    gain = own.offset + read_all(weight).astype(np.float64)
    return _Norm(scene, weight, x.reshape(x.shape[0], -1, gain.size), gain)


def _norm(outputs: Callable[[_Norm], Iterator[Trial]]) -> Callable[[Scene], Iterator[Trial]]:
    """Variants of a norm, finished; none where the model has no such norm."""

    def run(scene: Scene) -> Iterator[Trial]:
        norm = _norm_of(scene)
        if norm is not None:
            for name, y in outputs(norm):
                yield name, norm.finish(y)

    return run


def _other_eps(norm: _Norm) -> Iterator[Trial]:
    scaled = norm.gain * norm.x
    for eps in USUAL_EPS:
        if eps != norm.eps and (eps > 0 or (norm.mean_square > 0).all()):
            yield f"{eps:g}", scaled / np.sqrt(norm.mean_square + eps)


def _solved_eps(norm: _Norm) -> Iterator[Trial]:
    """eps from the factor that each token was multiplied by."""
    if norm.is_rotated:
        return
    scaled = norm.gain * norm.x
    energy = np.square(scaled).sum(axis=2, keepdims=True)
    factor = (norm.scene.observed.reshape(scaled.shape) * scaled).sum(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        eps = np.square(energy / factor) - norm.mean_square
    if np.isfinite(eps).all() and float(np.median(eps)) > 0:
        value = round_number(float(np.median(eps)), 1e-2)
        yield f"{value:g}", scaled / np.sqrt(norm.mean_square + value)


def _eps_outside(norm: _Norm) -> Iterator[Trial]:
    yield "", norm.gain * norm.x / (np.sqrt(norm.mean_square) + norm.eps)


def _no_gain(norm: _Norm) -> Iterator[Trial]:
    yield "", norm.normed


def _other_offset(norm: _Norm) -> Iterator[Trial]:
    """The weight with 1 added, or without the 1 that belongs to it."""
    more, less, in_file = norm.gain + 1, norm.gain - 1, norm.scene.in_file
    if not norm.offset:
        yield "+ 1" if in_file else "+ 1 (by 1 + w in place of w)", more * norm.normed
        if in_file:
            yield "- 1", less * norm.normed
    elif not in_file:
        yield "without its 1 (by w in place of 1 + w)", less * norm.normed
        yield "+ 1 once more (by 1 + (1 + w))", more * norm.normed


def _stored_offset(norm: _Norm) -> Iterator[Trial]:
    """A file that holds 1 + w where readers add the 1, or w where they take it off."""
    if norm.offset:
        yield "1 + w (readers add 1 once more)", (norm.gain - 1) * norm.normed
        yield "w (readers take 1 off)", (norm.gain + 1) * norm.normed


def _gain_twice(norm: _Norm) -> Iterator[Trial]:
    yield "", np.square(norm.gain) * norm.normed


def _applied_twice(norm: _Norm) -> Iterator[Trial]:
    once = norm.gain * norm.normed
    mean = np.square(once).mean(axis=2, keepdims=True)
    yield "", norm.gain * once / np.sqrt(mean + norm.eps)


def _of_others(scene: Scene) -> Iterator[Trial]:
    """The norm of another tensor: of the layer's input, as in a parallel block, or another's."""
    graph, layer = scene.graph, scene.key.layer
    own, x = scene.source(0), scene.inputs[0]
    stream = graph.stream(layer)
    found = []
    if layer is not None and own != stream:
        found.append(("the layer's input (a parallel block)", stream))
        rows = [row.key for row in graph.layer(layer).values()]
        found += [(key.stage, key) for key in rows if key not in (scene.key, own)]
    else:
        found += [(f"what layer {n} gives", key) for n, key in other_layers(scene, own)]
        found.append(("the embedding", graph.embedding))
    for name, key in found:
        tensor = scene.tensor(key) if key != own else None
        if tensor is not None and tensor.shape == x.shape:
            yield name, scene.run(tensor)


def _other_gains(norm: _Norm) -> Iterator[Trial]:
    """The weight of another norm of the model, this layer's first."""
    found = norm.scene.site.weights.items()
    names = [name for name, weight in found if name.endswith("norm.weight")
             and weight.shape == norm.weight.shape and name != norm.weight.name]  # fmt: skip
    layer = f"model.layers.{norm.scene.key.layer}."
    for name in sorted(names, key=lambda n: not n.startswith(layer)):
        gain = norm.offset + read_all(norm.scene.site.weights[name]).astype(np.float64)
        short = name.removeprefix("model.").removesuffix(".weight")
        yield short + order_note(norm.scene, name), gain * norm.normed


def _layer_norm(norm: _Norm) -> Iterator[Trial]:
    centred = norm.x - norm.x.mean(axis=2, keepdims=True)
    for variance in (np.square(centred).mean(axis=2, keepdims=True), norm.mean_square):
        yield "", norm.gain * centred / np.sqrt(variance + norm.eps)


def _wrong_mean(norm: _Norm) -> Iterator[Trial]:
    squares, size = np.square(norm.x), norm.x.shape[2]
    for name, mean in (
        ("over the wrong axis (over tokens)", squares.mean(axis=0, keepdims=True)),
        ("over the wrong axes (over the whole tensor)", squares.mean(keepdims=True)),
        ("of the first token", norm.mean_square[:1]),
        ("of the last token", norm.mean_square[-1:]),
        ("of the token before", np.roll(norm.mean_square, 1, axis=0)),
        ("taken as a sum", norm.mean_square * size),
        ("taken as the norm, without the square root's 1/sqrt(n)", norm.mean_square / size),
        ("divided by n - 1", norm.mean_square * size / max(1, size - 1)),
    ):
        yield name, norm.over(mean)
    for start, name in ((0, "first"), (size // 2, "second")):
        half = squares[:, :, start : start + size // 2].mean(axis=2, keepdims=True)
        yield f"over the {name} half", norm.over(half)
    for tile in (32, 64, 128, 256, 1024):
        kept = size - size % tile
        if 0 < kept < size:
            part = squares[:, :, :kept].sum(axis=2, keepdims=True) / size
            yield f"without the last {size - kept} values", norm.over(part)


def _no_root(norm: _Norm) -> Iterator[Trial]:
    scaled, mean = norm.gain * norm.x, norm.mean_square + norm.eps
    yield "divided by the mean square, without its root", scaled / mean
    yield "multiplied by the root", scaled * np.sqrt(mean)
    yield "without the division", scaled


def _not_at_all(norm: _Norm) -> Iterator[Trial]:
    yield "", norm.x


def _after_rotation(scene: Scene) -> Iterator[Trial]:
    norm = _norm_of(scene)
    if norm is None:
        return
    rotated = norm.finish(norm.x).reshape(norm.x.shape)
    mean = np.square(rotated).mean(axis=2, keepdims=True)
    yield "", (norm.gain * rotated / np.sqrt(mean + norm.eps)).reshape(norm.x.shape[0], -1)


def _whole_row(norm: _Norm) -> Iterator[Trial]:
    yield "", norm.over(np.square(norm.x).mean(axis=(1, 2), keepdims=True))


def _solved_gain(scene: Scene) -> Iterator[Trial]:
    """One factor per dimension, from the observed output: another weight than this file's."""
    norm = _norm_of(scene)
    if norm is None:
        return
    observed = scene.observed.reshape(scene.plain.value.shape)
    if norm.is_rotated:  # turn back, to what the rotation was given
        rope = scene.config.rope
        observed = (
            scene.backend.rope(observed, -scene.positions, rope) / rope.attention_factor() ** 2
        )
    values = norm.normed.reshape(-1, norm.gain.size)
    if values.shape[0] < 3:
        return
    energy = np.square(values).sum(axis=0)
    along = (observed.reshape(values.shape) * values).sum(axis=0)
    gain = along / np.where(energy > 0, energy, 1.0)
    state = "all ones" if bool((norm.gain - norm.offset == 1).all()) else "another"
    yield state, norm.finish(gain * norm.normed)


def _row(name: str, outputs: Callable[[_Norm], Iterator[Trial]], advice: str,
         in_file: str | None = None, file_advice: str = "", *,
         is_fallback: bool = False, in_engine: bool = True) -> Entry:  # fmt: skip
    return Entry(name, NORMED, _norm(outputs), advice, in_file, file_advice, is_fallback, in_engine)


ENTRIES = (
    _row("norm eps {}", _other_eps, "which eps the kernel adds: rms_norm_eps of the model",
         ORIGINAL, "rms_norm_eps of this file against the original config"),
    _row("norm eps {}", _solved_eps, "which eps the kernel adds: rms_norm_eps of the model",
         ORIGINAL, "rms_norm_eps of this file against the original config", is_fallback=True),
    _row("norm eps outside the root", _eps_outside, "eps belongs inside: sqrt(mean(x²) + eps)"),
    _row("norm weight missing", _no_gain, "the multiplication by the norm's weight",
         "no norm weight" + ORIGINAL, "whether this norm's weight belongs to this model"),
    _row("norm weight {}", _other_offset,
         "whether the norm multiplies by w or, as Gemma's do, by 1 + w", ORIGINAL,
         "the converter added 1 to the norm's weight, or left it out (Gemma's convention)"),
    _row("norms stored as {}", _stored_offset, "", "norms stored as {}",
         "the converter added 1 to the norm's weight, or took it off (Gemma's convention)",
         in_engine=False),
    _row("norm weight applied twice", _gain_twice, "the weight is multiplied in twice, for "
         "instance once folded into the next projection"),
    _row("norm applied twice", _applied_twice, "the norm runs in place and once more", ORIGINAL,
         "the architecture this file declares"),
    _row("norm weight of {}", _other_gains, "which norm's weight is bound here",
         "norm weight stored as {}", "the mapping of norm names in the conversion"),
    _row("LayerNorm for RMSNorm", _layer_norm, "the mean is subtracted; RMSNorm does not",
         "LayerNorm" + ORIGINAL, "the architecture this file declares"),
    Entry("norm of {}", (Norm,), _of_others,
          "which tensor the norm reads, and the order in which layers run", ORIGINAL,
          "the architecture this file declares", is_causal=False),
    Entry("norm with the mean square {}", NORMED, _norm(_wrong_mean),
          "the axis and length of the mean square", is_causal=False),
    _row("norm {}", _no_root, "x / sqrt(mean(x²) + eps)"),
    _row("norm missing", _not_at_all, "the norm is skipped, or its input is passed on",
         "no norm here" + ORIGINAL, "the architecture this file declares"),
    Entry("q/k norm after RoPE", ROTATED, _after_rotation,
          "the norm of q and k comes before the rotation"),
    Entry("q/k norm over all heads together", ROTATED, _norm(_whole_row),
          "the norm of q and k is per head", ORIGINAL, "the architecture this file declares"),
    Entry("norm weight {}", NORMED, _solved_gain, "",
          "norm weight is {} in this file and not the original's",
          "the norm's weight was lost or replaced in the conversion", is_fallback=True,
          in_engine=False),
)  # fmt: skip
