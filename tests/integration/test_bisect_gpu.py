"""A run with a second side: a device beside the CPU, or two dumps held against each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.engines.engine import Engine
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import BackendError, PlanError
from aprcore.judging.layouts import interleavings
from aprcore.judging.verdict import Verdict
from aprcore.network.graph import StageKey
from aprcore.records.parity import StageParity
from aprcore.records.report import DeviceOpened, PathRejected, Report, RunHeader, StageReport
from aprcore.records.report_json import to_json
from aprcore.runs import second_side
from aprcore.runs.bisect import bisect, run
from aprcore.runs.fallback import RejectedError
from aprcore.runs.request import Request
from aprtui.cli import main
from aprtui.demo import demo_path
from dump_files import own_names, write_safetensors
from opencl_device import obstacle
from tiny import (
    NUM_LAYERS,
    SIZES,
    TOKENS,
    Tensors,
    edited,
    trace_model,
    write_model,
    write_stages,
)
from wrong_backends import BlindToTheFirst, MissingTail, NotFinite, OutOfMemory, WrongStride

needs_device = pytest.mark.skipif(bool(obstacle()), reason=f"no OpenCL device: {obstacle()}")

PREFIX = "[apr-cpu-vs-gpu-output-parity-v1] opencl path rejected, attempting fallback: "
LOGITS = StageKey(None, "lm_head")
NUM_STAGES = 1 + 17 * NUM_LAYERS + 2
DEMO = demo_path()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


@pytest.fixture(scope="module")
def cpu_dump(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("cpu") / "d", tensors)


Plant = Callable[[Any], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a backend, or what opening it raises, in the place of the device."""

    def put(device: Any) -> None:
        @contextmanager
        def opened(name: str, **options: Any) -> Iterator[Engine]:
            assert name == "opencl"
            if isinstance(device, Exception):
                raise device
            yield Engine(device, "a planted device", "0")

        monkeypatch.setattr(second_side, "open_engine", opened)

    return put


def pair_at(report: Report, key: StageKey) -> StageParity:
    return next(stage for stage in report.parity if stage.key == key)


def faults(report: Report) -> list[StageKey]:
    return [stage.key for stage in report.parity if stage.fault]


def called(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, list[str]]:
    code = main(["bisect", *map(str, args)])
    out, errors = capsys.readouterr()
    return code, out, errors.splitlines()


@needs_device
class TestDevice:
    def test_a_sound_model_agrees_in_every_stage(self) -> None:
        report = run(Request(model=DEMO / "sound.apr", oracle=DEMO / "oracle", gpu=True))
        assert [stage.key for stage in report.parity] == list(report.header.keys)
        for stage in report.parity:
            assert stage.comparison is not None
            assert stage.comparison.relative_l2 <= 1e-5, stage.key
            assert stage.tested.verdict is Verdict.PASS, stage.key
            assert stage.verdict is Verdict.PASS, stage.key
            assert stage.tested.elapsed_s > 0 and stage.trusted.elapsed_s > 0
            assert stage.tested.oracle is not None
            assert stage.tested.oracle.relative_l2 <= 1e-5, stage.key
        assert report.rejected is None
        assert report.device is not None and report.device.label.startswith("opencl: ")
        assert not report.diverges(strict=True)

    def test_every_stage_is_judged_as_it_is_without_a_device(self) -> None:
        request = Request(model=DEMO / "sound.apr", oracle=DEMO / "oracle")
        alone = run(request)
        beside = run(Request(model=DEMO / "sound.apr", oracle=DEMO / "oracle", gpu=True))
        for a, b in zip(alone.stages, beside.stages, strict=True):
            assert (a.key, a.verdict, a.reason) == (b.key, b.verdict, b.reason)
            assert a.comparison is not None and b.comparison is not None
            assert a.comparison.relative_l2 == b.comparison.relative_l2

    def test_the_order_of_events(self, model: Path) -> None:
        header, opened, *stages, report = bisect(Request(model=model, tokens=TOKENS, gpu=True))
        assert isinstance(header, RunHeader) and isinstance(opened, DeviceOpened)
        assert header.tested is not None and "opencl" in header.tested.label
        assert header.trusted == header.trace
        assert isinstance(report, Report)
        for first, second in zip(stages[::2], stages[1::2], strict=True):
            assert isinstance(first, StageReport) and isinstance(second, StageParity)
            assert first.key == second.key
        assert tuple(stages[1::2]) == report.parity

    def test_a_planned_stage_is_judged_on_what_nobody_asked_about(self, model: Path) -> None:
        plan = Plan(frozenset({"attention"}), range(1, 2))
        report = run(Request(model=model, tokens=TOKENS, gpu=True, plan=plan))
        (stage,) = report.parity
        assert stage.key == StageKey(1, "attention")
        assert stage.tested.kernel is not None and not stage.tested.kernel.span
        assert stage.verdict is Verdict.PASS

    def test_a_wrong_kernel_of_the_device_is_named_and_the_cpu_carries_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from aprcore.engines.opencl import program

        read = program.read_source
        monkeypatch.setattr(
            program, "read_source",
            lambda file: read(file).replace("head / (heads / kv_heads)", "head % kv_heads"),
        )  # fmt: skip
        arguments = (DEMO / "sound.apr", "--oracle", DEMO / "oracle")
        code, out, errors = called(capsys, *arguments, "--gpu")
        assert code == 1
        (line,) = errors
        assert line.startswith(PREFIX)
        assert "layer 0 · attn_scores: kernel: kv heads tiled" in line
        # The run against the oracle is what it is without a device.
        assert "no divergence in 71 stages (71 PASS)" in out
        code, out, errors = called(capsys, *arguments, "--require-gpu")
        assert code == 2
        (line,) = errors
        assert line.startswith("aprtui: opencl path rejected: ")
        assert "lm_head" in out  # the table is complete

    def test_a_kernel_that_does_not_build(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from aprcore.engines.opencl import program

        read = program.read_source
        broken = {"attention.cl": "}"}
        monkeypatch.setattr(program, "read_source", lambda file: read(file) + broken.get(file, ""))
        code, out, errors = called(capsys, DEMO / "sound.apr", "--gpu")
        assert code == 0
        (line,) = errors
        assert line.startswith(PREFIX) and "does not build" in line
        assert "71 stages" in out

    def test_the_json_holds_both_sides(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, errors = called(
            capsys, DEMO / "sound.apr", "--oracle", DEMO / "oracle", "--gpu", "--json"
        )
        assert (code, errors) == (0, [])
        data = json.loads(out)
        assert data["parity"]["device"]["label"].startswith("opencl: ")
        assert data["parity"]["rejected"] is None
        for stage in data["stages"]:
            pair = stage["parity"]
            assert pair["comparison"]["cosine"] == pytest.approx(1)
            assert pair["comparison"]["relative_l2"] <= 1e-5
            assert "max_abs_diff_position" in pair["comparison"]
            assert pair["tested"]["kernel"]["passed"] and pair["trusted"]["kernel"]["passed"]
            assert pair["tested"]["elapsed_s"] > 0


class TestPlanted:
    """Devices that are wrong in ways of their own; no driver is needed."""

    @pytest.mark.parametrize(
        ("backend", "stage"),
        [
            (WrongStride(1), "attention"),
            (NotFinite(1), "ffn_silu"),
            (MissingTail(1), "ffn_out"),
        ],
        ids=["stride", "not finite", "tail"],
    )
    def test_a_wrong_kernel_is_named_by_its_stage(
        self, model: Path, backend: NumpyBackend, stage: str, plant: Plant
    ) -> None:
        plant(backend)
        report = run(Request(model=model, tokens=TOKENS, gpu=True))
        first = report.first_parity_fault
        assert first is not None
        assert first.key == StageKey(0, stage)
        assert first.fault and first.tested.verdict is Verdict.FAIL
        # The same kernel is wrong in every layer, and nothing else is.
        if stage != "ffn_silu":  # what reads a NaN cannot be judged
            assert faults(report) == [StageKey(layer, stage) for layer in range(NUM_LAYERS)]
        else:
            assert faults(report) == [StageKey(0, stage)]
            assert first.verdict is Verdict.NONFINITE
            reader = pair_at(report, StageKey(0, "ffn_swigl"))
            assert reader.verdict is Verdict.INHERITED and reader.differs
        assert report.diverges()
        assert f"layer 0 · {stage}" in report.summary()
        # The CPU is not blamed for it.
        assert report.first_divergence is None
        assert not any(stage.trusted.fault for stage in report.parity)

    def test_the_gate_rejects_by_the_logits_and_names_the_stage(
        self, model: Path, plant: Plant
    ) -> None:
        plant(WrongStride(1))
        events = list(bisect(Request(model=model, tokens=TOKENS, gpu=True)))
        *_, stage, rejected, report = events
        assert isinstance(rejected, PathRejected) and isinstance(report, Report)
        assert isinstance(stage, StageParity) and stage.key == LOGITS
        assert rejected.by_gate
        assert rejected.key == StageKey(0, "attention")
        assert "layer 0 · attention: kernel: kv heads tiled" in rejected.line_reason
        assert report.rejected == rejected
        assert sum(isinstance(event, PathRejected) for event in events) == 1
        assert len(report.parity) == NUM_STAGES

    def test_what_is_not_wrong_is_inherited(self, model: Path, plant: Plant) -> None:
        plant(WrongStride(1))
        report = run(Request(model=model, tokens=TOKENS, gpu=True))
        assert pair_at(report, StageKey(0, "attn_softmax")).verdict is Verdict.PASS
        inherited = pair_at(report, StageKey(0, "attn_out"))
        assert inherited.verdict is Verdict.INHERITED
        assert inherited.differs and not inherited.fault

    def test_what_nobody_asked_about_is_remembered_as_different(
        self, model: Path, plant: Plant
    ) -> None:
        plant(WrongStride(1))
        plan = Plan(frozenset({"attn_out"}), range(1))
        (stage,) = run(Request(model=model, tokens=TOKENS, gpu=True, plan=plan)).parity
        assert stage.verdict is Verdict.INHERITED

    def test_a_wrong_kernel_that_the_gate_lets_pass_is_a_divergence(
        self, model: Path, plant: Plant
    ) -> None:
        plant(MissingTail(1))
        plan = Plan(frozenset({"ffn_out"}), range(1))
        report = run(Request(model=model, tokens=TOKENS, gpu=True, plan=plan))
        assert report.rejected is None
        assert faults(report) == [StageKey(0, "ffn_out")]
        assert report.diverges()

    def test_a_device_that_cannot_be_opened(
        self, model: Path, cpu_dump: Path, plant: Plant, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plant(BackendError("no OpenCL platform is installed"))
        header, rejected, *stages, report = bisect(Request(model=model, oracle=cpu_dump, gpu=True))
        assert isinstance(header, RunHeader) and isinstance(report, Report)
        assert rejected == PathRejected("no OpenCL platform is installed", None)
        assert all(isinstance(stage, StageReport) for stage in stages)
        assert len(stages) == NUM_STAGES
        assert not report.diverges(strict=True)
        code, out, errors = called(capsys, model, "--oracle", cpu_dump, "--gpu")
        assert (code, errors) == (0, [f"{PREFIX}no OpenCL platform is installed"])
        assert f"{NUM_STAGES} PASS" in out

    def test_the_header_comes_before_the_device_is_opened(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = []

        def note(name: str, **options: Any) -> Any:
            opened.append(name)
            raise BackendError("not now")

        monkeypatch.setattr(second_side, "open_engine", note)
        events = bisect(Request(model=model, tokens=TOKENS, gpu=True))
        assert isinstance(next(events), RunHeader)
        assert opened == []
        assert isinstance(next(events), PathRejected)
        assert opened == ["opencl"]

    def test_the_device_is_closed_however_the_run_ends(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed = []

        @contextmanager
        def opened(name: str, **options: Any) -> Iterator[Engine]:
            yield Engine(NumpyBackend(1))
            closed.append(name)

        monkeypatch.setattr(second_side, "open_engine", opened)
        run(Request(model=model, tokens=TOKENS, gpu=True))
        events = bisect(Request(model=model, tokens=TOKENS, gpu=True))
        assert any(isinstance(event, StageParity) for event in events)
        assert closed == ["opencl"]
        events.close()  # type: ignore[attr-defined]
        assert closed == ["opencl", "opencl"]

    def test_memory_that_runs_out_in_the_middle_of_a_layer(
        self, model: Path, cpu_dump: Path, plant: Plant
    ) -> None:
        plant(OutOfMemory(0))
        events = list(bisect(Request(model=model, oracle=cpu_dump, gpu=True)))
        found = [i for i, event in enumerate(events) if isinstance(event, PathRejected)]
        assert len(found) == 1
        rejected = events[found[0]]
        assert rejected == PathRejected("the device is out of memory", StageKey(0, "ffn_swigl"))
        assert not any(isinstance(event, StageParity) for event in events[found[0] :])
        report = events[-1]
        assert isinstance(report, Report)
        assert report.parity[-1].key == StageKey(0, "ffn_silu")
        assert len(report.stages) == NUM_STAGES
        assert not report.diverges(strict=True)

    @pytest.mark.parametrize(
        "device",
        [BackendError("no platform"), OutOfMemory(0), WrongStride(1)],
        ids=["unopened", "memory", "gate"],
    )
    def test_a_required_device_ends_the_run(
        self, model: Path, device: Any, plant: Plant, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plant(device)
        seen = []
        with pytest.raises(RejectedError, match="opencl path rejected: "):
            for event in bisect(Request(model=model, tokens=TOKENS, require_gpu=True)):
                seen.append(event)
        stages = [event for event in seen if isinstance(event, StageReport)]
        if isinstance(device, WrongStride):  # refused in the end, so that there is a table
            assert len(stages) == NUM_STAGES
        else:
            assert len(stages) < NUM_STAGES
        code, _, errors = called(
            capsys, model, "--tokens", ",".join(map(str, TOKENS)), "--require-gpu"
        )
        assert code == 2
        assert len(errors) == 1

    def test_a_kernel_that_is_wrong_only_in_decoding_is_not_seen(
        self, model: Path, plant: Plant
    ) -> None:
        """The pass over a prompt is one of its own; `aprtui parity` runs the others."""
        plant(BlindToTheFirst(1))
        report = run(Request(model=model, tokens=TOKENS, gpu=True))
        assert not report.diverges()

    def test_a_budget_tolerates_the_device_too(self, model: Path, plant: Plant) -> None:
        from aprcore.runs.budget import parse_budgets

        plant(MissingTail(1))
        budgets = parse_budgets(["ffn_out=1.0"], None)
        report = run(Request(model=model, tokens=TOKENS, gpu=True, budgets=budgets))
        assert not faults(report)

    def test_the_same_nan_on_both_sides_is_no_fault(
        self, tmp_path: Path, plant: Plant, tensors: Tensors
    ) -> None:
        name = "model.layers.1.input_layernorm.weight"
        norm = np.ones(SIZES["E"], dtype=np.float32)
        norm[3] = np.nan
        broken = write_model(tmp_path / "m.apr", changed={name: norm})
        plant(NumpyBackend(1))
        report = run(Request(model=broken, tokens=TOKENS, gpu=True))
        assert not faults(report)
        pair = pair_at(report, StageKey(1, "attn_norm"))
        assert pair.comparison is not None
        assert pair.comparison.nonfinite_a == pair.comparison.nonfinite_b == len(TOKENS)
        assert pair.verdict is Verdict.PASS

    def test_without_the_other_judgments_the_sides_are_compared(
        self, model: Path, plant: Plant
    ) -> None:
        plant(WrongStride(1))
        report = run(Request(model=model, tokens=TOKENS, gpu=True, cumulative_only=True))
        first = report.first_parity_fault
        assert first is not None
        assert first.key == StageKey(0, "attention")
        assert "its inputs are the same" in first.reason
        assert all(stage.tested.kernel is None for stage in report.parity)


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


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--trace", "a", "--gpu"), "needs a model"),
            (("m.apr", "--trace", "a", "--gpu"), "another engine's run"),
            (("m.apr", "--trace", "a", "--device", "0"), "another engine's run"),
            (("m.apr", "--against", "b"), "--against is for two dumps"),
            (("m.apr", "--device", "0", "--no-gpu"), "contradict"),
        ],
    )
    def test_contradictions_are_one_line(
        self, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, errors = called(capsys, *options)
        assert (code, out, len(errors)) == (2, "", 1)
        assert words in errors[0]

    def test_other_tokens_are_refused(
        self, tensors: Tensors, cpu_dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = write_stages(tmp_path / "other", tensors, tokens=TOKENS[::-1])
        code, _, errors = called(capsys, "--trace", cpu_dump, "--against", other)
        assert (code, len(errors)) == (2, 1)
        assert "the dump it is held against" in errors[0]

    def test_a_request_that_names_a_device_uses_one(self) -> None:
        assert not Request(model=Path("m")).uses_device
        assert Request(model=Path("m"), device="0").uses_device
        with pytest.raises(PlanError):
            run(Request(trace=Path("d"), device="0"))

    def test_without_gpu_no_opencl_is_imported(self) -> None:
        probe = (
            "import sys; from aprtui.cli import main; main(sys.argv[1:]);"
            "print('pyopencl' in sys.modules, file=sys.stderr)"
        )
        found = {}
        for option in ("--no-gpu", "--gpu"):
            arguments = [sys.executable, "-c", probe, "bisect", DEMO / "sound.apr", option,
                         "--stages", "attn_norm"]  # fmt: skip
            done = subprocess.run(
                arguments, capture_output=True, text=True, timeout=120, check=True
            )
            found[option] = done.stderr.splitlines()[-1]
        assert found["--no-gpu"] == "False"
        if not obstacle():
            assert found["--gpu"] == "True"
