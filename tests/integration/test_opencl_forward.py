"""The whole pass on the device against the CPU path, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.engines.expectation import product_weights
from aprcore.engines.forward import everything, needed_keys, trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.models.model import Model, open_model
from aprcore.network.stages import StageKey
from aprtui.demo import demo_path
from closeness import relative_l2
from models import ARCHITECTURES, FIRST_GEMMA, build, random_config, save, write_apr
from opencl_device import backend, require_device
from stored_weights import write_block_model

require_device()

# Float32 on both sides: only the order of additions differs.
RELATIVE_L2_BOUND = 1e-5
LOGITS = StageKey(None, "lm_head")

# Two of each architecture, among them one token, 65 tokens and every kind of RoPE scaling.
QUICK_SEEDS = (0, 1, 2, 3, 5, 6, 7, 8, 13, FIRST_GEMMA, FIRST_GEMMA + 1, FIRST_GEMMA + 4)


def trace_all(model: Model, op: Any, tokens: tuple[int, ...]) -> dict[StageKey, np.ndarray]:
    stream = trace(model.graph, model.weights, op, tokens)
    return {key: tensor.copy() for key, tensor in stream}


def assert_paths_agree(model: Model, op: OpenCLBackend, tokens: tuple[int, ...]) -> None:
    """Hold every stage of the device against the CPU's."""
    on_cpu = trace_all(model, NumpyBackend(), tokens)
    on_device = trace_all(model, op, tokens)
    assert list(on_device) == list(on_cpu)
    for key, expected in on_cpu.items():
        found = on_device[key]
        assert found.shape == expected.shape, key
        assert relative_l2(found, expected) <= RELATIVE_L2_BOUND, key
    assert on_device[LOGITS].argmax() == on_cpu[LOGITS].argmax()
    logits = op.from_host(on_device[LOGITS])
    assert op.argmax(logits) == on_device[LOGITS].argmax()


def check_random_model(seed: int, folder: Path, op: OpenCLBackend) -> None:
    pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
    pytest.importorskip("transformers", reason="transformers is not installed (`oracle` extra)")
    recipe = random_config(seed)
    model = build(recipe)
    # Stored as adjacent pairs, rows reach the device in another order than the file's.
    paths = [write_apr(model, folder / "model.apr", rope_type=0), save(model, folder / "hf")]
    with open_model(paths[seed % 2]) as opened:
        assert_paths_agree(opened, op, recipe.tokens)


@pytest.mark.parametrize("seed", QUICK_SEEDS)
def test_random_models(seed: int, tmp_path: Path) -> None:
    assert {random_config(seed).architecture for seed in QUICK_SEEDS} == set(ARCHITECTURES)
    check_random_model(seed, tmp_path, backend())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_more_random_models(seed: int, tmp_path: Path) -> None:
    check_random_model(seed, tmp_path, backend())


@pytest.mark.slow
@pytest.mark.parametrize("seed", QUICK_SEEDS)
def test_random_models_with_work_groups(seed: int, tmp_path: Path) -> None:
    check_random_model(seed, tmp_path, backend(64))


@pytest.mark.parametrize("lanes", [None, 64])
@pytest.mark.parametrize("num_tokens", [1, 5, 23])
def test_demo_model(num_tokens: int, lanes: int | None) -> None:
    with open_model(demo_path() / "sound.apr") as model:
        tokens = tuple(range(40, 40 + num_tokens))
        assert_paths_agree(model, backend(lanes), tokens)


def test_the_pass_repeats_bit_for_bit_streamed_or_kept() -> None:
    with open_model(demo_path() / "sound.apr") as model:
        tokens = (40, 41, 42, 43, 44)
        first = trace_all(model, backend(), tokens)
        budgets = [{"budget_bytes": 0, "piece_bytes": 4000}, {"budget_bytes": 1 << 30}]
        for options in budgets:
            with OpenCLBackend(backend().device, **options) as op:
                for _ in range(3):
                    for key, tensor in trace_all(model, op, tokens).items():
                        np.testing.assert_array_equal(tensor, first[key], err_msg=str(key))


@pytest.mark.parametrize("rope_type", [0, 2])
@pytest.mark.parametrize("dtype", ["Q4_K", "Q6_K", "AprQ4", "AprQ8", "BF16"])
def test_a_quantised_model(dtype: str, rope_type: int, tmp_path: Path) -> None:
    path = write_block_model(tmp_path / "model.apr", dtype, rope_type=rope_type)
    with open_model(path) as model:
        assert_paths_agree(model, backend(), (1, 2, 3, 4, 5, 6, 7))
        with OpenCLBackend(backend().device, piece_bytes=10_000) as op:
            keys = needed_keys(model.graph, everything)
            op.expect(product_weights(model.graph, model.weights, keys))
            assert_paths_agree(model, op, (1, 2, 3))


def test_the_weights_that_are_expected_are_those_that_come() -> None:
    class Listening(NumpyBackend):
        def linear(self, x: Any, weights: Any) -> Any:
            heard.extend(weights)
            return super().linear(x, weights)

    heard: list[Any] = []
    with open_model(demo_path() / "sound.apr") as model:
        keys = needed_keys(model.graph, everything)
        expected = product_weights(model.graph, model.weights, keys)
        trace_all(model, Listening(), (1, 2))
    assert [weight.name for weight in expected] == [weight.name for weight in heard]
    assert len(expected) == 7 * model.config.num_layers + 1
