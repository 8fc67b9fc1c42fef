"""The table of stages, held against FORMATS.md and against itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.ground.errors import PlanError
from aprcore.network.graph import (
    ALIASES,
    BY_NAME,
    LAYER_INPUT,
    QKV,
    STAGES,
    WEIGHT_SHAPES,
    Scope,
    StageKey,
    axis_names,
    computation_order,
    find_stage,
    input_keys,
    parse_path,
    resolve_factors,
    resolve_shape,
    stage_keys,
)

# FORMATS.md, "Canonical layouts", in its notation and in the order of computation (there the
# experts follow the residual). S stands for the second T of the scores, n + 1 when decoding.
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

names = st.sampled_from(list(BY_NAME))


def test_names_and_shapes_are_those_of_the_format() -> None:
    assert {stage.name: stage.shape for stage in STAGES} == FORMATS_TABLE
    assert [stage.name for stage in STAGES] == list(FORMATS_TABLE)


def test_whole_model_stages_are_the_last_two_and_the_embedding_is_first() -> None:
    assert [s.name for s in STAGES if s.scope is Scope.MODEL] == ["final_norm", "lm_head"]
    assert [s.name for s in STAGES if s.scope is Scope.FIRST_LAYER] == ["embedding"]


def test_a_stage_reads_only_stages_above_it() -> None:
    above: set[str] = set()
    for stage in STAGES:
        sources = [name for name in stage.reads if name not in (LAYER_INPUT, QKV)]
        assert set(sources) <= above, stage.name
        above.add(stage.name)


def test_every_weight_has_a_shape_and_every_shape_a_weight() -> None:
    used = {name for stage in STAGES for name in (*stage.weights, *stage.optional)}
    assert used == set(WEIGHT_SHAPES)
    for shape in WEIGHT_SHAPES.values():
        assert all(size > 0 for size in resolve_shape(shape, SIZES))


def test_only_expert_stages_have_no_operation() -> None:
    assert {s.name for s in STAGES if s.operation is None} == {
        "moe_router", "moe_router_indices", "moe_ffn_out"
    }  # fmt: skip
    assert all(s.feature == "experts" for s in STAGES if s.operation is None)
    assert all(stage.title for stage in STAGES)


@given(names, st.integers(0, 2**32))
def test_paths_round_trip(name: str, layer: int) -> None:
    scope = BY_NAME[name].scope
    number = {Scope.MODEL: None, Scope.FIRST_LAYER: 0, Scope.LAYER: layer}[scope]
    key = StageKey(number, name)
    assert parse_path(key.path) == key
    assert key.path == (name if number is None else f"layer-{number}/{name}")


@given(st.text(max_size=30))
def test_any_text_is_a_path_or_is_none(text: str) -> None:
    assert parse_path(text) is None or text.rpartition("/")[2] in {*BY_NAME, *ALIASES}


@pytest.mark.parametrize(
    "path",
    ["attn_norm", "layer-1/embedding", "layer-0/lm_head", "layer-/attn_norm", "layer--1/attn_norm",
     "layer-1", "layer-x/attn_norm", "layer-²/attn_norm", "layer-٣/attn_norm",
     "x/layer-0/attn_norm", "layer-0/layer-0/attn_norm", "layer-0/Attn_norm", "layer-0/", "",
     "Layer-0/ffn_up"],
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
    for name in BY_NAME:
        assert name in str(caught.value)


@given(
    st.integers(0, 4),
    st.sets(st.sampled_from(["dense", "qkv_bias", "experts"])),
)
def test_keys_come_in_the_order_of_computation(num_layers: int, features: set[str]) -> None:
    keys = list(stage_keys(num_layers, features))
    assert keys == sorted(set(keys), key=computation_order)
    assert {key.layer for key in keys} == {*range(num_layers), None}
    for stage in STAGES:
        exists = stage.feature is None or stage.feature in features
        times = {Scope.MODEL: 1, Scope.FIRST_LAYER: min(1, num_layers), Scope.LAYER: num_layers}
        assert [k.stage for k in keys].count(stage.name) == exists * times[stage.scope]


@given(st.integers(1, 4), st.sampled_from([{"dense"}, {"dense", "qkv_bias"}]))
def test_inputs_are_made_before_they_are_read(num_layers: int, features: set[str]) -> None:
    made: set[StageKey] = set()
    for key in stage_keys(num_layers, features):
        assert set(input_keys(key, num_layers, features)) <= made, key
        made.add(key)


def test_layers_are_chained_by_the_residual_stream() -> None:
    def inputs(layer: int | None, stage: str) -> list[str]:
        return [key.path for key in input_keys(StageKey(layer, stage), 3, {"dense"})]

    assert inputs(0, "attn_norm") == ["layer-0/embedding"]
    assert inputs(2, "attn_norm") == ["layer-1/post_ffn_residual"]
    assert inputs(None, "final_norm") == ["layer-2/post_ffn_residual"]
    assert inputs(None, "lm_head") == ["final_norm"]
    assert inputs(1, "attention") == ["layer-1/attn_softmax", "layer-1/qkv_matmul"]
    with_bias = input_keys(StageKey(1, "attention"), 3, {"dense", "qkv_bias"})
    assert with_bias[1] == StageKey(1, "qkv_bias")


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
