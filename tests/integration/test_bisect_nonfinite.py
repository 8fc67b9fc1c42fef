"""A whole run with NaN, infinities or nothing but zeros on a side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from bisect_runs import EMBEDDING, LOGITS, SCORES, SOFTMAX, found_at, masked, only_pass, verdicts
from tiny import (
    Tensors,
    draw_weights,
    edited,
    embedded_tokenizer,
    trace_model,
    write_model,
    write_stages,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = ["[bold]", "\x1b[2J", *map(chr, range(ord("a"), ord("a") + 26))]
    metadata = embedded_tokenizer(vocabulary)
    return write_model(tmp_path_factory.mktemp("model") / "m.apr", metadata=metadata)


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


@pytest.fixture(scope="module")
def oracle(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("oracle") / "o", tensors, prompt="sums")


class TestNonFinite:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
    def test_in_the_trace_it_is_blamed_on_the_first_stage_and_inherited_by_the_rest(
        self, model: Path, oracle: Path, tensors: Tensors, tmp_path: Path, value: float,
        has_model: bool,
    ) -> None:  # fmt: skip
        first = StageKey(1, "ffn_norm")
        later = list(tensors)[list(tensors).index(first) :]
        spoilt = {k: np.full_like(x, value) if k in later else x for k, x in tensors.items()}
        trace = write_stages(tmp_path / "t", spoilt)
        report = run(Request(model=model if has_model else None, trace=trace, oracle=oracle))
        found = verdicts(report)
        assert report.first_divergence is not None
        assert report.first_divergence.key == first
        assert found[first.path] == "NONFINITE"
        assert {found[key.path] for key in later[1:]} == {"INHERITED"}
        assert report.counts == {
            Verdict.PASS: len(tensors) - len(later), Verdict.INHERITED: len(later) - 1,
            Verdict.NONFINITE: 1,
        }  # fmt: skip

    def test_a_trace_alone_says_how_many_values_are_lost(
        self, tensors: Tensors, tmp_path: Path
    ) -> None:
        key = StageKey(1, "ffn_norm")
        trace = write_stages(tmp_path / "t", edited(tensors, key, lambda x: x * np.nan))
        report = found_at(run(Request(trace=trace)), key)
        assert report.verdict is Verdict.NONFINITE
        assert report.reason.startswith(f"{tensors[key].size} values are NaN or infinite")

    def test_masked_scores_do_not_excuse_a_nan_after_them(
        self, oracle: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        def nan_row(x: np.ndarray) -> np.ndarray:
            x[0, -1] = np.nan
            return x

        spoilt = edited(tensors, SCORES, lambda x: masked(x, -np.inf))
        trace = write_stages(tmp_path / "t", edited(spoilt, SOFTMAX, nan_row))
        report = run(Request(trace=trace, oracle=oracle))
        assert found_at(report, SCORES).verdict is Verdict.PASS
        assert found_at(report, SOFTMAX).verdict is Verdict.NONFINITE

    @pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
    def test_a_nan_that_came_up_in_an_unjudged_stage_is_still_reported(
        self, model: Path, tensors: Tensors, tmp_path: Path, has_model: bool
    ) -> None:
        later = {key: np.full_like(x, np.nan) for key, x in tensors.items() if key.layer != 0}
        trace = write_stages(tmp_path / "t", tensors | later)
        oracle = write_stages(tmp_path / "o", {k: tensors[k] for k in (EMBEDDING, LOGITS)})
        side = Request(model=model if has_model else None, trace=trace, oracle=oracle)
        assert run(side).diverges()

    def test_weights_that_are_nan_fail_the_one_stage_asked_for(
        self, oracle: Path, tmp_path: Path
    ) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        broken = write_model(tmp_path / "m.apr", changed={name: np.nan * draw_weights()[name]})
        for plan in (None, Plan(("lm_head",)), Plan(("lm_head", "post_ffn_residual"))):
            assert run(Request(model=broken, oracle=oracle, plan=plan)).diverges()

    def test_in_the_oracle_it_never_passes(
        self, model: Path, oracle: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        key = StageKey(1, "attn_out")
        spoilt = write_stages(tmp_path / "o", edited(tensors, key, lambda x: x * np.nan))
        for request in (
            Request(model=model, oracle=spoilt), Request(trace=oracle, oracle=spoilt),
            Request(trace=spoilt, oracle=spoilt),
        ):  # fmt: skip
            report = run(request)
            assert report.first_divergence is not None
            assert report.first_divergence.key == key
            assert "oracle" in report.first_divergence.reason

    def test_all_zero_tensors(self, oracle: Path, tensors: Tensors, tmp_path: Path) -> None:
        zeros = write_stages(tmp_path / "z", {k: np.zeros_like(x) for k, x in tensors.items()})
        assert only_pass(run(Request(trace=zeros, oracle=zeros)))
        for a, b in ((zeros, oracle), (oracle, zeros)):
            report = run(Request(trace=a, oracle=b))
            assert set(verdicts(report).values()) == {"FAIL"}
            assert {s.comparison.cosine for s in report.stages if s.comparison} == {0.0}
