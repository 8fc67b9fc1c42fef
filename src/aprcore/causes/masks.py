"""What goes wrong with what each query sees: masks, windows and the softmax over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from aprcore.causes.scene import ORIGINAL, Bools, Entry, Float64, Scene, Trial, single
from aprcore.causes.solving import round_number
from aprcore.network.mask import Mask
from aprcore.network.operations import Scores, Softmax

MASKED, SOFTMAX = (Scores, Softmax), (Softmax,)
EVERYTHING = Mask(None, None)
# Windows that are taken from what is observed, at most.
MOST_SHOWN = 3
# What a mask adds, at the most: more is none at all.
LARGEST_ADDED = -0.01
# Sinks of all heads that lie in less are one.
SAME_LOGIT = 1e-2


def seen(scene: Scene) -> Bools:
    """What each query sees, [T, S]: of scores, of their softmax or of what it is multiplied by."""
    weights = scene.plain.value if isinstance(scene.operation, MASKED) else scene.inputs[0]
    masked = scene.operation if isinstance(scene.operation, MASKED) else (
        scene.graph.operation(scene.source(0))
    )  # fmt: skip
    mask: Mask = getattr(masked, "mask", EVERYTHING)
    return mask.allowed(*weights.shape[1:])


def _softmax(scores: Float64, allowed: Bools, axis: int = 2) -> Float64:
    """Softmax over the allowed positions, zero elsewhere and where none is allowed."""
    powers = np.where(allowed, scores, -np.inf)
    top = powers.max(axis=axis, keepdims=True)
    powers -= np.where(np.isfinite(top), top, 0.0)
    np.exp(powers, out=powers)
    total = powers.sum(axis=axis, keepdims=True)
    powers /= np.where(total > 0, total, 1.0)
    return powers


def _all_scores(scene: Scene) -> Iterator[Trial]:
    """Scores with what the mask hides: as dumped, from q and k, or zeros there."""
    key, hidden = scene.source(0), ~seen(scene)
    dumped = scene.unmasked(key)
    if dumped is not None and np.isfinite(dumped).all() and np.any(dumped * hidden):
        yield "", np.where(hidden, dumped, scene.inputs[0])
    operation = scene.graph.operation(key)
    rotated = scene.factors_of(key)
    if isinstance(operation, Scores) and rotated is not None:
        whole = operation.altered(mask=EVERYTHING)(scene.backend, scene.site, *rotated)
        yield "", np.where(hidden, whole, scene.inputs[0])
    yield ", with zeros for later positions", scene.inputs[0]


def _under(scene: Scene, masks: Iterable[tuple[str, Mask]]) -> Iterator[Trial]:
    """The stage under other masks."""
    sound, operation = seen(scene), scene.operation
    every: list[Trial] = []
    for name, mask in masks:
        allowed = mask.allowed(*sound.shape)
        shows_more = bool((allowed & ~sound).any())
        if isinstance(operation, Scores):
            if not shows_more:  # nobody looks at the scores of what the model's mask hides
                yield name, np.where(allowed, scene.plain.value, 0.0)
            continue
        if shows_more and not every:
            every = list(_all_scores(scene))
        for zeros, scores in every if shows_more else [("", scene.inputs[0])]:
            yield name + zeros, _softmax(scores, allowed)


def _other_order(scene: Scene) -> Iterator[Trial]:
    """A causal mask that is missing, or one that should not be there."""
    own: Mask = scene.operation.mask
    other = replace(scene.config, is_causal=not own.is_causal).mask(scene.key.layer)
    if own.is_causal:
        masks = {EVERYTHING: "no causal mask, nor a window", Mask(own.behind, None): "",
                 other: ""}  # fmt: skip
        yield from _under(scene, ((what or "no causal mask", m) for m, what in masks.items()))
    else:
        what = "a causal mask" if scene.in_file else "a causal mask (is_causal: false ignored)"
        yield from _under(scene, ((what, m) for m in {other, Mask(own.behind, 0)}))


def _windows(scene: Scene) -> Iterator[Trial]:
    """Another window than this layer's, or none."""
    own: Mask = scene.operation.mask
    size = None if own.behind is None else own.behind + int(own.is_causal)
    positions = scene.plain.value.shape[2]
    tried, masks = {own}, []
    for what, window in _window_sizes(scene, size, positions):
        mask = replace(scene.config, windows=(window,)).mask(None)
        if mask not in tried and (window is None or 0 < window < positions):
            tried.add(mask)
            masks.append((what, mask))
    yield from _under(scene, masks)


def _window_sizes(
    scene: Scene, own: int | None, positions: int
) -> Iterator[tuple[str, int | None]]:
    usual = {2**n for n in range(11)} | {positions - 1, positions - 2} | _windows_shown(scene)
    if own is None:
        for window in scene.config.windows:
            yield f"window of {window}, which other layers have", window
        for window in sorted(usual):
            yield f"only the last {window} positions attended to", window
        return
    ignored = f"window of {own} ignored: attends to everything before"
    yield "no window" if scene.in_file else ignored, None
    for window in scene.config.windows:
        yield f"window of {window}, which other layers have, in place of {own}", window
    for window in (own + 1, own - 1):
        yield f"window off by one: {window} in place of {own}", window
    for window in (2 * own, own // 2, *sorted(usual)):
        yield f"window of {window} in place of {own}", window


def _windows_shown(scene: Scene) -> set[int]:
    """The windows that most rows show, by where their values begin."""
    observed = scene.observed.reshape(scene.plain.value.shape)
    queries, positions = scene.plain.value.shape[1:]
    own_place = np.arange(positions - queries, positions)
    behind = own_place - np.argmax(observed != 0, axis=2)  # [H, T]
    cut = behind[(behind < own_place) & (behind >= 0)]
    found = np.argsort(-np.bincount(cut, minlength=1), kind="stable")[:MOST_SHOWN]
    return {int(n) + int(scene.operation.mask.is_causal) for n in found}


def _chunks(scene: Scene) -> Iterator[Trial]:
    """A part of the text that does not see what came before it."""
    own: Mask = scene.operation.mask
    queries, positions = scene.plain.value.shape[1:]
    if queries != positions or not own.is_causal:
        return
    sound, place = seen(scene), np.arange(positions)
    first = scene.first_wrong_token
    sizes = {2**n for n in range(1, 11)} | {first}
    masks = [(f"in chunks of {n} tokens", place // n * n) for n in sorted(sizes) if 1 < n < queries]
    starts = sorted({*range(1, min(queries, 17)), first, queries - 1} - {0})
    if not scene.is_observed:  # each runs a whole span
        starts = [queries - 1] if queries > 1 else []
    masks += [(f"from token {n} on", np.where(place < n, 0, n)) for n in starts]
    for name, begins in masks:
        allowed = sound & (place[None, :] >= begins[:, None])
        if isinstance(scene.operation, Scores):
            yield name, np.where(allowed, scene.plain.value, 0.0)
        else:
            yield name, _softmax(scene.inputs[0], allowed)


def _finite_mask(scene: Scene) -> Iterator[Trial]:
    """What is hidden gets a number added, and is seen a little."""
    sound = seen(scene)
    if sound.all():
        return
    scores = next(value for _, value in _all_scores(scene))
    shown = _mask_shown(scene, scores, sound)
    usual = (-1e4, -65504.0, -1e9, -100.0, -10.0, -1.0)
    for added in dict.fromkeys((*usual, *shown)):
        every = np.where(sound, scores, scores + added)
        yield f"{added:g}", _softmax(every, np.ones_like(sound))
    for low in (-1e4, -65504.0):  # in place of the score, which is seen where all scores are lower
        yield f"{low:g}", _softmax(np.where(sound, scores, low), np.ones_like(sound))


def _mask_shown(scene: Scene, scores: Float64, sound: Bools) -> Iterator[float]:
    """What was added, from what a hidden position weighs against the token itself."""
    observed = scene.observed.reshape(scores.shape)
    queries, positions = sound.shape
    own = np.eye(queries, positions, positions - queries, dtype=bool)
    itself = observed[:, own][:, :, None]
    hidden = np.where(sound, 0.0, observed)
    if not ((hidden > 0) & (itself > 0)).any():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        added = np.log(hidden / itself) - (scores - scores[:, own][:, :, None])
    found = float(np.median(added[np.isfinite(added)]))
    if found < LARGEST_ADDED:
        yield round_number(found, 1e-4)


def _solved_temperature(scene: Scene) -> Iterator[Trial]:
    """The factor on the scores under which they give what was observed."""
    scores, sound = scene.inputs[0], seen(scene)
    observed = scene.observed.reshape(scores.shape)
    if not scene.is_observed:
        return
    rows = scene.wrong.reshape(scores.shape).any(axis=2, keepdims=True)
    weight = np.where(rows & sound & (observed > 1e-6), observed, 0.0)
    total = weight.sum(axis=2, keepdims=True)
    total = np.where(total > 0, total, 1.0)
    logs = np.log(np.where(weight > 0, observed, 1.0))

    def centred(x: Float64) -> Float64:
        return x - (weight * x).sum(axis=2, keepdims=True) / total

    x, y = centred(scores), centred(logs)
    energy = float((weight * x * x).sum())
    factor = float((weight * x * y).sum()) / energy if energy > 0 else 0.0
    if factor > 0:
        name, temperature = f"{1 / factor:.5g} (scores times {factor:.5g})", 1 / factor
        yield name, scene.run(scores * factor)
        # Large scores divided in float32 are off by more than a softmax of them would be.
        single = scores.astype(np.float32) / np.float32(round_number(temperature, 1e-5))
        yield name, scene.run(single.astype(np.float64))


def _sinks(scene: Scene) -> Iterator[Trial]:
    """One more logit in the sum of each head, which no position has: gpt-oss's sinks."""
    scores, sound = np.where(seen(scene), scene.inputs[0], -np.inf), seen(scene)
    observed = scene.observed.reshape(scores.shape)
    top = scores.max(axis=2)
    total = np.exp(scores - top[:, :, None]).sum(axis=2)
    kept = (observed * sound).sum(axis=2)
    if not ((kept > 0) & (kept < 1)).any(axis=1).all():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = np.log(total / kept - total) + top
    sink = np.array([np.median(row[np.isfinite(row)]) for row in logits])[:, None, None]
    powers = np.exp(scores - top[:, :, None])
    value = powers / (total[:, :, None] + np.exp(sink - top[:, :, None]))
    spread = float(sink.max() - sink.min())
    if spread < SAME_LOGIT:
        yield f"one logit of {round_number(float(sink.mean()), 1e-3):g} more", value
    else:
        yield f"a logit more for each head, {sink.min():.4g} to {sink.max():.4g} (a sink)", value


def alibi_slopes(heads: int) -> Float64:
    """The slope of each head. Source: ALiBi (arXiv:2108.12409), for any number of heads."""
    whole = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return np.asarray(slopes)


def _alibi(scene: Scene) -> Iterator[Trial]:
    """A bias that grows with the distance."""
    queries, positions = scene.plain.value.shape[1:]
    if isinstance(scene.operation, Scores) and not scene.is_observed:
        return  # what reads the scores says the same, and is in the span too
    distance = np.arange(positions)[None] - np.arange(positions - queries, positions)[:, None]
    bias = alibi_slopes(scene.plain.value.shape[0])[:, None, None] * distance
    if isinstance(scene.operation, Scores):
        yield "", np.where(seen(scene), scene.plain.value + bias, 0.0)
        scaled = scene.plain.value + scene.operation.scale * bias
        yield " before the scale", np.where(seen(scene), scaled, 0.0)
    else:
        yield "", scene.run(scene.inputs[0] + bias)


def _itself_hidden(scene: Scene) -> Float64:
    queries, positions = scene.plain.value.shape[1:]
    return scene.plain.value * ~np.eye(queries, positions, positions - queries, dtype=bool)


def _mask_off(scene: Scene) -> Iterator[Trial]:
    own: Mask = scene.operation.mask
    if own.ahead is None:
        return
    for offset in (1, -1, 2, -2):
        mask = own._replace(ahead=own.ahead + offset)
        # A row without any position: engines give an even spread, or the first.
        empty = ~mask.allowed(*scene.plain.value.shape[1:]).any(axis=1)
        for name, value in _under(scene, [(f"{offset:+d}", mask)]):
            yield name, value
            if empty.any():
                even, own_place = value.copy(), value.copy()
                even[:, empty] = 1 / value.shape[2]
                own_place[:, empty, 0] = 1.0
                yield name, even
                yield name, own_place


def _mask_after(scene: Scene) -> Iterator[Trial]:
    sound, own = seen(scene), scene.operation.mask
    for name, scores in _all_scores(scene):
        yield name, _softmax(scores, np.ones_like(sound)) * sound
        if own.behind is not None:
            order = own._replace(behind=None).allowed(*sound.shape)
            yield f", of the window alone{name}", _softmax(scores, order) * sound


def _mask_before_cap(scene: Scene) -> Float64 | None:
    """What is hidden as minus infinity comes out of the cap as no more than its negative."""
    masked = scene.graph.operation(scene.source(0))
    if not isinstance(masked, Scores) or masked.cap is None:
        return None
    scores = np.where(seen(scene), scene.inputs[0], -masked.cap)
    return _softmax(scores, np.ones_like(scores, dtype=bool))


def _wrong_axis(scene: Scene) -> Iterator[Trial]:
    scores, sound = scene.inputs[0], seen(scene)
    everywhere = np.ones_like(scores, dtype=bool)
    full = [("", scores), next(_all_scores(scene))]
    for axis, name in ((1, "queries"), (0, "heads")):
        yield name, _softmax(scores, sound & everywhere, axis)
        for _, every in full:
            yield f"{name}, and the mask after", _softmax(every, everywhere, axis) * sound
            yield f"{name}, without the mask", _softmax(every, everywhere, axis)
    flat = scores.reshape(scores.shape[0], -1)
    yield "queries and positions", _softmax(flat, sound.reshape(-1), 1).reshape(scores.shape)


def _tempered(scene: Scene) -> Iterator[Trial]:
    dim, hidden = scene.config.head_dim, scene.config.hidden_size
    for name, factor in (
        ("divided by sqrt(D) once more", dim**-0.5), ("times sqrt(D)", dim**0.5),
        ("taken to base 2", math.log(2)), ("times log2(e)", 1 / math.log(2)),
        ("divided by sqrt(E)", hidden**-0.5), ("negated", -1.0),
        ("doubled", 2.0), ("halved", 0.5),
    ):  # fmt: skip
        yield name, scene.run(scene.inputs[0] * factor)


def _no_sum(scene: Scene) -> Iterator[Trial]:
    scores = np.where(seen(scene), scene.inputs[0], -np.inf)
    top = scores.max(axis=2, keepdims=True)
    with np.errstate(over="ignore"):
        powers = np.exp(scores - top)
        yield "not divided by its sum", powers
        yield "not divided by its sum, nor less the maximum", np.exp(scores)
    total = powers.sum(axis=2, keepdims=True)
    yield "with 1 added to the sum", powers / (np.exp(-top) + total)
    yield "with 1 added to the sum, after the maximum is subtracted", powers / (1 + total)
    plain = scene.plain.value
    yield "applied twice", scene.run(plain)
    yield "as its logarithm", np.log(np.where(plain > 0, plain, 1.0))


def _first_hidden(scene: Scene) -> Float64 | None:
    allowed = seen(scene)
    allowed[1:, 0] = False
    return _softmax(scene.inputs[0], allowed) if scene.num_tokens > 1 else None


def _overflowed(scene: Scene) -> Iterator[Trial]:
    """exp without the maximum's subtraction, where it overflows to infinity and 0 after."""
    scores = np.where(seen(scene), scene.inputs[0], -np.inf)
    for name, dtype in (("float32", np.float32), ("float16", np.float16)):
        limit = float(np.finfo(dtype).max)
        with np.errstate(over="ignore", invalid="ignore"):
            powers = np.exp(scores)
            for clipped in (np.minimum(powers, limit), np.where(powers > limit, np.inf, powers)):
                total = clipped.sum(axis=2, keepdims=True)
                value: Any = clipped / np.where(total > limit, np.inf, total)
                yield name, np.nan_to_num(value, nan=0.0, posinf=0.0)
                yield name, np.nan_to_num(value, nan=1.0, posinf=0.0)


_MASK = "the causal mask: token t sees positions s <= t"

ENTRIES = (
    Entry("mask off by one (the token itself hidden)", (Scores,), single(_itself_hidden), _MASK),
    Entry("{}", MASKED, _windows,
          "the sliding window: which layers have one, and that it counts the token itself; or a "
          "tile that is dropped", ORIGINAL, "sliding_window, and which layers have it"),
    Entry("{}", MASKED, _other_order, _MASK + ", unless is_causal is false", ORIGINAL,
          "is_causal of the original config", is_causal=False),
    Entry("mask off by one ({})", SOFTMAX, _mask_off, _MASK, is_causal=False),
    Entry("mask after softmax{}", SOFTMAX, _mask_after,
          "mask the scores with -inf before softmax, so that the rest sums to 1", is_causal=False),
    Entry("mask before the soft cap, which makes its -inf a finite score", SOFTMAX,
          single(_mask_before_cap), "cap the scores first, and mask what comes out",
          is_causal=False),
    Entry("softmax over the wrong axis: {}", SOFTMAX, _wrong_axis,
          "the axis of softmax: the last one, positions", is_causal=False),
    Entry("softmax of scores {}", SOFTMAX, _tempered, "scale and base of the exponential"),
    Entry("softmax {}", SOFTMAX, _no_sum, "the sum in the denominator"),
    Entry("nothing before it seen {}", MASKED, _chunks,
          "the cache of earlier chunks: a chunk of the prompt must see all that came before it"),
    Entry("mask adds {} in place of -inf", SOFTMAX, _finite_mask,
          "mask with -inf, or with what no score comes near", is_causal=False),
    Entry("softmax with {}", SOFTMAX, _sinks, "the sum in the denominator: what is in it besides "
          "the positions", ORIGINAL, "attention sinks of the original model", is_fallback=True),
    Entry("softmax at a temperature of {}", SOFTMAX, _solved_temperature,
          "what the scores are multiplied by before softmax", ORIGINAL,
          "an attention multiplier that was lost", is_fallback=True),
    Entry("ALiBi added{}", MASKED, _alibi,
          "the bias of the scores: this model has rotary positions alone", ORIGINAL,
          "the architecture this file declares: the original has ALiBi"),
    Entry("first position hidden", SOFTMAX, single(_first_hidden),
          "padding, or the first index of the loop"),
    Entry("softmax without the maximum's subtraction, in {}", SOFTMAX, _overflowed,
          "subtract the row's maximum before exp"),
)  # fmt: skip
