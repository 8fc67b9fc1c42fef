"""Walking the graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.dumps.trace import record_trace
from aprcore.engines.forward import everything, forward, needed_keys, trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.reference import ReferenceBackend
from aprcore.ground.errors import ConfigError
from aprcore.models.model import Model
from aprcore.network.backend import KeyValueCache
from aprcore.network.graph import Graph, known_stages
from aprcore.network.stages import StageKey, resolve_shape
from tiny import NUM_LAYERS, SIZES, TOKENS, Tensors, opened, trace_model, write_model

LOGITS = StageKey(None, "lm_head")
BACKENDS = (NumpyBackend(1), ReferenceBackend())


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
    assert list(found) == list(model.graph.keys)
    sizes = SIZES | {"T": len(TOKENS), "S": len(TOKENS)}
    for key, tensor in found.items():
        assert tensor.shape == resolve_shape(known_stages()[key.stage].shape, sizes), key
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
    stream = forward(model.graph, model.weights, backend, TOKENS, wanted.__eq__)
    assert [key for key, _ in stream] == [wanted]
    assert backend.products == products


def test_needed_keys_are_closed_under_reading(model: Model) -> None:
    keys = needed_keys(model.graph, StageKey(1, "attn_out").__eq__)
    stages = [key.stage for key in keys if key.layer == 1]
    assert stages[-1] == "attn_out"
    assert "ffn_norm" not in stages
    assert needed_keys(model.graph, lambda _: False) == []
    everything_needed = needed_keys(model.graph, everything)
    assert everything_needed == list(model.graph.keys)


def test_a_tensor_is_dropped_with_its_last_reader(model: Model) -> None:
    alive: dict[StageKey, weakref.ref[Any]] = {}
    most = 0
    stream = forward(model.graph, model.weights, NumpyBackend(1), TOKENS)
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
        stream = forward(model.graph, model.weights, NumpyBackend(1), TOKENS, key.__eq__)
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
        stream = forward(model.graph, model.weights, NumpyBackend(threads), TOKENS)
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
    assert (none, every, one) == (0, len(list(model.graph.keys)), 1)
    np.testing.assert_array_equal(saved, unsaved)
    np.testing.assert_array_equal(single, unsaved)


def with_windows(model: Model, *windows: int | None, **changes: Any) -> Graph:
    return Graph(replace(model.config, windows=windows, **changes))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_window_hides_what_lies_before_it(model: Model, backend: Any) -> None:
    def run(graph: Graph, tokens: Sequence[int] = TOKENS) -> Tensors:
        return dict(trace(graph, model.weights, backend, tokens))

    whole, narrow = run(model.graph), run(with_windows(model, 2, None))
    for layer, window in ((0, 2), (1, None), (2, 2)):
        weights = narrow[StageKey(layer, "attn_softmax")]
        for token in range(len(TOKENS)):
            first = 0 if window is None else max(0, token - window + 1)
            assert not weights[:, token, :first].any()
            assert (weights[:, token, first : token + 1] > 0).all()
            np.testing.assert_allclose(weights[:, token].sum(axis=-1), 1, rtol=1e-6)
    # As wide as the text a window hides nothing.
    wide = run(with_windows(model, len(TOKENS)))
    assert all(np.array_equal(x, whole[key]) for key, x in wide.items())
    assert not np.array_equal(narrow[LOGITS], whole[LOGITS])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_cache_of_a_decoding_step_is_seen_through_the_window(
    model: Model, backend: Any
) -> None:
    graph = with_windows(model, 2, None)
    whole = dict(trace(graph, model.weights, backend, TOKENS))
    cache = KeyValueCache()
    for position, token in enumerate(TOKENS):
        step = dict(trace(graph, model.weights, backend, [token], cache=cache))
        row = whole[StageKey(2, "attention")][position]
        np.testing.assert_allclose(step[StageKey(2, "attention")][0], row, rtol=1e-4, atol=1e-6)
        weights = step[StageKey(0, "attn_softmax")]
        assert not weights[:, :, : max(0, position - 1)].any()


def test_in_both_directions_every_token_sees_every_other(model: Model) -> None:
    graph = with_windows(model, None, is_causal=False)
    found = dict(trace(graph, model.weights, NumpyBackend(1), TOKENS))
    assert (found[StageKey(1, "attn_softmax")] > 0).all()
    cache = KeyValueCache()
    assert dict(trace(graph, model.weights, NumpyBackend(1), TOKENS[:2], cache=cache))
    with pytest.raises(ConfigError, match="both directions: it does not continue a text"):
        next(trace(graph, model.weights, NumpyBackend(1), TOKENS[2:], cache=cache))
