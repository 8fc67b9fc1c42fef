"""A run beside a device that is wrong in a way of its own; no driver is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.plan import Plan
from aprcore.engines.engine import Engine
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import BackendError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.parity import StageParity
from aprcore.records.report import PathRejected, Report, RunHeader, StageReport
from aprcore.runs import second_side
from aprcore.runs.bisect import bisect, run
from aprcore.runs.fallback import RejectedError
from aprcore.runs.request import Request
from second_side_runs import LOGITS, NUM_STAGES, PREFIX, called, faults, pair_at
from tiny import NUM_LAYERS, SIZES, TOKENS, Tensors, trace_model, write_model, write_stages
from wrong_backends import BlindToTheFirst, MissingTail, NotFinite, OutOfMemory, WrongStride


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
