"""What quantisation really makes, with the float weights at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aprcore.ground.errors import PlanError, WeightError
from aprcore.judging.verdict import Verdict
from aprcore.models.convert import import_model
from aprcore.network.graph import known_stages
from aprcore.records.report import Report
from aprcore.records.report_json import to_json
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from tiny import trace_model, write_model, write_stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, what it computes, and the same quantised."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "float.apr")
    write_stages(folder / "oracle", trace_model(folder / "float.apr"))
    import_model(folder / "float.apr", folder / "small.apr", quantize="q4_k")
    return folder


def judge(folder: Path, model: str = "small.apr", **options: Any) -> Report:
    return run(Request(model=folder / model, oracle=folder / "oracle", **options))


def test_the_true_error_is_told_from_the_predicted_one(folder: Path) -> None:
    report = judge(folder, reference_weights=folder / "float.apr")
    measured = {s.key: s.quantisation for s in report.stages if s.quantisation is not None}
    assert {key.stage for key in measured} == {
        "qkv_matmul", "attn_out", "ffn_gate", "ffn_up", "ffn_out",
    }  # fmt: skip
    for found in measured.values():
        assert found.ratio is not None
        assert 0.4 < found.ratio < 1.6
        assert 0.01 < found.true_relative_l2 < 0.2
        assert found.remaining_relative_l2 < 1e-6
    noise = [s for s in report.stages if s.verdict is Verdict.NOISE and s.key in measured]
    assert noise
    assert all("quantisation makes 0.0" in s.reason for s in noise)
    stages = {s["path"]: s for s in to_json(report)["stages"]}
    assert set(stages["layer-1/ffn_out"]["quantisation"]) == {
        "true_relative_l2", "predicted_relative_l2", "ratio", "remaining_relative_l2",
    }  # fmt: skip
    assert "quantisation" not in stages["layer-1/attn_scores"]


def test_verdicts_are_the_same_without_them(folder: Path) -> None:
    plain, informed = judge(folder), judge(folder, reference_weights=folder / "float.apr")
    assert [s.verdict for s in plain.stages] == [s.verdict for s in informed.stages]
    assert all(s.quantisation is None for s in plain.stages)


def test_other_weights_do_not_explain_the_oracle(folder: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.apr", seed=1)
    report = judge(folder, reference_weights=other)
    found = next(s.quantisation for s in report.stages if s.key.stage == "ffn_out")
    assert found is not None
    assert found.remaining_relative_l2 > 0.5


def test_a_float_model_has_no_quantisation(folder: Path) -> None:
    report = judge(folder, "float.apr", reference_weights=folder / "float.apr")
    assert all(s.quantisation is None for s in report.stages)


def test_weights_that_cannot_be_the_reference(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"holds Q4_K weights; the reference must be floating"):
        judge(folder, reference_weights=folder / "small.apr")
    shallow = write_model(tmp_path / "s.apr", num_layers=2)
    with pytest.raises(WeightError, match=r"s\.apr has no tensor 'model\.layers\.2"):
        judge(folder, reference_weights=shallow)
    with pytest.raises(PlanError, match="needs a model, --oracle"):
        run(Request(model=folder / "small.apr", reference_weights=folder / "float.apr"))


def test_the_stages_measured_are_those_with_weights(folder: Path) -> None:
    report = judge(folder, reference_weights=folder / "float.apr")
    assert all(
        known_stages()[s.key.stage].operation.weights for s in report.stages if s.quantisation
    )
