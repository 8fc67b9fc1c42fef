"""A whole run, from two sides on disk to the report."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.writer import TraceWriter
from aprcore.ground.errors import AprError, OracleError, PlanError, TokenizerError, TruncatedError
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import StageKey
from aprcore.records.report import Report, RunHeader, StageReport
from aprcore.runs.bisect import bisect, run
from aprcore.runs.request import Request
from aprcore.runs.tensors import TensorStore
from aprtui.demo import demo_path
from tiny import (
    NUM_LAYERS,
    SIZES,
    TOKENS,
    Tensors,
    draw_weights,
    edited,
    embedded_tokenizer,
    trace_model,
    write_model,
    write_stages,
)

Change = Callable[[np.ndarray], np.ndarray]

SCORES, SOFTMAX = StageKey(1, "attn_scores"), StageKey(1, "attn_softmax")
Q, K = StageKey(1, "q_post_rope"), StageKey(1, "k_post_rope")
LOGITS, EMBEDDING = StageKey(None, "lm_head"), StageKey(0, "embedding")
T, H, D = len(TOKENS), SIZES["H"], SIZES["D"]


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


def verdicts(report: Report) -> dict[str, str | None]:
    return {s.key.path: s.verdict and s.verdict.value for s in report.stages}


def found_at(report: Report, key: StageKey) -> StageReport:
    return next(stage for stage in report.stages if stage.key == key)


def only_pass(report: Report) -> bool:
    return set(verdicts(report).values()) == {"PASS"}


class TestAgreement:
    def test_a_model_agrees_with_its_own_trace(self, model: Path, oracle: Path) -> None:
        report = run(Request(model=model, oracle=oracle))
        assert only_pass(report)
        assert len(report.stages) == 1 + 17 * NUM_LAYERS + 2
        assert report.first_divergence is None
        assert not report.diverges(strict=True)
        assert report.header.tokens == TOKENS
        assert report.header.prompt == "sums"

    def test_so_do_two_dumps_without_a_model(self, oracle: Path) -> None:
        assert only_pass(run(Request(trace=oracle, oracle=oracle)))

    def test_so_does_a_dump_judged_with_the_model(self, model: Path, oracle: Path) -> None:
        assert only_pass(run(Request(model=model, trace=oracle, oracle=oracle)))

    def test_files_of_an_earlier_run_are_left_out_and_named(
        self, oracle: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        dump = write_stages(tmp_path / "dump", tensors)
        few = {key: x for key, x in tensors.items() if key.layer == 0}
        write_stages(dump, few)  # a later run of fewer layers over the same directory
        report = run(Request(trace=dump, oracle=oracle))
        notes = [note for note in report.header.notes if "earlier run" in note]
        assert len(notes) == 1
        assert "files of the trace that its sidecar does not list" in notes[0]
        assert "layer-1/attn_norm" in notes[0]
        assert f"and {len(tensors) - len(few) - 3} more" in notes[0]
        assert not any("earlier run" in note for note in run(Request(trace=oracle)).header.notes)

    def test_the_stream_is_header_stages_report(self, model: Path, oracle: Path) -> None:
        events = list(bisect(Request(model=model, oracle=oracle)))
        header, *stages, report = events
        assert isinstance(header, RunHeader)
        assert isinstance(report, Report)
        assert tuple(stages) == report.stages
        assert tuple(stage.key for stage in report.stages) == header.keys

    def test_without_an_oracle_there_are_statistics(self, model: Path) -> None:
        report = run(Request(model=model, tokens=TOKENS))
        assert not report.diverges(strict=True)
        assert all(stage.trace is not None for stage in report.stages)
        assert all(stage.comparison is None for stage in report.stages)

    def test_the_default_prompt_is_recorded(self, tmp_path: Path) -> None:
        vocabulary = list("What is 2+?Ġ")
        model = write_model(tmp_path / "m.apr", metadata=embedded_tokenizer(vocabulary))
        header = next(bisect(Request(model=model)))
        assert isinstance(header, RunHeader)
        assert header.prompt == "What is 2+2?"

    def test_logits_are_named_by_the_tokenizer(self, model: Path, oracle: Path) -> None:
        report = run(Request(model=model, oracle=oracle))
        logits = found_at(report, LOGITS).logits
        assert logits is not None
        assert logits.comparison.agree
        assert set(logits.texts) == set(logits.comparison.top_a)
        assert report.header.token_texts is not None
        assert report.header.token_texts[1] == "[bold]"


@pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
@pytest.mark.parametrize("stage", ["attn_norm", "q_post_rope", "attn_softmax", "ffn_swigl"])
def test_a_planted_wrong_stage_is_the_first_divergence(
    model: Path, tensors: Tensors, oracle: Path, tmp_path: Path, stage: str, has_model: bool
) -> None:
    key = StageKey(1, stage)
    wrong = write_stages(tmp_path / "w", edited(tensors, key, lambda x: x[..., ::-1]))
    report = run(Request(model=model if has_model else None, trace=wrong, oracle=oracle))
    assert report.first_divergence is not None
    assert report.first_divergence.key == key
    assert report.first_divergence.verdict is Verdict.FAIL
    assert report.diverges()
    before = report.stages[: report.stages.index(report.first_divergence)]
    assert {stage.verdict for stage in before} == {Verdict.PASS}


def test_a_wrong_weight_is_found_where_it_is_used(tmp_path: Path, oracle: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    wrong = write_model(tmp_path / "w.apr", changed={name: 1.1 * draw_weights()[name]})
    report = run(Request(model=wrong, oracle=oracle))
    assert report.first_divergence is not None
    assert report.first_divergence.key == StageKey(1, "attn_out")
    failed = [s.key for s in report.stages if s.verdict is Verdict.FAIL]
    assert failed == [StageKey(1, "attn_out")]  # what follows is inherited


class TestTokens:
    def test_another_prompt_is_refused_with_both_lists(
        self, tensors: Tensors, tmp_path: Path, oracle: Path, model: Path
    ) -> None:
        other = write_stages(tmp_path / "other", tensors, tokens=(5, 0, 39, 7, 8))
        for request in (
            Request(trace=other, oracle=oracle),
            Request(model=model, trace=oracle, oracle=other),
            Request(model=model, oracle=oracle, tokens=(5, 0, 39, 7, 8)),
        ):
            with pytest.raises(OracleError) as caught:
                run(request)
            assert "[5, 0, 39, 7, 7]" in str(caught.value)
            assert "[5, 0, 39, 7, 8]" in str(caught.value)

    def test_the_side_that_disagrees_is_named(self, tensors: Tensors, tmp_path: Path) -> None:
        trace = write_stages(tmp_path / "trace", tensors)
        silent = write_stages(tmp_path / "silent", tensors, tokens=None)
        with pytest.raises(OracleError) as caught:
            run(Request(trace=trace, oracle=silent, tokens=(1, 2)))
        assert str(caught.value).startswith(f"{trace}: ")

    def test_ids_that_nobody_recorded_are_noted(self, tensors: Tensors, tmp_path: Path) -> None:
        sides = [write_stages(tmp_path / name, tensors, tokens=None) for name in "ab"]
        report = run(Request(trace=sides[0], oracle=sides[1]))
        assert only_pass(report)
        assert any("neither side recorded token ids" in note for note in report.header.notes)
        assert report.header.tokens is None

    def test_ids_given_by_the_user_are_taken_on_trust(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        silent = write_stages(tmp_path / "silent", tensors, tokens=None)
        report = run(Request(model=model, oracle=silent, tokens=TOKENS))
        assert only_pass(report)
        assert any("taken on trust" in note for note in report.header.notes)

    def test_a_recorded_prompt_is_run_where_ids_are_not(self, model: Path, tmp_path: Path) -> None:
        tokens = tuple(2 + ord(c) - ord("a") for c in "sums")
        silent = write_stages(
            tmp_path / "silent", trace_model(model, tokens), tokens=None, prompt="sums"
        )
        report = run(Request(model=model, oracle=silent))
        assert (report.header.tokens, report.header.prompt) == (tokens, "sums")
        assert only_pass(report)
        assert any("recorded prompt 'sums'" in note for note in report.header.notes)

    @pytest.mark.parametrize("token", [SIZES["V"], 10**12])
    def test_an_id_outside_the_vocabulary_is_named(
        self, model: Path, tensors: Tensors, tmp_path: Path, token: int
    ) -> None:
        oracle = write_stages(tmp_path / "o", tensors, tokens=(token, 1))
        for request in (Request(model=model, oracle=oracle), Request(model=model, tokens=(token,))):
            with pytest.raises(TokenizerError, match=f"token id {token} .* vocabulary of 40"):
                run(request)

    def test_no_tokens_are_refused(self, model: Path) -> None:
        for request in (Request(model=model, prompt=""), Request(model=model, tokens=())):
            with pytest.raises(TokenizerError):
                run(request)

    def test_other_positions_are_refused(
        self, tensors: Tensors, tmp_path: Path, oracle: Path
    ) -> None:
        late = write_stages(tmp_path / "late", tensors, positions=(3, 4, 5, 6, 7))
        for request in (Request(trace=late, oracle=oracle), Request(trace=oracle, oracle=late)):
            with pytest.raises(OracleError, match="only a full pass from position 0"):
                run(request)

    def test_a_prompt_needs_a_tokenizer(self, oracle: Path) -> None:
        with pytest.raises(PlanError, match="--tokens"):
            run(Request(trace=oracle, oracle=oracle, prompt="hello"))


class TestDepth:
    def without(self, tensors: Tensors, layer: int) -> Tensors:
        return {key: x for key, x in tensors.items() if key.layer != layer}

    def test_layers_that_the_oracle_lacks_are_missing(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        oracle = write_stages(tmp_path / "o", self.without(tensors, 2))
        report = run(Request(model=model, oracle=oracle))
        rows = [s for s in report.stages if s.key.layer == 2]
        assert len(rows) == 17
        assert {s.verdict for s in rows} == {Verdict.MISSING}
        assert all(s.comparison is None and s.oracle is None for s in rows)
        assert {s.verdict for s in report.stages if s.key.layer != 2} == {Verdict.PASS}
        assert not report.diverges()
        assert report.diverges(strict=True)

    def test_layers_that_the_model_lacks_are_missing(self, tensors: Tensors, oracle: Path,
                                                     tmp_path: Path) -> None:  # fmt: skip
        short = write_stages(tmp_path / "t", self.without(tensors, 2))
        report = run(Request(trace=short, oracle=oracle))
        assert {s.verdict for s in report.stages if s.key.layer == 2} == {Verdict.MISSING}
        shallow = write_model(tmp_path / "m.apr", num_layers=2)
        report = run(Request(model=shallow, oracle=oracle))
        assert {s.verdict for s in report.stages if s.key.layer == 2} == {Verdict.MISSING}
        assert {s.verdict for s in report.stages if s.key.layer in (0, 1)} == {Verdict.PASS}

    def test_stages_of_the_oracle_decide_what_is_reported(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        keys = [StageKey(layer, "attn_out") for layer in range(3)]
        oracle = write_stages(tmp_path / "o", {key: tensors[key] for key in keys})
        report = run(Request(model=model, oracle=oracle))
        assert [stage.key for stage in report.stages] == keys
        assert only_pass(report)

    def test_a_plan_decides_whoever_has_the_stages(self, model: Path, oracle: Path) -> None:
        report = run(Request(model=model, oracle=oracle, plan=Plan(("ffn_up",), range(1, 3))))
        assert [stage.key.path for stage in report.stages] == ["layer-1/ffn_up", "layer-2/ffn_up"]
        with pytest.raises(PlanError, match=r"layers 3\.\.4 were asked for and the model has 3"):
            run(Request(model=model, oracle=oracle, plan=Plan(("ffn_up",), range(3, 4))))
        with pytest.raises(PlanError, match="selects no stage"):
            run(Request(model=model, oracle=oracle, plan=Plan(("moe_router",))))

    @pytest.mark.timeout(20)
    def test_one_stage_of_a_deep_model_is_judged_at_once(self, tmp_path: Path) -> None:
        """The ways back through 40 layers are far too many to walk one by one."""
        keys = [StageKey(39, "ffn_norm"), LOGITS]
        bad = np.full(SIZES["E"], np.nan)
        sides = [
            write_stages(tmp_path / name, {keys[0]: x, LOGITS: np.ones(9)})
            for name, x in (("good", np.ones(SIZES["E"])), ("bad", bad))
        ]
        report = run(Request(trace=sides[1], oracle=sides[0]))
        assert report.first_divergence is not None
        assert report.first_divergence.verdict is Verdict.NONFINITE
        model = write_model(tmp_path / "m.apr", num_layers=16)
        only = run(Request(model=model, tokens=TOKENS, plan=Plan(("lm_head",))))
        assert [s.key for s in only.stages] == [LOGITS]


def test_an_oracle_of_another_model_gives_shape_rows_and_the_rest_is_compared(
    model: Path, tensors: Tensors, tmp_path: Path
) -> None:
    other = {
        key: np.ones((T, 50)) if key.stage in ("ffn_gate", "ffn_up") else x
        for key, x in tensors.items()
    }
    oracle = write_stages(tmp_path / "o", other)
    report = run(Request(model=model, oracle=oracle))
    shapes = [s for s in report.stages if s.verdict is Verdict.SHAPE]
    assert [s.key.stage for s in shapes] == ["ffn_gate", "ffn_up"] * NUM_LAYERS
    assert "140 values, the oracle 250" in shapes[0].reason
    assert shapes[0].trace is not None
    assert shapes[0].oracle is not None
    assert len([s for s in report.stages if s.verdict is Verdict.PASS]) >= 40
    assert report.diverges()


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


def masked(scores: np.ndarray, junk: float | None) -> np.ndarray:
    """Scores as other engines dump them: `junk`, or anything at all, above the diagonal."""
    above = np.triu(np.ones(scores.shape, bool), 1)
    raw = np.random.default_rng(0).standard_normal(scores.shape)
    return np.where(above, raw if junk is None else junk, scores)


def heads_first(x: np.ndarray) -> np.ndarray:
    """[T, N·D] as [N, T, D]."""
    return np.ascontiguousarray(x.reshape(T, -1, D).swapaxes(0, 1))


def pairs(x: np.ndarray) -> np.ndarray:
    """[T, N·D] with adjacent pairs in place of halves."""
    return x.reshape(T, -1, 2, D // 2).swapaxes(-1, -2).reshape(T, -1)


def last_token(x: np.ndarray) -> np.ndarray:
    return x[-1:] if x.ndim == 2 else x[:, -1:] if x.ndim == 3 else x


def everywhere(tensors: Tensors, stage: str, change: Change) -> dict[StageKey, Any]:
    return {k: change(x) if k.stage == stage else x for k, x in tensors.items()}


LAYOUTS: dict[str, Callable[[Tensors], dict[StageKey, Any]]] = {
    "q with heads first": lambda t: everywhere(t, "q_post_rope", heads_first),
    "k with heads first": lambda t: everywhere(t, "k_post_rope", heads_first),
    "q in pairs": lambda t: everywhere(t, "q_post_rope", pairs),
    "k in pairs": lambda t: everywhere(t, "k_post_rope", pairs),
    "q with heads first, in pairs": lambda t: everywhere(
        t, "q_post_rope", lambda x: heads_first(pairs(x))
    ),
    "scores with tokens first": lambda t: everywhere(
        t, "attn_scores", lambda x: np.ascontiguousarray(x.swapaxes(0, 1))
    ),
    "scores with -inf": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, -np.inf)),
    "scores with -65504": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, -65504)),
    "scores with -3.4e38": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, -3.4e38)),
    "raw scores": lambda t: everywhere(t, "attn_scores", lambda x: masked(x, None)),
    "the last token only": lambda t: {k: last_token(x) for k, x in t.items()},
    "the last token only, in pairs": lambda t: {
        k: last_token(pairs(x) if k.stage in ("q_post_rope", "k_post_rope") else x)
        for k, x in t.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("setting", ["trace", "trace and model", "oracle", "oracle and model"])
def test_another_layout_is_never_a_divergence(
    model: Path, oracle: Path, tensors: Tensors, tmp_path: Path, name: str, setting: str
) -> None:
    dump = write_stages(tmp_path / "d", LAYOUTS[name](tensors))
    request = {
        "trace": Request(trace=dump, oracle=oracle),
        "trace and model": Request(model=model, trace=dump, oracle=oracle),
        "oracle": Request(trace=oracle, oracle=dump),
        "oracle and model": Request(model=model, oracle=dump),
    }[setting]
    report = run(request)
    assert not report.diverges(), report.summary()
    assert set(verdicts(report).values()) <= {"PASS", "LAYOUT"}
    changed = any(not np.array_equal(a, b) for a, b in zip(LAYOUTS[name](tensors).values(),
                                                          tensors.values()))  # fmt: skip
    assert changed
    if "scores with -" not in name and name != "raw scores":
        assert Verdict.LAYOUT in report.counts


@pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
def test_both_sides_may_have_their_own_layout(
    model: Path, tensors: Tensors, tmp_path: Path, has_model: bool
) -> None:
    trace = write_stages(tmp_path / "t", everywhere(tensors, "q_post_rope", pairs))
    oracle = write_stages(tmp_path / "o", everywhere(tensors, "q_post_rope", heads_first))
    report = run(Request(model=model if has_model else None, trace=trace, oracle=oracle))
    assert not report.diverges(), report.summary()
    assert found_at(report, Q).verdict is Verdict.LAYOUT


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
def test_a_wrong_stage_is_found_in_another_layout_too(
    model: Path, oracle: Path, tensors: Tensors, tmp_path: Path, name: str, has_model: bool
) -> None:
    stage = next((s for s in ("q", "k") if name.startswith(f"{s} ")), "attn_scores")
    key = StageKey(1, {"q": "q_post_rope", "k": "k_post_rope"}.get(stage, stage))

    def spoil(x: np.ndarray) -> np.ndarray:
        x[..., -1, 0] += 3 * np.abs(x).max()  # in the last token, which every layout has
        return x

    dump = write_stages(tmp_path / "d", LAYOUTS[name](edited(tensors, key, spoil)))
    report = run(Request(model=model if has_model else None, trace=dump, oracle=oracle))
    assert report.first_divergence is not None
    assert report.first_divergence.key == key
    assert report.first_divergence.verdict is Verdict.FAIL


def test_a_permutation_within_a_head_that_no_engine_uses_is_a_fault(
    oracle: Path, tensors: Tensors, tmp_path: Path
) -> None:
    trace = write_stages(tmp_path / "t", edited(tensors, Q, lambda x: np.roll(x, 1, axis=1)))
    assert found_at(run(Request(trace=trace, oracle=oracle)), Q).verdict is Verdict.FAIL


class TestEndingEarly:
    def open_files(self) -> set[str]:
        links = Path("/proc/self/fd")
        if not links.is_dir():
            pytest.skip("no /proc")
        return {os.readlink(x) for x in map(str, links.iterdir()) if os.path.islink(x)}  # noqa: PTH114, PTH115

    @pytest.mark.parametrize("events", [1, 2, 9])
    def test_closing_the_stream_closes_the_files(
        self, model: Path, oracle: Path, events: int
    ) -> None:
        stream = bisect(Request(model=model, oracle=oracle))
        for _ in range(events):
            next(stream)
        assert str(model) in self.open_files()
        stream.close()
        gc.collect()
        assert str(model) not in self.open_files()

    def test_an_oracle_that_breaks_meanwhile_is_an_error_and_closes_the_files(
        self, model: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        oracle = write_stages(tmp_path / "o", tensors)
        stream = bisect(Request(model=model, oracle=oracle))
        next(stream)
        os.truncate(oracle / "layer-1/ffn_up.bin", 20)
        with pytest.raises(TruncatedError, match=r"ffn_up\.bin"):
            list(stream)
        assert str(model) not in self.open_files()


class TestBadDirectories:
    @pytest.mark.parametrize("content", [b"", b"APRT", b"not a stage file at all"])
    def test_a_damaged_stage_file_is_named(
        self, model: Path, tensors: Tensors, tmp_path: Path, content: bytes
    ) -> None:
        oracle = write_stages(tmp_path / "o", tensors)
        (oracle / "layer-1/ffn_up.bin").write_bytes(content)
        with pytest.raises(AprError, match=r"layer-1/ffn_up\.bin"):
            run(Request(model=model, oracle=oracle))

    @pytest.mark.parametrize("shape", [[-2, -3], "x", [10**30, 4]])
    def test_a_lying_sidecar_does_no_harm(
        self, tensors: Tensors, tmp_path: Path, shape: Any
    ) -> None:
        oracle = write_stages(tmp_path / "o", tensors, tokens=None)
        record = json.loads((oracle / "_trace.json").read_text())
        for entry in record["stages"].values():
            entry["shape"] = shape
        (oracle / "_trace.json").write_text(json.dumps(record))
        report = run(Request(trace=oracle, oracle=oracle))
        assert only_pass(report)
        json.dumps([str(stage.layout) for stage in report.stages])

    def test_nothing_to_run(self, oracle: Path) -> None:
        with pytest.raises(PlanError, match="nothing to run"):
            run(Request(oracle=oracle))

    def test_a_dump_without_any_sidecar_works(
        self, model: Path, oracle: Path, tensors: Tensors, tmp_path: Path
    ) -> None:
        bare = write_stages(tmp_path / "b", everywhere(tensors, "q_post_rope", heads_first))
        (bare / "_trace.json").unlink()
        for request in (
            Request(trace=bare, oracle=oracle), Request(model=model, trace=bare, oracle=oracle),
            Request(model=model, oracle=bare, tokens=TOKENS), Request(model=model, trace=bare),
        ):  # fmt: skip
            report = run(request)
            assert not report.diverges(), report.summary()


def test_an_empty_sidecar_records_nothing() -> None:
    assert Sidecar().tokens is None


STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "stories260k"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k model is absent")
class TestStories:
    """A trained model: Llama, 5 layers, grouped kv heads, tied head."""

    @pytest.fixture(scope="class")
    def traced(self) -> Tensors:
        return trace_model(STORIES, (1, 403, 407, 261, 378))

    def test_it_agrees_with_itself_and_a_wrong_stage_is_found(
        self, traced: Tensors, tmp_path: Path
    ) -> None:
        tokens = (1, 403, 407, 261, 378)
        oracle = write_stages(tmp_path / "o", traced, tokens=tokens)
        assert only_pass(run(Request(model=STORIES, oracle=oracle)))
        key = StageKey(3, "k_post_rope")
        trace = write_stages(
            tmp_path / "t", edited(traced, key, lambda x: np.roll(x, 1, axis=0)), tokens=tokens
        )
        report = run(Request(model=STORIES, trace=trace, oracle=oracle))
        assert report.first_divergence is not None
        assert report.first_divergence.key == key


class TestRepeatedTokens:
    """Equal inputs round to equal errors: however long the prompt, nothing averages out."""

    @pytest.mark.parametrize("prompt", ["a" * 120, "ab" * 80, "What is 2+2?" * 12])
    def test_a_sound_model_is_not_blamed(self, prompt: str) -> None:
        report = run(Request(model=demo_path() / "sound.apr", prompt=prompt))
        assert report.counts == {Verdict.PASS: len(report.stages)}

    def test_a_fault_among_them_still_is(self, tmp_path: Path) -> None:
        request = Request(model=demo_path() / "sound.apr", prompt="ab" * 80)
        key = StageKey(2, "ffn_gate")
        store, report = TensorStore(request), run(request)
        folder = tmp_path / "dump"
        with TraceWriter(folder, Sidecar(tokens=report.header.tokens, dtype="float32")) as writer:
            for stage in report.stages:
                plane = store.open(stage).trace
                assert plane is not None
                values = plane.read_flat(0, plane.shape[0] * plane.shape[1]).copy()
                if stage.key == key:
                    values[::17] *= np.float32(1 + 2e-6)
                writer.write(stage.key, values)
        found = run(Request(model=demo_path() / "sound.apr", trace=folder)).first_divergence
        assert found is not None and found.key == key
