"""From figures to a verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aprcore.judging.compare import compare
from aprcore.judging.noise import Assessment, TensorPart
from aprcore.judging.verdict import (
    FLOAT32_BOUND,
    HALF_BOUND,
    QUANTISED_BOUND,
    Evidence,
    Judgment,
    Verdict,
    cumulative_bound,
    decide,
    within,
)

ORACLE = np.array([3, 4, 0, 12], np.float32)  # of length 13
NAN = np.array([3, np.nan, 0, 12], np.float32)
INFINITE = np.array([3, 4, -np.inf, 12], np.float32)
BOUND = 1e-2

SOUND = Judgment(1e-7, 1.0, 3e-7, Assessment(0.9, 2e-7, TensorPart("whole tensor", 0.9, 2.0)))
WRONG = Judgment(0.5, 0.8, 3e-7, Assessment(1e12, 2e-7, TensorPart("row 812", 1e12, 46.0)))


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


def evidence(trace: np.ndarray, oracle: np.ndarray, **known: Any) -> Evidence:
    found = compare(trace, oracle)
    return Evidence(found, BOUND, BOUND, traced_nonfinite=found.nonfinite_a, **known)


@pytest.mark.parametrize(
    ("trace", "oracle", "verdict"),
    [
        (ORACLE, ORACLE, Verdict.PASS),
        (ORACLE + np.float32(0.064), ORACLE, Verdict.PASS),  # 0.128 / 13 = 0.0098
        (ORACLE + np.float32(0.066), ORACLE, Verdict.FAIL),  # 0.132 / 13 = 0.0102
        (0 * ORACLE, ORACLE, Verdict.FAIL),
        (ORACLE, 0 * ORACLE, Verdict.FAIL),
        (0 * ORACLE, 0 * ORACLE, Verdict.PASS),
        (NAN, ORACLE, Verdict.NONFINITE),
        (INFINITE, ORACLE, Verdict.NONFINITE),
        (ORACLE, NAN, Verdict.FAIL),
        (NAN, NAN, Verdict.FAIL),
        (INFINITE, INFINITE, Verdict.FAIL),
    ],
)
def test_by_comparison_alone(trace: np.ndarray, oracle: np.ndarray, verdict: Verdict) -> None:
    assert decide(evidence(trace, oracle))[0] is verdict
    assert within(compare(trace, oracle), BOUND) == (verdict is Verdict.PASS)


FAR = 2 * ORACLE


@pytest.mark.parametrize(
    ("known", "verdict"),
    [
        ({"kernel": SOUND, "model": SOUND}, Verdict.NOISE),
        ({"kernel": SOUND, "inputs_pass": False}, Verdict.INHERITED),
        ({"kernel": WRONG, "model": SOUND}, Verdict.FAIL),
        ({"kernel": SOUND, "model": WRONG}, Verdict.FAIL),
        ({"layout": "heads before tokens", "kernel": SOUND}, Verdict.LAYOUT),
        ({"layout": "heads before tokens"}, Verdict.LAYOUT),
        ({"layout": "heads before tokens", "kernel": WRONG}, Verdict.FAIL),
        ({"layout": "heads before tokens", "model": WRONG}, Verdict.FAIL),
    ],
)
def test_far_from_the_oracle_the_other_judgments_decide(
    known: dict[str, Any], verdict: Verdict
) -> None:
    assert decide(evidence(FAR, ORACLE, **known))[0] is verdict


def test_close_to_the_oracle_a_wrong_operation_still_fails() -> None:
    assert decide(evidence(ORACLE, ORACLE, kernel=WRONG))[0] is Verdict.FAIL
    assert decide(evidence(ORACLE, ORACLE, kernel=SOUND, inputs_pass=False))[0] is Verdict.PASS


def test_a_non_finite_value_is_blamed_where_it_comes_up_first() -> None:
    assert decide(evidence(NAN, ORACLE, inputs_finite=False))[0] is Verdict.INHERITED
    assert decide(evidence(ORACLE, NAN, oracle_inputs_finite=False))[0] is Verdict.INHERITED
    assert decide(evidence(NAN, ORACLE, layout="any"))[0] is Verdict.NONFINITE


def test_without_an_oracle_the_kernel_judgment_decides() -> None:
    for kernel, verdict in ((SOUND, Verdict.PASS), (WRONG, Verdict.FAIL), (None, None)):
        assert decide(Evidence(None, BOUND, BOUND, kernel=kernel))[0] is verdict
    assert decide(Evidence(None, BOUND, BOUND, traced_nonfinite=3))[0] is Verdict.NONFINITE


def test_the_reason_has_the_figures() -> None:
    assert "1 value is NaN or infinite" in decide(evidence(NAN, ORACLE))[1]
    assert "relative L2 1 exceeds 0.01" in decide(evidence(FAR, ORACLE))[1]
    reason = decide(evidence(FAR, ORACLE, kernel=WRONG))[1]
    assert "kernel: relative L2 0.5" in reason
    assert "row 812" in reason


def test_which_verdicts_end_with_exit_code_one() -> None:
    diverging = {verdict for verdict in Verdict if verdict.is_divergence}
    assert diverging == {Verdict.FAIL, Verdict.NONFINITE, Verdict.SHAPE}
