"""Hooks on engines in torch: what is written, under which names, and what is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.capture import capture_torch
from aprcore.dumps.tensor_files import read_safetensors_dump
from aprcore.dumps.tensor_folder import TENSORS_NAME
from aprcore.ground.errors import TraceError
from aprcore.judging.verdict import Verdict
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from models import build, save, small_model

torch = pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
pytest.importorskip("transformers", reason="transformers is not installed")


class FusedNorm(torch.nn.Module):
    """A norm that is given the residual stream too, and adds to it in place, as vLLM's does."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x: Any, residual: Any = None) -> Any:
        if residual is None:
            return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight)
        residual += x
        return torch.nn.functional.rms_norm(residual, x.shape[-1:], self.weight), residual


class FusedLayer(torch.nn.Module):
    def __init__(self, size: int, shared: torch.nn.Module) -> None:
        super().__init__()
        self.norm = FusedNorm(size)
        self.shared = shared
        self.product = torch.nn.Linear(size, size)

    def forward(self, x: Any, residual: Any) -> Any:
        if residual is None:
            residual = x.clone()
            x = self.norm(x)
        else:
            x, residual = self.norm(x, residual)
        return self.product(self.shared(x) * 2), residual


class FusedEngine(torch.nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        shared = torch.nn.SiLU()  # one module in every layer, as vLLM shares its rotary embedding
        self.embed = torch.nn.Embedding(10, size)
        self.layers = torch.nn.ModuleList(FusedLayer(size, shared) for _ in range(2))

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        x, residual = self.embed(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


def _read(folder: Path) -> dict[str, np.ndarray]:
    held = read_safetensors_dump(folder / TENSORS_NAME)
    return {name: array.read() for name, array in held.arrays.items()}


def _sidecar(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "_trace.json").read_text("utf-8"))


@pytest.fixture
def engine() -> FusedEngine:
    torch.manual_seed(0)
    return FusedEngine().eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_transformers_is_judged_without_a_map(tmp_path: Path, dtype: str) -> None:
    recipe = small_model("qwen2")
    model = build(recipe, dtype)
    model.set_attn_implementation("eager")
    path = save(build(recipe), tmp_path / "model")
    with torch.inference_mode(), capture_torch(model, tmp_path / "dump", engine="transformers"):
        model(torch.tensor([recipe.tokens]))
    report = run(Request(model=path, trace=tmp_path / "dump"))
    verdicts = {stage.key.stage: stage.verdict for stage in report.stages}
    assert set(verdicts.values()) == {Verdict.PASS}
    assert {"embedding", "qkv_bias", "attn_softmax", "attention", "post_attn_residual", "ffn_swigl",
            "post_ffn_residual", "final_norm", "lm_head"} <= set(verdicts)  # fmt: skip
    sidecar = _sidecar(tmp_path / "dump")
    assert sidecar["tokens"] == list(recipe.tokens)
    assert sidecar["dtype"] == dtype
    assert sidecar["backend"] == "transformers"


def test_pairs_are_written_as_the_module_gives_them(tmp_path: Path, engine: FusedEngine) -> None:
    ids = torch.tensor([1, 2, 3])
    with torch.inference_mode(), capture_torch(engine, tmp_path):
        logits = engine(ids)
        stream = engine.embed(ids)
    held = _read(tmp_path)
    assert np.array_equal(held["layers.0.norm"], _numpy(engine.layers[0].norm(stream)))
    # The residual stream is written as it was then, though the next norm adds to it in place.
    assert np.array_equal(held["layers.0.1"], _numpy(stream))
    assert np.array_equal(held["layers.1.norm.1"], _numpy(stream) + held["layers.0.0"])
    assert np.array_equal(held["layers.1.0"], _numpy(logits))
    assert "output" not in held  # the last layer's own, which is there


def test_what_no_module_gave_is_written_as_an_input(tmp_path: Path, engine: FusedEngine) -> None:
    with torch.inference_mode(), capture_torch(engine, tmp_path):
        engine(torch.tensor([1, 2, 3]))
    held = _read(tmp_path)
    assert np.array_equal(held["layers.0.product.input"], held["layers.0.shared"] * 2)
    assert "layers.0.shared.input" not in held
    assert "layers.0.input" not in held


def test_a_tensor_that_was_added_to_since_is_an_input_of_its_own(tmp_path: Path) -> None:
    class Adding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.second = torch.nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            y = self.first(x)
            y += 1
            return self.second(y)

    model = Adding()
    with torch.inference_mode(), capture_torch(model, tmp_path):
        model(torch.ones(2, 4))
    held = _read(tmp_path)
    assert np.array_equal(held["second.input"], held["first"] + 1)


def test_a_shared_module_is_named_by_the_layer_that_runs_it(
    tmp_path: Path, engine: FusedEngine
) -> None:
    with torch.inference_mode(), capture_torch(engine, tmp_path):
        engine(torch.tensor([1, 2, 3]))
    held = _read(tmp_path)
    for layer in range(2):
        norm = held["layers.0.norm" if layer == 0 else "layers.1.norm.0"]
        wanted = _numpy(torch.nn.functional.silu(torch.from_numpy(norm)))
        assert np.array_equal(held[f"layers.{layer}.shared"], wanted)


def test_a_batch_keeps_its_axis_and_its_ids(tmp_path: Path, engine: FusedEngine) -> None:
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.inference_mode(), capture_torch(engine, tmp_path):
        engine(input_ids=ids, attention_mask=mask)
    assert _read(tmp_path)["layers.0.norm"].shape == (2, 3, 4)
    library = pytest.importorskip("safetensors.numpy")
    held = library.load_file(tmp_path / TENSORS_NAME)
    assert np.array_equal(held["input_ids"], _numpy(ids))
    assert np.array_equal(held["attention_mask"], _numpy(mask))
    assert _sidecar(tmp_path)["tokens"] is None
    assert _sidecar(tmp_path)["settings"]["batch"] == 2


def test_a_later_call_is_captured_alone(tmp_path: Path, engine: FusedEngine) -> None:
    with torch.inference_mode(), capture_torch(engine, tmp_path, call=1):
        engine(torch.tensor([1, 2, 3]))
        engine(torch.tensor([4]))
    assert _read(tmp_path)["layers.0.norm"].shape == (1, 4)
    assert _sidecar(tmp_path)["tokens"] == [4]


def test_only_the_modules_that_are_asked_for(tmp_path: Path, engine: FusedEngine) -> None:
    with (
        torch.inference_mode(),
        capture_torch(engine, tmp_path, only=lambda name: name.endswith("norm")),
    ):
        engine(torch.tensor([1, 2, 3]))
    assert {"layers.0.norm", "layers.1.norm.0"} <= set(_read(tmp_path))
    assert not any("product" in name for name in _read(tmp_path))


def test_each_rank_has_a_folder(tmp_path: Path, engine: FusedEngine) -> None:
    for rank in range(2):
        with torch.inference_mode(), capture_torch(engine, tmp_path, rank=rank):
            engine(torch.tensor([1, 2, 3]))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["rank0", "rank1"]
    assert _sidecar(tmp_path / "rank1")["settings"]["rank"] == 1


def test_a_failure_writes_nothing_and_leaves_no_hook(tmp_path: Path, engine: FusedEngine) -> None:
    with pytest.raises(IndexError), capture_torch(engine, tmp_path / "dump"):
        engine(torch.tensor([99]))
    assert not (tmp_path / "dump").exists()
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in engine.modules()]
    assert not any(hooks)


def test_a_model_that_is_not_called_often_enough_is_named(
    tmp_path: Path, engine: FusedEngine
) -> None:
    with (
        pytest.raises(TraceError, match="was not called in the block"),
        capture_torch(engine, tmp_path / "dump"),
    ):
        pass
    with (
        pytest.raises(TraceError, match="was called once"),
        capture_torch(engine, tmp_path / "dump", call=1),
    ):
        engine(torch.tensor([1]))
    assert not (tmp_path / "dump").exists()


def _numpy(x: Any) -> np.ndarray:
    return x.detach().numpy()
