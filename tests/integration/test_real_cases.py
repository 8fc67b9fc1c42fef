"""Real models and dumps beside the project, and what is right for each: windows, masks, Gemma 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from aprcore.judging.verdict import Verdict
from aprcore.runs.bisect import run
from aprcore.runs.request import Request

TOKENS = tuple(range(3, 43))


@pytest.fixture
def cases(shared: Path) -> Path:
    found = shared / "cases"
    if not found.exists():
        pytest.skip("the cases are not at hand")
    return found


def test_a_window_that_an_engine_keeps_is_sound(cases: Path) -> None:
    model, dump = cases / "models/mistral-win8", cases / "engines/window-ok.safetensors"
    report = run(Request(model=model, trace=dump))
    assert {stage.verdict for stage in report.stages} == {Verdict.PASS}


def test_a_window_that_an_engine_ignores_is_named(cases: Path) -> None:
    model, dump = cases / "models/mistral-win8", cases / "engines/window-missing.safetensors"
    report = run(Request(model=model, trace=dump))
    failed = [stage for stage in report.stages if stage.verdict is not Verdict.PASS]
    assert {stage.key.stage for stage in failed} == {"attn_softmax"}
    assert len(failed) == report.header.num_layers
    assert all("window of 8 ignored" in stage.reason for stage in failed)


@pytest.mark.parametrize("name", ["gemma2_cap", "llama_is_causal_false", "mistral-win8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_oracle_of_it_is_what_the_model_computes(
    cases: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    pytest.importorskip("torch", reason="torch is not installed (the `oracle` extra)")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from aprcore.capture.oracle import OracleRequest, write_oracle

    model, oracle = cases / "models" / name, tmp_path / "oracle"
    written = write_oracle(OracleRequest(model, tokens=TOKENS, dtype=dtype), oracle)
    assert written.judged == written.count
    report = run(Request(model=model, oracle=oracle))
    assert len(report.stages) == written.count
    right = {Verdict.PASS} if dtype == "float32" else {
        Verdict.PASS, Verdict.NOISE, Verdict.INHERITED
    }  # fmt: skip
    assert {stage.verdict for stage in report.stages} <= right
