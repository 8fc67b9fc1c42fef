"""Holding an observed output against one alternative after the other, and telling which explain it.

An alternative explains the output if rounding accounts for what is left, as a whole and in every
part. Where only some tokens, heads or columns are wrong, it may do so in those alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.scene import Float64, Scene
from aprcore.engines.estimate import Estimate
from aprcore.judging.compare import compare
from aprcore.judging.layouts import Layout
from aprcore.judging.noise import CALIBRATION, SMALLEST_ENERGY, allowed_ratio, assess

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]

# Evidence, in nats, from which on the better of two explanations is named alone.
DECISIVE_NATS = 12.0
# Error energies below this part of the predicted are as good as none: predictions are upper
# estimates, and alternatives are computed in float64 by another route than the engine's.
NEGLIGIBLE_RATIO = 1e-3
# Values looked at before all are, and those that figures are taken from.
SAMPLED_VALUES = 4096
MOST_COMPARED = 1 << 20
# Of alternatives that fail, figures only rank the list of those that were tried.
MOST_RANKED = 1 << 17
# Standard deviations within which what an alternative leaves in a region counts as noise.
CHANCE = 2.5
# A region larger than this share of the tensor is no local fault.
LARGEST_LOCAL_SHARE = 0.75
# Evidence, in nats, that what an alternative changes is better for it: at least three values of
# the most that one may give, whatever it says, or many small ones. Of a thousand alternatives none
# is as good by chance, and no fit to a value or two is named. What is solved for takes twice that.
NAMING_NATS = 24.0
MOST_NATS = 9.0
# An alternative leaves at most this share of the error where it differs from the plain operation.
MOST_LEFT = 0.67
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class Room:
    """How much an alternative may miss the output by.

    Attributes:
        is_wide: Whether a value's variance is at least the mean of its token.
        roundings: Roundings of the alternative's own values on the way.
    """

    is_wide: bool
    roundings: float


# The first under which the plain operation still fails: nothing explains what it would explain.
ROOMS = (Room(True, 8.0), Room(True, 0.0), Room(False, 0.0))


@dataclass(frozen=True, slots=True)
class Region:
    """The part of an output that is wrong.

    Attributes:
        mask: True where it is wrong, in the output's factors.
        name: "head 3", "tokens 4 to 7, head 3".
        indices: The wrong indices per axis; None where all are.
    """

    mask: Bools
    name: str
    indices: tuple[tuple[int, ...] | None, ...]

    def without(self, axis: int, layout: Layout) -> Region:
        """The region without its limits along one axis."""
        indices = list(self.indices)
        indices[axis] = None
        return _region(tuple(indices), layout)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an alternative fared.

    Attributes:
        relative_l2, cosine: Of the observed output against it.
        explains: Whether rounding accounts for the rest.
        misfit: Mean ratio of measured to predicted error energy, for comparing explanations.
        region: Where it was taken instead of the plain operation, unless everywhere.
    """

    relative_l2: float
    cosine: float
    explains: bool
    misfit: float
    region: Region | None = None


class Experiment:
    """One failed output and the means to hold alternatives against it."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._shape = scene.layout.factors
        self._observed = scene.observed.reshape(self._shape)
        self._plain = scene.plain.value.reshape(self._shape)
        self._energy = float(np.square(self._plain).mean()) if self._plain.size else 0.0
        self._predicted = scene.plain.variance.reshape(self._shape)
        self._wide = self._widened()
        self._room = next((r for r in ROOMS if not self._passes(self._plain, r)), ROOMS[-1])
        self.region = find_region(scene)

    @property
    def plain_fails(self) -> bool:
        """Whether rounding does not explain the output."""
        return not assess(self._observed, self.scene.plain, self.scene.layout).explained

    def variance(self, columns: NDArray[np.int64]) -> Float64:
        """Predicted variances of some columns of a [T, C] output."""
        variance = self._wide if self._room.is_wide else self._predicted
        return variance.reshape(self.scene.plain.value.shape)[:, columns]

    def _widened(self) -> Float64:
        """Predicted variances, raised to their token's mean.

        An alternative moves values between dimensions, so that the variance predicted for one
        place belongs to another.
        """
        axes = self.scene.layout.axes
        token = axes.index("token") if "token" in axes else None
        others = tuple(axis for axis in range(len(axes)) if axis != token)
        return np.maximum(self._predicted, self._predicted.mean(axis=others, keepdims=True))

    def _passes(self, value: Float64, room: Room) -> bool:
        """Whether rounding accounts for the output being this value."""
        estimate = Estimate(value, self._variance(value, room), self.scene.plain.token_dof)
        return assess(self._observed, estimate, self.scene.layout).explained

    def _variance(self, value: Float64, room: Room) -> Float64:
        """The variance to allow an alternative."""
        return self._variance_at(value, room, slice(None)).reshape(self._shape)

    def _variance_at(
        self, value: Float64, room: Room, places: Int64 | slice, energy: float | None = None
    ) -> Float64:
        """The same at some flat indices; `energy` is the mean square of `value`, if known."""
        variance = (self._wide if room.is_wide else self._predicted).reshape(-1)[places]
        if energy is None:
            energy = _mean_square(value)
        if self._energy:  # larger values are rounded more coarsely
            variance = variance * max(1.0, energy / self._energy)
        roundoff = self.scene.profile.arithmetic.stored.roundoff
        own = np.square(value.reshape(-1)[places]) + energy
        floor = SMALLEST_ENERGY * energy * 1e-6  # as in `assess`, for values that are exactly zero
        return variance + floor + room.roundings * roundoff**2 / 3 * own

    def hold(self, value: Float64, *, is_solved: bool = False) -> Outcome | None:
        """The outcome of one alternative; None if it says the same as the plain operation.

        Args:
            value: What it gives, as many values as the output has.
            is_solved: Whether it was fitted to the output, or says little: then more must speak
                for it.
        """
        nats = NAMING_NATS * (2 if is_solved else 1)
        value = np.ascontiguousarray(value).reshape(self._shape)
        energy = _mean_square(value)
        is_finite = math.isfinite(energy) or bool(np.isfinite(value).all())
        if not is_finite or self._is_plain(value):
            return None
        if not self._may_pass(value, self._sample, energy):
            return self._failure(value)
        if self._may_pass(value, self._sample_of_rest, energy):
            whole = self._outcome(value, None, nats)
            if whole.explains or self.region is None:
                return whole
        if self.region is not None:
            local = self._within(value, self.region, nats)
            if local.explains:
                return self._widest(value, local, nats)
        return self._failure(value)

    def _failure(self, value: Float64) -> Outcome:
        """The outcome of an alternative that explains nothing."""
        return Outcome(*self.figures(value, MOST_RANKED), False, math.inf)

    def _may_pass(self, value: Float64, places: Int64, energy: float) -> bool:
        """Whether a sample of the values allows it: one beyond its own limit is enough."""
        variance = self._variance_at(value, self._room, places, energy)
        error = np.square(self._observed.reshape(-1)[places] - value.reshape(-1)[places])
        return bool((error <= allowed_ratio(1.0) * variance).all())

    @cached_property
    def _sample(self) -> NDArray[np.int64]:
        """Some of the values that are to be explained, by their flat index."""
        if self.region is None:
            count = self._plain.size
            return np.linspace(0, count - 1, min(count, SAMPLED_VALUES)).astype(np.int64)
        return _spread(np.flatnonzero(self.region.mask))

    @cached_property
    def _sample_of_rest(self) -> NDArray[np.int64]:
        """Some of the values beside the region, which an alternative for all must explain too."""
        if self.region is None:
            return np.empty(0, np.int64)
        return _spread(np.flatnonzero(~self.region.mask))

    def _within(self, value: Float64, region: Region, nats: float) -> Outcome:
        return self._outcome(np.where(region.mask, value, self._plain), region, nats)

    def _widest(self, value: Float64, local: Outcome, nats: float) -> Outcome:
        """The same in as large a region as explains it: fewer words, and nothing by accident."""
        assert local.region is not None
        for axis, indices in enumerate(local.region.indices):
            if indices is None or sum(i is not None for i in local.region.indices) == 1:
                continue
            wider = local.region.without(axis, self.scene.layout)
            outcome = self._within(value, wider, nats)
            if outcome.explains:
                return self._widest(value, outcome, nats)
        return local

    def _is_plain(self, value: Float64) -> bool:
        """Whether an alternative is the plain operation but for rounding."""
        places = self._sample  # which mostly tells, without a pass over all values
        plain, wide = self._plain.reshape(-1)[places], self._wide.reshape(-1)[places]
        floor = SMALLEST_ENERGY * self._energy
        if not (np.square(value.reshape(-1)[places] - plain) <= 4 * wide + floor).all():
            return False
        return bool((np.square(value - self._plain) <= 4 * self._wide + floor).all())

    def _outcome(self, value: Float64, region: Region | None, nats: float) -> Outcome:
        explains = region is None or self._fits_within(value, region)
        explains = explains and self._passes(value, self._room) and self._is_earned(value, nats)
        if not explains:
            return self._failure(value)
        return Outcome(*self.figures(value), True, self.misfit(value), region)

    def _is_earned(self, value: Float64, nats: float) -> bool:
        """Whether it is better than the plain operation beyond chance, and not by a value or two.

        What passes where the plain operation just fails may say next to nothing.
        """
        variance = self._variance(value, self._room)
        moved = np.square(value - self._plain) > variance * 1e-2
        plain, left = (
            np.square(self._observed[moved] - x[moved]) / np.maximum(variance[moved], _TINY)
            for x in (self._plain, value)
        )
        if left.sum() > MOST_LEFT * plain.sum():
            return False
        gain = np.clip((plain - left) / 2, -MOST_NATS, MOST_NATS).sum()
        return bool(gain >= nats)

    def _fits_within(self, value: Float64, region: Region) -> bool:
        """Whether what is left in a region is of the size of noise there.

        Parts of a tensor are judged so that none of millions fails by chance. One alternative of a
        hundred, on a few values, is held to less.
        """
        places = np.flatnonzero(region.mask)
        variance = self._variance_at(value, self._room, places).sum()
        error = np.square(self._observed.reshape(-1)[places] - value.reshape(-1)[places]).sum()
        count = self._independent(float(places.size))
        allowed = CALIBRATION * (1 + CHANCE * math.sqrt(2 / count) + CHANCE**2 / count)
        return bool(error <= allowed * variance)

    def _independent(self, count: float) -> float:
        """How many independent errors so many values hold: a weight's repeat in every token."""
        dof = self.scene.plain.token_dof
        if dof is None or self.scene.num_tokens <= 1:
            return count
        return max(1.0, count * min(1.0, dof / self.scene.num_tokens))

    def figures(self, value: Float64, most: int = MOST_COMPARED) -> tuple[float, float]:
        """Relative L2 and cosine of the observed output against a value, of about `most` values."""
        step = max(1, self._plain.size // most) | 1  # odd: heads and rows have even sizes
        found = compare(self._observed.reshape(-1)[::step], value.reshape(-1)[::step])
        return found.relative_l2, found.cosine

    def misfit(self, value: Float64) -> float:
        """Mean of measured over predicted error energy, under one prediction for all."""
        floor = SMALLEST_ENERGY * max(self._energy, float(np.square(self._observed).mean())) * 1e-3
        error = np.square(self._observed - value.reshape(self._shape))
        return float((error / (self._wide + floor)).mean())

    def tells_apart(self, better: float, worse: float) -> bool:
        """Whether one misfit is better than another beyond chance."""
        count = self._independent(float(self._observed.size))
        better = max(better, NEGLIGIBLE_RATIO)
        return count * (worse / better - 1) / 2 > DECISIVE_NATS


def _mean_square(x: Float64) -> float:
    """The mean of squares in one pass; infinite or NaN where a value is. 0 for no values."""
    flat = x.reshape(-1)
    return float(np.vdot(flat, flat)) / max(1, flat.size)


def _spread(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most `SAMPLED_VALUES` of some indices, evenly spread."""
    count = min(places.size, SAMPLED_VALUES)
    return places[np.linspace(0, places.size - 1, count).astype(np.int64)]


def part_scene(scene: Scene, start: int, stop: int) -> Scene:
    """Columns `start` to `stop` of a [T, C] output as a scene of their own."""
    columns = slice(start, stop)
    plain = scene.plain
    tokens, heads_dim = scene.plain.value.shape[0], stop - start
    dim = scene.config.head_dim
    layout = scene.layout._replace(
        shape=(tokens, heads_dim), factors=(tokens, heads_dim // dim, dim)
    )
    return replace(
        scene,
        observed=scene.observed.reshape(plain.value.shape)[:, columns],
        plain=Estimate(plain.value[:, columns], plain.variance[:, columns], plain.token_dof),
        layout=layout,
    )


def find_region(scene: Scene) -> Region | None:
    """The tokens, heads and columns that are wrong, if they are few and the rest is right."""
    shape = scene.layout.factors
    observed, plain = (x.reshape(shape) for x in (scene.observed, scene.plain.value))
    error = np.square(observed - plain)
    if not error.size:
        return None
    floor = SMALLEST_ENERGY * float(np.square(plain).mean()) * 1e-6
    predicted = scene.plain.variance.reshape(shape) + floor
    indices: list[tuple[int, ...] | None] = []
    for axis in range(len(shape)):
        wrong = _wrong_along(error, predicted, axis, scene)
        some = wrong.any() and not wrong.all()
        indices.append(tuple(int(i) for i in np.flatnonzero(wrong)) if some else None)
    region = _region(tuple(indices), scene.layout)
    if region.mask.mean() > LARGEST_LOCAL_SHARE:
        return None
    rest = Estimate(plain, scene.plain.variance.reshape(shape), scene.plain.token_dof)
    if not assess(np.where(region.mask, plain, observed), rest, scene.layout).explained:
        return None
    return region


def _region(indices: tuple[tuple[int, ...] | None, ...], layout: Layout) -> Region:
    """The product of the indices along each axis."""
    mask = np.ones(layout.factors, dtype=np.bool_)
    names = []
    for axis, found in enumerate(indices):
        if found is not None:
            along = np.zeros(layout.factors[axis], dtype=np.bool_)
            along[list(found)] = True
            mask &= along.reshape([-1 if a == axis else 1 for a in range(mask.ndim)])
            names.append(_range_name(layout.axes[axis], found))
    return Region(mask, ", ".join(names), indices)


def _wrong_along(error: Float64, predicted: Float64, axis: int, scene: Scene) -> Bools:
    """Which indices of an axis hold an error that rounding does not explain."""
    others = tuple(a for a in range(error.ndim) if a != axis)
    ratio = error.sum(axis=others) / predicted.sum(axis=others)
    count = error.size / error.shape[axis]
    values = (error / predicted).max(axis=others) > allowed_ratio(1.0)
    dof = scene.plain.token_dof
    if dof is not None and scene.layout.axes[axis] != "token":
        count = max(1.0, count * min(1.0, dof / scene.num_tokens))
    return np.asarray(values | (ratio > allowed_ratio(max(1.0, count / 3))))


def _range_name(axis: str, found: tuple[int, ...]) -> str:
    """Indices in words: "head 3", "tokens 4 to 7", "dims 0, 5, ... (9 of them)"."""
    plural = {"index": "indices"}.get(axis, f"{axis}s")
    if len(found) == 1:
        return f"{axis} {found[0]}"
    if found[-1] - found[0] == len(found) - 1:
        return f"{plural} {found[0]} to {found[-1]}"
    if len(found) <= 4:
        return f"{plural} {', '.join(map(str, found))}"
    return f"{plural} {found[0]}, {found[1]}, ... {found[-1]} ({len(found)} of them)"
