"""What runs ahead: the loading of weights, and the device itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from aprcore.engines.decode import Decoder
from aprcore.engines.engine import Engine
from aprcore.engines.forward import AHEAD, forward, trace
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.ground.errors import BackendError
from aprcore.models.model import Model
from aprcore.network.stages import StageKey
from aprcore.network.weights import Weight
from opencl_device import backend, require_device
from tiny import NUM_LAYERS, TOKENS, opened, write_model

require_device()

# What a loading thread on a busy machine may take; a test that passes does not wait for it.
PATIENCE_S = 20.0


class Watched:
    """A weight that says when its first row is read."""

    def __init__(self, weight: Weight) -> None:
        self.name, self.shape, self.dtype = weight.name, weight.shape, weight.dtype
        self.was_read = threading.Event()
        self._weight = weight

    def read(self, start: int, stop: int, out: Any = None) -> Any:
        self.was_read.set()
        return self._weight.read(start, stop, out)


class Counting(OpenCLBackend):
    """Counts operations, and fails at one of them."""

    def __init__(self, failing: int | None = None) -> None:
        super().__init__(backend().device)
        self.norms = 0
        self.failing = failing

    def rms_norm(self, *args: Any) -> Any:
        self.norms += 1
        if self.norms == self.failing:
            raise BackendError("the device is out of memory")
        return super().rms_norm(*args)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with opened(write_model(tmp_path_factory.mktemp("model") / "m.apr")) as model:
        yield model


def watch(model: Model) -> Mapping[str, Watched]:
    return {name: Watched(weight) for name, weight in model.weights.items()}


@pytest.mark.parametrize("budget_bytes", [0, 1 << 30])
def test_the_next_weights_are_read_while_this_layer_is_computed(
    model: Model, budget_bytes: int
) -> None:
    """Pieces of whole weights, three of them at a time: after each product the next three come."""
    weights = watch(model)
    with OpenCLBackend(backend().device, budget_bytes=budget_bytes) as op:
        stream = forward(model.graph, weights, op, TOKENS)
        seen = {}
        for key, _ in stream:
            seen[key] = True
            if key == StageKey(0, "embedding"):
                first = weights["model.layers.0.self_attn.q_proj.weight"]
                assert first.was_read.wait(PATIENCE_S), "before any product was asked for"
                assert not weights["model.layers.0.mlp.up_proj.weight"].was_read.is_set()
            if key == StageKey(0, "ffn_out"):
                layer = "model.layers.1.self_attn."
                following = [weights[f"{layer}{name}_proj.weight"] for name in "qkv"]
                for weight in following:
                    assert weight.was_read.wait(PATIENCE_S), weight.name
                assert not weights[f"{layer}o_proj.weight"].was_read.is_set()
    assert len(seen) > NUM_LAYERS


def test_a_pass_that_was_given_up_does_not_confuse_the_next(model: Model) -> None:
    with OpenCLBackend(backend().device, budget_bytes=0, piece_bytes=4000) as op:
        whole = {k: x.copy() for k, x in trace(model.graph, model.weights, op, TOKENS)}
        stream = trace(model.graph, model.weights, op, TOKENS)
        for _ in range(10):
            next(stream)
        stream.close()
        for key, tensor in trace(model.graph, model.weights, op, TOKENS):
            np.testing.assert_array_equal(tensor, whole[key], err_msg=str(key))


@pytest.mark.parametrize("ahead", [0, 1, AHEAD, 1000])
def test_running_ahead_changes_nothing(model: Model, ahead: int) -> None:
    expected = list(trace(model.graph, model.weights, backend(), TOKENS, ahead=0))
    found = list(trace(model.graph, model.weights, backend(), TOKENS, ahead=ahead))
    assert [key for key, _ in found] == [key for key, _ in expected]
    for (key, ours), (_, theirs) in zip(found, expected):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(key))


def test_the_device_is_some_stages_ahead_and_not_more(model: Model) -> None:
    with Counting() as op:
        stream = trace(model.graph, model.weights, op, TOKENS, ahead=2)
        assert next(stream)[0] == StageKey(0, "embedding")
        assert op.norms == 1  # attn_norm and the product after it
        stream.close()
        timed = Decoder(model.graph, model.weights, Engine(op)).stages(TOKENS)
        op.norms = 0
        next(timed)
        assert op.norms == 0  # who times a stage must not pay for the next


def test_what_was_made_before_an_error_still_comes(model: Model) -> None:
    with Counting(failing=3) as op:  # the first norm of layer 1
        found = []
        with pytest.raises(BackendError, match="out of memory"):
            for key, _ in trace(model.graph, model.weights, op, TOKENS):
                found.append(key)
        assert found[-1] == StageKey(0, "post_ffn_residual")
        assert op.norms == 3


def test_an_array_that_was_fetched_survives_the_reuse_of_its_memory() -> None:
    op = backend()
    x = np.arange(6, dtype=np.float32)
    there = op.add(op.from_host(x), op.from_host(x))
    wait = op.fetch(there)
    del there
    for value in range(20):  # the pool hands the freed buffer out again
        op.multiply(op.from_host(np.full(6, value)), op.from_host(x))
    np.testing.assert_array_equal(wait(), 2 * x)
