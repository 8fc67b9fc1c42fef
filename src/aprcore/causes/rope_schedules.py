"""RoPE at other frequencies or positions, solved for: how far each pair of dimensions was turned.

A rotation keeps the length of a pair, so what came out over what went in is one complex number for
each token and pair: its angle is position times frequency, its length the factor on sine and
cosine. Whole families of schedules are held against these few numbers; only the nearest one is run.

Source: the fields of `rope_scaling` as in transformers' `modeling_rope_utils`; llama.cpp's options
of the same meaning (--rope-scale, --yarn-beta-fast, --yarn-orig-ctx).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial
from aprcore.causes.solving import minimise, round_number
from aprcore.network.operations import Rotate
from aprcore.network.rope import Rope, RopeScaling

Complex = NDArray[np.complex128]

ROTATED = (Rotate,)
USUAL_FACTORS = (2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 40.0, 64.0)
USUAL_LENGTHS = (16, 64, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
USUAL_BETAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0)
USUAL_LIMITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of llama3's wavelengths
# Solving reads this many tokens: the last ones turn the furthest.
SOLVED_TOKENS = 33
# Positions are shifted by this much at most.
LARGEST_SHIFT = 1 << 14
# And divided by this much at most.
LARGEST_DIVISOR = 128.0
# A schedule is run if it leaves at most this share of the energy; a simpler one that leaves up to
# this many times the least is taken for it.
MOST_LEFT = 0.05
FITS_AS_WELL = 1.5
# Attention factors that differ by less are one.
SAME_FACTOR = 1e-3


def before_rotation(scene: Scene) -> Float64:
    """What the stage rotates: its columns of q, k and v, normalised where the model does so."""
    own: Rotate = scene.operation
    columns = REFERENCE.columns(scene.inputs[0], *scene.config.qkv_columns(own.part))
    weight = scene.site.find(own.norm)
    return columns if weight is None else REFERENCE.rms_norm(columns, weight, own.eps, own.offset)


@dataclass(frozen=True, slots=True)
class _Turns:
    """What every pair was turned by.

    Attributes:
        positions: Of the tokens looked at, [T].
        ratio: Output over input of each pair, all heads together, [T, D/2].
        weight: The energy behind each, [T, D/2].
    """

    positions: Float64
    ratio: Complex
    weight: Float64

    @property
    def factor(self) -> float:
        """The factor on sine and cosine."""
        energy = float((self.weight * np.abs(self.ratio) ** 2).sum())
        return float(np.sqrt(energy / self.weight.sum()))

    def left(self, frequencies: Float64) -> float:
        """The share of the energy that other frequencies leave."""
        turned = self.factor * np.exp(1j * np.multiply.outer(self.positions, frequencies))
        energy = self.weight * np.abs(self.ratio) ** 2
        return float((self.weight * np.abs(self.ratio - turned) ** 2).sum() / energy.sum())


def _turns(scene: Scene, rows: slice = slice(-SOLVED_TOKENS, None)) -> _Turns | None:
    """The turns of some tokens; None where nothing is observed (inside a span) or nothing turns."""
    if not scene.is_observed or not scene.wrong.any():
        return None
    dim = scene.config.head_dim
    given, found = (
        _pairs(x.reshape(scene.plain.value.shape)[rows], dim)
        for x in (before_rotation(scene), scene.observed)
    )  # fmt: skip
    heads = scene.wrong.reshape(len(scene.positions), -1, dim).any(axis=(0, 2))
    given, found = given[:, heads], found[:, heads]
    weight = (np.abs(given) ** 2).sum(axis=1)
    if not (weight > 0).all():
        return None
    ratio = (found * given.conj()).sum(axis=1) / weight
    return _Turns(scene.positions[rows].astype(np.float64), ratio, weight)


def _pairs(x: Float64, dim: int) -> Complex:
    """[T, N·D] as complex numbers [T, N, D/2] of dimensions i and i + D/2."""
    heads = x.reshape(x.shape[0], -1, 2, dim // 2)
    return np.asarray(heads[:, :, 0] + 1j * heads[:, :, 1])


Schedule = tuple[str | None, Rope]
"""What it is called, None where another row of the catalogue names it, and what it is."""


def _nearest(turns: _Turns, schedules: Iterable[Schedule]) -> Schedule | None:
    """The first of the schedules that leaves about as little as any."""
    found = [(turns.left(rope.inverse_frequencies()), name, rope) for name, rope in schedules]
    if not found:
        return None
    least = min(left for left, *_ in found)
    if least > MOST_LEFT:
        return None
    # What is left of a perfect schedule is rounding; two such are not told apart by it.
    limit = max(FITS_AS_WELL * least, 1e-12)
    return next((name, rope) for left, name, rope in found if left <= limit)


def _run(scene: Scene, rope: Rope, factor: float) -> Float64:
    """The rotation by another schedule and factor."""
    x = before_rotation(scene)
    pairs = _pairs(x, scene.config.head_dim)
    turned = np.multiply.outer(scene.positions.astype(np.float64), rope.inverse_frequencies())
    out = pairs * (factor * np.exp(1j * turned))[:, None]
    return np.stack([out.real, out.imag], axis=2).reshape(x.shape)


def _tell_factor(turns: _Turns, rope: Rope) -> tuple[str, float]:
    """A word on the attention factor where it is not the schedule's own, and the factor."""
    own = rope.attention_factor()
    if abs(turns.factor / own - 1) < SAME_FACTOR:
        return "", own
    return f", with an attention factor of {turns.factor:.4g}", turns.factor


def _added(scene: Scene) -> Iterator[Trial]:
    """Long-context scaling that this file does not state."""
    rope = scene.config.rope
    turns = _turns(scene)
    if turns is None or rope.scaling.kind != "default" or rope.divisors is not None:
        return
    found = _nearest(turns, _unasked(rope, scene.config.max_position_embeddings or 8192))
    name, scaled = found or (None, rope)
    if name is None:
        return
    said, factor = _tell_factor(turns, scaled)
    yield name + said, _run(scene, scaled, factor)


def _unasked(rope: Rope, trained: int) -> Iterator[Schedule]:
    """Usual scalings."""
    yield None, rope
    for factor in USUAL_FACTORS:
        yield None, replace(rope, scaling=RopeScaling("linear", factor))
    for kind in ("llama3", "yarn"):
        for factor in USUAL_FACTORS:
            lengths = dict.fromkeys((trained, int(trained / factor), *USUAL_LENGTHS))
            for length in (n for n in lengths if n > 0):
                scaling = RopeScaling(kind, factor, length)
                yield f"{kind} by {factor:g} from {length}", replace(rope, scaling=scaling)


def _changed(scene: Scene) -> Iterator[Trial]:
    """This model's scaling with one of its numbers changed."""
    rope = scene.config.rope
    turns = _turns(scene)
    if turns is None or rope.scaling.kind == "default":
        return
    found = _nearest(turns, _variations(rope))
    name, other = found or (None, rope)
    if name is None:
        return
    said, factor = _tell_factor(turns, other)
    if name:
        yield name + said, _run(scene, other, factor)
    elif said and rope.scaling.kind == "yarn" and scene.wrong.mean() > 0.5:
        own = rope.attention_factor()
        yield f"an attention factor of {factor:.5g} in place of {own:.5g}", (
            scene.plain.value * (factor / own)
        )  # fmt: skip


def _variations(rope: Rope) -> Iterator[Schedule]:
    own = rope.scaling
    yield "", rope
    yield None, replace(rope, scaling=RopeScaling())
    yield None, replace(rope, scaling=RopeScaling("linear", own.factor))
    fields: dict[str, tuple[Any, ...]] = {"factor": USUAL_FACTORS}
    if own.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = USUAL_LENGTHS
    if own.kind == "llama3":
        fields |= {"low_freq_factor": USUAL_LIMITS, "high_freq_factor": USUAL_LIMITS}
    if own.kind == "yarn":
        fields |= {"beta_fast": USUAL_BETAS, "beta_slow": USUAL_BETAS, "truncate": (True, False)}
    for name, values in fields.items():
        before = getattr(own, name)
        for value in values:
            if value != before and _is_possible(replace(own, **{name: value})):
                shown = f"{value:g} in place of {before:g}" if before else f"{value:g}"
                if name == "truncate":
                    shown = str(value).lower()
                yield f"{name} {shown}", replace(rope, scaling=replace(own, **{name: value}))
    for kind in ("llama3", "yarn"):
        if kind != own.kind:
            length = own.original_max_position_embeddings or rope.max_position_embeddings
            scaling = RopeScaling(kind, own.factor, length)
            yield f"{kind} in place of {own.kind}", replace(rope, scaling=scaling)


def _is_possible(scaling: RopeScaling) -> bool:
    """Whether the limits of a ramp are in order."""
    if scaling.kind == "llama3":
        return scaling.low_freq_factor < scaling.high_freq_factor
    return scaling.kind != "yarn" or scaling.beta_slow < scaling.beta_fast


def solved_divisor(scene: Scene) -> float | None:
    """What the positions are divided by, if one number tells."""
    turns = _turns(scene)
    if turns is None:
        return None
    frequencies = scene.config.rope.inverse_frequencies()

    def left(log_divisor: float) -> float:
        return turns.left(frequencies / math.exp(log_divisor))

    # The turns of a late token are told apart by small steps only.
    steps = 40 + 8 * int(min(1000.0, turns.positions[-1]))
    grid = np.linspace(math.log(1 / LARGEST_DIVISOR), math.log(LARGEST_DIVISOR), steps)
    solved = minimise(left, grid)
    least = left(solved)
    if least > MOST_LEFT:
        return None
    rounded = (round_number(math.exp(solved), tolerance) for tolerance in (1e-3, 1e-4, 1e-5, 1e-6))
    close = (x for x in rounded if left(math.log(x)) <= FITS_AS_WELL * least)
    return next(close, math.exp(solved))


def solved_shift(scene: Scene) -> int | None:
    """By how many positions every token is off, if one number of them tells."""
    turns = _turns(scene, slice(None, None))
    if turns is None:
        return None
    frequencies = scene.config.rope.inverse_frequencies()
    back = np.exp(-1j * np.multiply.outer(turns.positions, frequencies))
    mean = (turns.weight * turns.ratio * back).sum(axis=0)  # [D/2]: turned by the shift alone
    shifts = np.arange(-LARGEST_SHIFT, LARGEST_SHIFT + 1)
    best, largest = 0, -np.inf
    for part in np.array_split(shifts, 16):
        along = (np.exp(-1j * np.multiply.outer(part, frequencies)) @ mean).real
        if along.max() > largest:
            best, largest = int(part[int(along.argmax())]), float(along.max())
    explained = largest / float((turns.weight * np.abs(turns.ratio)).sum())
    return best if best and explained > 1 - MOST_LEFT else None


_CONFIG = "rope_scaling of this file: compare it with the original model's config"
_ENGINE = "which rope_scaling the kernel applies, and its numbers (YaRN's options in llama.cpp)"

ENTRIES = (
    Entry("RoPE scaling added: {}", ROTATED, _added, _ENGINE,
          "RoPE scaling {}" + ORIGINAL + ", dropped in this file", _CONFIG, is_fallback=True),
    Entry("RoPE scaling with {}", ROTATED, _changed, _ENGINE, ORIGINAL, _CONFIG),
)  # fmt: skip
