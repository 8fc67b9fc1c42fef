"""What goes wrong with the keys and values that attention reads from its cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from aprcore.causes.scene import REFERENCE, Entry, Float64, Scene, Trial
from aprcore.network.operations import Scores, Values
from aprcore.network.stages import StageKey

# Other layers whose keys and values are tried: the nearest ones.
MOST_LAYERS = 8
# Rows of a cache that are solved for are this many at most, and half of the equations are left to
# check them.
MOST_STALE = 8
EQUATIONS_LEFT = 2
# Of the error's energy stale rows may leave this share; fewer rows are taken for more that leave so
# many times less.
MOST_LEFT = 0.05
FITS_AS_WELL = 4.0


def other_layers(scene: Scene, key: StageKey) -> Iterator[tuple[int, StageKey]]:
    """The same stage of the layers around, the nearest first."""
    here = scene.key.layer
    if here is None:
        return
    around = sorted(range(scene.config.num_layers), key=lambda n: (abs(n - here), n))
    for layer in around[1 : MOST_LAYERS + 1]:
        yield layer, StageKey(layer, key.stage)


def values_of(scene: Scene, qkv: Float64) -> Float64:
    """v of the joined projection."""
    return REFERENCE.columns(qkv, *scene.config.qkv_columns("v"))


def _keys_of_layers(scene: Scene) -> Iterator[Trial]:
    q, k = scene.inputs
    for layer, key in other_layers(scene, scene.source(1)):
        other = scene.tensor(key)
        if other is not None and other.shape == k.shape:
            yield f"{layer}", scene.run(q, other)


def _values_of_layers(scene: Scene) -> Iterator[Trial]:
    softmax, qkv = scene.inputs
    for layer, key in other_layers(scene, scene.source(1)):
        other = scene.tensor(key)
        if other is not None and other.shape == qkv.shape:
            yield (
                f"{layer}",
                scene.backend.weighted_values(
                    softmax, values_of(scene, other), scene.config.num_kv_heads
                ),
            )


def _rows_named(rows: list[int]) -> str:
    if len(rows) == 1:
        return f"position {rows[0]}"
    return f"positions {rows[0]} to {rows[-1]}"


def _stale_keys(scene: Scene) -> Iterator[Trial]:
    """Keys of a few positions solved for: every query that sees one tells of it."""
    if scene.operation.cap is not None:
        return
    q, k = scene.inputs
    heads, kv, dim = scene.config.num_heads, scene.config.num_kv_heads, scene.config.head_dim
    shape = scene.plain.value.shape
    observed = scene.observed.reshape(shape)
    if shape[1] != shape[2]:  # a step, whose cache has rows that are not here
        return
    rows = np.flatnonzero(scene.wrong.reshape(shape).any(axis=(0, 1)))
    if not 0 < rows.size <= MOST_STALE or rows[-1] - rows[0] >= rows.size:
        return
    seen = scene.operation.mask.allowed(*shape[1:])
    queries = q.reshape(len(q), kv, heads // kv, dim) * scene.operation.scale
    found = k.reshape(len(k), kv, dim).copy()
    for row in rows:
        sees = seen[:, row]
        if sees.sum() * (heads // kv) < EQUATIONS_LEFT * dim:
            return
        for head in range(kv):
            given = queries[:, head][sees].reshape(-1, dim)
            columns = observed[head * (heads // kv) : (head + 1) * (heads // kv), sees, row]
            found[row, head] = np.linalg.lstsq(given, columns.T.reshape(-1), rcond=None)[0]
    yield _rows_named(rows.tolist()), scene.run(q, found.reshape(k.shape))


def _stale_values(scene: Scene) -> Iterator[Trial]:
    """Values of a few positions solved for, from the first token that is wrong."""
    softmax, qkv = scene.inputs
    plain = scene.plain.value
    heads, kv, dim = scene.config.num_heads, scene.config.num_kv_heads, scene.config.head_dim
    if softmax.shape[1] != softmax.shape[2] or not scene.wrong.any():
        return
    error = (scene.observed.reshape(plain.shape) - plain).reshape(len(plain), kv, -1, dim)
    first, energy = scene.first_wrong_token, float(np.square(error).sum())
    weights = softmax.reshape(kv, heads // kv, *softmax.shape[1:])  # [K, G, T, S]
    found: list[tuple[float, str, Float64]] = []
    equations = (len(plain) - first) * (heads // kv)
    for count in range(1, min(MOST_STALE, len(plain) - first, equations // EQUATIONS_LEFT) + 1):
        rows = list(range(first, first + count))
        changed, left = values_of(scene, qkv).reshape(len(qkv), kv, dim).copy(), 0.0
        for head in range(kv):
            given = weights[head][:, :, rows].swapaxes(0, 1).reshape(-1, count)  # [T·G, rows]
            missed = error[:, head].reshape(-1, dim)
            solved = np.linalg.lstsq(given, missed, rcond=None)[0]
            changed[rows, head] += solved
            left += float(np.square(missed - given @ solved).sum())
        found.append((left, _rows_named(rows), changed.reshape(len(qkv), kv * dim)))
    least = min((left for left, *_ in found), default=energy)
    if least <= MOST_LEFT * energy:
        name, value = next((name, v) for left, name, v in found if left <= FITS_AS_WELL * least)
        yield name, scene.backend.weighted_values(softmax, value, kv)


_ROWS = "which rows of the cache are written before attention reads it, and cleared between texts"

ENTRIES = (
    Entry("scores against the keys of layer {}", (Scores,), _keys_of_layers,
          "the layer's offset in the key cache"),
    Entry("weighted sum of the values of layer {}", (Values,), _values_of_layers,
          "the layer's offset in the value cache"),
    Entry("scores against stale keys at {} of the cache", (Scores,), _stale_keys, _ROWS,
          is_fallback=True),
    Entry("weighted sum over stale values at {} of the cache", (Values,), _stale_values, _ROWS,
          is_fallback=True),
)  # fmt: skip
