"""The finished run, and its JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.engines.estimate import Estimate
from aprcore.judging.compare import compare, describe
from aprcore.judging.layouts import layout_of
from aprcore.judging.logits import compare_logits
from aprcore.judging.noise import assess
from aprcore.judging.verdict import Judgment, Verdict
from aprcore.network.stages import StageKey
from aprcore.records import telling
from aprcore.records.report import LogitsReport, Report, RunHeader, Side, StageReport
from aprcore.records.report_json import json_ready, stage_to_json, to_json

NORM = StageKey(2, "attn_norm")
HEADER = RunHeader(
    trace=Side("a.apr", "F32 apr", "float32"), oracle=Side("hf", "HF float32", "float32"),
    model="a.apr", architecture="qwen2", num_layers=3, prompt="[b]\x1b", tokens=(1, 2),
    token_texts=("a", "b"), keys=(NORM,), bound=1e-4, backend="numpy", notes=("note",),
)  # fmt: skip


SIZES = {"T": 2, "E": 3}


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"JSON has no {constant}")


def parsed(value: Any) -> Any:
    """Through strict JSON text and back."""
    return json.loads(json.dumps(value, allow_nan=False), parse_constant=refuse)


def stage(
    verdict: Verdict | None = Verdict.PASS, key: StageKey = NORM, **parts: Any
) -> StageReport:
    return StageReport(key, layout_of(key, {"T": 2, "E": 3}, 6), verdict, "why", **parts)


def report(*stages: StageReport, header: RunHeader = HEADER) -> Report:
    return Report(header, stages, 0.5)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_anything_survives_json_and_non_finite_numbers_become_words(value: Any) -> None:
    def expected(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)  # "nan", "inf", "-inf"
        if isinstance(value, dict):
            return {key: expected(item) for key, item in value.items()}
        return [*map(expected, value)] if isinstance(value, (list, tuple)) else value

    assert parsed(json_ready(value)) == expected(value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 7]),
        ([np.nan, np.inf, 2, 3, 4, 5], [0, -np.inf, 2, np.nan, 4, 5]),
        ([np.nan] * 6, [np.nan] * 6),
        ([1] * 6, [0] * 6),
        ([0] * 6, [0] * 6),
    ],
)
def test_a_compared_stage_is_strict_json(a: list[float], b: list[float]) -> None:
    x, y = np.float32(a), np.float32(b)
    logits = LogitsReport(compare_logits(x, y), {5: "\ud800[/INST]"})
    record = parsed(stage_to_json(stage(comparison=compare(x, y, 4), logits=logits), top_k=2))
    assert (record["path"], record["layer"], record["stage"]) == (
        "layer-2/attn_norm",
        2,
        "attn_norm",
    )
    assert (record["shape"], record["verdict"], record["reason"]) == ([2, 3], "PASS", "why")
    assert len(record["cumulative"]["top_diffs"]) <= 2
    assert set(record["logits"]["top_trace"][0]) == {"id", "text", "logit"}


def test_figures_and_positions_of_a_stage() -> None:
    found = compare(np.float32([0, 1, 2, 3, 4, 5]), np.float32([0, 1, 2, 3, 4, 7]), 1)
    figures = parsed(stage_to_json(stage(comparison=found)))["cumulative"]
    assert figures["max_abs_diff"] == 2
    assert figures["max_abs_diff_index"] == 5
    assert figures["max_abs_diff_position"] == {"token": 1, "dim": 2}
    assert figures["top_diffs"] == [
        {"index": 5, "position": {"token": 1, "dim": 2}, "trace": 5, "oracle": 7, "abs_diff": 2}
    ]
    assert figures["nmse"] == pytest.approx(4 / 79)


def test_a_lone_stage_has_statistics_and_no_comparison() -> None:
    record = parsed(stage_to_json(stage(None, trace=describe(np.float32([np.nan, 0])))))
    assert (record["verdict"], record["trace"]["nan"], record["trace"]["zeros"]) == (None, 1, 1)
    assert "cumulative" not in record
    assert "oracle" not in record
    empty = parsed(stage_to_json(stage(None, oracle=describe(np.float32([np.inf])))))
    assert empty["oracle"]["mean"] == "nan"


def test_the_report_says_what_was_found() -> None:
    fault = stage(Verdict.FAIL, StageKey(2, "ffn_up"))
    whole = report(stage(), stage(Verdict.LAYOUT), fault, stage(Verdict.SHAPE), stage(Verdict.FAIL))
    assert whole.first_divergence is fault
    assert whole.diverges()
    record = parsed(to_json(whole))
    assert record["schema"] == "aprtui-report-v1"
    assert record["diverges"] is True
    assert record["first_divergence"] == "layer-2/ffn_up"
    assert record["counts"] == {"PASS": 1, "LAYOUT": 1, "FAIL": 2, "SHAPE": 1}
    assert record["tokens"] == [1, 2]
    assert len(record["stages"]) == 5
    assert whole.summary().startswith("first divergence: layer 2 · ffn_up FAIL: why")


@pytest.mark.parametrize("verdict", list(Verdict))
def test_exit_codes(verdict: Verdict) -> None:
    found = report(stage(), stage(verdict))
    bad = verdict in (Verdict.FAIL, Verdict.NONFINITE, Verdict.SHAPE)
    assert found.diverges() == bad
    is_open = verdict in (Verdict.MISSING, Verdict.UNJUDGED)
    assert found.diverges(strict=True) == (bad or is_open)


def test_a_run_that_could_judge_little_never_ends_well() -> None:
    header = replace(HEADER, oracle=None, judged=True)
    x = np.ones((2, 3))
    estimate = Estimate(x, np.full(x.shape, 1e-14))
    kernel = Judgment(0.0, 1.0, 1e-6, assess(x.reshape(-1), estimate, layout_of(NORM, SIZES, 6)))
    known = [replace(stage(), kernel=kernel)] * 2
    lost = [replace(stage(Verdict.UNJUDGED), reason="it has 3 values where 6 are due")] * 3
    few = report(*known, lost[0], header=header)
    assert not few.diverges()
    assert "1 of 3 stages could not be judged" in few.summary()
    assert "1 of 3 stages could not be judged" in telling.headline(few)[1]
    most = report(*known, *lost, header=header)
    assert most.diverges()
    for said in (most.summary(), *telling.headline(most)):
        assert "nothing wrong" not in said
        assert "PASS:" not in said
    told = "3 of 5 stages could not be judged (layer 2 · attn_norm: it has 3 values"
    assert most.summary().startswith(told)
    assert telling.headline(most)[0] == "UNJUDGED"


def test_without_an_oracle_nothing_diverges_and_nothing_is_claimed() -> None:
    alone = report(stage(None), header=replace(HEADER, oracle=None))
    assert not alone.diverges(strict=True)
    assert alone.counts == {}
    assert "no oracle" in alone.summary()
    assert parsed(to_json(alone))["oracle"] is None
