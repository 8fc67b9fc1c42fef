"""What may be behind an operation: the arithmetics to replay it under, the finest first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from aprcore.engines.arithmetic import (
    ANGLES,
    CACHES,
    QUANTISED_CACHES,
    RESULTS,
    TF32_PRODUCTS,
    Arithmetic,
    attention_in,
    cached_in,
    product_arithmetics,
)
from aprcore.ground.precision import FLOAT16, FLOAT32
from aprcore.judging.replay import RecordedSide
from aprcore.network.stages import StageKey
from aprcore.quant.roundings import UNCERTAIN

# Blocks of 32 have a scale in float16 in ggml's files and products, and in float32 elsewhere.
SCALES = {"q8_0": ("q8_0", "q8_0-f32"), "q8_1": ("q8_1", "q8_0-f32")}
# A kernel may read its weights as it reads activations, and cut off bits or round them.
TILES = {"f16:f32": ("f16:f32", "f16:f32-both"), "bf16:f32": ("bf16:f32", "bf16:f32-both"),
         "tf32": TF32_PRODUCTS}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Arithmetics that may be behind an operation.

    Attributes:
        parts: One for each operation that it settles: the judged one first.
        rank: Of what may be taken only where nothing of a lower rank explains most sites.
    """

    parts: Mapping[str, Arithmetic]
    rank: int


@dataclass(frozen=True)
class Leeway:
    """What of an engine is open where only this much is said.

    Attributes:
        caches: Types that its cache may have.
        angles: How it may make RoPE's angles.
    """

    caches: tuple[str, ...] = CACHES
    angles: tuple[str, ...] = ANGLES


def leeway_of(stated: Mapping[str, str]) -> Leeway:
    """What is left open where a cache or the angles are told."""
    cache, angles = stated.get("kv_cache"), stated.get("angles")
    return Leeway(CACHES if cache is None else (cache,), ANGLES if angles is None else (angles,))


def choices(
    side: RecordedSide,
    part: str,
    judged: Sequence[StageKey],
    results: Sequence[Arithmetic],
    leeway: Leeway,
) -> Iterator[Choice]:
    """What may be behind an operation of which nothing is said.

    Args:
        side: The dump, with what is known of its engine so far.
        part: The operation.
        judged: Its stages that will be replayed.
        results: The types that its results may have, the finest first.
        leeway: What is known all the same.
    """
    for rank, result in enumerate(results):
        match part.partition(".")[0]:
            case "linear" | "head":
                # Factors are reproduced, so that what another weight's product does can come first.
                others = [x.activations for name, x in side.engine.parts.items()
                          if name.startswith(("linear.", "head."))]  # fmt: skip
                products = sorted(
                    product_arithmetics(), key=lambda x: x.activations not in others
                )  # fmt: skip
                for product in products:
                    yield Choice({part: with_results(product, result)}, rank)
            case "scores" | "values":
                for choice in _attention(side, part, judged, leeway.caches):
                    typed = {k: with_results(x, result) for k, x in choice.parts.items()}
                    yield Choice(typed, rank + choice.rank * len(results))
            case "rope":
                for angles in leeway.angles:
                    yield Choice(
                        {part: replace(result, iterates_angles=angles == "iterated")}, rank
                    )
            case "softmax":
                for late in (False, True):
                    yield Choice({part: replace(result, scales_late=late)}, rank)
            case _:
                yield Choice({part: result}, rank)


# What engines do who round activations and the cache, by the word for products: caches, and how
# RoPE's angles are made. llama.cpp's CPU path, its GPU paths, and kernels in TF32 throughout.
_TOGETHER = (
    ("ggml", "f16", "iterated"), ("ggml", "f32", "iterated"), ("q8_0", "f16", "iterated"),
    ("f16:f32", "f16", "iterated"), ("f16:f32", "f16", "direct"), ("bf16:f32", "bf16", "direct"),
    ("tf32", "tf32", "direct"), ("tf32-cut", "tf32-cut", "direct"),
)  # fmt: skip


def over_hidden(
    side: RecordedSide,
    part: str,
    judged: Sequence[StageKey],
    results: Sequence[Arithmetic],
    leeway: Leeway,
) -> Iterator[Choice]:
    """As `choices`, of stages that hide others: with what those compute in, unless that is settled.

    They are taken to compute as what is seen does, and then otherwise: a dump of layers' outputs
    alone shows what an engine rounds only there.

    Args:
        side, part, judged, results, leeway: As of `choices`.
    """
    settled = side.engine.parts
    hidden = dict.fromkeys(
        name for key in judged for name in side.hidden_parts(key)
        if name != part and name not in settled and name.partition(".")[0] not in settled
    )  # fmt: skip
    for choice in choices(side, part, judged, results, leeway):
        alike = with_results(RESULTS["f32"], choice.parts[part])
        yield replace(choice, parts={**choice.parts, **{
            name: alike for name in hidden if name not in choice.parts}})  # fmt: skip
    if not hidden:
        return
    plain, halves = RESULTS["f32"], (RESULTS["bf16"], RESULTS["f16"])
    behind, in_halves = _behind(side, hidden, leeway)
    for result in results:
        # A residual stream may be kept in float32 where what goes into it is not.
        for unseen in (result, *(half for half in halves if result is plain)):
            for parts in behind if unseen is result else in_halves:
                typed = {
                    name: parts[name] if name in parts and name in _TYPED
                    else with_results(parts.get(name, plain), unseen)
                    for name in hidden
                }  # fmt: skip
                yield Choice({part: result, **typed}, len(results))


# What `_behind` names the type of results of.
_TYPED = ("norm", "softmax")


def _behind(
    side: RecordedSide, hidden: Collection[str], leeway: Leeway
) -> tuple[list[dict[str, Arithmetic]], list[dict[str, Arithmetic]]]:
    """What hidden operations may do: all that is known, and what engines in half types do."""
    plain = RESULTS["f32"]
    products = [name for name in hidden if name.startswith(("linear", "head"))]
    behind: list[dict[str, Arithmetic]] = [{}]
    for scores, values in _caches(side, leeway.caches) if "values" in hidden else ():
        behind.append({"scores": scores, "values": values})
        if scores.activations == values.activations != "":
            alone = (replace(x, activations="") for x in (scores, values))
            behind.append(dict(zip(("scores", "values"), alone)))
    if "softmax" in hidden:
        behind += [{"softmax": RESULTS[word]} for word in ("bf16", "f16")]
    in_halves = [parts | norm for parts in behind for norm in ({}, {"norm": plain})]
    if products:
        words = {x.activations: x for x in product_arithmetics()}
        behind += [dict.fromkeys(products, x) for word, x in words.items() if word]
        for word, cache, angles in _TOGETHER if {"values", "rope"} <= set(hidden) else ():
            if cache not in (*leeway.caches, *TF32_PRODUCTS) or angles not in leeway.angles:
                continue
            is_tf32 = cache in TF32_PRODUCTS
            both = (attention_in(cache),) * 2 if is_tf32 else cached_in(cache)
            rope = replace(plain, iterates_angles=angles == "iterated")
            attention = dict(zip(("scores", "values", "rope"), (*both, rope)))
            behind.append(dict.fromkeys(products, words[word]) | attention)
    return behind, in_halves


def variants(
    side: RecordedSide,
    part: str,
    judged: Sequence[StageKey],
    stated: Arithmetic,
    leeway: Leeway,
) -> Iterator[Choice]:
    """What the words for an operation leave open: the type of a block's scale, what meets a cache.

    Args:
        side, part, judged: As of `choices`.
        stated: What was said of the operation.
        leeway: What was said of cache and angles.
    """
    for word in (SCALES | TILES).get(stated.activations, ()):
        if not stated.cached:
            yield Choice({part: replace(stated, activations=word)}, 0)
    if stated.cached in TF32_PRODUCTS:
        for told in (stated, *(with_results(attention_in(x), stated) for x in TF32_PRODUCTS)):
            yield Choice({part: told}, 0)
        yield Choice({part: with_results(RESULTS["f32"], stated)}, 0)
    elif stated.cached and len(leeway.caches) == 1:
        for choice in _attention(side, part, judged, leeway.caches):
            typed = {k: with_results(x, stated) for k, x in choice.parts.items()}
            yield Choice(typed, choice.rank)


def with_results(plain: Arithmetic, result: Arithmetic) -> Arithmetic:
    """What reads its factors as one arithmetic, and gives results as another."""
    is_coarse = plain.accumulated.digits < FLOAT32.digits
    return replace(
        plain, name=plain.name if plain.activations else result.name, stored=result.stored,
        accumulated=plain.accumulated if is_coarse else result.accumulated,
        rounds_on_dump=result.rounds_on_dump,
    )  # fmt: skip


def _attention(
    side: RecordedSide, part: str, judged: Sequence[StageKey], caches: Sequence[str]
) -> Iterator[Choice]:
    """What a cache makes of keys and values: of both, where the scores are not recorded."""
    if part == "values" and not _is_recorded(side, judged):
        yield from _fused(side, caches)
        return
    place = ("scores", "values").index(part)
    settled = side.engine.parts.get("scores")
    if part == "values" and settled is not None and settled.cached in caches:
        caches = [settled.cached, *(cache for cache in caches if cache != settled.cached)]
    for both in _caches(side, caches):
        told = both[place]
        for activations in dict.fromkeys((told.activations, "")):
            yield Choice({part: replace(told, activations=activations)}, 0)
    if "f32" in caches:
        for word in TF32_PRODUCTS:
            yield Choice({part: attention_in(word)}, 0)


def _caches(side: RecordedSide, caches: Sequence[str]) -> Iterator[tuple[Arithmetic, Arithmetic]]:
    """Scores and values with each cache.

    Blocks are of what the engine has: llama.cpp keeps rotated pairs side by side for some
    architectures, and turns quantised heads of whole 64s.
    """
    for cache in caches:
        if cache not in QUANTISED_CACHES:
            yield cached_in(cache)
        elif side.sizes()["D"] % 32 == 0:
            for rotated in (True, False) if side.sizes()["D"] % 64 == 0 else (False,):
                for paired in (False, True):
                    yield cached_in(cache, rotated=rotated, paired=paired)


def _fused(side: RecordedSide, caches: Sequence[str]) -> Iterator[Choice]:
    """Attention in one kernel: queries and weights rounded or not, sums in float32 or float16.

    llama.cpp's keeps sums in float16 where the cache has that type and few tokens are run, and
    rounds queries then; a text that is run in pieces may have tokens of either kind. A cache in
    float32 it casts to float16 first.
    """
    if "f32" in caches and "f16" not in caches:
        caches = [*caches, "f16"]
    for scores, values in _caches(side, caches):
        plain = replace(values, activations="")
        for queries in dict.fromkeys((scores.activations, "")):
            yield Choice({"values": plain, "scores": replace(scores, activations=queries)}, 0)
        if values.activations:
            yield Choice({"values": values, "scores": scores}, 0)
    for word in TF32_PRODUCTS if "f32" in caches else ():
        yield Choice({"values": attention_in(word), "scores": attention_in(word)}, 0)
    if "f16" in caches:
        scores, values = cached_in("f16")
        coarse = replace(values, activations="", accumulated=FLOAT16)
        yield Choice({"values": coarse, "scores": scores}, 1)
        mixed = replace(scores, activations=UNCERTAIN)
        yield Choice({"values": coarse, "scores": mixed}, 2)


def _is_recorded(side: RecordedSide, judged: Sequence[StageKey]) -> bool:
    """Whether the attention weights that the stages read are there."""
    return any(side.tensor(side.graph.inputs(key)[0]) is not None for key in judged)
