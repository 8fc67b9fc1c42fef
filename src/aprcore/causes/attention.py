"""What goes wrong in attention: which heads meet, their scores' scale, the weighted values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.caps import capped, factor_before_cap, uncapped
from aprcore.causes.masks import EVERYTHING, seen
from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial, single
from aprcore.causes.solving import nearest, off_by_a_token
from aprcore.network.operations import Rotate, Scores, Values

SCORES, VALUES = (Scores,), (Values,)


def head_maps(heads: int, kv: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Which kv head each query head reads, otherwise than grouped."""
    index = np.arange(heads)
    yield "tiled (head h reads kv head h mod K) instead of grouped", index % kv
    yield "all of the first kv head", index * 0
    yield "in reverse order", (kv - 1) - index // (heads // kv)
    for group in range(1, heads + 1):
        if group != heads // kv:
            yield f"in groups of {group}", np.minimum(index // group, kv - 1)
            if group > 1:  # by ones is tiled
                yield f"in groups of {group}, wrapping", index // group % kv


def _other_groups(scene: Scene) -> Iterator[Trial]:
    config = scene.config
    heads, kv = config.num_heads, config.num_kv_heads
    every_head = replace(scene.site, config=replace(config, num_kv_heads=heads))
    tried = {(np.arange(heads) // (heads // kv)).tobytes()}
    for name, index in head_maps(heads, kv):
        if index.tobytes() in tried:  # of equal maps the first
            continue
        tried.add(index.tobytes())
        x = scene.inputs[1] if isinstance(scene.operation, Scores) else _values(scene)
        mapped = x.reshape(x.shape[0], kv, -1)[:, index].reshape(x.shape[0], -1)
        if isinstance(scene.operation, Scores):
            yield name, scene.run(scene.inputs[0], mapped, site=every_head)
        else:
            yield name, scene.backend.weighted_values(scene.inputs[0], mapped, heads)


def _values(scene: Scene) -> Float64:
    """v of the weighted sum."""
    return REFERENCE.columns(scene.inputs[1], *scene.config.qkv_columns("v"))


def _scales(scene: Scene) -> Iterator[Trial]:
    """Scores by another factor: recognised, or solved for."""
    config, own = scene.config, scene.operation.scale
    dim, hidden, heads, kv = (
        config.head_dim, config.hidden_size, config.num_heads, config.num_kv_heads,
    )  # fmt: skip
    known = {
        "none": 1.0, "1/sqrt(D), the head dimension": dim**-0.5,
        "1/sqrt(E), the hidden size": hidden**-0.5, "1/D": 1 / dim,
        "1/sqrt(H), the number of heads": heads**-0.5,
        "1/sqrt(K), the number of kv heads": kv**-0.5,
        "1/sqrt(D/2)": (dim / 2) ** -0.5, "1/sqrt(2D)": (2 * dim) ** -0.5,
        "1/sqrt(K·D)": (dim * kv) ** -0.5, "1/sqrt(H·D)": (dim * heads) ** -0.5,
        "1/sqrt(E/K), the hidden size over kv heads": (hidden / kv) ** -0.5,
        "1/sqrt(E/H), the hidden size over heads": (hidden / heads) ** -0.5,
        "sqrt(D)": dim**0.5, "D^(-1/4)": dim**-0.25,
    }  # fmt: skip
    for count in (heads, kv):
        for other in (count // 2, count * 2, count + 1, count - 1):
            if other > 0:
                known.setdefault(f"1/sqrt(E/{other})", (other / hidden) ** 0.5)
    unscaled = uncapped(scene) / own
    tried = {"plain": own}
    for name, scale in known.items():
        if nearest(scale, tried, 1e-9) is None:
            tried[name] = scale
            yield name, capped(scene, unscaled * scale)


def _sign(scene: Scene) -> Float64:
    return -scene.plain.value


def _other_factor(scene: Scene) -> Iterator[Trial]:
    plain = uncapped(scene)
    factor = factor_before_cap(scene, plain)
    if factor is not None and abs(factor) > 1e-3:
        yield f"{factor * scene.operation.scale:.5g}", capped(scene, factor * plain)


def _unrotated(scene: Scene) -> Iterator[Trial]:
    """Scores of q, k or both as they were before the rotation."""
    q, k = (_before_rotation(scene, argument) for argument in (0, 1))
    rotated = scene.inputs
    if q is not None and k is not None:
        yield "q and k", scene.run(q, k)
    if q is not None:
        yield "q", scene.run(q, rotated[1])
    if k is not None:
        yield "k", scene.run(rotated[0], k)


def _before_rotation(scene: Scene, argument: int) -> Float64 | None:
    """The columns that an argument's rotation reads, if they are recorded."""
    rotation = scene.graph.operation(scene.source(argument))
    if not isinstance(rotation, Rotate):
        return None
    qkv = scene.tensor(scene.source(argument, 0))
    return None if qkv is None else qkv[:, slice(*scene.config.qkv_columns(rotation.part))]


def _shifted_keys(scene: Scene) -> Iterator[Trial]:
    q, k = scene.inputs
    for name, moved in off_by_a_token(k):
        yield name, scene.run(q, moved)
    yield "earlier (zeros first)", scene.run(q, np.vstack([0 * k[:1], k[:-1]]))


def _exchanged(scene: Scene) -> Float64 | None:
    full = scene.run(operation=scene.operation.altered(mask=EVERYTHING))
    return full.swapaxes(1, 2) * seen(scene) if full.shape[1] == full.shape[2] else None


def _short_dots(scene: Scene) -> Iterator[Trial]:
    """The last dimensions of every head left out: no whole vector, or more than a tile."""
    q, k = scene.inputs
    dim = scene.config.head_dim
    left = {dim % width for width in (4, 8, 16, 32, 64, 128, 256)}
    left |= {dim - kept for kept in (dim // 2, 32, 64, 128)}
    for count in sorted(n for n in left if 0 < n < dim):
        kept = q.reshape(len(q), -1, dim).copy()
        kept[:, :, dim - count :] = 0
        yield f"{count}", scene.run(kept.reshape(q.shape), k)


def _strided_heads(scene: Scene) -> Iterator[Trial]:
    """Head count and head dimension exchanged: a head is every H-th value."""
    q, k = scene.inputs
    if scene.config.head_dim == 1:
        return
    by_stride = [
        x.reshape(len(x), scene.config.head_dim, -1).swapaxes(1, 2).reshape(x.shape) for x in (q, k)
    ]
    yield "q and k", scene.run(*by_stride)
    yield "q", scene.run(by_stride[0], k)
    yield "k", scene.run(q, by_stride[1])


def _rotated_values(scene: Scene) -> Float64:
    v = scene.backend.rope(_values(scene), scene.positions, scene.config.rope)
    return scene.backend.weighted_values(scene.inputs[0], v, scene.config.num_kv_heads)


def _other_values(scene: Scene) -> Iterator[Trial]:
    """The weighted sum of something else than v."""
    for name, v in _read_as_values(scene):
        yield name, scene.backend.weighted_values(scene.inputs[0], v, scene.config.num_kv_heads)


def _read_as_values(scene: Scene) -> Iterator[Trial]:
    qkv, kv = scene.inputs[1], scene.config.num_kv_heads
    start, stop = scene.config.qkv_columns("v")
    yield "k's columns", qkv[:, slice(*scene.config.qkv_columns("k"))]
    yield "q's columns", qkv[:, : stop - start]
    bare = scene.unbiased(1)
    if bare is not None:
        yield "v before its bias", bare[:, start:stop]
    for key in scene.graph.of_kind(scene.key.layer, Rotate):
        rotation, rotated = scene.graph.operation(key), scene.tensor(key)
        if isinstance(rotation, Rotate) and rotated is not None and rotated.shape == (
            qkv.shape[0], stop - start,
        ):  # fmt: skip
            yield f"the rotated {rotation.part}", rotated
    v = qkv[:, start:stop]
    for name, moved in off_by_a_token(v):
        yield f"v one token {name}", moved
    yield "v one token earlier (zeros first)", np.vstack([0 * v[:1], v[:-1]])
    exchanged = v.reshape(v.shape[0], -1, kv).swapaxes(1, 2)
    yield "v with heads and dimensions exchanged", exchanged.reshape(v.shape)
    exchanged = v.reshape(kv, v.shape[0], -1).swapaxes(0, 1)
    yield "v with heads and tokens exchanged", exchanged.reshape(v.shape)


def _other_weights(scene: Scene) -> Iterator[Trial]:
    for name, weights in _read_as_weights(scene):
        yield name, scene.run(weights, scene.inputs[1])


def _read_as_weights(scene: Scene) -> Iterator[Trial]:
    softmax, sound = scene.inputs[0], seen(scene)
    scores = scene.tensor(scene.source(0, 0))
    if scores is not None:
        yield "the scores before softmax", scores * sound
    _, queries, positions = softmax.shape
    if queries == positions:
        yield "transposed weights", softmax.swapaxes(1, 2)
    even = sound / sound.sum(axis=1, keepdims=True)
    yield "even weights", np.broadcast_to(even, softmax.shape)
    yield "the weights of the head before", np.roll(softmax, 1, 0)
    yield "the weights of the head after", np.roll(softmax, -1, 0)
    others = ~np.eye(queries, positions, positions - queries, dtype=bool)
    yield "weights without the token itself", softmax * others


def _heads_mixed(scene: Scene) -> Float64:
    plain, heads = scene.plain.value, scene.config.num_heads
    return plain.reshape(plain.shape[0], heads, -1).swapaxes(1, 2).reshape(plain.shape)


_SCALE = "the scale of the scores: 1/sqrt(D) with the head dimension, unless the model states one"

ENTRIES = (
    Entry("kv heads {}", (Scores, Values), _other_groups,
          "how query heads are mapped to kv heads: h // (H/K)", ORIGINAL,
          "num_kv_heads and the order of the k and v rows"),
    Entry("attention scale {}", SCORES, _scales, _SCALE, ORIGINAL,
          "head_dim, or an attention multiplier"),
    Entry("attention scale {}", SCORES, _other_factor, _SCALE, ORIGINAL,
          "an attention multiplier that was lost", is_fallback=True),
    Entry("scores negated", SCORES, single(_sign), "the sign of the scores"),
    Entry("scores of {} before RoPE", SCORES, _unrotated,
          "which buffer the product reads: the rotated one"),
    Entry("scores against keys one token {}", SCORES, _shifted_keys, "the index into the key cache",
          is_causal=False),
    Entry("queries and keys exchanged", SCORES, single(_exchanged), "the order of q and k"),
    Entry("the last {} dimensions of a head left out of the scores", SCORES, _short_dots,
          "the end of the loop over a head's dimensions: they may be no whole vectors"),
    Entry("head count and head dimension exchanged in {}", SCORES, _strided_heads,
          "the shape that q and k are read in: [T, heads, dimensions]"),
    Entry("RoPE applied to v too", VALUES, single(_rotated_values),
          "the rotation must touch q and k only"),
    Entry("weighted sum of {}", VALUES, _other_values, "where the kernel reads v", is_causal=False),
    Entry("weighted sum with {}", VALUES, _other_weights, "which attention weights are read",
          is_causal=False),
    Entry("output with dimensions before heads", VALUES, single(_heads_mixed),
          "the transpose after the weighted sum"),
)  # fmt: skip
