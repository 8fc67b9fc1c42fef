"""The graph of stages, held against docs/formats.md and against itself."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.ground.errors import PlanError
from aprcore.network.architectures import ARCHITECTURES
from aprcore.network.graph import (
    Graph,
    Inheritance,
    computation_order,
    find_stage,
    known_stages,
    outline,
    parse_path,
)
from aprcore.network.mask import CAUSAL, Mask
from aprcore.network.stages import (
    ALIASES,
    MOST_LAYERS,
    Scope,
    StageKey,
    axis_names,
    resolve_factors,
    resolve_shape,
)
from masks import Seen

# docs/formats.md, "Stages and canonical layouts", in its notation and in the order of computation
# (there the experts follow the feed-forward network). S stands for the second T of the scores,
# n + 1 when decoding.
FORMATS_TABLE = {
    "embedding": "T,E",
    "attn_norm": "T,E",
    "qkv_matmul": "T,(H+2K)·D",
    "qkv_bias": "T,(H+2K)·D",
    "q_post_rope": "T,H·D",
    "k_post_rope": "T,K·D",
    "attn_scores": "H,T,S",
    "attn_softmax": "H,T,S",
    "attention": "T,H·D",
    "attn_out": "T,E",
    "post_attn_residual": "T,E",
    "ffn_norm": "T,E",
    "ffn_gate": "T,F",
    "ffn_up": "T,F",
    "ffn_silu": "T,F",
    "ffn_swigl": "T,F",
    "ffn_out": "T,E",
    "moe_router": "T,k",
    "moe_router_indices": "T,k",
    "moe_ffn_out": "T,E",
    "post_ffn_residual": "T,E",
    "final_norm": "T,E",
    "lm_head": "V",
}

SIZES = {"T": 7, "S": 11, "H": 4, "K": 2, "D": 6, "E": 20, "F": 28, "V": 40, "k": 3}

names = st.sampled_from(list(known_stages()))


STAGES = tuple(known_stages().values())


def test_names_and_shapes_are_those_of_the_format() -> None:
    found = {stage.name: stage.shape for stage in STAGES}
    assert found == FORMATS_TABLE | {"attn_post_norm": "T,E", "ffn_post_norm": "T,E"}


def test_whole_model_stages_are_the_last_two_and_the_embedding_is_first() -> None:
    assert [s.name for s in STAGES if s.scope is Scope.MODEL] == ["final_norm", "lm_head"]
    assert [s.name for s in STAGES if s.scope is Scope.FIRST_LAYER] == ["embedding"]
    assert [s.name for s in (STAGES[0], *STAGES[-2:])] == ["embedding", "final_norm", "lm_head"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_order_of_computation_fits_every_architecture(architecture: str) -> None:
    graph = outline(3, known_stages(), architecture)
    assert list(graph.keys) == sorted(graph.keys, key=computation_order)


def test_every_weight_has_a_shape() -> None:
    for stage in STAGES:
        for use in stage.operation.weights if stage.operation is not None else ():
            assert all(size > 0 for size in resolve_shape(use.shape, SIZES))


def test_only_expert_stages_have_no_operation() -> None:
    assert {s.name for s in STAGES if s.operation is None} == {
        "moe_router", "moe_router_indices", "moe_ffn_out"
    }  # fmt: skip
    assert all(stage.title for stage in STAGES)


@given(names, st.integers(0, MOST_LAYERS - 1))
def test_paths_round_trip(name: str, layer: int) -> None:
    scope = known_stages()[name].scope
    number = {Scope.MODEL: None, Scope.FIRST_LAYER: 0, Scope.LAYER: layer}[scope]
    key = StageKey(number, name)
    assert parse_path(key.path) == key
    assert key.path == (name if number is None else f"layer-{number}/{name}")


@given(st.text(max_size=30))
def test_any_text_is_a_path_or_is_none(text: str) -> None:
    assert parse_path(text) is None or text.rpartition("/")[2] in {*known_stages(), *ALIASES}


@pytest.mark.parametrize(
    "path",
    ["attn_norm", "layer-1/embedding", "layer-0/lm_head", "layer-/attn_norm", "layer--1/attn_norm",
     "layer-1", "layer-x/attn_norm", "layer-²/attn_norm", "layer-٣/attn_norm",
     "x/layer-0/attn_norm", "layer-0/layer-0/attn_norm", "layer-0/Attn_norm", "layer-0/", "",
     "Layer-0/ffn_up", f"layer-{MOST_LAYERS}/ffn_up", "layer-4000000000/ffn_up"],
)  # fmt: skip
def test_other_paths_name_no_stage(path: str) -> None:
    assert parse_path(path) is None


def test_spellings_of_other_engines() -> None:
    assert parse_path("embedding") == StageKey(0, "embedding")
    assert parse_path("layer-3/layer_output") == StageKey(3, "post_ffn_residual")
    assert find_stage(" Layer_Output ").name == "post_ffn_residual"
    assert find_stage("LM_HEAD").name == "lm_head"


def test_an_unknown_name_is_answered_with_those_that_exist() -> None:
    with pytest.raises(PlanError, match="unknown stage 'attn_nrm'") as caught:
        find_stage("attn_nrm")
    for name in known_stages():
        assert name in str(caught.value)


graphs = st.builds(
    outline, st.integers(0, 4), st.sampled_from([(), ("qkv_bias",)]),
    st.sampled_from(list(ARCHITECTURES)),
)  # fmt: skip


@given(graphs)
def test_keys_come_in_the_order_of_computation(graph: Graph) -> None:
    keys = list(graph.keys)
    assert keys == sorted(set(keys), key=computation_order)
    assert {key.layer for key in keys} == {*range(graph.num_layers), None}
    assert all(key in graph for key in keys)


@given(graphs)
def test_inputs_are_made_before_they_are_read_and_readers_are_the_way_back(graph: Graph) -> None:
    made: set[StageKey] = set()
    for key in graph.keys:
        assert graph.num_layers == 0 or set(graph.inputs(key)) <= made, key
        assert all(key in graph.readers(source) for source in graph.inputs(key) if made)
        made.add(key)


@given(graphs)
def test_readers_are_those_that_have_it_among_their_inputs_in_order(graph: Graph) -> None:
    for source in graph.keys:
        found = [key for key in graph.keys if source in graph.inputs(key)]
        assert list(graph.readers(source)) == found


def test_ancestors_come_nearest_first_once_each_and_only_through_what_goes_on() -> None:
    graph = outline(2, (), "llama")

    def ancestors(path: str, stops: str = "") -> list[tuple[str, str]]:
        key = parse_path(path)
        assert key is not None
        found = graph.ancestors(key, lambda source: source.path != stops)
        return [(source.path, reader.path) for source, reader in found]

    assert ancestors("layer-0/attention") == [
        ("layer-0/attn_softmax", "layer-0/attention"),
        ("layer-0/qkv_matmul", "layer-0/attention"),
        ("layer-0/attn_scores", "layer-0/attn_softmax"),
        ("layer-0/attn_norm", "layer-0/qkv_matmul"),
        ("layer-0/q_post_rope", "layer-0/attn_scores"),
        ("layer-0/k_post_rope", "layer-0/attn_scores"),
        ("layer-0/embedding", "layer-0/attn_norm"),
    ]
    assert ancestors("layer-0/attention", stops="layer-0/attn_softmax") == [
        ("layer-0/attn_softmax", "layer-0/attention"),
        ("layer-0/qkv_matmul", "layer-0/attention"),
        ("layer-0/attn_norm", "layer-0/qkv_matmul"),
        ("layer-0/embedding", "layer-0/attn_norm"),
    ]
    assert ancestors("layer-0/embedding") == []
    assert {source for source, _ in ancestors("lm_head")} == {key.path for key in graph.keys} - {
        "lm_head"
    }


def test_layers_that_nothing_was_recorded_of_are_passed_over() -> None:
    graph = outline(900_000, (), "llama", {5, 2, 899_999})
    assert graph.layers == [2, 5, 899_999]
    residual = [StageKey(n, "post_ffn_residual") for n in (2, 5, 899_999)]
    assert graph.inputs(StageKey(2, "attn_norm")) == (StageKey(0, "embedding"),)
    assert graph.inputs(StageKey(5, "attn_norm")) == (residual[0],)
    assert graph.inputs(StageKey(899_999, "attn_norm")) == (residual[1],)
    assert graph.inputs(StageKey(None, "final_norm")) == (residual[2],)
    assert graph.readers(residual[0])[0] == StageKey(5, "attn_norm")
    assert graph.readers(residual[2]) == (StageKey(None, "final_norm"),)
    assert graph.including(["qkv_bias"]).layers == graph.layers


@given(graphs, st.randoms(use_true_random=False))
def test_what_is_inherited_is_what_the_nearest_recorded_ancestors_say(
    graph: Graph, draw: Random
) -> None:
    told = {key: draw.randrange(4) for key in graph.keys if draw.random() < 0.3}
    found = Inheritance(graph)
    for key in graph.keys:
        nearest = graph.ancestors(key, lambda source: source not in told)
        expected = 0
        for source, _ in nearest:
            expected |= told.get(source, 0)
        assert found.before(key) == expected
        if key in told:
            found.tell(key, told[key])


def test_layers_are_chained_by_the_residual_stream() -> None:
    graph = outline(3, (), "llama")

    def inputs(layer: int | None, stage: str) -> list[str]:
        return [key.path for key in graph.inputs(StageKey(layer, stage))]

    assert inputs(0, "attn_norm") == ["layer-0/embedding"]
    assert inputs(2, "attn_norm") == ["layer-1/post_ffn_residual"]
    assert inputs(None, "final_norm") == ["layer-2/post_ffn_residual"]
    assert inputs(None, "lm_head") == ["final_norm"]
    assert inputs(1, "attention") == ["layer-1/attn_softmax", "layer-1/qkv_matmul"]
    assert inputs(3, "attention") == []
    with_bias = graph.including(["qkv_bias", "attn_norm"])
    assert with_bias.inputs(StageKey(1, "attention"))[1] == StageKey(1, "qkv_bias")
    assert [graph.is_stream(StageKey(n, s)) for n, s in (
        (0, "embedding"), (1, "post_ffn_residual"), (1, "post_attn_residual"), (None, "lm_head"),
    )] == [True, True, False, False]  # fmt: skip


def test_an_outline_takes_the_architecture_that_has_most_of_the_stages() -> None:
    assert outline(2, {"attn_norm"}).config.architecture == "llama"
    assert outline(2, {"attn_norm", "ffn_post_norm"}).config.architecture == "gemma2"
    assert outline(2, {"moe_router", "attn_norm"}).config.architecture == "experts"
    assert outline(2, {"attn_norm"}, "gemma2").config.architecture == "gemma2"
    assert outline(2, {"attn_norm"}, "no such").config.architecture == "llama"


@given(st.integers(1, 9), st.integers(0, 9), st.sampled_from([None, 0, 1, 3, 9]),
       st.sampled_from([None, 0, 2, 9]))  # fmt: skip
def test_a_mask_is_an_interval_about_the_query(
    queries: int, past: int, behind: int | None, ahead: int | None
) -> None:
    mask = Mask(behind, ahead)
    allowed = mask.allowed(queries, past + queries)
    for row in range(queries):
        first, stop = mask.span(past + row, past + queries)
        assert [i for i, seen in enumerate(allowed[row]) if seen] == list(range(first, stop))
        assert allowed[row, past + row]  # a token sees itself
    hidden = Seen(queries, past + queries, mask).hidden()
    assert np.array_equal(allowed, ~hidden)


def test_masks_in_words() -> None:
    assert Mask(None, 0) == CAUSAL
    assert [Mask(*x).is_causal for x in ((None, 0), (3, 0), (None, None), (3, 1))] == [
        True, True, False, False,
    ]  # fmt: skip
    assert CAUSAL.describe() == "causal"
    assert Mask(7, 0).describe() == "causal, a window of 8"
    assert Mask(None, None).describe() == "in both directions"


def test_shapes_in_numbers() -> None:
    assert resolve_shape("T,(H+2K)·D", SIZES) == (7, 48)
    assert resolve_factors("T,(H+2K)·D", SIZES) == (7, 8, 6)
    assert resolve_shape("H,T,S", SIZES) == (4, 7, 11)
    assert axis_names("T,K·D") == ("token", "head", "dim")
    assert axis_names("H,T,S") == ("head", "token", "position")
    with pytest.raises(KeyError):
        resolve_shape("T,F", {"T": 7})
    for stage in STAGES:
        assert len(axis_names(stage.shape)) == len(resolve_factors(stage.shape, SIZES))
