"""What an engine rounds, operation by operation, and the words for it."""

from __future__ import annotations

import pytest

from aprcore.engines.arithmetic import (
    CACHES,
    ENGINES,
    PARTS,
    PRODUCTS,
    RESULTS,
    EngineArithmetic,
    engine_arithmetic,
    stated_arithmetic,
    words_for,
)
from aprcore.ground.errors import PlanError
from aprcore.ground.precision import FLOAT16, FLOAT32
from aprcore.network.operations import Activate, Add, Head, Linear, Norm, Rotate, Scores, Values

NORM, ADD, LINEAR, HEAD = Norm("w", 1e-5), Add(), Linear(()), Head()
SCORES, VALUES, ROPE = Scores(1.0), Values(), Rotate("q", "w", 1e-5)


def test_one_word_is_said_of_all() -> None:
    engine = engine_arithmetic(stated_arithmetic("f16"))
    assert all(engine.of(x) is RESULTS["f16"] for x in (NORM, ADD, LINEAR, HEAD, SCORES, ROPE))


@pytest.mark.parametrize("word", PRODUCTS)
def test_a_word_for_products_is_said_of_products(word: str) -> None:
    engine = engine_arithmetic(stated_arithmetic(word))
    assert engine.of(LINEAR).activations == engine.of(HEAD).activations == word
    assert engine.of(NORM) == RESULTS["f32"]
    # A kernel in TF32 multiplies so everywhere.
    assert engine.of(VALUES).cached == engine.of(SCORES).activations == word * (word == "tf32")


def test_words_by_operation() -> None:
    told = stated_arithmetic("all=bf16, norm=f32,linear=f16:f32,kv_cache=q4_0,angles=iterated")
    engine = engine_arithmetic(told)
    assert engine.of(NORM) is RESULTS["f32"] and engine.of(ADD) is RESULTS["bf16"]
    assert (engine.of(LINEAR).activations, engine.of(LINEAR).stored) == ("f16:f32", FLOAT32)
    assert (engine.of(SCORES).activations, engine.of(SCORES).cached) == ("q8_0", "q4_0")
    assert (engine.of(VALUES).activations, engine.of(VALUES).cached) == ("", "q4_0")
    assert engine.of(ROPE).iterates_angles and engine.of(ROPE).stored is RESULTS["bf16"].stored
    assert engine.of(Activate("silu")) is RESULTS["bf16"]


@pytest.mark.parametrize("cache", ["f16", "bf16"])
def test_halves_of_a_cache_meet_halves(cache: str) -> None:
    engine = engine_arithmetic({"kv_cache": cache})
    assert engine.of(SCORES).activations == engine.of(VALUES).activations == cache


def test_products_may_differ_by_the_type_of_their_weights() -> None:
    engine = EngineArithmetic(RESULTS["f32"], {"linear.F16+Q4_K": RESULTS["f16"]})
    assert engine.of(LINEAR, ("Q4_K", "F16", "Q4_K")).stored is FLOAT16
    assert engine.of(LINEAR, ("Q4_K",)) is RESULTS["f32"]


def test_every_preset_is_of_known_words() -> None:
    for words in ENGINES.values():
        assert engine_arithmetic(stated_arithmetic(words))
    assert engine_arithmetic(ENGINES["llama.cpp"]).of(SCORES).cached == "f16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("f8", "'f8' is not known for all"),
        ("linear=q3", "'q3' is not known for linear"),
        ("kv_cache=int8", "'int8' is not known for kv_cache"),
        ("norms=f32", "the arithmetic of 'norms' is not known"),
        ("", "'' is not known for all"),
    ],
)
def test_other_words_are_refused(words: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        stated_arithmetic(words)


def test_nothing_is_said_by_nothing_or_auto() -> None:
    assert stated_arithmetic(None) == stated_arithmetic("auto") == {}


def test_what_words_there_are() -> None:
    assert words_for("nothing") == ()
    assert all(words_for(part) for part in (*PARTS, "kv_cache", "angles", "all"))
    assert set(CACHES) >= {"f32", "f16", "bf16", "q8_0", "q4_0", "q5_1"}
