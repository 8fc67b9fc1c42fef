"""From figures to a verdict."""

from __future__ import annotations

import numpy as np
import pytest

from aprcore.compare import compare
from aprcore.judge import (
    FLOAT32_BOUND,
    HALF_BOUND,
    QUANTISED_BOUND,
    Verdict,
    cumulative_bound,
    judge_values,
    within,
)

ORACLE = np.array([3, 4, 0, 12], np.float32)  # of length 13
NAN = np.array([3, np.nan, 0, 12], np.float32)
INFINITE = np.array([3, 4, -np.inf, 12], np.float32)
BOUND = 1e-2


@pytest.mark.parametrize(
    ("types", "bound"),
    [
        ([], 1e-4),
        (["F32", "float32", "F64"], 1e-4),
        (["F32", "float16"], 1e-2),
        (["bfloat16", "float32"], 1e-2),
        (["F16"], 1e-2),
        (["BF16", "F32"], 1e-2),
        (["Q4_K", "F32", "float16"], 0.15),
        (["AprQ8"], 0.15),
        (["something new"], 0.15),
    ],
)
def test_the_coarsest_type_decides(types: list[str], bound: float) -> None:
    assert cumulative_bound(types) == bound


def test_the_named_bounds_are_those_of_the_design() -> None:
    assert (FLOAT32_BOUND, HALF_BOUND, QUANTISED_BOUND) == (1e-4, 1e-2, 0.15)


@pytest.mark.parametrize(
    ("trace", "oracle", "inputs_finite", "verdict"),
    [
        (ORACLE, ORACLE, True, Verdict.PASS),
        (ORACLE + np.float32(0.064), ORACLE, True, Verdict.PASS),  # 0.128 / 13 = 0.0098
        (ORACLE + np.float32(0.066), ORACLE, True, Verdict.FAIL),  # 0.132 / 13 = 0.0102
        (0 * ORACLE, ORACLE, True, Verdict.FAIL),
        (ORACLE, 0 * ORACLE, True, Verdict.FAIL),
        (0 * ORACLE, 0 * ORACLE, True, Verdict.PASS),
        (NAN, ORACLE, True, Verdict.NONFINITE),
        (INFINITE, ORACLE, True, Verdict.NONFINITE),
        (NAN, ORACLE, False, Verdict.INHERITED),
        (ORACLE, NAN, True, Verdict.FAIL),
        (NAN, NAN, True, Verdict.FAIL),
        (INFINITE, INFINITE, True, Verdict.FAIL),
        (ORACLE, ORACLE, False, Verdict.PASS),
    ],
)
def test_the_verdict(
    trace: np.ndarray, oracle: np.ndarray, inputs_finite: bool, verdict: Verdict
) -> None:
    found = compare(trace, oracle)
    assert judge_values(found, BOUND, inputs_finite=inputs_finite)[0] is verdict
    assert within(found, BOUND) == (verdict is Verdict.PASS)


def test_the_reason_has_the_figures() -> None:
    _, reason = judge_values(compare(NAN, ORACLE), BOUND, inputs_finite=True)
    assert "1 of 4 values" in reason
    _, reason = judge_values(compare(2 * ORACLE, ORACLE), BOUND, inputs_finite=True)
    assert "relative L2 1 exceeds 0.01" in reason


def test_which_verdicts_end_with_exit_code_one() -> None:
    diverging = {verdict for verdict in Verdict if verdict.is_divergence}
    assert diverging == {Verdict.FAIL, Verdict.NONFINITE, Verdict.SHAPE}
