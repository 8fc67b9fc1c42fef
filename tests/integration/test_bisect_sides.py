"""What the two sides of a run are: prompts, depths, and directories in disorder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.dumps.sidecar import Sidecar
from aprcore.ground.errors import AprError, OracleError, PlanError, TokenizerError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from bisect_runs import LOGITS, T, everywhere, heads_first, only_pass
from tiny import (
    NUM_LAYERS,
    SIZES,
    TOKENS,
    Tensors,
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

    @pytest.mark.parametrize("token", [SIZES["V"], 2**31 - 1])
    def test_an_id_outside_the_vocabulary_is_named(
        self, model: Path, tensors: Tensors, tmp_path: Path, token: int
    ) -> None:
        oracle = write_stages(tmp_path / "o", tensors, tokens=(token, 1))
        for request in (Request(model=model, oracle=oracle), Request(model=model, tokens=(token,))):
            with pytest.raises(TokenizerError, match=f"token id {token} .* vocabulary of 40"):
                run(request)

    def test_an_id_that_no_vocabulary_has(self, tensors: Tensors, tmp_path: Path) -> None:
        oracle = write_stages(tmp_path / "o", tensors, tokens=(10**12, 1))
        with pytest.raises(AprError, match=r"_trace\.json: tokens\[0\] is 1000000000000"):
            run(Request(trace=oracle, oracle=oracle))

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


class TestBadDirectories:
    @pytest.mark.parametrize("content", [b"", b"APRT", b"not a stage file at all"])
    def test_a_damaged_stage_file_is_named(
        self, model: Path, tensors: Tensors, tmp_path: Path, content: bytes
    ) -> None:
        oracle = write_stages(tmp_path / "o", tensors)
        (oracle / "layer-1/ffn_up.bin").write_bytes(content)
        with pytest.raises(AprError, match=r"layer-1/ffn_up\.bin"):
            run(Request(model=model, oracle=oracle))

    @pytest.mark.parametrize("shape", [[-2, -3], "x"])
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

    def test_a_sidecar_of_another_size_is_refused(self, tensors: Tensors, tmp_path: Path) -> None:
        oracle = write_stages(tmp_path / "o", tensors, tokens=None)
        record = json.loads((oracle / "_trace.json").read_text())
        record["stages"]["layer-0/embedding"]["shape"] = [10**30, 4]
        (oracle / "_trace.json").write_text(json.dumps(record))
        with pytest.raises(AprError, match="files of two runs are mixed"):
            run(Request(trace=oracle, oracle=oracle))

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
