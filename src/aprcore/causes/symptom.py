"""What is visible in a wrong output that no known cause explains."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprcore.causes.experiment import Bools, Experiment, Region
from aprcore.causes.scene import Float64
from aprcore.causes.solving import best_factor
from aprcore.judging.noise import allowed_ratio

# Solving for one number per token or column needs this many values behind each.
FEWEST_BEHIND = 4
# Sorted values that agree this well, relatively, are a permutation of each other.
SAME_VALUES = 1e-3
# What is nearer to its place than this, relatively, is not in another: sorting hides small errors.
LEAST_MOVED = 0.1


def describe_symptom(experiment: Experiment) -> str:
    """The pattern of the error in a clause."""
    where = _where(experiment)
    pattern = next(_patterns(experiment), None)
    if pattern is None:
        return where or _spread(experiment)
    return f"{pattern} ({where})" if where else pattern


def _where(experiment: Experiment) -> str | None:
    """Which part is wrong, if not all of it."""
    region, layout = experiment.region, experiment.scene.layout
    if region is None:
        return None
    parts = [region.name]
    axes = dict(zip(layout.axes, region.indices))
    tokens, heads = axes.get("token"), axes.get("head")
    count = experiment.scene.num_tokens
    if tokens is not None and len(tokens) > 1 and tokens == tuple(range(tokens[0], count)):
        parts.append(f"that is from token {tokens[0]} on")
    if heads is not None:
        group = _kv_group(experiment, heads)
        if group is not None:
            parts.append(f"that is kv group {group}")
    return f"only in {', '.join(parts)}"


def _kv_group(experiment: Experiment, heads: tuple[int, ...]) -> int | None:
    """The kv head whose query heads these are."""
    config = experiment.scene.config
    size = config.num_heads // config.num_kv_heads
    layout = experiment.scene.layout
    if layout.factors[layout.axes.index("head")] != config.num_heads:
        return None
    is_group = size > 1 and heads == tuple(range(heads[0], heads[0] + size)) and not heads[0] % size
    return heads[0] // size if is_group else None


def _patterns(experiment: Experiment) -> Iterator[str]:
    """Patterns that account for the error, the most telling first."""
    shape = experiment.scene.layout.factors
    observed = experiment.scene.observed.reshape(shape)
    plain = experiment.scene.plain.value.reshape(shape)
    region = experiment.region
    mask = np.ones(shape, dtype=np.bool_) if region is None else region.mask
    if not observed[mask].any():
        yield "all zero"
    if np.unique(observed[mask]).size == 1 and mask.sum() > 1:
        yield f"one value throughout: {float(observed[mask][0]):g}"
    factor = best_factor(observed[mask], plain[mask])
    if factor is not None and observed[mask].any() and mask.sum() == 1:
        yield f"off by a factor of {factor:.6g}"
    if factor is not None and _accounts(experiment, factor * plain):
        yield f"a constant factor {factor:.6g}"
    offset = float((observed - plain)[mask].mean())
    if _accounts(experiment, plain + offset):
        yield f"a constant offset {offset:.6g}"
    yield from _addends(experiment, observed, plain)
    yield from _per_axis(experiment, observed, plain, mask)
    if _accounts(experiment, np.copysign(plain, observed)):
        yield "signs flipped, magnitudes right"
    yield from _permutations(experiment, observed, plain, region)


def _accounts(experiment: Experiment, value: Float64) -> bool:
    outcome = experiment.hold(value)
    return outcome is not None and outcome.explains


def _addends(experiment: Experiment, observed: Float64, plain: Float64) -> Iterator[str]:
    """A recorded tensor that is missing from the output, or in it once too often."""
    scene = experiment.scene
    for key, tensor in scene.around():
        if tensor.size != plain.size:
            continue
        factor = best_factor((observed - plain).reshape(-1), tensor.reshape(-1))
        if factor is not None and _accounts(
            experiment, plain + factor * tensor.reshape(plain.shape)
        ):
            change = "added" if factor > 0 else "missing"
            yield f"{abs(factor):.6g} times {key.stage} is {change}"


def _per_axis(
    experiment: Experiment, observed: Float64, plain: Float64, mask: Bools
) -> Iterator[str]:
    """One factor or one addend for each token, head or dimension."""
    for axis, name in enumerate(experiment.scene.layout.axes):
        others = tuple(a for a in range(plain.ndim) if a != axis)
        if plain.size / plain.shape[axis] < FEWEST_BEHIND or not others:
            continue
        inside = np.where(mask, plain, 0.0)
        energy = np.square(inside).sum(axis=others, keepdims=True)
        along = (observed * inside).sum(axis=others, keepdims=True)
        factor = np.where(energy > 0, along / np.where(energy > 0, energy, 1.0), 1.0)
        if _accounts(experiment, factor * plain):
            used = factor[np.broadcast_to(mask.any(axis=others, keepdims=True), factor.shape)]
            yield f"a factor for each {name}, {used.min():.4g} to {used.max():.4g}"
        count = np.maximum(mask.sum(axis=others, keepdims=True), 1)
        addend = np.where(mask, observed - plain, 0.0).sum(axis=others, keepdims=True) / count
        if _accounts(experiment, plain + addend):
            yield f"an addend for each {name}, the same along the rest (a bias?)"


def _permutations(
    experiment: Experiment, observed: Float64, plain: Float64, region: Region | None
) -> Iterator[str]:
    """The right values in another order."""
    axes = experiment.scene.layout.axes
    if region is not None:
        a, b = observed[region.mask], plain[region.mask]
        if a.size > 2 and _is_moved(a, b) and _same(np.sort(a), np.sort(b)):
            yield "the right values in another order"
    if not _is_moved(observed, plain):
        return
    for axis, name in enumerate(axes):
        if plain.shape[axis] > 2 and _same(np.sort(observed, axis), np.sort(plain, axis)):
            yield f"the right values with each {name} axis permuted"
    if _same(np.sort(observed.reshape(-1)), np.sort(plain.reshape(-1))):
        yield "the right values in another order"


def _is_moved(observed: Float64, plain: Float64) -> bool:
    """Whether values are so far off that they may be other ones."""
    return _energy(observed - plain) > LEAST_MOVED**2 * _energy(plain)


def _same(a: Float64, b: Float64) -> bool:
    return _energy(b) > 0 and _energy(a - b) <= SAME_VALUES**2 * _energy(b)


def _energy(x: Float64) -> float:
    return float(np.square(x).sum())


def _spread(experiment: Experiment) -> str:
    shape = experiment.scene.layout.factors
    observed = experiment.scene.observed.reshape(shape)
    plain = experiment.scene.plain
    error = np.square(observed - plain.value.reshape(shape))
    wrong = error > allowed_ratio(1.0) * plain.variance.reshape(shape)
    return f"no pattern: {100 * float(wrong.mean()):.3g}% of the values are beyond rounding"
