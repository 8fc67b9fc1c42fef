"""The check of a capture: the logits of the plain pass, and every stage on its inputs.

The model that runs is made up, and what it "shows" is this project's own float32 pass over the
weights of a model directory: then each tensor can be spoiled where a test wants it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aprcore.capture.oracle import OracleRequest, _Check
from aprcore.engines.forward import trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.formats.huggingface import read_huggingface
from aprcore.ground.errors import OracleError
from aprcore.models.model import assemble
from aprcore.network.dialects import declare_huggingface
from aprcore.network.graph import Graph, StageKey, parse_path
from tiny import SIZES, TOKENS, Tensors, draw_weights

torch = pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
save_file = pytest.importorskip("safetensors.numpy").save_file

NUM_LAYERS = 3
CONFIG = {
    "model_type": "llama", "hidden_size": SIZES["E"], "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": SIZES["H"], "num_key_value_heads": SIZES["K"], "head_dim": SIZES["D"],
    "vocab_size": SIZES["V"], "intermediate_size": SIZES["F"], "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip


@dataclass
class World:
    """A model directory, and what a sound engine shows of it."""

    folder: Path
    tensors: Tensors
    graph: Graph
    make: Callable[..., _Check]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weights = draw_weights(num_layers=NUM_LAYERS, has_bias=False)
    # As models are stored: half precision, which the engine widens without loss.
    save_file({k: w.astype(np.float16) for k, w in weights.items()}, folder / "model.safetensors")
    held = read_huggingface(folder)
    declared = declare_huggingface(held.config, held.config_path)
    config, assembled = assemble(declared, held.tensors, folder)
    graph = Graph(config)
    stream = trace(graph, assembled, NumpyBackend(1), TOKENS)
    tensors = {key: tensor.copy() for key, tensor in stream}

    def make(logits: Any = None, dtype: str = "float32") -> _Check:
        request = OracleRequest(folder, tokens=TOKENS, dtype=dtype)
        given = torch.zeros(1) if logits is None else logits
        return _Check(request, held, Plain(given), graph, TOKENS)

    return World(folder, tensors, graph, make)


class Plain:
    """A model whose logits are known."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def show(check: _Check, tensors: Tensors, keys: Iterable[StageKey] | None = None) -> None:
    """Record tensors in the order given, without the end."""
    for key in tensors if keys is None else keys:
        check.record(key, tensors[key])


def key_of(path: str) -> StageKey:
    key = parse_path(path)
    assert key is not None
    return key


def off(tensors: Tensors, *paths: str, by: float = 1e-3) -> Tensors:
    """A copy in which stages are off by a part of themselves."""
    return tensors | {(k := key_of(path)): tensors[k] * np.float32(1 + by) for path in paths}


def test_every_stage_of_a_sound_pass_is_judged(world: World) -> None:
    check = world.make()
    show(check, world.tensors)
    check.finish(torch.zeros(1))
    assert check.judged == len(world.graph.keys) == len(world.tensors)


def test_a_layer_is_judged_once_the_next_begins(world: World) -> None:
    check, counts = world.make(), []
    for key, values in world.tensors.items():
        check.record(key, values)
        counts.append((key.layer, check.judged))
    sizes = [len(world.graph.layer(n)) for n in (0, 1, 2)]
    sums = {0: 0, 1: sizes[0], 2: sizes[0] + sizes[1], None: sum(sizes)}
    assert counts == [(key.layer, sums[key.layer]) for key in world.tensors]


@pytest.mark.parametrize(
    "path", ["layer-0/embedding", "layer-0/ffn_out", "layer-1/attn_norm", "layer-1/attn_softmax"]
)
def test_a_stage_that_does_not_follow_from_its_inputs_stops_the_capture(
    world: World, path: str
) -> None:
    with pytest.raises(OracleError, match=f"{key_of(path)} does not follow") as caught:
        show(world.make(), off(world.tensors, path))
    assert caught.value.where == str(world.folder)


@pytest.mark.parametrize("path", ["final_norm", "lm_head"])
def test_what_follows_the_layers_is_judged_at_the_end(world: World, path: str) -> None:
    check = world.make()
    show(check, off(world.tensors, path))
    with pytest.raises(OracleError, match=f"{key_of(path)} does not follow"):
        check.finish(torch.zeros(1))


@pytest.mark.parametrize("path", ["layer-2/ffn_norm", "layer-2/post_ffn_residual"])
def test_the_last_layer_is_judged_before_what_follows_it(world: World, path: str) -> None:
    tensors = off(world.tensors, path)
    with pytest.raises(OracleError, match=f"{key_of(path)} does not follow"):
        show(world.make(), tensors)
    # A range of layers may end there.
    check = world.make()
    show(check, tensors, [k for k in tensors if k.layer is not None])
    with pytest.raises(OracleError, match=f"{key_of(path)} does not follow"):
        check.finish(torch.zeros(1))


def test_the_first_fault_in_the_order_of_computation_is_named(world: World) -> None:
    tensors = off(world.tensors, "layer-1/attn_norm", "layer-1/ffn_out")
    # Hooks fire in the order of the model's code: a residual, say, once the norm behind it reads.
    shown = [k for n in (0, 1, 2) for k in reversed(tensors) if k.layer == n]
    with pytest.raises(OracleError, match="layer 1 · attn_norm does not follow"):
        show(world.make(), tensors, shown)
    check = world.make()
    show(check, world.tensors, shown)
    assert check.judged == sum(len(world.graph.layer(n)) for n in (0, 1))


def test_values_are_those_that_were_shown_even_if_the_model_reuses_their_memory(
    world: World,
) -> None:
    check = world.make()
    for key, values in world.tensors.items():
        lent = values.copy()
        check.record(key, lent)
        lent[...] = 0
    check.finish(torch.zeros(1))
    assert check.judged == len(world.tensors)


def test_no_more_than_a_layer_is_held(world: World) -> None:
    check, held = world.make(), []
    for key, values in world.tensors.items():
        check.record(key, values)
        held.append(len(check._side.recorded_keys()))
    # And what the layer before it gave.
    assert max(held) <= max(len(world.graph.layer(n)) for n in range(NUM_LAYERS)) + 1


def test_what_is_not_finite_is_not_judged(world: World) -> None:
    key = StageKey(1, "ffn_gate")
    broken = world.tensors[key].copy()
    broken[0, 0] = np.inf
    check = world.make()
    show(check, world.tensors | {key: broken})
    check.finish(torch.zeros(1))
    # Nor what reads it; the rest is.
    assert check.judged == len(world.tensors) - 2


def test_half_precision_of_the_weights_alone_excuses_nothing(world: World) -> None:
    # The directory's float16 steps are 5e-4 of a weight.
    for path in ("layer-1/ffn_gate", "layer-1/attn_norm", "layer-0/embedding"):
        with pytest.raises(OracleError, match=f"{key_of(path)} does not follow"):
            show(world.make(), off(world.tensors, path, by=3e-6))


def test_what_the_engine_rounds_is_allowed_for(world: World) -> None:
    key = StageKey(1, "ffn_gate")
    rounded = world.tensors[key].astype(np.float16).astype(np.float32)
    until = [k for k in world.tensors if k.layer in (0, 1) and k.stage != "ffn_silu"]
    for dtype, passes in (("float16", True), ("float32", False)):
        check = world.make(dtype=dtype)
        show(check, world.tensors | {key: rounded}, until)
        if passes:
            check.finish(torch.zeros(1))
            continue
        with pytest.raises(OracleError, match="ffn_gate does not follow"):
            check.finish(torch.zeros(1))


class TestLogits:
    """Those of the pass that was captured, against those of the model alone."""

    def test_equal_ones_pass(self, world: World) -> None:
        logits = torch.arange(6.0).reshape(1, 2, 3)
        world.make(logits).finish(logits.clone())

    def test_a_single_bit_is_a_difference(self, world: World) -> None:
        logits = torch.arange(1, 7.0).reshape(1, 2, 3)
        other = logits.clone()
        other[0, 0, 0] = 1 + 2.0**-23
        with pytest.raises(OracleError, match=r"1\.25e-08 \(relative L2\) from its own") as caught:
            world.make(logits).finish(other)
        assert caught.value.where == str(world.folder)

    def test_they_are_those_of_before_the_capture(self, world: World) -> None:
        logits = torch.arange(6.0)
        check, captured = world.make(logits), logits.clone()
        logits += 1  # the model may give the same memory again
        check.finish(captured)
