"""A run with a device beside the CPU, and the options of a second side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aprcore.dumps.plan import Plan
from aprcore.ground.errors import PlanError
from aprcore.judging.verdict import Verdict
from aprcore.network.stages import StageKey
from aprcore.records.parity import StageParity
from aprcore.records.report import DeviceOpened, Report, RunHeader, StageReport
from aprcore.runs.bisect import bisect, run
from aprcore.runs.request import Request
from opencl_device import obstacle
from second_side_runs import DEMO, PREFIX, called, needs_device
from tiny import TOKENS, Tensors, trace_model, write_model, write_stages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    return trace_model(model)


@pytest.fixture(scope="module")
def cpu_dump(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stages(tmp_path_factory.mktemp("cpu") / "d", tensors)


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
