"""One case of a sweep: what is asked for, and what it came to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aprcore.engines.engine import Engine
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import BackendError
from aprcore.network.stages import StageKey
from aprcore.runs import second_side
from aprcore.sweep.cases import CaseSettings, make_request
from aprcore.sweep.plan import read_sweep
from aprcore.sweep.results import (
    CaseResult,
    parse_result,
    result_to_json,
)
from aprcore.sweep.worker import run_case
from aprtui.cli import main
from sweep_cases import make_case, write
from tiny import trace_model, write_stages
from wrong_backends import MissingTail, OutOfMemory

UP = StageKey(1, "ffn_up")


class TestRequest:
    def test_a_backend_is_asked_for(self, tiny: Path, tmp_path: Path) -> None:
        case = replace(make_case(backend="opencl"), settings=CaseSettings(device="1"))
        request = make_request(case, tmp_path, 2)
        assert (request.gpu, request.device, request.threads) == (True, "1", 2)
        on_cpu = make_request(replace(case, backend="numpy"), tmp_path, 2)
        assert not on_cpu.uses_device

    def test_the_command_line_is_the_case(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import shlex

        (tmp_path / "tol.toml").write_text("[default]\nany = 1e-9\n")
        (case,) = read_sweep(write(tmp_path, f"""
            [[case]]
            model = "{tiny}/m.apr"
            trace = "{tiny}/wrong"
            oracle = "{tiny}/oracle"
            layers = "1..2"
            stages = "ffn_up,ffn_out"
            arithmetic = "f32"
            budgets = ["ffn_up=9"]
            tolerances = "tol.toml"
            strict = true
        """)).cases  # fmt: skip
        result = run_case(case, tmp_path, 1)
        name, *arguments = shlex.split(case.command())
        assert name == "aprtui"
        code = main([*arguments, "--json"])
        report = json.loads(capsys.readouterr().out)
        assert code == result.diverges
        assert report["summary"] == result.summary
        assert report["counts"] == result.counts
        assert [s["path"] for s in report["stages"]] == ["layer-1/ffn_up", "layer-1/ffn_out"]


class TestCase:
    def test_its_result_is_that_of_a_bisect(self, tiny: Path, tmp_path: Path) -> None:
        text = f'[[case]]\nmodel = "{tiny}/m.apr"\ntrace = "{tiny}/wrong"\noracle = "{tiny}/oracle"'
        result = run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)
        assert result.first is not None
        assert (result.verdict, result.diverges, result.first.path) == ("FAIL", True, UP.path)
        assert result.first.blamed == "kernel"
        assert result.worst_relative_l2 == pytest.approx(2.0)
        assert result.worst_path == UP.path

    def test_a_nan_is_worse_than_any_figure(self, tiny: Path, tmp_path: Path) -> None:
        tensors = trace_model(tiny / "m.apr")
        tensors[UP][0, 0] = float("nan")
        write_stages(tmp_path / "nan", tensors)
        text = f'[[case]]\nmodel = "{tiny}/m.apr"\ntrace = "nan"\noracle = "{tiny}/oracle"'
        result = run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)
        assert (result.verdict, result.worst_relative_l2) == ("NONFINITE", "nan")
        line = json.dumps(result_to_json(result), allow_nan=False)
        assert parse_result(line.encode()) == result

    def test_a_missing_stage_counts_when_strict(self, tiny: Path, tmp_path: Path) -> None:
        tensors = trace_model(tiny / "m.apr")
        write_stages(tmp_path / "o", {key: x for key, x in tensors.items() if key != UP})
        text = f'[[matrix]]\nmodels = ["{tiny}/m.apr"]\noracles = ["o"]\nstages = "all"\n'
        path = write(tmp_path, text + "strict = true\n" + text)
        strict, lenient = (run_case(case, tmp_path, 1) for case in read_sweep(path).cases)
        assert (strict.verdict, strict.diverges, strict.first) == ("MISSING", True, None)
        assert (lenient.verdict, lenient.diverges) == ("MISSING", False)
        assert "1 MISSING" in strict.clause and lenient.clause == ""

    def test_what_cannot_be_judged_is_an_error(self, tiny: Path, tmp_path: Path) -> None:
        text = f'[[case]]\nmodel = "{tiny}/m.apr"\noracle = "{tiny}/oracle"\ntokens = [1]'
        result = run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)
        assert result.is_error and not result.diverges
        assert "oracle" in result.summary and "[1]" in result.summary

    def test_a_file_that_changed_since_is_no_result(self, tiny: Path, tmp_path: Path) -> None:
        model = tmp_path / "m.apr"
        model.write_bytes((tiny / "m.apr").read_bytes())
        text = f'[[case]]\nmodel = "m.apr"\noracle = "{tiny}/oracle"'
        (case,) = read_sweep(write(tmp_path, text)).cases
        assert run_case(case, tmp_path, 1).verdict == "PASS"
        os.utime(model, ns=(1, 1))
        result = run_case(case, tmp_path, 1)
        assert result.is_error and "m.apr: is not what it was" in result.summary


class TestDevice:
    """A device is held against the CPU, and what the CPU computes is not counted as its result."""

    def run(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any
            ) -> CaseResult:  # fmt: skip
        @contextmanager
        def opened(name: str, **options: Any) -> Iterator[Engine]:
            if isinstance(device, Exception):
                raise device
            yield Engine(device, "a planted device", "0")

        monkeypatch.setattr(second_side, "open_engine", opened)
        text = f"""
            [[case]]
            model = "{tiny}/m.apr"
            oracle = "{tiny}/oracle"
            backend = "opencl"
        """
        return run_case(read_sweep(write(tmp_path, text)).cases[0], tmp_path, 1)

    def test_a_sound_one(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        result = self.run(tiny, tmp_path, monkeypatch, NumpyBackend(1))
        assert (result.verdict, result.diverges, result.faults) == ("PASS", False, ())
        assert result.worst_relative_l2 == 0

    def test_a_file_that_changes_while_it_is_read_gives_no_result(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Rebuilding(NumpyBackend):
            def embed(self, tokens: Any, weight: Any) -> Any:
                os.utime(tmp_path / "m.apr", ns=(1, 1))
                return super().embed(tokens, weight)

        (tmp_path / "m.apr").write_bytes((tiny / "m.apr").read_bytes())
        write_stages(tmp_path / "oracle", trace_model(tiny / "m.apr"))
        result = self.run(tmp_path, tmp_path, monkeypatch, Rebuilding(1))
        assert result.is_error and "m.apr: is not what it was" in result.summary

    def test_a_wrong_kernel_is_the_first_divergence(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = self.run(tiny, tmp_path, monkeypatch, MissingTail())
        assert result.first is not None
        assert (result.verdict, result.diverges) == ("FAIL", True)
        assert (result.first.path, result.first.blamed) == ("layer-0/ffn_out", "device")
        assert result.first.clause.startswith("kernel: ")
        # The device's error, and not that of the CPU beside it.
        assert isinstance(result.worst_relative_l2, float) and result.worst_relative_l2 > 0.01

    @pytest.mark.parametrize("device", [BackendError("no such device"), OutOfMemory(0)],
                             ids=["absent", "out of memory"])  # fmt: skip
    def test_one_that_is_given_up_has_no_result(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any
    ) -> None:
        result = self.run(tiny, tmp_path, monkeypatch, device)
        assert (result.verdict, result.diverges, result.faults) == ("ERROR", False, ())
        assert "no such device" in result.summary or "out of memory" in result.summary
