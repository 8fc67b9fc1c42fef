"""Decoding with a cache of keys and values, and the text that comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.engines.decode import (
    Decoder,
    Ending,
    PassOutcome,
    StepRequest,
    StepTraced,
    TextEnded,
    TextStream,
    TokenChosen,
    find_stop_tokens,
    generate,
    nothing,
    prompt_tokens,
)
from aprcore.engines.engine import Engine, open_engine
from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.reference import ReferenceBackend
from aprcore.ground.errors import BackendError, TokenizerError
from aprcore.models.model import Model, open_model
from aprcore.network.graph import known_stages
from aprcore.network.stages import StageKey, resolve_shape
from aprtui.demo import demo_path
from closeness import assert_close
from models import build, random_config, write_apr
from tiny import SIZES, TOKENS, embedded_tokenizer, opened, write_model

# Float32 sums in another order, and float64 ones.
BOUNDS = {"numpy": 1e-5, "reference": 1e-12}
LOGITS = StageKey(None, "lm_head")
ENGINES = [Engine(NumpyBackend(1)), Engine(ReferenceBackend())]
# Two of each architecture, among them every kind of RoPE scaling.
SEEDS = (0, 1, 2, 3, 8, 13, 18, 23)


def decoder(model: Model, engine: Engine = ENGINES[0]) -> Decoder:
    return Decoder(model.graph, model.weights, engine)


def assert_cache_changes_nothing(model: Model, engine: Engine, tokens: Sequence[int]) -> None:
    """Hold steps of one token, and of a few, against full passes over the same tokens."""
    bound = BOUNDS[engine.backend.name]
    cached = decoder(model, engine)
    first = max(1, len(tokens) // 2)
    last = len(tokens)
    cuts = sorted({0, first, first + 1, first + 2, min(first + 5, last), last - 1, last})
    for start, stop in pairwise(cuts):
        logits = cached.feed(tokens[start:stop]).logits
        full = decoder(model, engine).feed(tokens[:stop]).logits
        assert_close(logits, full, bound)
        assert int(logits.argmax()) == int(full.argmax())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with opened(write_model(tmp_path_factory.mktemp("model") / "m.apr")) as model:
        yield model


class TestCache:
    @pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.backend.name)
    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_cached_step_gives_the_logits_of_a_full_pass(
        self, seed: int, engine: Engine, tmp_path: Path
    ) -> None:
        recipe = replace(random_config(seed), num_tokens=max(9, random_config(seed).num_tokens))
        with opened(write_apr(build(recipe), tmp_path / "m.apr")) as model:
            assert_cache_changes_nothing(model, engine, recipe.tokens)

    @pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.backend.name)
    def test_on_the_demo(self, engine: Engine) -> None:
        with open_model(demo_path() / "sound.apr") as model:
            tokens = prompt_tokens(model, "What is 2+2?2+2=4", None)
            assert_cache_changes_nothing(model, engine, tokens)

    def test_on_stories260k(self, shared: Path) -> None:
        with open_model(shared / "data/stories260k") as model:
            tokens = prompt_tokens(model, "Once upon a time there was a little", None)
            assert_cache_changes_nothing(model, ENGINES[0], tokens)

    def test_every_stage_of_a_step_is_the_last_row_of_the_full_pass(self, tiny: Model) -> None:
        whole = dict(decoder(tiny).stages(TOKENS))
        cached = decoder(tiny)
        cached.feed(TOKENS[:-1])
        step = dict(cached.stages(TOKENS[-1:]))
        assert list(step) == list(tiny.graph.keys)
        sizes = SIZES | {"T": 1, "S": len(TOKENS)}
        for key, tensor in step.items():
            assert tensor.shape == resolve_shape(known_stages()[key.stage].shape, sizes), key
            last = whole[key][..., -1:, :] if tensor.ndim > 1 else whole[key]
            assert_close(tensor, last, 1e-5)
        # As docs/formats.md says: scores and softmax are H,1,n+1.
        assert step[StageKey(0, "attn_scores")].shape == (SIZES["H"], 1, len(TOKENS))

    def test_looking_at_a_step_does_not_take_it(self, tiny: Model) -> None:
        one, other = decoder(tiny), decoder(tiny)
        for each in (one, other):
            each.feed(TOKENS[:3])
        list(one.stages(TOKENS[3:4]))
        branch = one.copy()
        branch.feed((1, 2, 3))
        np.testing.assert_array_equal(one.feed(TOKENS[3:]).logits, other.feed(TOKENS[3:]).logits)
        assert one.tokens == TOKENS
        assert branch.tokens == (*TOKENS[:3], 1, 2, 3)

    def test_a_step_that_fails_leaves_the_decoder_where_it_was(self, tiny: Model) -> None:
        class Failing(NumpyBackend):
            fails = False

            def multiply(self, x: Any, y: Any) -> Any:
                if self.fails:
                    raise BackendError("the device is out of memory")
                return super().multiply(x, y)

        backend = Failing(1)
        failing, sound = decoder(tiny, Engine(backend)), decoder(tiny)
        for each in (failing, sound):
            each.feed(TOKENS[:2])
        backend.fails = True
        with pytest.raises(BackendError):
            failing.feed(TOKENS[2:3])
        backend.fails = False
        assert failing.tokens == TOKENS[:2]
        found, expected = (each.feed(TOKENS[2:3]).logits for each in (failing, sound))
        np.testing.assert_array_equal(found, expected)

    def test_keeping_stages_changes_no_logit(self, tiny: Model) -> None:
        wanted = StageKey(1, "ffn_up")
        bare, keeping = decoder(tiny).feed(TOKENS), decoder(tiny).feed(TOKENS, wanted.__eq__)
        np.testing.assert_array_equal(bare.logits, keeping.logits)
        assert not bare.stages
        assert list(keeping.stages) == [wanted]


class Script:
    """A source whose choices are written down, and which notes what it is fed."""

    engine = ENGINES[0]

    def __init__(self, *choices: int) -> None:
        self.choices = choices
        self.fed: list[tuple[int, ...]] = []

    def feed(self, tokens: Sequence[int], wants: Any = nothing) -> PassOutcome:
        choice = self.choices[len(self.fed)]
        self.fed.append(tuple(tokens))
        logits = np.eye(10)[choice]
        return PassOutcome(logits, {LOGITS: logits} if wants(LOGITS) else {})


class TestText:
    def test_each_choice_is_fed_back(self) -> None:
        script = Script(4, 5, 6)
        events = list(generate(script, (1, 2), 3))
        assert events == [
            TokenChosen(0, 4), TokenChosen(1, 5), TokenChosen(2, 6),
            TextEnded(Ending.MAX_TOKENS, 3),
        ]  # fmt: skip
        assert script.fed == [(1, 2), (4,), (5,)]

    def test_the_end_of_text_is_not_part_of_it(self) -> None:
        events = list(generate(Script(4, 0, 6), (1,), 9, stop_tokens={0}))
        assert events == [TokenChosen(0, 4), TextEnded(Ending.END_OF_TEXT, 1)]

    def test_a_traced_step_knows_its_history(self) -> None:
        script = Script(4, 5, 6)
        events = list(generate(script, (1, 2), 3, traced=StepRequest(1)))
        (traced,) = [event for event in events if isinstance(event, StepTraced)]
        assert (traced.step, traced.history, traced.tokens) == (1, (1, 2), (4,))
        assert list(traced.stages) == [LOGITS]

    def test_nan_is_not_chosen(self) -> None:
        assert PassOutcome(np.array([1.0, np.nan, 3.0, 3.0])).choice == 2

    def test_the_demo_answers(self) -> None:
        with open_model(demo_path() / "sound.apr") as model, open_engine("numpy") as engine:
            text = TextStream(model.tokenizer())
            events = generate(
                decoder(model, engine), prompt_tokens(model, "What is 2+2?", None), 20,
                stop_tokens=find_stop_tokens(model),
            )  # fmt: skip
            said = "".join(text.add(e.token) for e in events if isinstance(e, TokenChosen))
        assert said == "2+2=4"

    def test_a_character_in_several_tokens_waits_for_its_last(self, tmp_path: Path) -> None:
        # "é" is the bytes c3 a9; byte-level vocabularies spell them "Ã" and "©".
        path = write_model(tmp_path / "m.apr", metadata=embedded_tokenizer(["Ã", "©", "a", "Ġ"]))
        with opened(path) as model:
            stream = TextStream(model.tokenizer())
            assert [stream.add(token) for token in (0, 1, 2, 3)] == ["", "é", "a", " "]
            assert [stream.add(0), stream.add(2)] == ["", r"\xc3a"]
            assert (stream.add(0), stream.finish()) == ("", r"\xc3")


class TestStopTokens:
    def test_the_tokenizer_says(self, tmp_path: Path) -> None:
        said = embedded_tokenizer(["a"]) | {"tokenizer.eos_token_id": 3}
        with opened(write_model(tmp_path / "m.apr", metadata=said)) as model:
            assert find_stop_tokens(model) == {3}

    @pytest.mark.parametrize(("declared", "found"), [(7, {7}), ([7, 9], {7, 9}), (None, set())])
    def test_the_configuration_may_name_several(
        self, tmp_path: Path, declared: Any, found: set[int]
    ) -> None:
        path = write_model(tmp_path / "m.apr", metadata={"eos_token_id": declared})
        with opened(path) as model:
            assert find_stop_tokens(model) == found

    def test_a_damaged_tokenizer_stops_nothing(self, tmp_path: Path) -> None:
        said = embedded_tokenizer(["a"]) | {"tokenizer.eos_token_id": 999}
        with opened(write_model(tmp_path / "m.apr", metadata=said)) as model:
            assert find_stop_tokens(model) == set()


def test_a_prompt_must_have_tokens_of_the_model(tiny: Model) -> None:
    assert prompt_tokens(tiny, "ignored", TOKENS) == TOKENS
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        prompt_tokens(tiny, "", (40,))


def test_no_engine_has_another_name() -> None:
    with pytest.raises(ValueError, match="unknown backend"), open_engine("cuda"):
        pass
