"""What goes wrong in attention that is one kernel, where more than one stage is wrong at once.

Engines with flash attention dump no scores and no softmax, some not even q and k after RoPE. A
fault that is in both q and k, or in both keys and values, then shows in one tensor, and no single
stage of the span explains it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from aprcore.causes import rope, rope_schedules
from aprcore.causes.attention import head_maps
from aprcore.causes.caches import other_layers, values_of
from aprcore.causes.scene import ORIGINAL, REFERENCE, Entry, Float64, Scene, Trial
from aprcore.causes.solving import minimise, off_by_a_token, round_number
from aprcore.engines.estimate import Estimate
from aprcore.judging.layouts import layout_of
from aprcore.network.operations import Scores, Softmax, Values
from aprcore.network.stages import StageKey

VALUES = (Values,)
# Blocks of keys that kernels go through.
BLOCKS = (4, 8, 16, 32, 64, 128, 256)
# Spans are run whole for every alternative; beyond so many tokens that takes too long.
LONGEST = 256

Tensors = Mapping[StageKey, Float64]


def _is_fused(scene: Scene) -> bool:
    """Whether the weights of attention were not dumped, and were made here from scores."""
    softmax = scene.source(0)
    return (
        scene.num_tokens <= LONGEST
        and scene.recorded(softmax) is None
        and isinstance(scene.graph.operation(softmax), Softmax)
        and isinstance(scene.graph.operation(scene.source(0, 0)), Scores)
    )


def _tensor(scene: Scene, key: StageKey, known: Tensors) -> Float64 | None:
    """A tensor that is known or dumped, or is made of such."""
    if key in known:
        return known[key]
    dumped = scene.tensor(key)
    if dumped is not None:
        return dumped
    if key.layer != scene.key.layer and key == scene.graph.stream(scene.key.layer):
        return None
    inputs = []
    for source in scene.graph.inputs(key):
        found = _tensor(scene, source, known)
        if found is None:
            return None
        inputs.append(found)
    operation = scene.graph.operation(key)
    if operation is None or not inputs:
        return None
    made: Float64 = operation(scene.backend_of(key), replace(scene.site, layer=key.layer), *inputs)
    return made


def _finish(scene: Scene, known: Tensors, qkv: Float64 | None = None) -> Float64 | None:
    """Attention with some of its tensors replaced."""
    softmax = _tensor(scene, scene.source(0), known)
    return None if softmax is None else scene.run(softmax, scene.inputs[1] if qkv is None else qkv)


def _q_and_k(scene: Scene) -> tuple[StageKey, StageKey]:
    return scene.source(0, 0, 0), scene.source(0, 0, 1)


def _other_heads(scene: Scene) -> Iterator[Trial]:
    """Query heads that read other kv heads, keys and values alike."""
    if not _is_fused(scene):
        return
    heads, kv = scene.config.num_heads, scene.config.num_kv_heads
    q, k = (_tensor(scene, key, {}) for key in _q_and_k(scene))
    if q is None or k is None or heads == kv:
        return
    site = replace(scene.site, config=replace(scene.config, num_kv_heads=heads))
    key = scene.source(0, 0)
    scores, softmax = scene.graph.operation(key), scene.graph.operation(scene.source(0))
    assert scores is not None and softmax is not None
    v = values_of(scene, scene.inputs[1])
    tried = {(np.arange(heads) // (heads // kv)).tobytes()}
    for name, index in head_maps(heads, kv):
        if index.tobytes() in tried:
            continue
        tried.add(index.tobytes())
        keys, values = (x.reshape(len(x), kv, -1)[:, index].reshape(len(x), -1) for x in (k, v))
        weights = softmax(REFERENCE, site, scores(scene.backend_of(key), site, q, keys))
        yield name, scene.backend.weighted_values(weights, values, heads)


def _rotated_otherwise(scene: Scene) -> Iterator[Trial]:
    """Each fault of RoPE in both q and k, where neither was dumped."""
    if not _is_fused(scene) or any(scene.recorded(key) is not None for key in _q_and_k(scene)):
        return
    keys = _q_and_k(scene)
    inner = [_inner(scene, key) for key in keys]
    if inner[0] is None or inner[1] is None:
        return
    for entry in (*rope.ENTRIES, *rope_schedules.ENTRIES):
        title = entry.title(inner[0])
        # Turning both by one angle changes nothing; both unrotated is an entry of the scores.
        is_told = entry.is_fallback or not entry.is_causal or entry is rope.NOT_APPLIED
        if is_told or title is None:
            continue
        for (name, q), (other, k) in zip(entry.outputs(inner[0]), entry.outputs(inner[1])):
            value = _finish(scene, dict(zip(keys, (q, k)))) if name == other else None
            if value is not None:
                yield title.format(name), value


def _inner(scene: Scene, key: StageKey) -> Scene | None:
    """A stage inside the span, taken to be right."""
    inputs = [_tensor(scene, source, {}) for source in scene.graph.inputs(key)]
    value = _tensor(scene, key, {})
    if value is None or any(x is None for x in inputs):
        return None
    sizes = scene.config.sizes(scene.num_tokens)
    return replace(
        scene,
        key=key,
        inputs=tuple(x for x in inputs if x is not None),
        observed=value,
        plain=Estimate(value, np.zeros_like(value)),
        layout=layout_of(key, sizes, value.size),
    )


def _cache_rows(scene: Scene) -> Iterator[Trial]:
    """Keys and values of other tokens, or of another layer."""
    if not _is_fused(scene):
        return
    key = _q_and_k(scene)[1]
    k, qkv = _tensor(scene, key, {}), scene.inputs[1]
    if k is None:
        return
    for (name, keys), (_, rows) in zip(off_by_a_token(k), off_by_a_token(qkv)):
        value = _finish(scene, {key: keys}, rows)
        if value is not None:
            yield f"one token {name}", value
    empty = [np.vstack([0 * x[:1], x[:-1]]) for x in (k, qkv)]
    value = _finish(scene, {key: empty[0]}, empty[1])
    if value is not None:
        yield "one token earlier (zeros first)", value
    for layer, other in other_layers(scene, key):
        theirs = _tensor(scene, other, {})
        joined = scene.tensor(StageKey(layer, scene.source(1).stage))
        if theirs is not None and joined is not None and joined.shape == qkv.shape:
            value = _finish(scene, {key: theirs}, joined)
            if value is not None:
                yield f"of layer {layer}", value


def _unrescaled(scene: Scene) -> Iterator[Trial]:
    """Blocks of keys whose running maximum grows, and what was summed before stays as it was."""
    scores = _tensor(scene, scene.source(0, 0), {}) if _is_fused(scene) else None
    if scores is None:
        return
    masked: Softmax = scene.graph.operation(scene.source(0))  # type: ignore[assignment]
    hidden = np.where(masked.mask.allowed(*scores.shape[1:]), scores, -np.inf)
    v, kv = values_of(scene, scene.inputs[1]), scene.config.num_kv_heads
    for size in (n for n in BLOCKS if n < scores.shape[2]):
        starts = range(0, scores.shape[2], size)
        blocks = np.stack([hidden[:, :, n : n + size].max(axis=2) for n in starts])
        running = np.maximum.accumulate(blocks, axis=0)  # the maximum after each block
        stale = np.repeat(running, size, axis=0)[: scores.shape[2]].transpose(1, 2, 0)
        with np.errstate(invalid="ignore", over="ignore"):
            as_summed = np.exp(hidden - np.where(np.isfinite(stale), stale, 0.0))
            right = np.exp(hidden - running[-1][:, :, None])
        for name, numerator, denominator in (
            ("the sum of values and the sum of weights", as_summed, as_summed),
            ("the sum of values", as_summed, right),
            ("the sum of weights", right, as_summed),
        ):
            weights = numerator / denominator.sum(axis=2, keepdims=True)
            if np.isfinite(weights).all():
                what = f"{name}, in blocks of {size} keys"
                yield what, scene.backend.weighted_values(weights, v, kv)


def _other_scale(scene: Scene) -> Iterator[Trial]:
    """The factor on the scores, solved for on the last token."""
    scores = _tensor(scene, scene.source(0, 0), {}) if _is_fused(scene) else None
    if scores is None or not scene.is_observed:
        return
    operation: Scores = scene.graph.operation(scene.source(0, 0))  # type: ignore[assignment]
    if operation.cap is not None:
        return
    v, kv = values_of(scene, scene.inputs[1]), scene.config.num_kv_heads
    last, observed = scores[:, -1:], scene.observed.reshape(scene.plain.value.shape)[-1:]
    softmax = scene.graph.operation(scene.source(0))
    assert softmax is not None

    def attended(factor: float, rows: Float64) -> Float64:
        weights = softmax(REFERENCE, scene.site, rows * factor)
        return scene.backend.weighted_values(weights, v, kv)

    def misfit(log_factor: float) -> float:
        return float(np.square(attended(float(np.exp(log_factor)), last) - observed).sum())

    factor = float(np.exp(minimise(misfit, np.linspace(np.log(0.02), np.log(50), 60))))
    yield f"{round_number(factor * operation.scale, 1e-4):g}", attended(factor, scores)


def _sinks(scene: Scene) -> Iterator[Trial]:
    """One more logit in each head's sum, from the factor that it leaves of every output."""
    scores = _tensor(scene, scene.source(0, 0), {}) if _is_fused(scene) else None
    if scores is None or not scene.is_observed:
        return
    masked: Softmax = scene.graph.operation(scene.source(0))  # type: ignore[assignment]
    hidden = np.where(masked.mask.allowed(*scores.shape[1:]), scores, -np.inf)
    heads, plain = scene.config.num_heads, scene.plain.value
    by_head = plain.reshape(len(plain), heads, -1)
    observed = scene.observed.reshape(by_head.shape)
    energy = np.square(by_head).sum(axis=2)
    kept = (observed * by_head).sum(axis=2) / np.where(energy > 0, energy, 1.0)  # [T, H]
    total = np.logaddexp.reduce(hidden, axis=2).T
    if not ((kept > 0) & (kept < 1)).any(axis=0).all():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = total + np.log(1 / kept - 1)
    sink = np.array([np.median(column[np.isfinite(column)]) for column in logits.T])
    value = by_head / (1 + np.exp(sink - total))[:, :, None]
    yield f"{sink.min():.4g} to {sink.max():.4g}", value.reshape(plain.shape)


_CACHE = "which rows of the cache attention reads: its layer's, from the first on"

ENTRIES = (
    Entry("kv heads {}", VALUES, _other_heads,
          "how query heads are mapped to kv heads: h // (H/K)", ORIGINAL,
          "num_kv_heads and the order of the k and v rows"),
    Entry("q and k: {}", VALUES, _rotated_otherwise, "the rotation of q and k", "q and k: {}",
          "rope_theta, rope_scaling and rope_type of this file", is_causal=False),
    Entry("keys and values {}", VALUES, _cache_rows, _CACHE, is_causal=False),
    Entry("no rescale between blocks of flash attention, of {}", VALUES, _unrescaled,
          "when the running maximum grows, both sums so far are multiplied by "
          "exp(old maximum - new maximum)"),
    Entry("softmax with a logit more for each head, {} (a sink)", VALUES, _sinks,
          "the sum in the denominator: what is in it besides the positions", ORIGINAL,
          "attention sinks of the original model", is_fallback=True),
    Entry("attention scale {}", VALUES, _other_scale,
          "the scale of the scores: 1/sqrt(D) with the head dimension, unless the model states one",
          ORIGINAL, "an attention multiplier that was lost", is_fallback=True),
)  # fmt: skip
