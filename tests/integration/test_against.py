"""Two dumps held against each other, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.judging.layouts import interleavings
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.report import Report
from aprcore.records.report_json import to_json
from aprcore.runs.bisect import run
from aprcore.runs.request import Request
from dump_files import own_names, write_safetensors
from second_side_runs import LOGITS, NUM_STAGES, called, pair_at
from tiny import SIZES, TOKENS, Tensors, edited, trace_model, write_model, write_stages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


@pytest.fixture(scope="module")
def cpu_dump(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("cpu") / "d", tensors)


def changed(tensors: Tensors, target: Path, key: StageKey, change: Any, **sidecar: Any) -> Path:
    return write_stages(target, edited(tensors, key, change), **sidecar)


@pytest.mark.parametrize("has_model", [True, False], ids=["with model", "dumps only"])
class TestDumps:
    """`--trace A --against B`."""

    @pytest.fixture
    def held(self, model: Path, has_model: bool) -> Callable[[Path, Path], Report]:
        def hold(a: Path, b: Path) -> Report:
            return run(Request(model=model if has_model else None, trace=a, against=b))

        return hold

    def test_equal_dumps_agree(
        self, held: Callable[[Path, Path], Report], cpu_dump: Path, has_model: bool
    ) -> None:
        report = held(cpu_dump, cpu_dump)
        assert len(report.parity) == len(report.stages) == NUM_STAGES
        assert {stage.verdict for stage in report.parity} == {Verdict.PASS}
        assert all((stage.trusted.kernel is not None) is has_model for stage in report.parity)
        assert not report.diverges(strict=True)
        assert report.rejected is None

    def test_a_wrong_stage_is_the_first_fault(
        self, held: Callable[[Path, Path], Report], tensors: Tensors, cpu_dump: Path,
        tmp_path: Path, has_model: bool,
    ) -> None:  # fmt: skip
        key = StageKey(1, "ffn_silu")
        report = held(changed(tensors, tmp_path / "gpu", key, lambda x: x * 1.5), cpu_dump)
        first = report.first_parity_fault
        assert first is not None
        assert first.key == key
        assert bool(first.fault) is has_model
        assert report.diverges()

    def test_a_wrong_stage_of_the_trusted_side_is_told_apart(
        self, held: Callable[[Path, Path], Report], tensors: Tensors, cpu_dump: Path,
        tmp_path: Path, has_model: bool,
    ) -> None:  # fmt: skip
        key = StageKey(1, "ffn_silu")
        report = held(cpu_dump, changed(tensors, tmp_path / "cpu", key, lambda x: x * 1.5))
        first = report.first_parity_fault
        assert first is not None
        assert first.key == key
        assert not first.fault
        assert bool(first.trusted.fault) is has_model

    def test_heads_in_another_order_are_the_same(
        self, held: Callable[[Path, Path], Report], tensors: Tensors, cpu_dump: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        def by_head(x: Any) -> Any:
            return x.reshape(len(TOKENS), SIZES["H"], SIZES["D"]).transpose(1, 0, 2)

        key = StageKey(1, "q_post_rope")
        permuted = changed(tensors, tmp_path / "gpu", key, by_head)
        for a, b in ((permuted, cpu_dump), (cpu_dump, permuted)):
            stage = pair_at(report := held(a, b), key)
            assert stage.verdict in (Verdict.PASS, Verdict.LAYOUT)
            assert stage.comparison is not None and stage.comparison.relative_l2 == 0
            assert not report.diverges()

    def test_a_stage_that_one_side_lacks_is_missing(
        self, held: Callable[[Path, Path], Report], tensors: Tensors, cpu_dump: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        key = StageKey(1, "attention")
        fewer = {k: x for k, x in tensors.items() if k != key}
        partial = write_stages(tmp_path / "partial", fewer)
        for a, b, lacking in ((partial, cpu_dump, "tested"), (cpu_dump, partial, "trusted")):
            report = held(a, b)
            stage = pair_at(report, key)
            assert stage.verdict is Verdict.MISSING
            assert stage.comparison is None and not stage.differs
            assert stage.reason == f"the {lacking} side lacks it"
            assert not report.diverges()
            assert report.diverges(strict=True)

    def test_another_size_is_a_divergence(
        self, held: Callable[[Path, Path], Report], tensors: Tensors, cpu_dump: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        key = StageKey(2, "ffn_up")
        odd = changed(tensors, tmp_path / "gpu", key, lambda x: x.reshape(-1)[:-3])
        stage = pair_at(report := held(odd, cpu_dump), key)
        assert stage.verdict is Verdict.SHAPE
        assert stage.comparison is None and stage.differs
        count = len(TOKENS) * SIZES["F"]
        assert stage.reason.startswith(
            f"the tested side has {count - 3} values, the trusted {count}"
        )
        assert report.diverges()
        assert json.dumps(to_json(report), allow_nan=False)

    def test_the_last_token_only_is_compared_with_its_row(
        self, held: Callable[[Path, Path], Report], tensors: Tensors, cpu_dump: Path,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        key = StageKey(2, "ffn_out")
        part = changed(tensors, tmp_path / "gpu", key, lambda x: x[-1:])
        stage = pair_at(held(part, cpu_dump), key)
        assert stage.comparison is not None and stage.comparison.count == SIZES["E"]
        assert stage.verdict is Verdict.LAYOUT
        assert "the last token only" in stage.reason

    def test_nan_at_the_same_place_is_the_same(
        self, held: Callable[[Path, Path], Report], tensors: Tensors, tmp_path: Path
    ) -> None:
        key = StageKey(1, "ffn_gate")

        def spoil(x: Any) -> Any:
            x[2, 3] = np.nan
            return x

        def spoil_elsewhere(x: Any) -> Any:
            x[2, 4] = np.nan
            return x

        a = changed(tensors, tmp_path / "a", key, spoil)
        b = changed(tensors, tmp_path / "b", key, spoil)
        stage = pair_at(held(a, b), key)
        assert stage.verdict is Verdict.PASS and not stage.fault
        c = changed(tensors, tmp_path / "c", key, spoil_elsewhere)
        stage = pair_at(report := held(a, c), key)
        assert stage.verdict is Verdict.NONFINITE
        assert stage.fault == "2 values are NaN or infinite on one side only"
        assert report.diverges()

    def test_no_line_is_printed_on_stderr(
        self, model: Path, has_model: bool, tensors: Tensors, cpu_dump: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        wrong = changed(tensors, tmp_path / "gpu", LOGITS, lambda x: -x)
        given = [model] if has_model else []
        code, out, errors = called(capsys, *given, "--trace", wrong, "--against", cpu_dump)
        assert (code, errors) == (1, [])
        assert f"against {cpu_dump}" in out
        assert "first fault at lm_head" in out


def test_both_dumps_are_held_against_the_oracle(
    model: Path, tensors: Tensors, cpu_dump: Path, tmp_path: Path
) -> None:
    key = StageKey(1, "ffn_silu")
    gpu = changed(tensors, tmp_path / "gpu", key, lambda x: x * 1.5)
    stage = pair_at(run(Request(trace=gpu, oracle=cpu_dump, against=cpu_dump)), key)
    assert stage.tested.oracle is not None and stage.trusted.oracle is not None
    assert stage.tested.oracle.relative_l2 == pytest.approx(0.5)
    assert stage.trusted.oracle.relative_l2 == 0


def test_a_fused_projection_in_another_order_is_the_same(
    model: Path, tensors: Tensors, cpu_dump: Path, tmp_path: Path
) -> None:
    """Only the kernel judgment reads the columns of q, k and v in the right order."""
    _, order = next(interleavings(SIZES["H"], SIZES["K"], SIZES["D"]))
    key = StageKey(1, "qkv_bias")
    gpu = changed(tensors, tmp_path / "gpu", key, lambda x: x[:, order])
    report = run(Request(model=model, trace=gpu, against=cpu_dump))
    assert pair_at(report, key).verdict is Verdict.PASS
    assert not report.diverges()


def test_a_dump_in_one_file_can_be_held_against_a_directory(
    tensors: Tensors, cpu_dump: Path, tmp_path: Path
) -> None:
    from aprcore.dumps.directory import TraceDirectory

    arrays = own_names(TraceDirectory(cpu_dump))
    metadata = {"tokens": json.dumps(TOKENS), "dtype": "float32"}
    path = write_safetensors(tmp_path / "cpu.safetensors", arrays, metadata)
    gpu = changed(tensors, tmp_path / "gpu", LOGITS, lambda x: -x)
    report = run(Request(trace=gpu, against=path))
    assert len(report.parity) == NUM_STAGES
    first = report.first_parity_fault
    assert first is not None and first.key == LOGITS
    assert report.header.trusted is not None
    assert report.header.trusted.path == str(path)


def test_half_precision_dumps_have_the_bound_of_their_type(
    tensors: Tensors, cpu_dump: Path, tmp_path: Path
) -> None:
    rounded = {key: x.astype(np.float16).astype(np.float32) for key, x in tensors.items()}
    half = write_stages(tmp_path / "gpu", rounded, dtype="float16")
    report = run(Request(trace=half, against=cpu_dump))
    assert not report.diverges()
    assert max(s.comparison.relative_l2 for s in report.parity if s.comparison) > 1e-4
    claimed = write_stages(tmp_path / "claimed", rounded, dtype="float32")
    assert run(Request(trace=claimed, against=cpu_dump)).diverges()
