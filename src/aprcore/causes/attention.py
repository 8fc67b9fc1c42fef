"""What goes wrong in attention: scores, their softmax and the weighted values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.causes.scene import REFERENCE, Entry, Float64, Scene, Trial, single, stages
from aprcore.causes.solving import best_factor, nearest
from aprcore.network.graph import StageKey, input_keys

SCORES, SOFTMAX, VALUES = stages("attn_scores"), stages("attn_softmax"), stages("attention")
GROUPED = SCORES | VALUES


def _distinct_head_maps(scene: Scene) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Which kv head each query head reads, otherwise than grouped; of equal maps the first."""
    heads, kv = scene.config.num_heads, scene.config.num_kv_heads
    seen = [np.arange(heads) // (heads // kv)]
    for name, index in _head_maps(heads, kv):
        if not any(np.array_equal(index, other) for other in seen):
            seen.append(index)
            yield name, index


def _head_maps(heads: int, kv: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
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
    for name, heads in _distinct_head_maps(scene):
        if scene.key.stage == "attn_scores":
            q, k = scene.inputs
            yield (
                name,
                REFERENCE.attention_scores(
                    q, _heads_of(k, config.head_dim, heads), config.num_heads, config.num_heads
                ),
            )
        else:
            softmax, v = scene.inputs[0], values_of(scene)
            yield (
                name,
                REFERENCE.weighted_values(
                    softmax, _heads_of(v, config.head_dim, heads), config.num_heads
                ),
            )


def _heads_of(x: Float64, dim: int, heads: NDArray[np.int64]) -> Float64:
    return x.reshape(x.shape[0], -1, dim)[:, heads].reshape(x.shape[0], -1)


def values_of(scene: Scene) -> Float64:
    """v of the stage `attention`."""
    return REFERENCE.columns(scene.inputs[1], *scene.config.qkv_columns("v"))


def _scales(scene: Scene) -> Iterator[Trial]:
    """Scores by another factor: recognised, or solved for."""
    config, plain = scene.config, scene.plain.value
    dim, hidden = config.head_dim, config.hidden_size
    known = {
        "none": 1.0, "1/sqrt(E), the hidden size": hidden**-0.5, "1/D": 1 / dim,
        "1/sqrt(H), the number of heads": config.num_heads**-0.5,
        "1/sqrt(K), the number of kv heads": config.num_kv_heads**-0.5,
        "1/sqrt(D/2)": (dim / 2) ** -0.5, "1/sqrt(2D)": (2 * dim) ** -0.5,
        "1/sqrt(K·D)": (dim * config.num_kv_heads) ** -0.5,
        "1/sqrt(H·D)": (dim * config.num_heads) ** -0.5,
        "1/sqrt(E/K), the hidden size over kv heads": (hidden / config.num_kv_heads) ** -0.5,
        "1/sqrt(E/H), the hidden size over heads": (hidden / config.num_heads) ** -0.5,
        "sqrt(D)": dim**0.5, "D^(-1/4)": dim**-0.25,
    }  # fmt: skip
    seen: list[float] = []
    for name, scale in known.items():
        if nearest(scale, {"plain": dim**-0.5, **{str(s): s for s in seen}}, 1e-9) is None:
            seen.append(scale)
            yield name, plain * (scale * math.sqrt(dim))
    for heads in (config.num_heads, config.num_kv_heads):
        for other in (heads // 2, heads * 2, heads + 1, heads - 1):
            if other > 0 and nearest(other / hidden, {str(s): s**2 for s in seen}, 1e-9) is None:
                scale = (other / hidden) ** 0.5
                seen.append(scale)
                yield f"1/sqrt(E/{other})", plain * (scale * math.sqrt(dim))


def _sign(scene: Scene) -> Float64:
    return -scene.plain.value


def _other_factor(scene: Scene) -> Iterator[Trial]:
    factor = best_factor(scene.observed.reshape(-1), scene.plain.value.reshape(-1))
    if factor is not None and abs(factor) > 1e-3:
        yield f"{factor / math.sqrt(scene.config.head_dim):.5g}", factor * scene.plain.value


def _unrotated(scene: Scene) -> Iterator[Trial]:
    """Scores of q, k or both as they were before the rotation."""
    qkv = _qkv(scene)
    if qkv is None:
        return
    rotated = scene.inputs
    q, k = (REFERENCE.columns(qkv, *scene.config.qkv_columns(part)) for part in "qk")
    yield "q and k", scene.run(inputs=(q, k))
    yield "q", scene.run(inputs=(q, rotated[1]))
    yield "k", scene.run(inputs=(rotated[0], k))


def _qkv(scene: Scene) -> Float64 | None:
    keys = input_keys(
        StageKey(scene.key.layer, "q_post_rope"), scene.config.num_layers, scene.features
    )
    return scene.tensor(keys[0].stage)


def _shifted_keys(scene: Scene) -> Iterator[Trial]:
    q, k = scene.inputs
    if scene.num_tokens > 1:
        yield "later", scene.run(inputs=(q, np.roll(k, -1, axis=0)))
        yield "earlier", scene.run(inputs=(q, np.roll(k, 1, axis=0)))
        before = np.vstack([np.zeros_like(k[:1]), k[:-1]])
        yield "earlier (zeros first)", scene.run(inputs=(q, before))


def _exchanged(scene: Scene) -> Float64 | None:
    q, k = scene.inputs
    full = _unmasked(scene, q, k)
    return np.tril(full.swapaxes(1, 2))


def _unmasked(scene: Scene, q: Float64, k: Float64) -> Float64:
    config = scene.config
    queries = q.reshape(q.shape[0], config.num_heads, -1)
    keys = k.reshape(k.shape[0], config.num_kv_heads, -1)
    keys = np.repeat(keys, config.num_heads // config.num_kv_heads, axis=1)
    scores = np.einsum("thd,shd->hts", queries, keys, optimize=True)
    return scores / math.sqrt(config.head_dim)


def _strict_mask(scene: Scene) -> Float64:
    return np.tril(scene.plain.value, -1)


def _windows(scene: Scene) -> Iterator[Trial]:
    """Only the last positions are attended to."""
    tokens = scene.num_tokens
    for window in sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, tokens - 1, tokens - 2}):
        if 0 < window < tokens:
            keep = ~np.tri(tokens, tokens, -window, dtype=bool)
            if scene.key.stage == "attn_scores":
                yield f"{window}", np.where(keep, scene.plain.value, 0.0)
            else:
                yield f"{window}", _softmax(scene.inputs[0], keep & _causal(scene))


def _causal(scene: Scene, offset: int = 0) -> NDArray[np.bool_]:
    return np.tri(scene.num_tokens, scene.num_tokens, offset, dtype=bool)


def _softmax(scores: Float64, allowed: NDArray[np.bool_], axis: int = 2) -> Float64:
    """Softmax over the allowed positions, zero elsewhere and where none is allowed."""
    powers = np.where(allowed, scores, -np.inf)
    top = powers.max(axis=axis, keepdims=True)
    powers -= np.where(np.isfinite(top), top, 0.0)
    np.exp(powers, out=powers)
    total = powers.sum(axis=axis, keepdims=True)
    powers /= np.where(total > 0, total, 1.0)
    return powers


def _all_scores(scene: Scene) -> Iterator[tuple[str, Float64]]:
    """Scores with what lies above the diagonal: from q and k, or zeros there."""
    q, k = scene.tensor("q_post_rope"), scene.tensor("k_post_rope")
    if q is not None and k is not None:
        yield "", np.where(_causal(scene), scene.inputs[0], _unmasked(scene, q, k))
    yield ", with zeros for later positions", scene.inputs[0]


def _no_mask(scene: Scene) -> Iterator[Trial]:
    for name, scores in _all_scores(scene):
        yield name, _softmax(scores, np.ones(scores.shape[1:], dtype=bool))


def _mask_off(scene: Scene) -> Iterator[Trial]:
    every = list(_all_scores(scene))
    for offset in (1, -1, 2, -2):
        for name, scores in every:
            value = _softmax(scores, _causal(scene, offset))
            yield f"{offset:+d}{name}", value
            if offset < 0:  # a row without any position: engines give an even spread, or the first
                empty = ~_causal(scene, offset).any(axis=1)
                even, own = value.copy(), value.copy()
                even[:, empty] = 1 / scene.num_tokens
                own[:, empty, 0] = 1.0
                yield f"{offset:+d}{name}", even
                yield f"{offset:+d}{name}", own


def _mask_after(scene: Scene) -> Iterator[Trial]:
    for name, scores in _all_scores(scene):
        value = _softmax(scores, np.ones(scores.shape[1:], dtype=bool))
        yield name, np.tril(value)


def _wrong_axis(scene: Scene) -> Iterator[Trial]:
    scores, allowed = scene.inputs[0], _causal(scene)[None]
    everywhere = np.ones_like(scores, dtype=bool)
    full = [("", scores), next(_all_scores(scene))]
    for axis, name in ((1, "queries"), (0, "heads")):
        yield name, _softmax(scores, allowed & everywhere, axis)
        for _, every in full:
            yield f"{name}, and the mask after", np.tril(_softmax(every, everywhere, axis))
            yield f"{name}, without the mask", _softmax(every, everywhere, axis)
    masked = np.where(allowed & everywhere, scores, -np.inf).reshape(scores.shape[0], -1)
    yield "queries and positions", _softmax(masked, np.isfinite(masked), 1).reshape(scores.shape)


def _tempered(scene: Scene) -> Iterator[Trial]:
    dim, hidden = scene.config.head_dim, scene.config.hidden_size
    for name, factor in (
        ("divided by sqrt(D) once more", dim**-0.5), ("times sqrt(D)", dim**0.5),
        ("taken to base 2", math.log(2)), ("times log2(e)", 1 / math.log(2)),
        ("divided by sqrt(E)", hidden**-0.5), ("negated", -1.0),
        ("doubled", 2.0), ("halved", 0.5),
    ):  # fmt: skip
        yield name, REFERENCE.causal_softmax(scene.inputs[0] * factor)


def _no_sum(scene: Scene) -> Iterator[Trial]:
    scores = np.where(_causal(scene), scene.inputs[0], -np.inf)
    top = scores.max(axis=2, keepdims=True)
    with np.errstate(over="ignore"):
        yield "not divided by its sum", np.exp(scores - top)
        yield "not divided by its sum, nor less the maximum", np.exp(scores)
        powers = np.exp(scores - top)
    yield "with 1 added to the sum", powers / (1 + powers.sum(axis=2, keepdims=True))
    plain = scene.plain.value
    yield "applied twice", REFERENCE.causal_softmax(plain)
    yield "as its logarithm", np.log(np.where(plain > 0, plain, 1.0))


def _first_hidden(scene: Scene) -> Iterator[Trial]:
    allowed = _causal(scene).copy()
    if scene.num_tokens > 1:
        allowed[1:, 0] = False
        yield "first", _softmax(scene.inputs[0], allowed)


def _overflowed(scene: Scene) -> Iterator[Trial]:
    """exp without the maximum's subtraction, where it overflows to infinity and 0 after."""
    scores = np.where(_causal(scene), scene.inputs[0], -np.inf)
    for name, dtype in (("float32", np.float32), ("float16", np.float16)):
        limit = float(np.finfo(dtype).max)
        with np.errstate(over="ignore", invalid="ignore"):
            powers = np.exp(scores)
            for clipped in (np.minimum(powers, limit), np.where(powers > limit, np.inf, powers)):
                total = clipped.sum(axis=2, keepdims=True)
                value: Any = clipped / np.where(total > limit, np.inf, total)
                yield name, np.nan_to_num(value, nan=0.0, posinf=0.0)
                yield name, np.nan_to_num(value, nan=1.0, posinf=0.0)


def _rotated_values(scene: Scene) -> Float64:
    v = REFERENCE.rope(values_of(scene), scene.positions, scene.config.rope)
    return REFERENCE.weighted_values(scene.inputs[0], v, scene.config.num_kv_heads)


def _other_values(scene: Scene) -> Iterator[Trial]:
    """The weighted sum of something else than v."""
    softmax, qkv = scene.inputs
    kv = scene.config.num_kv_heads

    def weighted(v: Float64) -> Float64:
        return REFERENCE.weighted_values(softmax, v, kv)

    start, stop = scene.config.qkv_columns("v")
    k_start, k_stop = scene.config.qkv_columns("k")
    yield "k's columns", weighted(qkv[:, k_start:k_stop])
    yield "q's columns", weighted(qkv[:, : stop - start])
    bare = scene.tensor("qkv_matmul")
    if "qkv_bias" in scene.features and bare is not None:
        yield "v before its bias", weighted(bare[:, start:stop])
    rotated = scene.tensor("k_post_rope")
    if rotated is not None:
        yield "the rotated k", weighted(rotated)
    v = qkv[:, start:stop]
    if scene.num_tokens > 1:
        yield "v one token later", weighted(np.roll(v, -1, axis=0))
        yield "v one token earlier", weighted(np.roll(v, 1, axis=0))
        yield "v one token earlier (zeros first)", weighted(np.vstack([0 * v[:1], v[:-1]]))
    kv_heads = v.reshape(v.shape[0], kv, -1)
    yield (
        "v with heads and dimensions exchanged",
        weighted(v.reshape(v.shape[0], -1, kv).swapaxes(1, 2).reshape(v.shape)),
    )
    yield (
        "v with heads and tokens exchanged",
        weighted(kv_heads.reshape(kv, v.shape[0], -1).swapaxes(0, 1).reshape(v.shape)),
    )


def _other_weights(scene: Scene) -> Iterator[Trial]:
    softmax, kv = scene.inputs[0], scene.config.num_kv_heads
    v = values_of(scene)
    scores = scene.tensor("attn_scores")
    if scores is not None:
        yield "the scores before softmax", REFERENCE.weighted_values(np.tril(scores), v, kv)
    yield "transposed weights", REFERENCE.weighted_values(softmax.swapaxes(1, 2), v, kv)
    even = np.tril(np.ones(softmax.shape)) / np.arange(1, scene.num_tokens + 1)[None, :, None]
    yield "even weights", REFERENCE.weighted_values(even, v, kv)
    yield "the weights of the head before", REFERENCE.weighted_values(np.roll(softmax, 1, 0), v, kv)
    yield "the weights of the head after", REFERENCE.weighted_values(np.roll(softmax, -1, 0), v, kv)
    diagonal = np.tril(softmax, -1)
    yield "weights without the token itself", REFERENCE.weighted_values(diagonal, v, kv)


def _heads_mixed(scene: Scene) -> Iterator[Trial]:
    plain, heads = scene.plain.value, scene.config.num_heads
    by_head = plain.reshape(plain.shape[0], heads, -1)
    yield "dimensions before heads", by_head.swapaxes(1, 2).reshape(plain.shape)


_GROUPS = "how query heads are mapped to kv heads: h // (H/K)"
_SCALE = "the scale of the scores: 1/sqrt(D) with the head dimension"
_MASK = "the causal mask: token t sees positions s <= t"

ENTRIES = (
    Entry("kv heads {}", GROUPED, _other_groups, _GROUPS,
          "kv heads {} in the original model", "num_kv_heads and the order of the k and v rows"),
    Entry("attention scale {}", SCORES, _scales, _SCALE,
          "attention scale {} in the original model", "head_dim, or an attention multiplier"),
    Entry("attention scale {}", SCORES, _other_factor, _SCALE,
          "attention scale {} in the original model", "an attention multiplier that was lost",
          is_fallback=True),
    Entry("scores negated", SCORES, single(_sign), "the sign of the scores"),
    Entry("scores of {} before RoPE", SCORES, _unrotated,
          "which buffer the product reads: the rotated one"),
    Entry("scores against keys one token {}", SCORES, _shifted_keys,
          "the index into the key cache", is_causal=False),
    Entry("queries and keys exchanged", SCORES, single(_exchanged), "the order of q and k"),
    Entry("mask off by one (the token itself hidden)", SCORES, single(_strict_mask), _MASK),
    Entry("only the last {} positions attended to", SCORES | SOFTMAX, _windows,
          "a sliding window that this model does not have, or a tile that is dropped",
          "only the last {} positions attended to in the original model", "sliding_window"),
    Entry("no causal mask{}", SOFTMAX, _no_mask, _MASK, is_causal=False),
    Entry("mask off by one ({})", SOFTMAX, _mask_off, _MASK, is_causal=False),
    Entry("mask after softmax{}", SOFTMAX, _mask_after,
          "mask the scores with -inf before softmax, so that the rest sums to 1", is_causal=False),
    Entry("softmax over the wrong axis: {}", SOFTMAX, _wrong_axis,
          "the axis of softmax: the last one, positions", is_causal=False),
    Entry("softmax of scores {}", SOFTMAX, _tempered, "scale and base of the exponential"),
    Entry("softmax {}", SOFTMAX, _no_sum, "the sum in the denominator"),
    Entry("{} position hidden", SOFTMAX, _first_hidden, "padding, or the first index of the loop"),
    Entry("softmax without the maximum's subtraction, in {}", SOFTMAX, _overflowed,
          "subtract the row's maximum before exp"),
    Entry("RoPE applied to v too", VALUES, single(_rotated_values),
          "the rotation must touch q and k only"),
    Entry("weighted sum of {}", VALUES, _other_values, "where the kernel reads v", is_causal=False),
    Entry("weighted sum with {}", VALUES, _other_weights, "which attention weights are read",
          is_causal=False),
    Entry("output with {}", VALUES, _heads_mixed, "the transpose after the weighted sum"),
)  # fmt: skip
