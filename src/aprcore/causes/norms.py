"""What goes wrong with RMSNorm: before attention and the network, and per head on q and k."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from aprcore.causes.scene import NORMS, REFERENCE, ROTATED, Entry, Float64, Scene, Trial, stages
from aprcore.causes.solving import round_number
from aprcore.network.weights import Weight, read_all

NORMED = NORMS | ROTATED
# The eps of published models; others are solved for.
USUAL_EPS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

_NORM_WEIGHTS = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "final_norm": "model.norm.weight",
    "q_post_rope": "self_attn.q_norm.weight",
    "k_post_rope": "self_attn.k_norm.weight",
}


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm's input in groups [T, N, size], its gain [size] and what comes after it."""

    scene: Scene
    x: Float64
    gain: Float64

    def finish(self, y: Float64) -> Float64:
        """The stage's output from the normalised groups: rotated, for q and k."""
        flat = y.reshape(self.x.shape[0], -1)
        if self.scene.key.stage not in ROTATED:
            return flat
        return REFERENCE.rope(flat, self.scene.positions, self.scene.config.rope)

    @property
    def mean_square(self) -> Float64:
        """[T, N, 1]."""
        return np.square(self.x).mean(axis=2, keepdims=True)

    @property
    def eps(self) -> float:
        """As configured."""
        return self.scene.config.rms_norm_eps

    @property
    def normed(self) -> Float64:
        """Without the gain."""
        return self.x / np.sqrt(self.mean_square + self.eps)


def _norm_of(scene: Scene) -> _Norm | None:
    weight = scene.site.find(_NORM_WEIGHTS[scene.key.stage])
    if weight is None:
        return None
    x = scene.inputs[0]
    if scene.key.stage in ROTATED:
        x = REFERENCE.columns(x, *scene.config.qkv_columns(scene.key.stage[0]))
    gain = _gain(weight)
    return _Norm(scene, x.reshape(x.shape[0], -1, gain.size), gain)


def _gain(weight: Weight) -> Float64:
    return read_all(weight).astype(np.float64)


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
    if norm.scene.key.stage in ROTATED:
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


def _gain_plus(norm: _Norm) -> Iterator[Trial]:
    yield "+ 1", (1 + norm.gain) * norm.normed
    if norm.scene.in_file:
        yield "- 1", (norm.gain - 1) * norm.normed


def _gain_twice(norm: _Norm) -> Iterator[Trial]:
    yield "", np.square(norm.gain) * norm.normed


def _other_gains(norm: _Norm) -> Iterator[Trial]:
    """The weight of another norm of the model, this layer's first."""
    own = norm.scene.site.find(_NORM_WEIGHTS[norm.scene.key.stage])
    assert own is not None
    norms = ((n, w) for n, w in norm.scene.site.weights.items() if n.endswith("norm.weight"))
    names = [name for name, weight in norms if weight.shape == own.shape and name != own.name]
    layer = f"model.layers.{norm.scene.key.layer}."
    for name in sorted(names, key=lambda n: not n.startswith(layer)):
        yield (
            name.removeprefix("model.").removesuffix(".weight"),
            _gain(norm.scene.site.weights[name]) * norm.normed,
        )


def _layer_norm(norm: _Norm) -> Iterator[Trial]:
    centred = norm.x - norm.x.mean(axis=2, keepdims=True)
    variance = np.square(centred).mean(axis=2, keepdims=True)
    yield "", norm.gain * centred / np.sqrt(variance + norm.eps)
    yield (
        "",
        norm.gain
        * (norm.x - norm.x.mean(axis=2, keepdims=True))
        / np.sqrt(norm.mean_square + norm.eps),
    )


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
        yield name, norm.gain * norm.x / np.sqrt(mean + norm.eps)
    for start, name in ((0, "first"), (size // 2, "second")):
        half = squares[:, :, start : start + size // 2].mean(axis=2, keepdims=True)
        yield f"over the {name} half", norm.gain * norm.x / np.sqrt(half + norm.eps)
    for tile in (32, 64, 128, 256, 1024):
        kept = size - size % tile
        if 0 < kept < size:
            part = squares[:, :, :kept].sum(axis=2, keepdims=True) / size
            yield (
                f"without the last {size - kept} values",
                norm.gain * norm.x / np.sqrt(part + norm.eps),
            )


def _no_root(norm: _Norm) -> Iterator[Trial]:
    yield (
        "divided by the mean square, without its root",
        norm.gain * norm.x / (norm.mean_square + norm.eps),
    )
    yield "multiplied by the root", norm.gain * norm.x * np.sqrt(norm.mean_square + norm.eps)


def _no_division(norm: _Norm) -> Iterator[Trial]:
    yield "", norm.gain * norm.x


def _not_at_all(norm: _Norm) -> Iterator[Trial]:
    yield "", norm.x


def _after_rotation(scene: Scene) -> Iterator[Trial]:
    norm = _norm_of(scene)
    if norm is None:
        return
    rotated = REFERENCE.rope(
        norm.x.reshape(norm.x.shape[0], -1), scene.positions, scene.config.rope
    ).reshape(norm.x.shape)
    mean = np.square(rotated).mean(axis=2, keepdims=True)
    yield "", (norm.gain * rotated / np.sqrt(mean + norm.eps)).reshape(norm.x.shape[0], -1)


def _whole_row(norm: _Norm) -> Iterator[Trial]:
    mean = np.square(norm.x).mean(axis=(1, 2), keepdims=True)
    yield "", norm.gain * norm.x / np.sqrt(mean + norm.eps)


def _solved_gain(scene: Scene) -> Iterator[Trial]:
    """One factor per dimension, from the observed output: another weight than this file's."""
    norm = _norm_of(scene)
    if norm is None:
        return
    observed = scene.observed.reshape(scene.plain.value.shape)
    if scene.key.stage in ROTATED:  # turn back, to what the rotation was given
        rope = scene.config.rope
        observed = REFERENCE.rope(observed, -scene.positions, rope) / rope.attention_factor() ** 2
    values = norm.normed.reshape(-1, norm.gain.size)
    if values.shape[0] < 3:
        return
    energy = np.square(values).sum(axis=0)
    along = (observed.reshape(values.shape) * values).sum(axis=0)
    gain = along / np.where(energy > 0, energy, 1.0)
    state = "all ones" if bool((norm.gain == 1).all()) else "another"
    yield state, norm.finish(gain * norm.normed)


def _row(name: str, outputs: Callable[[_Norm], Iterator[Trial]], advice: str,
         in_file: str | None = None, file_advice: str = "", *,
         is_fallback: bool = False, in_engine: bool = True) -> Entry:  # fmt: skip
    return Entry(name, NORMED, _norm(outputs), advice, in_file, file_advice, is_fallback, in_engine)


_ORIGINAL = " in the original model"

ENTRIES = (
    _row("norm eps {}", _other_eps, "which eps the kernel adds: rms_norm_eps of the model",
         "norm eps {}" + _ORIGINAL, "rms_norm_eps of this file against the original config"),
    _row("norm eps {}", _solved_eps, "which eps the kernel adds: rms_norm_eps of the model",
         "norm eps {}" + _ORIGINAL, "rms_norm_eps of this file against the original config",
         is_fallback=True),
    _row("norm eps outside the root", _eps_outside, "eps belongs inside: sqrt(mean(x²) + eps)"),
    _row("norm weight missing", _no_gain, "the multiplication by the norm's weight",
         "no norm weight" + _ORIGINAL, "whether this norm's weight belongs to this model"),
    _row("norm weight {}", _gain_plus, "1 is added to the weight, as Gemma's norms do",
         "norm weight {}" + _ORIGINAL,
         "the converter added 1 to the norm's weight, or left it out (Gemma's convention)"),
    _row("norm weight applied twice", _gain_twice, "the weight is multiplied in twice, for "
         "instance once folded into the next projection"),
    _row("norm weight of {}", _other_gains, "which norm's weight is bound here",
         "norm weight stored as {}", "the mapping of norm names in the conversion"),
    _row("LayerNorm for RMSNorm", _layer_norm, "the mean is subtracted; RMSNorm does not",
         "LayerNorm" + _ORIGINAL, "the architecture this file declares"),
    Entry("norm with the mean square {}", NORMED, _norm(_wrong_mean),
          "the axis and length of the mean square", is_causal=False),
    _row("norm {}", _no_root, "x / sqrt(mean(x²) + eps)"),
    _row("norm without the division", _no_division, "the division by the root mean square"),
    _row("norm missing", _not_at_all, "the norm is skipped, or its input is passed on",
         "no norm here" + _ORIGINAL, "the architecture this file declares"),
    Entry("q/k norm after RoPE", ROTATED, _after_rotation,
          "the norm of q and k comes before the rotation"),
    Entry("q/k norm over all heads together", ROTATED, _norm(_whole_row),
          "the norm of q and k is per head", "q/k norm over all heads together" + _ORIGINAL,
          "the architecture this file declares"),
    Entry("norm weight {}", NORMED, _solved_gain, "",
         "norm weight is {} in this file and not the original's",
         "the norm's weight was lost or replaced in the conversion",
         is_fallback=True, in_engine=False),
)  # fmt: skip
assert set(_NORM_WEIGHTS) == stages(*_NORM_WEIGHTS)
