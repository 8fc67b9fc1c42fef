"""What a user tolerates, and what that makes of a verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprcore.ground.errors import AprError, PlanError
from aprcore.judging.compare import compare
from aprcore.judging.noise import Assessment, TensorPart
from aprcore.judging.verdict import Judgment, Verdict
from aprcore.network.graph import known_stages, outline
from aprcore.network.stages import Scope, StageKey
from aprcore.records.report import RunHeader, Side, StageReport
from aprcore.records.telling import format_tolerance
from aprcore.runs.budget import Budgets, known_modules, own_error, parse_budgets, run_dtype, settle

KEY = StageKey(3, "ffn_out")


def judgment(error: float, *, passed: bool = True) -> Judgment:
    part = TensorPart("whole tensor", 1.0 if passed else 99.0, 2.0)
    return Judgment(error, 0.9, 0.1, Assessment(1.0, 0.05, part))


def stage(verdict: Verdict | None, **known: object) -> StageReport:
    return StageReport(KEY, None, verdict, "why", **known)  # type: ignore[arg-type]


NOISY = stage(Verdict.NOISE, kernel=judgment(1e-7), model=judgment(0.08))
WRONG = stage(Verdict.FAIL, kernel=judgment(1e-3, passed=False), model=judgment(0.08))


def find(*options: str, key: StageKey = KEY, dtype: str = "float32") -> float | None:
    return parse_budgets(options).find(key, dtype)


class TestPatterns:
    @pytest.mark.parametrize(
        "pattern",
        [
            "ffn_out", "FFN_OUT", "layer3.ffn_out", "layer-3/ffn_out", "layer-3.ffn_out",
            "layer*.ffn_out", "layer3.*", "layer*.*", "*", "ffn_down", "layer3.down_proj",
            " ffn_out ",
        ],
    )  # fmt: skip
    def test_that_cover_a_stage(self, pattern: str) -> None:
        assert find(f"{pattern}=1e-3") == 1e-3

    @pytest.mark.parametrize(
        "pattern", ["ffn_up", "layer2.ffn_out", "layer2.*", "lm_head", "layer*.attn_scores"]
    )
    def test_that_do_not(self, pattern: str) -> None:
        assert find(f"{pattern}=1e-3") is None

    def test_every_alias_names_stages(self) -> None:
        for alias, stages in known_modules().items():
            if alias in known_stages() or not alias.islower():
                continue
            for name in stages:
                layer = None if known_stages()[name].scope is Scope.MODEL else 0
                assert find(f"{alias}=0.5", key=StageKey(layer, name)) == 0.5

    @pytest.mark.parametrize(
        ("module", "stages"),
        [
            ("embed_tokens", {"embedding"}), ("token_embd", {"embedding"}),
            ("input_layernorm", {"attn_norm"}), ("q_proj", {"qkv_matmul", "qkv_bias"}),
            ("qkv_proj", {"qkv_matmul", "qkv_bias"}), ("o_proj", {"attn_out"}),
            ("attn_output", {"attn_out"}), ("gate_proj", {"ffn_gate"}), ("up_proj", {"ffn_up"}),
            ("down_proj", {"ffn_out"}), ("ffn_down", {"ffn_out"}), ("act_fn", {"ffn_silu"}),
            ("ffn_swiglu", {"ffn_swigl"}), ("output_norm", {"final_norm"}),
            ("logits", {"lm_head"}),
        ],
    )  # fmt: skip
    def test_modules_of_other_engines(self, module: str, stages: set[str]) -> None:
        assert stages <= set(known_modules()[module])

    def test_a_module_means_what_it_makes_in_the_model(self) -> None:
        budgets = parse_budgets(["post_attention_layernorm=1"])
        for architecture, stage in (("llama", "ffn_norm"), ("gemma2", "attn_post_norm")):
            found = budgets.resolved(outline(2, (), architecture))
            assert found.find(StageKey(1, stage), "float32") == 1
            for other in {"ffn_norm", "attn_post_norm"} - {stage}:
                assert found.find(StageKey(1, other), "float32") is None

    def test_the_most_specific_counts_then_the_last(self) -> None:
        options = ["layer3.ffn_out=4", "ffn_out=3", "layer3.*=2", "*=1"]
        for expected in (4, 3, 2, 1):
            assert find(*options) == find(*reversed(options)) == expected
            options.pop(0)
        assert find("ffn_out=1", "ffn_out=2") == 2

    @pytest.mark.parametrize(
        "option",
        [
            "", "=", "ffn_out", "ffn_out=", "ffn_out=x", "ffn_out=nan", "ffn_out=inf", "=1",
            "ffn_out=-1", "nose=1", "layer3=1", "layer.ffn_out=1", "layerx.ffn_out=1", "**=1",
            "layer3.lm_head=1", "layer1.embedding=1", "layer٣.ffn_out=1",
        ],
    )  # fmt: skip
    def test_malformed(self, option: str) -> None:
        with pytest.raises(PlanError) as caught:
            parse_budgets([option])
        assert "\n" not in str(caught.value)

    @given(st.text(max_size=30))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            found = parse_budgets([text])
        except PlanError:
            return
        assert found.options[0].relative_l2 >= 0

    @given(
        st.sampled_from([s for s in known_stages().values() if s.scope is Scope.LAYER]),
        st.integers(0, 999), st.floats(0, 1e300),
        st.sampled_from(["{1}", "layer{0}.{1}", "layer-{0}/{1}", "layer*.{1}", "layer{0}.*", "*"]),
    )  # fmt: skip
    def test_written_and_read(self, row: object, layer: int, number: float, form: str) -> None:
        name = row.name  # type: ignore[attr-defined]
        budgets = parse_budgets([f"{form.format(layer, name)}={number!r}"])
        assert budgets.find(StageKey(layer, name), "float32") == number

    def test_a_layer_that_is_not_there(self) -> None:
        budgets = parse_budgets(["layer3.ffn_out=1"])
        budgets.resolved(outline(4, ()))
        with pytest.raises(PlanError, match="for layer 3, but the layers are 0 to 2"):
            budgets.resolved(outline(3, ()))


class TestToleranceFile:
    TEXT = """
    [default]
    float16 = 1e-2
    any = 5
    [stage.attn_scores]
    float32 = 1e-4
    bfloat16 = 2e-2
    [stage."layer3.ffn_down"]
    any = 7
    """

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "t.toml"
        path.write_text(self.TEXT)
        return path

    @pytest.mark.parametrize(
        ("key", "dtype", "expected"),
        [
            (StageKey(1, "attn_scores"), "float32", 1e-4),
            (StageKey(1, "attn_scores"), "bfloat16", 2e-2),
            (StageKey(1, "attn_scores"), "float16", 1e-2),
            (StageKey(3, "ffn_out"), "float16", 7),
            (StageKey(2, "ffn_out"), "float16", 1e-2),
            (StageKey(2, "ffn_out"), "float32", 5),
            (StageKey(None, "lm_head"), "bfloat16", 5),
        ],
    )
    def test_by_stage_and_type(
        self, path: Path, key: StageKey, dtype: str, expected: float
    ) -> None:
        assert parse_budgets([], path).find(key, dtype) == expected

    def test_the_command_line_counts_more(self, path: Path) -> None:
        budgets = parse_budgets(["*=9"], path)
        assert budgets.find(StageKey(3, "ffn_out"), "float16") == 9

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[other]", r"unknown key 'other'; did you mean \w+\? There are default, stage"),
            ("default = 3", "default is 3, not a table"),
            ("stage = 3", "stage is 3, not a table"),
            ("[stage]\nffn_out = 3", "stage.ffn_out is 3, not a table"),
            ("[stage.nose]\nany = 1", "unknown stage 'nose'"),
            ("[default]\nint8 = 1", "'default.int8'"),
            ("[default]\nany = 'x'", "default.any is 'x', not a number"),
            ("[default]\nany = true", "default.any is True, not a number"),
            ("[default]\nany = -1", "not a number >= 0"),
            ("[default]\nany = inf", "default.any is inf, not a number <= 1.79"),
            ("[default", "is not TOML"),
        ],
    )
    def test_faults_name_the_file(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "t.toml"
        path.write_text(text)
        with pytest.raises(AprError, match=message) as caught:
            parse_budgets([], path)
        assert str(caught.value).startswith(str(path))


class TestSettling:
    def test_without_a_budget_only_a_failure_says_what_it_takes(self) -> None:
        assert settle(NOISY, None) == settle(NOISY, None, strict=True) == NOISY
        assert settle(WRONG, None) == replace(WRONG, passes_at=1e-3)

    def test_strict_counts_what_rounding_explains(self) -> None:
        found = settle(NOISY, 0.01, strict=True)
        assert (found.verdict, found.passes_at, found.blamed) == (Verdict.FAIL, 0.08, "model")
        assert found.reason == "noise beyond the budget: relative L2 0.08 > 0.01"
        assert settle(NOISY, 0.08, strict=True).verdict is Verdict.NOISE
        assert settle(WRONG, 0.01, strict=True).passes_at == 0.08

    def test_otherwise_it_is_only_said(self) -> None:
        found = settle(NOISY, 0.01)
        assert (found.verdict, found.passes_at) == (Verdict.NOISE, None)
        assert found.reason == "why; noise beyond the budget: relative L2 0.08 > 0.01"

    def test_a_budget_accepts_a_failure(self) -> None:
        found = settle(WRONG, 1e-3)
        assert (found.verdict, found.budget, found.passes_at) == (Verdict.NOISE, 1e-3, None)
        assert found.reason == "within your budget: 0.001 <= 0.001 (why)"
        assert found.accepted
        assert settle(WRONG, 0.99e-3).verdict is Verdict.FAIL

    def test_nothing_else_is_accepted(self) -> None:
        for found in (settle(WRONG, 0.99e-3), settle(NOISY, 0.08), settle(NOISY, 0.01),
                      settle(NOISY, 0.01, strict=True), settle(WRONG, None)):  # fmt: skip
            assert not found.accepted

    @pytest.mark.parametrize("verdict", [Verdict.PASS, Verdict.INHERITED, Verdict.LAYOUT])
    def test_every_sound_verdict_has_a_budget(self, verdict: Verdict) -> None:
        found = settle(replace(NOISY, verdict=verdict), 0.01, strict=True)
        assert found.verdict is Verdict.FAIL

    def test_the_cumulative_error_where_nothing_else_is_known(self) -> None:
        a = np.array([3, 4, 0, 12], np.float32)
        alone = stage(Verdict.FAIL, comparison=compare(2 * a, a))
        assert settle(alone, None).passes_at == pytest.approx(1.0)
        assert settle(alone, 1.1).verdict is Verdict.NOISE
        assert settle(replace(alone, verdict=Verdict.PASS), 0.1, strict=True).blamed == "cumulative"

    @pytest.mark.parametrize(
        "verdict", [None, Verdict.MISSING, Verdict.NONFINITE, Verdict.SHAPE, Verdict.FAIL]
    )
    def test_what_no_tolerance_mends(self, verdict: Verdict | None) -> None:
        broken = compare(np.array([np.nan, 1], np.float32), np.ones(2, np.float32))
        for found in (stage(verdict), stage(verdict, comparison=broken)):
            assert settle(found, 1e9, strict=True) == found
            assert own_error(found) is None

    @given(st.floats(0, 1e3), st.floats(0, 1e3), st.booleans(), st.booleans(), st.booleans())
    def test_it_passes_at_exactly_what_it_says(
        self, kernel: float, model: float, bad_kernel: bool, bad_model: bool, strict: bool
    ) -> None:
        verdict = Verdict.FAIL if bad_kernel or bad_model else Verdict.NOISE
        report = stage(verdict, kernel=judgment(kernel, passed=not bad_kernel),
                       model=judgment(model, passed=not bad_model))  # fmt: skip
        failed = settle(report, 0.0, strict=strict)
        if failed.passes_at is None:
            assert failed.verdict is not Verdict.FAIL
            return
        assert settle(report, failed.passes_at, strict=strict).verdict is Verdict.NOISE
        less = math.nextafter(failed.passes_at, 0)
        if less < failed.passes_at:
            assert settle(report, less, strict=strict).verdict is Verdict.FAIL


def test_the_coarsest_type_of_a_run() -> None:
    def header(trace: str | None, oracle: str | None) -> RunHeader:
        sides = Side("a", "b", trace), None if oracle is None else Side("a", "b", oracle)
        return RunHeader(*sides, None, None, 1, None, None, None, (), 1e-4, None)

    assert run_dtype(header("float32", "bfloat16")) == "bfloat16"
    assert run_dtype(header("float16", "float32")) == "float16"
    assert run_dtype(header(None, None)) == "float32"


def test_no_budget_is_nobody_s() -> None:
    assert Budgets().find(KEY, "float32") is None


@given(st.floats(1e-300, 1e300))
def test_a_tolerance_is_shown_large_enough(tolerance: float) -> None:
    shown = float(format_tolerance(tolerance))
    assert tolerance <= shown <= 1.011 * tolerance
