"""What an engine rounds, operation by operation, and the words that say so.

An engine keeps its residual stream in one type, its cache in another, and rounds the activations of
a product by what it multiplies them with. So arithmetic belongs to an operation: each has a type of
its results and of its sums, and a rounding of what it reads.

The words are those of sidecars and of `--arithmetic`; see docs/formats.md, "Arithmetic".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from aprcore.ground.errors import PlanError
from aprcore.ground.precision import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FLOAT_TYPES,
    FloatType,
)
from aprcore.network.operations import Operation
from aprcore.network.weights import Weight
from aprcore.quant.roundings import (
    PAIRED,
    ROTATED,
    ROTATED_BY_64,
    ROUNDINGS,
    Rounding,
    rounded_beside,
)

# Activations rounded by the type of the weight, as ggml's CPU path does.
GGML = "ggml"


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How an operation is computed.

    Attributes:
        name: The word for it.
        stored: The type that results are rounded to.
        accumulated: The type that sums are carried in.
        rounds_on_dump: Whether values are rounded to `stored` only when they are dumped. The engine
            then computed with others than it recorded, and every recorded input is off by that.
        activations: How the first factor of a product is rounded: activations, queries, attention
            weights. A name in `ROUNDINGS`, `GGML`, or nothing.
        cached: The same of the second where it comes from the cache: keys, values.
        iterates_angles: Whether RoPE multiplies its way from one angle to the next, in float32.
        scales_late: Whether the softmax scales the scores itself, so that they were never rounded.
        cuts_sums: Whether sums are cut off to float32 as they grow, as tensor cores do.
    """

    name: str
    stored: FloatType
    accumulated: FloatType
    rounds_on_dump: bool = False
    activations: str = ""
    cached: str = ""
    iterates_angles: bool = False
    scales_late: bool = False
    cuts_sums: bool = False

    def dumped_as(self, dtype: str | None) -> Arithmetic:
        """The same for a dump of this type: values that the engine has finer are rounded to it.

        Stage files hold float32, so that float64 counts as that.
        """
        stored = FLOAT_TYPES.get(dtype or "")
        if stored is None or stored.digits > FLOAT32.digits:
            return self
        if not self.rounds_on_dump and stored.digits >= self.stored.digits:
            return self
        return replace(self, stored=stored, rounds_on_dump=True)

    def rounding_of(self, weight: Weight) -> Rounding | None:
        """How activations are rounded before a product with a weight."""
        if self.activations == GGML:
            return rounded_beside(weight.dtype)
        return self.activation_rounding

    @property
    def activation_rounding(self) -> Rounding | None:
        """How the first factor is rounded, whatever the second is."""
        return ROUNDINGS.get(self.activations)

    @property
    def cache_rounding(self) -> Rounding | None:
        """How the second factor is rounded."""
        return ROUNDINGS.get(self.cached)


# Nothing is rounded: for what is measured, and for no engine.
EXACT = Arithmetic("exact", FLOAT64, FLOAT64)

# Half-precision engines carry sums in float32 (cuBLAS, PyTorch, llama.cpp do); one that does not is
# a finding. In the order of what they lose.
RESULTS = {
    arithmetic.name: arithmetic
    for arithmetic in (
        Arithmetic("f32", FLOAT32, FLOAT32),
        Arithmetic("f64", FLOAT32, FLOAT64, rounds_on_dump=True),
        Arithmetic("f16", FLOAT16, FLOAT32),
        Arithmetic("bf16", BFLOAT16, FLOAT32),
    )
}
# Words for products whose results are float32 and whose activations are not.
PRODUCTS = ("ggml", "q8_0", "q8_1", "q8_k", "int8", "tf32")
TF32_PRODUCTS = ("tf32", "tf32-cut")
# What tensor cores take; a CPU that rounds so has smaller errors than they.
ON_TENSOR_CORES = ("f16:f32", "bf16:f32", *TF32_PRODUCTS, "f16:f32-both", "bf16:f32-both")
PARTS = (
    "embedding", "norm", "linear", "bias", "rope", "scores", "softmax", "values", "activation",
    "product", "residual", "head",
)  # fmt: skip
_MULTIPLIED = ("linear", "head")
_CACHED = ("scores", "values")
ANGLES = ("direct", "iterated")
# Types that ggml rounds queries to for a product with keys of a cache of this type.
_BESIDE_CACHE = {"f16": "f16", "bf16": "bf16", "q8_0": "q8_0", "q5_0": "q8_0", "q4_0": "q8_0",
                 "q5_1": "q8_1 and sums", "q4_1": "q8_1 and sums"}  # fmt: skip
QUANTISED_CACHES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
CACHES = ("f32", *_BESIDE_CACHE, "float8_e4m3fn", "float8_e5m2")

_BY_DTYPE = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class EngineArithmetic:
    """What each operation of an engine computes in.

    Attributes:
        common: What holds where nothing else is said.
        parts: What holds for an operation, by a name in `PARTS`, or "linear.Q4_K" for products with
            weights of these types.
    """

    common: Arithmetic
    parts: Mapping[str, Arithmetic] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The word for the engine as a whole."""
        return self.common.name

    def of(self, operation: Operation | None, types: tuple[str, ...] = ()) -> Arithmetic:
        """What holds for an operation on weights of these types."""
        if operation is None:
            return self.common
        found = self.parts.get(group(operation, types))
        return found or self.parts.get(operation.role, self.common)

    def with_part(self, name: str, arithmetic: Arithmetic) -> EngineArithmetic:
        """The same with another arithmetic for one operation."""
        return replace(self, parts={**self.parts, name: arithmetic})

    def dumped_as(self, dtype: str | None) -> EngineArithmetic:
        """As `Arithmetic.dumped_as`, of every operation."""
        parts = {name: part.dumped_as(dtype) for name, part in self.parts.items()}
        return EngineArithmetic(self.common.dumped_as(dtype), parts)


def group(operation: Operation, types: tuple[str, ...]) -> str:
    """Operations of one name round alike: the part, and for products the types of the weights."""
    if operation.role in _MULTIPLIED and types:
        return f"{operation.role}.{'+'.join(sorted(set(types)))}"
    return operation.role


def same_everywhere(arithmetic: Arithmetic) -> EngineArithmetic:
    """An engine that computes everything alike."""
    return EngineArithmetic(arithmetic)


def arithmetic_of_dtype(dtype: str | None) -> EngineArithmetic:
    """The arithmetic of a side that records only its dtype; float32 if it records nothing."""
    return same_everywhere(RESULTS[_BY_DTYPE.get(dtype or "float32", "f32")])


# What an engine is known to do, to be said in a word. What a preset leaves out is found out.
ENGINES: dict[str, dict[str, str]] = {
    "llama.cpp": {"linear": "ggml", "head": "ggml", "kv_cache": "f16", "angles": "iterated"},
    "vllm": {"all": "bf16"},
    "mlx": {"all": "f16"},
    "transformers": {"all": "f32"},
}  # fmt: skip


def stated_arithmetic(words: str | Mapping[str, str] | None) -> dict[str, str]:
    """What is said of an engine's arithmetic, by operation.

    Args:
        words: "f16" (all of it), "linear=q8_0,kv_cache=f16", the same as a mapping, or "auto".

    Raises:
        PlanError: A word is not known; the message lists those that are.
    """
    if words is None or words == "auto":
        return {}
    if isinstance(words, str):
        pairs = [part.strip().partition("=") for part in words.split(",")]
        words = {name if sign else "all": word if sign else name for name, sign, word in pairs}
    for name, word in words.items():
        known = words_for(name)
        if not known:
            raise PlanError(f"the arithmetic of {name!r} is not known",
                            hint=f"one of all, kv_cache, angles, {', '.join(PARTS)}")  # fmt: skip
        if word not in known:
            raise PlanError(f"arithmetic {word!r} is not known for {name}",
                            hint=f"one of {', '.join(known)}")  # fmt: skip
    return dict(words)


def words_for(name: str) -> tuple[str, ...]:
    """The words that may be said of an operation; none for what is no operation."""
    match name:
        case "kv_cache":
            return CACHES
        case "angles":
            return ANGLES
        case "linear" | "head":
            return (*RESULTS, *PRODUCTS, "f16:f32", "bf16:f32")
        case "all":
            return (*RESULTS, *PRODUCTS)
    return tuple(RESULTS) if name in PARTS else ()


def engine_arithmetic(stated: Mapping[str, str]) -> EngineArithmetic:
    """What words that were checked by `stated_arithmetic` mean; float32 where they are silent."""
    common = stated.get("all", "f32")
    engine = same_everywhere(RESULTS.get(common, RESULTS["f32"]))
    if common in PRODUCTS:
        engine = replace(
            engine, parts={name: _product(common) for name in _MULTIPLIED}
        )  # fmt: skip
    if common in TF32_PRODUCTS:
        for name in _CACHED:
            engine = engine.with_part(name, attention_in(common))
    for name, word in stated.items():
        if name in _MULTIPLIED:
            engine = engine.with_part(name, _product(word))
        elif name in PARTS:
            engine = engine.with_part(name, RESULTS[word])
    cache = stated.get("kv_cache", "f32")
    if cache != "f32":
        for name, part in zip(_CACHED, cached_in(cache)):
            plain = engine.parts.get(name, engine.common)
            told = replace(plain, activations=part.activations, cached=part.cached)
            engine = engine.with_part(name, told)
    if stated.get("angles") == "iterated":
        plain = engine.parts.get("rope", engine.common)
        engine = engine.with_part("rope", replace(plain, iterates_angles=True))
    return engine


def cached_in(
    cache: str, *, rotated: bool = False, paired: bool = False
) -> tuple[Arithmetic, Arithmetic]:
    """Scores and values of an engine with a cache of this type, in float32 otherwise.

    Args:
        cache: A name in `CACHES`.
        rotated: Whether keys, queries and values are turned before they are rounded.
        paired: Whether queries and keys have rotated pairs side by side then.
    """
    plain = RESULTS["f32"]
    if cache == "f32":
        return plain, plain
    beside = _BESIDE_CACHE.get(cache, "")
    if cache in QUANTISED_CACHES:
        how = (ROTATED if rotated else "") + (PAIRED if paired else "")
        scores = replace(plain, activations=beside + how, cached=cache + how)
        return scores, replace(plain, cached=cache + (ROTATED_BY_64 if rotated else ""))
    scores = replace(plain, activations=beside, cached=cache)
    # A cache of integers, above, is expanded for the product with the attention weights.
    return scores, replace(plain, activations=beside, cached=cache)


def _product(word: str) -> Arithmetic:
    if word in RESULTS:
        return RESULTS[word]
    return replace(
        RESULTS["f32"], name=word, activations=word, cuts_sums=word in ON_TENSOR_CORES
    )  # fmt: skip


def product_arithmetics() -> Iterator[Arithmetic]:
    """What products with float32 results may do to their activations, none first."""
    yield RESULTS["f32"]
    for word in ("ggml", "f16:f32", "bf16:f32", *TF32_PRODUCTS, "f16:f32-both", "bf16:f32-both",
                 "q8_0", "q8_1", "q8_k", "q8_0-f32", "int8"):  # fmt: skip
        yield _product(word)


def attention_in(word: str) -> Arithmetic:
    """Scores and values that multiply both of their factors as a product of this word does."""
    return replace(_product(word), name="f32", cached=word)
