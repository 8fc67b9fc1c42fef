"""`examples/capture_mlx.py` on the real MLX: what it writes is read without a map."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aprcore.judging.verdict import Verdict
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from models import build as build_model
from models import save, small_model


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dump_of_mlx_is_judged_without_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    mx = pytest.importorskip("mlx.core", reason="MLX is not there (`make engines`)")
    loading = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not there (`make engines`)")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from capture_mlx import capture

    recipe = small_model("llama")
    path = save(build_model(recipe), tmp_path / "model")
    model, _ = loading.load_model(path)
    model.set_dtype(getattr(mx, dtype))
    calls = {kind: kind.__call__ for kind in map(type, model.modules())}
    capture(model, list(recipe.tokens), tmp_path / "dump.safetensors")
    assert {kind: kind.__call__ for kind in calls} == calls
    report = run(Request(model=path, trace=tmp_path / "dump.safetensors"))
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}
    assert report.header.tokens == recipe.tokens
    assert {"q_post_rope", "attention", "post_attn_residual", "ffn_swigl", "lm_head"} <= {
        stage.key.stage for stage in report.stages
    }
    sys.modules.pop("capture_mlx", None)
