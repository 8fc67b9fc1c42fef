"""The random model of the benchmarks, in small."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from aprcore.engines.forward import trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import AprError
from aprcore.models.model import open_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import large_model
from large_model import Shape, write_large_model

SMALL = Shape(num_layers=2, hidden=256, ffn=768, heads=4, kv_heads=2, vocab=500)


def test_a_pass_stays_in_range(tmp_path: Path) -> None:
    path = tmp_path / "small.apr"
    write_large_model(path, SMALL)
    with open_model(path) as model:
        assert model.weight_types == {"Q4_K", "F32"}
        for name, weight in model.weights.items():
            if weight.dtype == "Q4_K":
                values = weight.read(0, weight.shape[0]) * math.sqrt(weight.shape[1])
                assert abs(float(values.mean())) < 0.02, name
                assert float(values.std()) == pytest.approx(1, rel=0.05), name
        for key, tensor in trace(model.graph, model.weights, NumpyBackend(1), (1, 2, 3)):
            largest = float(np.abs(tensor).max())
            assert 1e-3 < largest < 1e3, key


def test_the_size_of_the_real_one() -> None:
    """7.6 thousand million parameters, as Qwen2.5-7B has."""
    values = sum(math.prod(entry.shape) for entry in Shape().entries())
    assert values == 7_615_616_512


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.apr"
    real = large_model.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        large_model.shutil, "disk_usage", lambda _: real._replace(free=1 << 20)
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["large_model.py", str(target), "--layers", "1"])
    assert large_model.main() == 2
    assert "1 MiB are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AprError, match="no such folder"):
        write_large_model(tmp_path / "nowhere" / "model.apr", SMALL)
