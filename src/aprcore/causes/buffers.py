"""What goes wrong around an operation: outputs not written, stale, shifted or scaled.

They apply to every stage, and mostly to a part of it: a tile, a head, the last tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprcore.causes.scene import ORIGINAL, Entry, Float64, Kinds, Scene, Trial, single
from aprcore.causes.solving import best_factor, round_number
from aprcore.network.backend import Int64
from aprcore.network.operations import Head, Linear, Scores

EVERY: Kinds = ()

# A factor is solved for from at least so many values, and is none if it is nearly zero.
FEWEST_SOLVED = 3
SMALLEST_FACTOR = 1e-3
# Matching needs this many values for each index, and has a table of indices squared.
FEWEST_MATCHED = 3
MOST_MATCHED = 4096
# So many indices are matched first, by so many values of each: where most of them come from
# nowhere, or are best where they are although they are wrong, the rest is not looked at.
FIRST_MATCHED = 32
FIRST_VALUES = 1024
# A match leaves at most this share of an index's energy: rounding, of 4-bit weights too, is less.
MOST_LEFT = 0.25
ADVICE_STALE = "which buffer the kernel writes: the output is an earlier tensor"


def _zeros(scene: Scene) -> Float64:
    return np.zeros_like(scene.plain.value)


def _stale(scene: Scene) -> Iterator[Trial]:
    """Other tensors of this layer and of the one before, of as many values."""
    graph, shape = scene.graph, scene.plain.value.shape
    for layer in dict.fromkeys((scene.key.layer, graph.stream(scene.key.layer).layer)):
        for row in graph.layer(layer).values():
            tensor = scene.tensor(row.key) if row.key != scene.key else None
            if tensor is not None and tensor.size == scene.plain.value.size:
                yield f"{row.key}", tensor.reshape(shape)
    for number, tensor in enumerate(scene.inputs):
        if tensor.size == scene.plain.value.size:
            yield f"its input {number + 1}", tensor.reshape(shape)


def _multiples(scene: Scene) -> Iterator[Trial]:
    for name, factor in (("doubled", 2.0), ("negated", -1.0), ("halved", 0.5), ("tripled", 3.0)):
        yield name, factor * scene.plain.value


def _shifted(scene: Scene) -> Iterator[Trial]:
    """The right values at the wrong index, by whole axes or by a tile of columns."""
    plain = scene.plain.value.reshape(scene.layout.factors)
    for axis, name in enumerate(scene.layout.axes):
        size = plain.shape[axis]
        steps = {1} | (
            {2, 4, 8, 16, 32, 64, 128, 256} if axis == len(scene.layout.axes) - 1 else set()
        )
        for step in sorted(s for s in steps if s < size):
            for sign, word in ((1, "late"), (-1, "early")):
                moved = np.roll(plain, sign * step, axis=axis)
                yield f"{step} {name}{'s' if step > 1 else ''} {word}", moved
        if size > 2:
            yield f"{name}s in reverse", np.flip(plain, axis=axis)


def _from_neighbour(scene: Scene) -> Iterator[Trial]:
    """Every token, head or dimension as the first or the last one."""
    plain = scene.plain.value.reshape(scene.layout.factors)
    for axis, name in enumerate(scene.layout.axes):
        for word, place in (("first", 0), ("last", -1)):
            if plain.shape[axis] > 1:
                copied = np.broadcast_to(plain.take([place], axis=axis), plain.shape)
                yield f"{word} {name}", copied.reshape(scene.plain.value.shape)


def _factor(scene: Scene) -> Iterator[Trial]:
    """One factor for all that is wrong, from the observed output."""
    if isinstance(scene.operation, Scores):  # those are attention's scale
        return
    plain = scene.plain.value
    observed, mask = scene.observed.reshape(plain.shape), scene.wrong.reshape(plain.shape)
    factor = best_factor(observed[mask], plain[mask])
    if mask.sum() >= FEWEST_SOLVED and factor is not None and abs(factor) > SMALLEST_FACTOR:
        yield f"{round_number(factor, 1e-5):.6g}", factor * plain


def _permuted(scene: Scene) -> Iterator[Trial]:
    """Values of other tokens, heads or dimensions: each wrong one is matched with all."""
    factors = scene.layout.factors
    plain, observed = (x.reshape(factors) for x in (scene.plain.value, scene.observed))
    wrong = scene.wrong.reshape(factors)
    if not wrong.any():  # too small everywhere for any value to stand out
        return
    for axis, name in enumerate(scene.layout.axes):
        count = factors[axis]
        others = tuple(a for a in range(plain.ndim) if a != axis)
        places = np.flatnonzero(wrong.any(axis=others))
        if plain.size // count < FEWEST_MATCHED or not 1 < count <= MOST_MATCHED:
            continue
        to, by = np.moveaxis(observed, axis, 0), np.moveaxis(plain, axis, 0)
        if places.size > FIRST_MATCHED and not _come_from_others(to, by, places):
            continue
        sources = np.arange(count)
        sources[places], _ = _match(to[places].reshape(places.size, -1), by.reshape(count, -1))
        moved = [f"{p} from {sources[p]}" for p in places if sources[p] != p]
        if not moved:
            continue
        pair = len(moved) == 2 and np.array_equal(sources[sources], np.arange(count))
        is_permutation = np.unique(sources).size == count
        what = "swapped" if pair else ("permuted" if is_permutation else "taken from others")
        listed = ", ".join(moved[:4]) + (", ..." if len(moved) > 4 else "")
        yield f"{name}s {what}: {listed}", np.take(plain, sources, axis=axis)


def _come_from_others(found: Float64, table: Float64, places: Int64) -> bool:
    """Whether some of the wrong indices, by some of their values, are other indices' values."""
    some = places[np.linspace(0, places.size - 1, FIRST_MATCHED).astype(np.int64)]
    step = max(1, table[0].size // FIRST_VALUES)
    few = table[..., ::step].reshape(len(table), -1)
    nearest, left = _match(found[some][..., ::step].reshape(some.size, -1), few)
    return float(np.mean((nearest == some) | (left > MOST_LEFT))) <= 0.5


def _match(found: Float64, table: Float64) -> tuple[Int64, Float64]:
    """The nearest row of a table for each row, and what share of the row's energy it leaves."""
    distance = np.square(table).sum(axis=1)[None] - 2 * found @ table.T
    energy = np.square(found).sum(axis=1)
    left = np.maximum(distance.min(axis=1) + energy, 0.0)
    return distance.argmin(axis=1), left / np.where(energy > 0, energy, 1.0)


def _clamped(scene: Scene) -> Iterator[Trial]:
    top = float(np.abs(scene.observed).max())
    if 0 < top < float(np.abs(scene.plain.value).max()):
        yield f"{top:g}", np.clip(scene.plain.value, -top, top)


def _zero_rows(scene: Scene) -> Iterator[Trial]:
    """Columns that this file's weight makes zero, where the original's are not."""
    plain = scene.plain.value
    observed = scene.observed.reshape(plain.shape)
    dead = np.all(plain == 0, axis=0)
    if dead.any() and observed[:, dead].any():
        places = np.flatnonzero(dead)
        yield f"{places[0]} to {places[-1]}", np.where(dead[None, :], observed, plain)


ENTRIES = (
    Entry("not computed (left at zero)", EVERY, single(_zeros),
          "the bounds of the loop or of the launch grid: this part is never written",
          "zero in the original model", "the conversion of this weight"),
    Entry("weight rows {} are zero in this file", (Linear, Head), _zero_rows, "",
          "weight rows {} are zero in this file", "the conversion lost these rows",
          in_engine=False),
    Entry("stale: the tensor of {}", EVERY, _stale, ADVICE_STALE, is_fallback=True),
    Entry("output {}", EVERY, _multiples, "a factor, or an addition that runs twice", ORIGINAL,
          "a factor folded into a weight", is_fallback=True),
    Entry("output {}", EVERY, _shifted, "the index that the result is written to", is_fallback=True,
          is_causal=False),
    Entry("a copy of the {}", EVERY, _from_neighbour, "the index that is read or written",
          is_fallback=True, is_causal=False),
    Entry("output scaled by a factor of {}", EVERY, _factor, "a constant factor", ORIGINAL,
          "a factor folded into a weight", is_fallback=True),
    Entry("{}", EVERY, _permuted, "the index that is read or written", ORIGINAL,
          "the order of this weight's rows in the conversion", is_fallback=True, is_causal=False),
    Entry("output clamped to ±{}", EVERY, _clamped, "a clamp, or saturation of a half type",
          ORIGINAL, "a clamp in the original config", is_fallback=True),
)  # fmt: skip
