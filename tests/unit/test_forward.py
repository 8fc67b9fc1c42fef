"""Walking the table of stages."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.dumps.trace import record_trace
from aprcore.engines.forward import everything, forward, needed_keys
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import ConfigError
from aprcore.models.model import Model
from aprcore.network.graph import BY_NAME, StageKey, resolve_shape, stage_keys
from tiny import NUM_LAYERS, SIZES, TOKENS, opened, trace_model, write_model

LOGITS = StageKey(None, "lm_head")


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    path = write_model(tmp_path_factory.mktemp("model") / "m.apr", has_bias=request.param)
    with opened(path) as model:
        yield model


class Counting(NumpyBackend):
    """Counts the products that were computed."""

    def __init__(self) -> None:
        super().__init__(1)
        self.products = 0

    def linear(self, x: Any, weights: Any) -> Any:
        self.products += 1
        return super().linear(x, weights)


def test_every_stage_of_the_model_comes_in_order_and_in_its_shape(model: Model) -> None:
    found = trace_model(model.path)
    assert list(found) == list(stage_keys(NUM_LAYERS, model.config.features))
    sizes = SIZES | {"T": len(TOKENS), "S": len(TOKENS)}
    for key, tensor in found.items():
        assert tensor.shape == resolve_shape(BY_NAME[key.stage].shape, sizes), key
        assert tensor.dtype == np.float32


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        (StageKey(0, "embedding"), 0),
        (StageKey(0, "attn_norm"), 0),
        (StageKey(0, "attn_scores"), 1),
        (StageKey(0, "ffn_gate"), 3),  # qkv, o, gate and not up
        (StageKey(1, "attn_norm"), 5),
        (LOGITS, 5 * NUM_LAYERS + 1),
    ],
)
def test_only_what_is_needed_is_computed(model: Model, wanted: StageKey, products: int) -> None:
    backend = Counting()
    stream = forward(model.config, model.weights, backend, TOKENS, wanted.__eq__)
    assert [key for key, _ in stream] == [wanted]
    assert backend.products == products


def test_needed_keys_are_closed_under_reading(model: Model) -> None:
    keys = needed_keys(model.config, StageKey(1, "attn_out").__eq__)
    stages = [key.stage for key in keys if key.layer == 1]
    assert stages[-1] == "attn_out"
    assert "ffn_norm" not in stages
    assert needed_keys(model.config, lambda _: False) == []
    everything_needed = needed_keys(model.config, everything)
    assert everything_needed == list(stage_keys(NUM_LAYERS, model.config.features))


def test_a_tensor_is_dropped_with_its_last_reader(model: Model) -> None:
    alive: dict[StageKey, weakref.ref[Any]] = {}
    most = 0
    stream = forward(model.config, model.weights, NumpyBackend(1), TOKENS)
    for key, tensor in stream:
        alive[key] = weakref.ref(tensor if tensor.base is None else tensor.base)
        del tensor
        most = max(most, sum(ref() is not None for ref in alive.values()))
    # The residual, both parts of the product and the stage just yielded, and a few in between.
    assert most <= 8
    assert len(alive) > 40


def test_wanting_less_does_not_change_a_bit(model: Model) -> None:
    whole = trace_model(model.path)
    for key in (LOGITS, StageKey(1, "attention"), StageKey(2, "ffn_swigl")):
        stream = forward(model.config, model.weights, NumpyBackend(1), TOKENS, key.__eq__)
        ((_, tensor),) = stream
        np.testing.assert_array_equal(tensor.reshape(whole[key].shape), whole[key])


def test_a_prefix_gives_the_same_rows(model: Model) -> None:
    """No token sees a later one. BLAS may sum another number of tokens in another order."""
    whole, part = trace_model(model.path), trace_model(model.path, TOKENS[:3])
    key = StageKey(NUM_LAYERS - 1, "post_ffn_residual")
    np.testing.assert_allclose(whole[key][:3], part[key], rtol=0, atol=1e-5)


def test_the_pass_is_deterministic_whatever_the_threads(model: Model) -> None:
    runs = []
    for threads in (1, 2, 3, 1):
        stream = forward(model.config, model.weights, NumpyBackend(threads), TOKENS)
        runs.append({key: tensor.copy() for key, tensor in stream})
    for run in runs[1:]:
        for key, tensor in run.items():
            np.testing.assert_array_equal(tensor, runs[0][key])


def test_saving_or_not_gives_identical_logits(model: Model, tmp_path: Path) -> None:
    none, unsaved = record_trace(model, TOKENS)
    every, saved = record_trace(model, TOKENS, plan=Plan(), directory=tmp_path / "all")
    one, single = record_trace(
        model, TOKENS, plan=Plan(("attn_norm",), range(1)), directory=tmp_path / "one"
    )
    assert (none, every, one) == (0, len(list(stage_keys(3, model.config.features))), 1)
    np.testing.assert_array_equal(saved, unsaved)
    np.testing.assert_array_equal(single, unsaved)


def test_a_sliding_window_that_the_pass_outgrows_is_refused(model: Model) -> None:
    config = replace(model.config, sliding_window=4)
    with pytest.raises(ConfigError, match=r"window of 4 tokens, and 5 were given"):
        next(forward(config, model.weights, NumpyBackend(1), TOKENS))
    # Within it the window masks nothing.
    whole = dict(forward(model.config, model.weights, NumpyBackend(1), TOKENS[:4]))
    windowed = dict(forward(config, model.weights, NumpyBackend(1), TOKENS[:4]))
    np.testing.assert_array_equal(whole[LOGITS], windowed[LOGITS])
