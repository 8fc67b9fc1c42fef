"""Replaying single stages of a side on its own tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aprcore.engines.arithmetic import arithmetic_of_dtype
from aprcore.engines.forward import trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.judging.layouts import layout_of
from aprcore.judging.noise import assess
from aprcore.judging.replay import RecordedSide, expect_both
from aprcore.models.model import Model
from aprcore.network.graph import computation_order
from aprcore.network.stages import StageKey
from tiny import TOKENS, Tensors, opened, trace_model, write_model

SOUND = arithmetic_of_dtype("float32")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.fixture(scope="module")
def tensors(path: Path) -> Tensors:
    return trace_model(path)


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with opened(path) as found:
        yield found


def make_side(
    model: Model, tensors: Tensors, tokens: tuple[int, ...] | None = TOKENS
) -> RecordedSide:
    return RecordedSide(
        model.graph, model.weights, tokens, len(TOKENS), SOUND, read=lambda key: tensors.get(key)
    )  # fmt: skip


def without(tensors: Tensors, *stages: str) -> Tensors:
    return {key: x for key, x in tensors.items() if key.stage not in stages}


def test_every_stage_is_what_its_inputs_make_it(model: Model, tensors: Tensors) -> None:
    side = make_side(model, tensors)
    for key in sorted(tensors, key=computation_order):
        side.enter(key)
        expected = side.expect(key)
        assert expected is not None and expected.span == () and expected.recomputed == ()
        layout = layout_of(key, side.sizes(), tensors[key].size)
        assert assess(tensors[key], expected.estimate, layout).explained, key


def test_a_missing_input_is_recomputed_and_the_span_named(model: Model, tensors: Tensors) -> None:
    side = make_side(model, without(tensors, "attn_scores", "attn_softmax"))
    key = StageKey(1, "attention")
    found = side.expect(key)
    assert found is not None
    assert {k.stage for k in found.span} == {"q_post_rope", "k_post_rope", "qkv_bias"}
    assert {k.stage for k in found.recomputed} == {"attn_scores", "attn_softmax"}
    layout = layout_of(key, side.sizes(), tensors[key].size)
    assert assess(tensors[key], found.estimate, layout).explained
    direct = make_side(model, tensors).expect(key)
    assert direct is not None
    # More operations lie in the span, so more noise is allowed for.
    assert found.estimate.variance.sum() > direct.estimate.variance.sum()


def test_a_layer_of_which_only_outputs_are_recorded(model: Model, tensors: Tensors) -> None:
    kept = {k: x for k, x in tensors.items() if k.stage in ("post_ffn_residual", "lm_head")}
    side = make_side(model, kept)
    found = side.expect(StageKey(1, "post_ffn_residual"))
    assert found is not None
    assert found.span == (StageKey(0, "post_ffn_residual"),)
    assert side.expect(StageKey(None, "lm_head")) is not None


def test_a_span_does_not_cross_a_whole_layer(model: Model, tensors: Tensors) -> None:
    kept = {k: x for k, x in tensors.items() if k.layer != 1}
    side = make_side(model, kept)
    assert side.expect(StageKey(2, "attn_norm")) is None
    assert side.expect(StageKey(2, "ffn_norm")) is not None


def test_without_token_ids_the_embedding_is_taken_as_recorded(
    model: Model, tensors: Tensors
) -> None:
    side = make_side(model, tensors, tokens=None)
    assert side.expect(StageKey(0, "embedding")) is None
    assert side.expect(StageKey(0, "attn_norm")) is not None


def test_inputs_that_are_not_finite_judge_nothing(model: Model, tensors: Tensors) -> None:
    broken = tensors[StageKey(1, "ffn_norm")].copy()
    broken[0, 0] = np.inf
    side = make_side(model, tensors | {StageKey(1, "ffn_norm"): broken})
    assert side.expect(StageKey(1, "ffn_gate")) is None
    assert side.expect(StageKey(1, "post_ffn_residual")) is not None


def test_both_sides_at_once_are_each_side_alone(model: Model, tensors: Tensors) -> None:
    other = {key: x + np.float32(1e-3) for key, x in tensors.items()}
    for key in sorted(tensors, key=computation_order):
        pair = expect_both(make_side(model, tensors), make_side(model, other), key)
        alone = make_side(model, tensors).expect(key), make_side(model, other).expect(key)
        for together, single in zip(pair, alone):
            assert together is not None and single is not None
            np.testing.assert_allclose(
                together.estimate.value, single.estimate.value, rtol=1e-12, atol=1e-12
            )


def test_earlier_layers_are_forgotten(model: Model) -> None:
    """What is held stays that of one layer, however deep the model."""
    side = RecordedSide(model.graph, model.weights, TOKENS, len(TOKENS), SOUND)
    held = []
    for key, x in trace(model.graph, model.weights, NumpyBackend(1), TOKENS):
        side.enter(key)
        assert side.expect(key) is not None
        side.record(key, x)
        held.append(len(side.recorded_keys()))
    assert max(held) <= 18 + 1  # a layer's stages, and the output of the one before
