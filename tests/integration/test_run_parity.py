"""`aprtui run` and `aprtui parity`, and the device that they fall back from."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.dumps.directory import TraceDirectory
from aprcore.engines.decode import Decoder
from aprcore.engines.engine import Engine, open_engine
from aprcore.engines.numpy import NumpyBackend
from aprcore.ground.errors import OracleError
from aprcore.network.stages import StageKey
from aprcore.records.parity_report import ParityReport
from aprcore.runs import parity_gate as gate
from aprcore.runs.bisect import run as bisect_run
from aprcore.runs.parity_gate import ParityRequest, check_parity
from aprcore.runs.request import Request
from aprtui.cli import main
from aprtui.demo import demo_path
from models import build, random_config, write_apr
from opencl_device import obstacle
from tiny import SIZES, TOKENS, embedded_tokenizer, leftovers, opened, write_model
from wrong_backends import NotFinite, WrongStride

DEMO = demo_path() / "sound.apr"
IDS = ",".join(map(str, TOKENS))
PREFIX = "[apr-cpu-vs-gpu-output-parity-v1] opencl path rejected, attempting fallback: "
MEANING = "aprtui: parity only judges: nothing was run on the CPU instead"
NASTY = "\x1b[2J\u202e"

needs_device = pytest.mark.skipif(bool(obstacle()), reason=f"no OpenCL device: {obstacle()}")

# Runs the command line in an interpreter of its own and prints which watched modules it loaded.
PROBE = """
import sys
from aprtui.cli import main
code = main(sys.argv[1:])
print([name for name in ("pyopencl", "torch") if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def aprtui(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "aprtui", *map(str, arguments)],
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip


def called(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str, Sequence[str]]:
    """Exit code, stdout and the lines of stderr of the command in this process."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = [NASTY, "a", "b", "Ċ", "ĉ", "Ġ"]
    return write_model(
        tmp_path_factory.mktemp("model") / "m.apr", metadata=embedded_tokenizer(vocabulary)
    )


class TestText:
    def test_the_demo_answers_on_stdout_alone(self) -> None:
        done = aprtui("run", DEMO, "--prompt", "What is 2+2?")
        assert (done.returncode, done.stdout, done.stderr) == (0, "2+2=4\n", "")

    def test_the_cpu_path_opens_no_platform(self) -> None:
        for options in ((), ("--no-gpu",)):
            done = subprocess.run(
                [sys.executable, "-c", PROBE, "run", str(DEMO), *options],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stdout, done.stderr) == (0, "2+2=4\n", "[]\n")

    def test_the_number_of_tokens_is_kept(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert called(capsys, "run", DEMO, "--max-tokens", "3") == (0, "2+2\n", [])

    def test_a_model_without_a_tokenizer_says_ids(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write_model(tmp_path / "m.apr")
        code, out, errors = called(capsys, "run", path, "--tokens", IDS, "--max-tokens", "4")
        assert (code, errors) == (0, [])
        ids = [int(word) for word in out.split()]
        assert len(ids) == 4
        with opened(path) as model, open_engine("numpy") as engine:
            logits = Decoder(model.graph, model.weights, engine).feed([*TOKENS, *ids[:3]]).logits
        assert ids[3] == int(logits.argmax())

    def test_what_the_model_writes_cannot_move_the_cursor(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # A head that always chooses token 0, then line breaks and tabs as they are.
        embedding = np.zeros((SIZES["V"], SIZES["E"]), dtype=np.float32)
        path = write_model(
            tmp_path / "m.apr", metadata=embedded_tokenizer([NASTY, "a"]),
            changed={"model.embed_tokens.weight": embedding},
        )  # fmt: skip
        code, out, _ = called(capsys, "run", path, "--tokens", IDS, "--max-tokens", "2")
        assert (code, out) == (0, r"\x1b[2J\u202e" * 2 + "\n")

    def test_line_breaks_and_tabs_stay(self) -> None:
        from aprtui.text import visible_lines

        assert visible_lines("a\n\tb\r\x07é") == "a\n\tb\\r\\x07é"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--max-tokens", "0"), "--max-tokens 0"),
            (("--max-tokens", "-1"), "not a number"),
            (("--trace-step", "5", "--max-tokens", "5"), "at least 6"),
            (("--save-tensor-dir", "x"), "--trace-step"),
            (("--no-gpu", "--device", "0"), "contradict"),
            (("--gpu", "--no-gpu"), "not allowed"),
            (("--prompt", ""), "empty"),
        ],
    )
    def test_a_wrong_argument_is_one_line(
        self, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, errors = called(capsys, "run", "no-such-model", *options)
        assert (code, out, len(errors)) == (2, "", 1)
        assert words in errors[0]


class TestTraceStep:
    def test_the_sidecar_says_where_the_step_is(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "step"
        code, _, errors = called(
            capsys, "run", tiny, "--tokens", IDS, "--max-tokens", "4", "--trace-step", "2",
            "--save-tensor-dir", target,
        )  # fmt: skip
        assert code == 0
        assert errors == [f"{len(TraceDirectory(target).keys())} tensors of step 2 in {target}"]
        directory = TraceDirectory(target)
        sidecar = directory.sidecar
        past = len(TOKENS) + 1
        assert sidecar.positions == (past,)
        assert sidecar.history is not None
        assert sidecar.history[: len(TOKENS)] == TOKENS
        assert len(sidecar.history) == past
        assert sidecar.tokens is not None and len(sidecar.tokens) == 1
        assert directory.shape(StageKey(1, "attn_softmax")) == (SIZES["H"], 1, past + 1)
        with opened(tiny) as model:
            assert directory.keys() == tuple(model.graph.keys)
            with open_engine("numpy") as engine:
                whole = Decoder(model.graph, model.weights, engine)
                logits = whole.feed([*sidecar.history, *sidecar.tokens]).logits
        np.testing.assert_allclose(directory.read(StageKey(None, "lm_head")), logits, atol=1e-5)

    def test_a_text_that_ends_before_it_writes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "step"
        code, out, errors = called(
            capsys, "run", DEMO, "--trace-step", "20", "--save-tensor-dir", target
        )
        assert (code, out, len(errors)) == (2, "2+2=4\n", 1)
        assert "before step 20" in errors[0]
        assert leftovers(tmp_path) == []

    @needs_device
    def test_the_device_and_the_cpu_agree_on_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, option in (("cpu", "--no-gpu"), ("gpu", "--require-gpu")):
            code, out, _ = called(
                capsys, "run", DEMO, option, "--trace-step", "2", "--save-tensor-dir",
                tmp_path / name,
            )  # fmt: skip
            assert (code, out) == (0, "2+2=4\n")
        assert TraceDirectory(tmp_path / "gpu").sidecar.backend == "opencl"
        diff = called(capsys, "diff", tmp_path / "gpu", tmp_path / "cpu", "--tolerance", "1e-5")
        assert diff[0] == 0


class TestTwoSteps:
    """Dumps of decoding steps, held against each other."""

    @pytest.fixture(scope="class")
    def steps(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("steps")
        for step in ("1", "2"):
            code = main(["run", str(DEMO), "--trace-step", step, "--save-tensor-dir",
                         str(folder / step)])  # fmt: skip
            assert code == 0
        return folder

    def test_the_same_step_agrees(self, steps: Path) -> None:
        report = bisect_run(Request(trace=steps / "2", against=steps / "2"))
        assert not report.diverges(strict=True)
        shapes = {stage.key.stage: stage.layout.shape for stage in report.parity if stage.layout}
        assert shapes["attn_scores"] == shapes["attn_softmax"] == (4, 1, 9)

    def test_a_wrong_stage_is_named_with_its_position(self, steps: Path, tmp_path: Path) -> None:
        key = StageKey(1, "attn_scores")
        wrong = shutil.copytree(steps / "2", tmp_path / "gpu")
        file = wrong / f"{key.path}.bin"
        data = bytearray(file.read_bytes())
        data[-4:] = struct.pack("<f", 100.0)  # the last position of the last head
        file.write_bytes(data)
        first = bisect_run(Request(trace=wrong, against=steps / "2")).first_parity_fault
        assert first is not None and first.key == key
        assert first.comparison is not None and first.layout is not None
        assert first.layout.position(first.comparison.max_index) == (3, 0, 8)

    @pytest.mark.parametrize("side", ["trace", "against"])
    def test_another_step_or_a_full_pass_is_refused(self, steps: Path, side: str) -> None:
        for other in (steps / "1", demo_path() / "oracle"):
            pair = {"trace": other, "against": other} | {side: steps / "2"}
            with pytest.raises(OracleError, match="same step of the same text"):
                bisect_run(Request(**pair))

    def test_a_model_judges_all_but_what_reads_the_cache(
        self, steps: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, errors = called(capsys, "bisect", DEMO, "--trace", steps / "2")
        assert (code, errors) == (0, [])
        unjudged = {line.split()[0] for line in out.splitlines() if "UNJUDGED" in line}
        read = {f"layer-{n}/{stage}" for n in range(4) for stage in ("attn_scores", "attention")}
        assert read <= unjudged and "layer-0/attn_softmax" not in unjudged
        assert "layer-3/k_post_rope" not in unjudged

    def test_an_oracle_cannot_judge_it(
        self, steps: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, errors = called(
            capsys, "bisect", DEMO, "--trace", steps / "2", "--oracle", steps / "2"
        )
        assert (code, out, len(errors)) == (2, "", 1)
        assert "leave the oracle out" in errors[0]


class TestParity:
    def test_the_reference_agrees(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, errors = called(capsys, "parity", DEMO, "--against", "reference")
        assert (code, errors) == (0, [])
        assert out.count("PASS") == 6  # four steps, and both sides' caches
        assert out.splitlines()[-1].startswith("same: ")

    @needs_device
    @pytest.mark.parametrize("steps", ["1", "16"])
    def test_the_device_agrees(self, steps: str, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, errors = called(
            capsys, "parity", DEMO, "--steps", steps, "--strict", "--json"
        )  # fmt: skip
        assert (code, errors) == (0, [])
        data = json.loads(out)
        assert data["gpu"]["backend"] == "opencl"
        assert len(data["steps"]) == int(steps) + 1
        assert all(step["relative_l2"] < 1e-5 for step in data["steps"])

    @needs_device
    @pytest.mark.parametrize("seed", [0, 5, 10, 15])
    def test_the_device_agrees_on_every_architecture(self, seed: int, tmp_path: Path) -> None:
        recipe = random_config(seed)
        path = write_apr(build(recipe), tmp_path / "m.apr")
        request = ParityRequest(path, tokens=recipe.tokens[:20], steps=4, strict=True)
        *_, report = check_parity(request)
        assert isinstance(report, ParityReport)
        assert not report.diverges, report.reason
        assert all(cache.relative_l2 <= 1e-5 for cache in report.caches)

    @pytest.mark.parametrize("backend", [WrongStride, NotFinite])
    def test_no_row_of_a_wrong_stage_looks_right(
        self, backend: type[NumpyBackend], capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        @contextmanager
        def opened(name: str, **options: Any) -> Iterator[Engine]:
            yield Engine(NumpyBackend(1) if name == "numpy" else backend(1))

        monkeypatch.setattr(gate, "open_engine", opened)
        code, out, _ = called(capsys, "parity", DEMO, "--steps", "1", "--stages")
        assert code == 1
        rows = {name: row for row in out.splitlines() for name in [row[:30].strip()]}
        assert "PASS" in rows["layer 0 · attn_norm"]
        after = rows["layer 0 · post_ffn_residual"]
        assert "INHERITED" in after and "PASS" not in after
        assert "1.0000000" not in after
        (step,) = (row for row in out.splitlines() if row.startswith("prompt "))
        assert step.split()[3][:6] in ("0.4585", "NaN") and "FAIL" in step

    @pytest.mark.parametrize("steps", ["0", "17", "-1", "x", "1e1", "١"])
    def test_other_numbers_of_steps_are_refused(
        self, steps: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, errors = called(capsys, "parity", "no-such-model", f"--steps={steps}")
        assert (code, out, len(errors)) == (2, "", 1)
        assert "1 to 16" in errors[0]

    def test_a_device_that_would_not_be_used_is_refused(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, errors = called(
            capsys, "parity", DEMO, "--against", "reference", "--device", "0"
        )  # fmt: skip
        assert (code, out, len(errors)) == (2, "", 1)
        assert "--device is for OpenCL" in errors[0]

    def test_without_a_device_nothing_is_claimed(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, errors = called(capsys, "parity", DEMO, "--device", "no such device")
        assert (code, out) == (2, "")
        line, meaning = errors
        assert line.startswith(PREFIX)
        assert meaning == MEANING


@needs_device
class TestRejection:
    """A device whose path is wrong or fails: in every way one line, and the CPU's text, if any."""

    @pytest.fixture(params=["kernel", "build", "memory"])
    def fault(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        """Words of the reason that has to be given."""
        from aprcore.engines.opencl import program
        from aprcore.engines.opencl.errors import DeviceMemoryError
        from aprcore.engines.opencl.launch import Launcher

        read, empty = program.read_source, Launcher.empty
        count = 0

        def wrong(file: str) -> str:
            """The test-only variant of the kernels: kv heads are tiled."""
            text = read(file)
            right = "head / (heads / kv_heads)"
            return text.replace(right, "head % kv_heads")

        def broken(file: str) -> str:
            return read(file) + ("}" if file == "attention.cl" else "")

        def exhausted(self: Any, shape: tuple[int, ...]) -> Any:
            nonlocal count
            count += 1
            if count > 400:  # in the middle of a decoding step
                raise DeviceMemoryError("the device is out of memory")
            return empty(self, shape)

        match request.param:
            case "kernel":
                monkeypatch.setattr(program, "read_source", wrong)
                return "step 0, layer 0 · attn_scores: kernel: kv heads tiled"
            case "build":
                monkeypatch.setattr(program, "read_source", broken)
                return "does not build"
            case _:
                monkeypatch.setattr(Launcher, "empty", exhausted)
                return "out of memory"

    def test_the_cpu_carries_on_after_one_line(
        self, fault: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, errors = called(capsys, "run", DEMO, "--gpu")
        assert (code, out) == (0, "2+2=4\n")
        (line,) = errors
        assert line.startswith(PREFIX)
        assert fault in line

    def test_a_required_device_ends_with_2(
        self, fault: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, _, errors = called(capsys, "run", DEMO, "--require-gpu")
        assert code == 2
        (line,) = errors
        assert line.startswith("aprtui: opencl path rejected: ")
        assert fault in line

    def test_the_gate_rejects(
        self, fault: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
    ) -> None:
        code, _, errors = called(capsys, "parity", DEMO)
        # A wrong kernel is a divergence; where a kernel cannot run, nothing was compared.
        assert code == (1 if "kernel:" in fault else 2)
        # The line that scripts look for, once, and that the fallback it speaks of is none here.
        line, meaning = errors
        assert line.startswith(PREFIX)
        assert fault in line
        assert meaning == MEANING


class TestUnopened:
    def test_a_device_that_does_not_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, errors = called(capsys, "run", DEMO, "--device", "no such device")
        assert (code, out) == (0, "2+2=4\n")
        (line,) = errors
        assert line.startswith(PREFIX)

    def test_pyopencl_that_is_not_installed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyopencl", None)
        code, out, errors = called(capsys, "run", DEMO, "--gpu")
        assert (code, out) == (0, "2+2=4\n")
        (line,) = errors
        assert line.startswith(PREFIX)
        assert "pyopencl" in line
        assert called(capsys, "run", DEMO, "--require-gpu")[0] == 2
