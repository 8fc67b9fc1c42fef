"""Which arithmetic explains a dump: what its engine rounds, found operation by operation.

Most stages of most dumps are sound. So each operation is replayed in several layers under one
arithmetic after the other, the finest first, and the finest that explains most of its sites is what
the engine is then held to everywhere. A site that needs a coarser one is a finding.

What an engine rounds on its way into a product can be reproduced, and explains an output exactly or
not at all. A type that results are rounded to shows in the values themselves: where they are not
all numbers of that type, nothing is explained by it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from aprcore.engines.arithmetic import (
    GGML,
    PARTS,
    RESULTS,
    TF32_PRODUCTS,
    Arithmetic,
    EngineArithmetic,
    cached_in,
    engine_arithmetic,
    group,
)
from aprcore.engines.estimate import is_blocked
from aprcore.ground.precision import BFLOAT16, FLOAT16, FLOAT32, FLOAT_TYPES, FloatType
from aprcore.judging.arithmetic_choices import (
    Choice,
    Leeway,
    choices,
    leeway_of,
    over_hidden,
    variants,
    with_results,
)
from aprcore.judging.layouts import alternatives, layout_of
from aprcore.judging.noise import assess
from aprcore.judging.replay import Floats, RecordedSide
from aprcore.network.stages import StageKey

# Layers looked at, evenly spread: enough for a majority that one wrong layer does not change.
LAYERS = 8
LAYERS_OF_PRODUCTS = 3  # whose weights cost the most to read
PASSES = 2
# What a rounding that is reproduced leaves of the error, at most: noise alone leaves all of it.
REPRODUCED = 0.75


class Inferred(NamedTuple):
    """What was found of an operation.

    Attributes:
        part: The operation, as in `EngineArithmetic.parts`.
        arithmetic: What explains it, or None where nothing explains most of its sites.
        explained, judged: Sites that it explains, of those that were replayed.
    """

    part: str
    arithmetic: Arithmetic | None
    explained: int
    judged: int


def infer_arithmetic(
    side: RecordedSide,
    keys: Iterable[StageKey],
    stated: Mapping[str, str],
    dtype: str | None = None,
) -> tuple[EngineArithmetic, list[Inferred]]:
    """Find what an engine computes in.

    Args:
        side: The dump, with any arithmetic.
        keys: The stages that it holds.
        stated: What is said of it (`engine_arithmetic`); that is taken as it is.
        dtype: The type of the dump's values, if it says so.

    Returns:
        The arithmetic, and what was found of each operation that nothing was said of.
    """
    said = engine_arithmetic(stated)
    leeway = leeway_of(stated)
    sites = _sites(side, keys)
    if "all" in stated:
        said = said.dumped_as(dtype)
        return _refined(side, sites, said, said, leeway), []
    told = engine_arithmetic({k: word for k, word in stated.items() if k in PARTS})
    engine, found = _infer(side, sites, told, leeway, None)
    # An engine that computes in a finer type than its dump has did not compute with what it
    # recorded: sums of recorded values show it, whatever else is settled without.
    for dumped in _storages(side, sites, dtype):
        open_sites = {x.part: sites[x.part] for x in found if x.arithmetic is None}
        if not open_sites:
            break
        _, outcomes = _infer(side, open_sites, told, leeway, dumped)
        if not _settled(outcomes):
            continue  # what is open stays open: a fault, say
        other, outcomes = _infer(side, sites, told, leeway, dumped)
        if _settled(outcomes) > _settled(found):
            engine, found = other, outcomes
    parts = _for_other_types(found) | dict(engine.parts)
    for name in (x.part for x in found if x.arithmetic is None):
        like = _like(name, parts) or said.parts.get(name)
        if like is not None:
            parts[name] = with_results(like, engine.common)
    return _refined(side, sites, replace(engine, parts=parts), told, leeway), found


def _refined(
    side: RecordedSide,
    sites: Mapping[str, Sequence[StageKey]],
    engine: EngineArithmetic,
    said: EngineArithmetic,
    leeway: Leeway,
) -> EngineArithmetic:
    """An engine of which something was said, with that chosen which the words leave open."""
    for part, keys in sites.items():
        stated = said.parts.get(part.partition(".")[0])
        if stated is None:
            continue
        judged = [key for key in keys if _is_judged(side, key)]
        open_choices = list(variants(side, part, judged, stated, leeway))
        if open_choices:
            _, engine = _choose(side.with_engine(engine), part, judged, open_choices)
    return engine


def _settled(found: Sequence[Inferred]) -> int:
    return sum(x.arithmetic is not None for x in found)


def _storages(
    side: RecordedSide, sites: Mapping[str, Sequence[StageKey]], dtype: str | None
) -> list[Arithmetic]:
    """Results that may have been rounded when they were dumped: of float64, or to a half type."""
    every = [key for keys in sites.values() for key in keys]
    halves = [RESULTS["f32"].dumped_as(kind.name) for kind in _types(side, every, dtype)]
    return [RESULTS["f64"], *halves]


def _infer(
    side: RecordedSide,
    sites: Mapping[str, Sequence[StageKey]],
    said: EngineArithmetic,
    leeway: Leeway,
    dumped: Arithmetic | None,
) -> tuple[EngineArithmetic, list[Inferred]]:
    """Settle every operation of which nothing was said.

    Args:
        side, sites: The dump, and the stages to replay by operation.
        said: What was said.
        leeway: What is known of the others all the same.
        dumped: How results were rounded on dump, if they were.
    """
    engine = said
    if dumped is not None:
        parts = {name: with_results(part, dumped) for name, part in said.parts.items()}
        engine = EngineArithmetic(dumped, parts)
    outcomes: dict[str, Inferred] = {}
    coarsest: dict[str, FloatType] = {}  # that all values of an operation are numbers of
    for _ in range(PASSES):
        # A stage whose inputs had to be recomputed tells nothing before their makers are settled.
        waiting = [part for part in sites if part.partition(".")[0] not in said.parts
                   and (part not in outcomes or outcomes[part].arithmetic is None)]  # fmt: skip
        for part in sorted(waiting, key=lambda p: _is_span(side, sites[p])):
            judged = [key for key in sites[part] if _is_judged(side, key)]
            if dumped is not None:
                results = [dumped]
            else:
                is_span = _is_span(side, sites[part])
                types = _types(side, judged)
                if types:
                    coarsest[part] = min(types, key=lambda kind: kind.digits)
                results = _results(types, is_span=is_span)
            tried = side.with_engine(engine)
            offered: Iterable[Choice] = choices(tried, part, judged, results, leeway)
            if dumped is None and is_span:
                offered = over_hidden(tried, part, judged, results, leeway)
            outcomes[part], engine = _choose(tried, part, judged, offered)
    found = [outcomes[part] for part in sites if part in outcomes]
    common = _common(found, coarsest) if dumped is None else dumped
    return replace(engine, common=common), found


def _sites(side: RecordedSide, keys: Iterable[StageKey]) -> dict[str, list[StageKey]]:
    """The stages to replay, by operation, in the order of computation."""
    held: dict[str, dict[int | None, list[StageKey]]] = {}
    for key in keys:
        operation = side.graph.operation(key) if key in side.graph else None
        if operation is not None and operation.role:
            name = group(operation, side.weight_types(key))
            held.setdefault(name, {}).setdefault(key.layer, []).append(key)
    order = {key: number for number, key in enumerate(side.graph.keys)}
    chosen = {}
    for name, layers in held.items():
        count = LAYERS_OF_PRODUCTS if name.startswith(("linear", "head")) else LAYERS
        numbers = sorted(layers, key=lambda n: -1 if n is None else n)
        spread = np.unique(np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int))
        chosen[name] = [key for i in spread.tolist() for key in layers[numbers[i]]]
    return dict(sorted(chosen.items(), key=lambda item: order[item[1][0]]))


def _for_other_types(found: Sequence[Inferred]) -> dict[str, Arithmetic]:
    """What products compute in whose weights are of a type that no replayed stage has."""
    settled = [x.arithmetic for x in found if x.part.startswith("linear.") and x.arithmetic]
    most = max(settled, key=settled.count, default=None)
    return {} if most is None else {"linear": most, "head": most}


def _like(name: str, parts: Mapping[str, Arithmetic]) -> Arithmetic | None:
    """What an operation is held to that nothing explains: what its like compute in.

    Products by weights of one type round alike, and keys are cached as values are.
    """
    kind, _, types = name.partition(".")
    match kind:
        case "linear" | "head":
            return parts.get(f"{'head' if kind == 'linear' else 'linear'}.{types}")
        case "scores" | "values":
            other = parts.get("values" if kind == "scores" else "scores")
            if other is not None and other.cached:
                plain = cached_in(other.cached)[kind == "values"]
                beside = plain.activations if other.activations else ""
                return with_results(replace(plain, activations=beside), other)
    return None


def _choose(
    side: RecordedSide, part: str, judged: Sequence[StageKey], offered: Iterable[Choice]
) -> tuple[Inferred, EngineArithmetic]:
    """The first choice that explains most of the stages, or one as fine that explains more."""
    best: tuple[int, int] = (0, 0)  # sites explained, and at which rank
    chosen: Choice | None = None
    readings: dict[StageKey, str] = {}
    for choice in offered:
        if chosen is not None and choice.rank > best[1]:
            break  # what is finer explains most
        engine = side.engine
        for name, arithmetic in choice.parts.items():
            engine = engine.with_part(name, arithmetic)
        tried = side.with_engine(engine)
        found: dict[StageKey, str] = {}
        for number, key in enumerate(judged):
            reading = _reading(tried, key)
            if reading is not None:
                found[key] = reading
            left = len(judged) - number - 1
            if len(found) + left <= max(best[0], len(judged) // 2):
                break  # it can no longer be the best
        if len(found) > len(judged) / 2 and len(found) > best[0]:
            found = {key: found[key] for key in found if _is_earned(tried, choice, key, found[key])}
        if len(found) > len(judged) / 2 and len(found) > best[0]:
            best, chosen, readings = (len(found), choice.rank), choice, found
        if len(found) == len(judged):
            break
    if chosen is None:
        return Inferred(part, None, 0, len(judged)), side.engine
    _reorder(side, readings)
    engine = side.engine
    for name, arithmetic in chosen.parts.items():
        engine = engine.with_part(name, arithmetic)
    return Inferred(part, next(iter(chosen.parts.values())), best[0], len(judged)), engine


def _is_earned(side: RecordedSide, choice: Choice, key: StageKey, reading: str) -> bool:
    """Whether roundings that explain a stage do it by themselves, and not by their noise.

    What is rounded on the way into a product can be reproduced: then less of the error is left than
    without. A fault that is as small as the noise of what cannot is no reason to expect that noise.
    """
    sizes = side.sizes()
    if is_blocked((sizes["H"], sizes["T"], sizes["S"])):
        return True  # nothing of that size is made twice
    plain = side.engine
    for name, arithmetic in choice.parts.items():
        if arithmetic.accumulated.digits < FLOAT32.digits:
            return True  # sums in a half type are off by what nobody can tell
        own = next(iter(choice.parts.values()))
        bare = replace(own, activations="", cached="", cuts_sums=False, iterates_angles=False)
        plain = plain.with_part(name, bare)
    if plain == side.engine:
        return True
    without = side.with_engine(plain)
    if _reading(without, key) is not None:
        return True
    left, before = (_error(x, key, reading) for x in (side, without))
    return left < REPRODUCED * before


def _error(side: RecordedSide, key: StageKey, reading: str) -> float:
    """Energy of what a stage is off by, read in a layout."""
    observed, expected = side.tensor(key), side.rounded(key)
    if observed is None or expected is None:
        return 0.0
    flat = observed.reshape(-1)
    if reading:
        flat = dict(_layouts(side, key, flat))[reading]
    return float(np.square(flat - expected.reshape(-1)).sum())


def _is_span(side: RecordedSide, keys: Sequence[StageKey]) -> bool:
    """Whether most stages are judged together with others, whose results are not recorded."""
    spans = [any(side.tensor(x) is None for x in side.graph.inputs(key)) for key in keys]
    return sum(spans) > len(spans) / 2


def _results(types: Sequence[FloatType], *, is_span: bool) -> list[Arithmetic]:
    """Types of results that the values allow, the finest first.

    What a span hides may be off by more than a half type rounds, so that float32 would explain
    its result as well; values that are all of a half type say by themselves that it is not, and
    those that are of both are of the coarser.
    """
    names = {FLOAT16: "f16", BFLOAT16: "bf16"}
    if types and is_span:
        return [RESULTS[names[min(types, key=lambda kind: kind.digits)]]]
    return [RESULTS["f32"], *(RESULTS[names[kind]] for kind in types)]


def _types(
    side: RecordedSide, judged: Sequence[StageKey], dtype: str | None = None
) -> list[FloatType]:
    """The half types that hold every value of most of the stages."""
    found = []
    for kind in (FLOAT16, BFLOAT16):
        tensors = (side.tensor(key) for key in judged)
        held = [kind.holds(x) for x in tensors if x is not None]
        if sum(held) > len(held) / 2:
            found.append(kind)
    stated = FLOAT_TYPES.get(dtype or "")
    return sorted(found, key=lambda kind: kind is not stated)


def _is_judged(side: RecordedSide, key: StageKey) -> bool:
    """Whether a stage can be replayed at all."""
    observed, inputs = side.tensor(key), side.inputs(key)
    return observed is not None and inputs is not None and bool(np.isfinite(observed).all())


def _reading(side: RecordedSide, key: StageKey) -> str | None:
    """In which layout rounding explains a stage: "" for the canonical one, None for none."""
    observed, expected = side.tensor(key), side.expect(key)
    if observed is None or expected is None or not expected.estimate.is_finite():
        return None
    flat = observed.reshape(-1)
    if flat.size != expected.estimate.size:
        return None
    layout = layout_of(key, side.sizes(), flat.size)
    if assess(flat, expected.estimate, layout).explained:
        return ""
    for name, other in _layouts(side, key, flat):
        if assess(other, expected.estimate, layout).explained:
            return name
    return None


def _layouts(side: RecordedSide, key: StageKey, flat: Floats) -> Iterator[tuple[str, Floats]]:
    layout = layout_of(key, side.sizes(), flat.size)
    operation = side.graph.operation(key)
    return alternatives(operation, flat, layout, num_kv_heads=side.sizes()["K"])


def _reorder(side: RecordedSide, readings: Mapping[StageKey, str]) -> None:
    """Put stages into canonical layout, in every layer, that most of their sites have another of.

    An engine's layouts are its conventions; what reads these stages is replayed on them.
    """
    names: dict[str, list[str]] = {}
    for key, name in readings.items():
        names.setdefault(key.stage, []).append(name)
    for stage, found in names.items():
        most = max(found, key=found.count)
        if most:
            side.layouts[stage] = most
        for key in side.graph.keys if most else ():
            observed = side.tensor(key) if key.stage == stage else None
            if observed is None:
                continue
            for name, other in _layouts(side, key, observed.reshape(-1)):
                if name == most:
                    side.record(key, other.reshape(observed.shape))
                    side.reorder_past(key, most)


def _common(found: Collection[Inferred], types: Mapping[str, FloatType]) -> Arithmetic:
    """What holds for operations that were not settled: the type of most results.

    Rows of an embedding are as the file has them, whatever an engine computes in.

    Args:
        found: What was found of those that were looked at.
        types: The half type that all values of one are numbers of, for those that nothing explains.
    """
    computed = [x for x in found if x.part != "embedding"] or found
    stored = [
        types.get(x.part, FLOAT32) if x.arithmetic is None else x.arithmetic.stored
        for x in computed
    ]
    most = max(stored, key=stored.count, default=FLOAT32)
    return next(x for x in RESULTS.values() if x.stored is most)


def describe_inference(engine: EngineArithmetic, found: Sequence[Inferred]) -> str:
    """What was found, in a sentence: what is common, then where operations differ."""
    explained, judged = sum(x.explained for x in found), sum(x.judged for x in found)
    differing: dict[str, list[str]] = {}
    for part, arithmetic in engine.parts.items():
        text = _differs(arithmetic, engine.common)
        if text:
            differing.setdefault(text, []).append(part)
    words = [engine.common.name]
    words += [f"{' and '.join(parts)} with {text}" for text, parts in differing.items()]
    return f"{', '.join(words)} explains {explained} of {judged} stages replayed"


def _differs(arithmetic: Arithmetic, common: Arithmetic) -> str:
    """What an operation does otherwise than most."""
    words = []
    if (arithmetic.stored, arithmetic.rounds_on_dump) != (common.stored, common.rounds_on_dump):
        words.append(f"{arithmetic.stored.name} results")
    if arithmetic.accumulated.digits < common.accumulated.digits:
        words.append(f"sums in {arithmetic.accumulated.name}")
    if arithmetic.activations == GGML:
        words.append("activations rounded as ggml does")
    elif arithmetic.activations and arithmetic.activations != arithmetic.cached:
        both = " and weights" if arithmetic.activations.endswith("-both") else ""
        words.append(f"activations{both} in {arithmetic.activations.partition(':')[0]}")
    if arithmetic.cached in TF32_PRODUCTS:
        words.append(f"both factors in {arithmetic.cached}")
    elif arithmetic.cached:
        also = " and what it meets" if arithmetic.activations == arithmetic.cached else ""
        words.append(f"the cache{also} in {arithmetic.cached}")
    if arithmetic.iterates_angles:
        words.append("each angle from the one before in float32")
    if arithmetic.scales_late:
        words.append("the scale applied inside")
    return " and ".join(words)
