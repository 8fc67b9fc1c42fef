"""Where an inherited error began, and what it spoils: each verdict, and each way through."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from aprcore.judging.verdict import Verdict
from aprcore.network.graph import outline, parse_path
from aprcore.network.stages import StageKey
from aprcore.records.report import RunHeader, Side, StageReport
from aprtui.lineage import CARRIES_ON, spoiled_by, trace_upstream
from aprtui.run_state import RunState

DIVERGE = ("FAIL", "NONFINITE", "SHAPE")
FEATURES = frozenset({"qkv_bias"})


def key_of(path: str) -> StageKey:
    key = parse_path(path)
    assert key is not None
    return key


def state_of(
    words: Mapping[str, str | None], *, unrecorded: tuple[str, ...] = (),
    features: frozenset[str] = FEATURES, architecture: str | None = None,
) -> RunState:  # fmt: skip
    """A run of two layers in which every stage passes but these."""
    keys = tuple(outline(2, features).keys)
    side = Side("m.apr", "float32")
    state = RunState()
    state.open(RunHeader(side, side, "m.apr", architecture, 2, None, None, None, keys, 1e-4, None))
    for key in keys:
        word = words.get(key.path, "PASS")
        if key.path not in unrecorded:
            verdict = None if word is None else Verdict(word)
            state.add(StageReport(key, None, verdict, ""))
    return state


def way(state: RunState, path: str) -> list[str] | None:
    """The way from a stage up to where its error began."""
    lineage = trace_upstream(state, key_of(path))
    if lineage is None:
        return None
    assert lineage.origin == lineage.path[-1]
    return [key.path for key in lineage.path]


def blamed(state: RunState, path: str) -> list[str]:
    lineage = trace_upstream(state, key_of(path))
    assert lineage is not None
    return [key.path for key in lineage.faults]


SCORES, SOFTMAX, ATTENTION = (f"layer-1/{s}" for s in ("attn_scores", "attn_softmax", "attention"))


class TestUpstream:
    @pytest.mark.parametrize("word", DIVERGE)
    def test_what_diverges_is_to_blame(self, word: str) -> None:
        state = state_of({SCORES: word, SOFTMAX: "INHERITED", ATTENTION: "INHERITED"})
        assert way(state, ATTENTION) == [ATTENTION, SOFTMAX, SCORES]
        assert blamed(state, ATTENTION) == [SCORES]
        assert way(state, SOFTMAX) == [SOFTMAX, SCORES]
        assert way(state, SCORES) is None

    @pytest.mark.parametrize("word", [v.value for v in Verdict if not v.is_divergence])
    def test_what_does_not_diverge_is_not(self, word: str) -> None:
        # It may be the end of the way where rounding began, or of no way at all.
        state = state_of({SCORES: word, SOFTMAX: "INHERITED"})
        assert way(state, SOFTMAX) == ([SOFTMAX, SCORES] if word == "NOISE" else None)

    @pytest.mark.parametrize("word", [*(v.value for v in Verdict), None])
    def test_what_an_error_comes_through(self, word: str | None) -> None:
        state = state_of({SCORES: "FAIL", SOFTMAX: word, ATTENTION: "INHERITED"})
        # PASS and LAYOUT say that what came in did no harm; so does what nobody judged.
        if word in ("PASS", "LAYOUT", None):
            assert way(state, ATTENTION) is None
            assert word not in CARRIES_ON
        else:
            assert way(state, ATTENTION) == [ATTENTION, SOFTMAX, SCORES]

    def test_an_unrecorded_stage_is_passed_through(self) -> None:
        state = state_of({SCORES: "FAIL"}, unrecorded=(SOFTMAX,))
        assert way(state, ATTENTION) == [ATTENTION, SOFTMAX, SCORES]
        assert blamed(state, ATTENTION) == [SCORES]

    def test_the_shortest_way_is_taken(self) -> None:
        # The residual reads the layer's input itself, which attention reads as well.
        keys = [key.path for key in outline(2, FEATURES).keys]
        residual = "layer-0/post_attn_residual"
        between = keys[1 : keys.index(residual)]
        words = {"layer-0/embedding": "FAIL", residual: "INHERITED"}
        state = state_of(words | dict.fromkeys(between, "INHERITED"))
        assert way(state, residual) == [residual, "layer-0/embedding"]
        attn_out = "layer-0/attn_out"
        assert way(state, attn_out) == [
            attn_out, "layer-0/attention", "layer-0/qkv_bias", "layer-0/qkv_matmul",
            "layer-0/attn_norm", "layer-0/embedding",
        ]  # fmt: skip

    def test_of_ways_as_short_the_one_of_the_first_input_is_taken(self) -> None:
        between = (f"layer-1/{stage}" for stage in ("q_post_rope", "k_post_rope"))
        words = {"layer-1/qkv_bias": "FAIL"} | dict.fromkeys((*between, SCORES), "INHERITED")
        assert way(state_of(words), SOFTMAX) == [
            SOFTMAX, SCORES, "layer-1/q_post_rope", "layer-1/qkv_bias",
        ]  # fmt: skip

    def test_the_first_of_several_faults_is_the_origin(self) -> None:
        words = {SCORES: "FAIL", "layer-0/ffn_out": "NONFINITE", "layer-1/ffn_norm": "FAIL"}
        keys = [key.path for key in outline(2, FEATURES).keys]
        after = keys[keys.index("layer-0/ffn_out") :]
        state = state_of(dict.fromkeys(after, "INHERITED") | words)
        assert blamed(state, ATTENTION) == ["layer-0/ffn_out", SCORES]
        assert way(state, ATTENTION)[-1] == "layer-0/ffn_out"
        assert blamed(state, "lm_head") == ["layer-0/ffn_out", SCORES, "layer-1/ffn_norm"]

    def test_a_fault_comes_before_rounding(self) -> None:
        words = {"layer-1/q_post_rope": "NOISE", SCORES: "FAIL", SOFTMAX: "INHERITED"}
        assert way(state_of(words), SOFTMAX) == [SOFTMAX, SCORES]

    def test_rounding_is_followed_to_its_first_stage(self) -> None:
        words = dict.fromkeys(("layer-1/q_post_rope", "layer-1/k_post_rope", SCORES), "NOISE")
        state = state_of(words)
        assert way(state, SOFTMAX) == [SOFTMAX, SCORES, "layer-1/q_post_rope"]
        assert blamed(state, SOFTMAX) == []

    @pytest.mark.parametrize(
        ("features", "source"),
        [(FEATURES, "qkv_bias"), (frozenset(), "qkv_matmul")],
    )
    def test_where_there_is_a_bias_it_is_what_is_read(
        self, features: frozenset[str], source: str
    ) -> None:
        words = {"layer-1/qkv_matmul": "FAIL", f"layer-1/{source}": "FAIL"}
        state = state_of(words, features=features)
        query = "layer-1/q_post_rope"
        assert way(state, query)[1] == f"layer-1/{source}"
        assert [key.path for key in spoiled_by(state, key_of(f"layer-1/{source}"))] == []
        state = state_of(words | {query: "INHERITED"}, features=features)
        assert [key.path for key in spoiled_by(state, key_of(f"layer-1/{source}"))] == [query]

    def test_a_stage_that_only_the_architecture_tells_of_is_on_the_way(self) -> None:
        words = {"layer-1/attn_out": "FAIL", "layer-1/post_attn_residual": "INHERITED"}
        state = state_of(words, architecture="gemma2")
        assert way(state, "layer-1/post_attn_residual") == [
            "layer-1/post_attn_residual", "layer-1/attn_post_norm", "layer-1/attn_out",
        ]  # fmt: skip
        assert way(state_of(words), "layer-1/post_attn_residual") == [
            "layer-1/post_attn_residual", "layer-1/attn_out",
        ]  # fmt: skip

    def test_what_follows_the_layers_reads_the_last_one(self) -> None:
        last = "layer-1/post_ffn_residual"
        state = state_of({last: "FAIL", "final_norm": "INHERITED", "lm_head": "INHERITED"})
        assert way(state, "lm_head") == ["lm_head", "final_norm", last]

    def test_before_the_files_are_open_nothing_is_known(self) -> None:
        assert trace_upstream(RunState(), key_of(SCORES)) is None
        assert spoiled_by(RunState(), key_of(SCORES)) == ()


class TestDownstream:
    def spoiled(self, state: RunState, path: str) -> list[str]:
        return [key.path for key in spoiled_by(state, key_of(path))]

    @pytest.mark.parametrize("word", [*(v.value for v in Verdict), None])
    def test_a_reader_with_an_error_of_its_own_or_another_may_have_it_from_here(
        self, word: str | None
    ) -> None:
        carries = word not in ("PASS", "LAYOUT", None)
        state = state_of({SCORES: "FAIL", SOFTMAX: word, ATTENTION: "INHERITED"})
        # Only who reads the stage itself: what they spoil is told of them.
        assert self.spoiled(state, SCORES) == ([SOFTMAX] if carries else [])
        assert self.spoiled(state, SOFTMAX) == ([ATTENTION] if carries else [])

    def test_an_unrecorded_reader_is_passed_through(self) -> None:
        state = state_of({SCORES: "FAIL", ATTENTION: "INHERITED"}, unrecorded=(SOFTMAX,))
        assert self.spoiled(state, SCORES) == [ATTENTION]

    def test_readers_come_in_the_order_of_computation(self) -> None:
        readers = [f"layer-1/{s}" for s in ("q_post_rope", "k_post_rope", "attention")]
        state = state_of({"layer-1/qkv_bias": "FAIL"} | dict.fromkeys(readers, "INHERITED"))
        assert self.spoiled(state, "layer-1/qkv_bias") == readers
        last = ["layer-1/attn_norm", "layer-1/post_attn_residual"]
        state = state_of({"layer-0/post_ffn_residual": "NOISE"} | dict.fromkeys(last, "INHERITED"))
        assert self.spoiled(state, "layer-0/post_ffn_residual") == last

    @pytest.mark.parametrize("feature", ["qkv_bias", "moe_router"])
    def test_readers_of_either_kind_of_feed_forward_network(self, feature: str) -> None:
        readers = [
            key.path
            for key in outline(2, {feature}).keys
            if key.layer == 1 and key.stage in ("ffn_gate", "ffn_up", "moe_router", "moe_ffn_out")
        ]
        words = {"layer-1/ffn_norm": "FAIL"} | dict.fromkeys(readers, "INHERITED")
        state = state_of(words, features=frozenset({feature}))
        assert len(readers) == 2
        assert self.spoiled(state, "layer-1/ffn_norm") == readers
