"""From figures to a verdict."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
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
from aprcore.network.stages import StageKey

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


# What a type loses once, carried through some hundred operations that add up: up to 1e2 roundings
# of a float32 (some 1e-6 in practice, and a bug far more), a few of a half, and of four bits the
# step of 16 levels over 4 deviations, d/sqrt(12) = 0.07, in a product or two.
@pytest.mark.parametrize(
    ("dtype", "once", "few", "many"),
    [
        ("float32", 2.0**-24, 100, 10_000),
        ("float16", 2.0**-11, 5, 50),
        ("bfloat16", 2.0**-8, 2, 5),
        ("Q4_K", 4.1 / 15 / 12**0.5, 1, 3),
    ],
)
def test_a_bound_is_some_roundings_of_its_type(
    dtype: str, once: float, few: int, many: int
) -> None:
    assert few * once < cumulative_bound([dtype]) < many * once


@pytest.mark.parametrize("coarse", ["F16", "BF16", "float16", "bfloat16"])
@pytest.mark.parametrize("fine", ["F32", "F64", "float32", "float64"])
def test_each_half_type_is_coarser_than_each_float_type(coarse: str, fine: str) -> None:
    assert cumulative_bound([fine]) < cumulative_bound([fine, coarse])
    assert cumulative_bound([coarse]) < cumulative_bound([fine, coarse, "Q8_0"])


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


# Every kind of evidence: whether there are NaNs in the trace, in the oracle, in the inputs of each;
# a layout; how the kernel and model judgments came out; how far from the oracle.
SOMETHING = ("sound", "wrong", None)


def expected_verdict(
    traced: int, oracle: int, finite: bool, oracle_finite: bool, layout: bool,
    kernel: str | None, model: str | None, error: str | None, inputs_pass: bool,
) -> Verdict | None:  # fmt: skip
    """The order of verdicts, as a list of who speaks when all before are silent."""
    compared = error is not None
    judged = kernel is not None or model is not None
    speakers = (
        (traced and not finite, Verdict.INHERITED),
        (traced and not oracle, Verdict.NONFINITE),
        (traced, Verdict.FAIL),
        (oracle and not oracle_finite, Verdict.INHERITED),
        (oracle, Verdict.FAIL),
        (layout and "wrong" not in (kernel, model), Verdict.LAYOUT),
        (kernel == "wrong", Verdict.FAIL),
        (model == "wrong", Verdict.FAIL),
        (not compared and not judged, None),
        (not compared, Verdict.PASS),
        (error == "within", Verdict.PASS),
        # Only where nothing else can be judged do weights count towards the bound.
        (error == "within alone" and not judged, Verdict.PASS),
        (not judged, Verdict.FAIL),
        (inputs_pass, Verdict.NOISE),
        (True, Verdict.INHERITED),
    )
    return next(verdict for speaks, verdict in speakers if speaks)


ERRORS = {"within": 0.9e-2, "within alone": 0.14, "beyond": 0.16}


@pytest.mark.parametrize("error", [*ERRORS, None])
@pytest.mark.parametrize("kernel", SOMETHING)
@pytest.mark.parametrize("model", SOMETHING)
def test_the_order_in_which_judgments_speak(
    error: str | None, kernel: str | None, model: str | None
) -> None:
    judgments = {"sound": SOUND, "wrong": WRONG, None: None}
    flags = (False, True)
    for traced, oracle, finite, oracle_finite, layout, inputs_pass in product(
        (0, 3), (0, 2) if error else (0,), flags, flags, flags, flags
    ):
        comparison = None
        if error is not None:
            comparison = replace(
                compare(ORACLE, ORACLE), relative_l2=ERRORS[error], nonfinite_b=oracle
            )
        found = Evidence(
            comparison,
            bound=1e-2,
            bound_alone=0.15,
            kernel=judgments[kernel],
            model=judgments[model],
            traced_nonfinite=traced,
            inputs_finite=finite,
            oracle_inputs_finite=oracle_finite,
            inputs_pass=inputs_pass,
            layout="heads before tokens" if layout else None,
        )
        expected = expected_verdict(
            traced, oracle, finite, oracle_finite, layout, kernel, model, error, inputs_pass
        )
        verdict, reason = decide(found)
        assert verdict is expected, found
        assert bool(reason) == (verdict is not None)


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"kernel": WRONG, "model": SOUND}, "kernel: relative L2 0.5"),
        ({"kernel": WRONG, "model": WRONG}, "kernel: relative L2 0.5"),
        ({"kernel": SOUND, "model": WRONG}, "model: relative L2 0.5"),
        ({"layout": "in pairs"}, "equal when read as: in pairs"),
        ({"kernel": SOUND, "inputs_pass": False}, "its own operation is right"),
    ],
)
def test_the_reason_says_who_spoke(known: dict[str, Any], reason: str) -> None:
    assert decide(evidence(FAR, ORACLE, **known))[1].startswith(reason)


@pytest.mark.parametrize("error", [0.0, BOUND])
def test_an_error_at_its_bound_passes(error: float) -> None:
    comparison = replace(compare(ORACLE, ORACLE), relative_l2=error)
    assert decide(Evidence(comparison, BOUND, BOUND))[0] is Verdict.PASS
    assert within(comparison, BOUND)


def test_noise_is_told_by_the_judgment_whose_own_error_is_larger() -> None:
    """The error's energy: how many times the floor, times the floor squared."""
    small = Judgment(1e-7, 1.0, 1e-7, Assessment(0.9, 1e-7, TensorPart("whole tensor", 0.9, 2.0)))
    large = Judgment(1e-3, 1.0, 2e-3, Assessment(0.5, 2e-3, TensorPart("whole tensor", 0.5, 2.0)))
    for known in ({"kernel": small, "model": large}, {"kernel": large, "model": small}):
        verdict, reason = decide(evidence(FAR, ORACLE, **known))
        assert (verdict, reason) == (Verdict.NOISE, "own error is 0.5 times the predicted noise")
    # Of floors alike the ratio decides.
    other = replace(small, assessment=replace(small.assessment, ratio=0.3))
    assert "is 0.9 times" in decide(evidence(FAR, ORACLE, kernel=small, model=other))[1]


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"traced_nonfinite": 1}, "1 value is NaN or infinite; its inputs are finite"),
        (
            {"traced_nonfinite": 2, "inputs_finite": False},
            "2 values are NaN or infinite; so were its inputs",
        ),
    ],
)
def test_the_reason_for_what_is_not_finite(known: dict[str, Any], reason: str) -> None:
    assert decide(Evidence(None, BOUND, BOUND, **known))[1] == reason


def test_the_reason_for_what_is_not_finite_beside_an_oracle() -> None:
    assert decide(evidence(NAN, ORACLE))[1].endswith("its inputs and the oracle are finite")
    assert decide(evidence(NAN, INFINITE))[1].endswith(", and 1 of the oracle's")
    assert decide(evidence(ORACLE, NAN))[1] == "in the oracle 1 value is NaN or infinite"
    inherited = decide(evidence(ORACLE, NAN, oracle_inputs_finite=False))[1]
    assert inherited.endswith("so were its inputs")


def judgment(relative_l2: float, ratio: float, factor: float) -> Judgment:
    part = TensorPart("row 8", ratio, factor)
    return Judgment(relative_l2, 1.0, 1e-3, Assessment(1.0, 1e-3, part))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (judgment(5e-4, 1.0, 2.0), "relative L2 0.0005 where rounding explains 0.001"),
        (judgment(5e-4, 2.0, 2.0), "relative L2 0.0005 where rounding explains 0.001"),
        (
            judgment(5e-4, 3.0, 2.0),
            "relative L2 0.0005, no more than rounding as a whole; "
            "3 times the predicted noise in row 8",
        ),
        (
            judgment(2e-3, 3.0, 2.0),
            "relative L2 0.002 where rounding explains 0.001; 3 times the predicted noise in row 8",
        ),
        (
            judgment(1.0, 999_999.0, 2.0),
            "relative L2 1 where rounding explains 0.001; 1e+06 times the predicted noise in row 8",
        ),
        (
            judgment(1.0, 1e6, 2.0),
            "relative L2 1 where rounding explains 0.001; "
            "over a million times the predicted noise in row 8",
        ),
    ],
)
def test_a_judgment_in_words(found: Judgment, said: str) -> None:
    assert found.describe() == said


def test_a_judgment_from_further_up_says_what_would_narrow_it() -> None:
    span = (StageKey(1, "attn_norm"), StageKey(1, "qkv_matmul"))
    found = replace(judgment(5e-4, 1.0, 2.0), span=span, recomputed=span[1:])
    assert found.describe().endswith(
        "(judged from attn_norm, qkv_matmul; dump qkv_matmul to narrow it)"
    )


@pytest.mark.parametrize(("a", "b"), [(NAN, ORACLE), (ORACLE, NAN)])
def test_nothing_that_is_not_finite_is_within_a_bound(a: np.ndarray, b: np.ndarray) -> None:
    found = replace(compare(a, b), relative_l2=0.0)
    assert not within(found, BOUND)
