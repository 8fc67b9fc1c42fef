"""What a device, a driver or a user does at the worst moment: one line, and the CPU's text.

The driver and its compiler are real: PoCL through its environment, drivers that do not load,
kernels with one wrong line. What no driver can be made to do on demand, vanish, is played at
pyopencl's calls with pyopencl's own exceptions.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.engines.decode import Decoder, TokenChosen, generate
from aprcore.engines.engine import Engine
from aprcore.engines.forward import trace
from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.opencl import program
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.engines.opencl.device import list_devices, open_device
from aprcore.engines.opencl.errors import KernelBuildError
from aprcore.engines.opencl.program import Programs, read_source
from aprcore.models.model import open_model
from aprcore.network.stages import StageKey
from aprcore.records.parity_report import ParityReport
from aprcore.runs.fallback import GuardedDecoder
from aprcore.runs.parity_gate import ParityRequest, check_parity
from aprtui.cli import main
from aprtui.demo import demo_path
from opencl_device import backend, require_device
from opencl_walk import walk
from stored_weights import write_block_model
from tiny import SIZES, draw_weights, opened, write_model
from wrong_backends import WRONG_KERNELS, WrongKernel

require_device()

DEMO = demo_path() / "sound.apr"
TEXT = "2+2=4\n"
PREFIX = "[apr-cpu-vs-gpu-output-parity-v1] opencl path rejected, attempting fallback: "

is_pocl = "portable computing" in backend().device.info.platform.lower()
needs_pocl = pytest.mark.skipif(not is_pocl, reason="only PoCL takes its limits from outside")


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "aprtui", *map(str, arguments)]


def aprtui(*arguments: str | Path, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with some of its environment changed."""
    changed = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120,
                          env=changed, check=False)  # fmt: skip


def called(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str, Sequence[str]]:
    """Exit code, stdout and the lines of stderr of the command in this process."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


class TestDrivers:
    """Drivers as the loader of OpenCL finds them: files that name a library."""

    @pytest.fixture(params=["none", "absent", "garbage", "not a driver", "without a device"])
    def environment(self, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str | Path]:
        icd = tmp_path / "driver.icd"
        match request.param:
            case "none":
                return {"OCL_ICD_VENDORS": tmp_path / "nowhere"}
            case "absent":
                icd.write_text(f"{tmp_path / 'libnothing.so'}\n")
            case "garbage":
                library = tmp_path / "libgarbage.so"
                library.write_bytes(b"\x7fELF" + bytes(range(256)) * 8)
                icd.write_text(f"{library}\n")
            case "not a driver":
                icd.write_text(f"{ctypes.util.find_library('m')}\n")
            case _ if is_pocl:
                return {"POCL_DEVICES": "no-such-device"}
            case _:
                pytest.skip("only PoCL can be told to find no device")
        return {"OCL_ICD_VENDORS": icd}

    def test_without_one_that_works_the_cpu_carries_on(
        self, environment: dict[str, str | Path]
    ) -> None:
        done = aprtui("devices", **environment)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("aprtui: no OpenCL platform ")
        done = aprtui("run", DEMO, "--gpu", **environment)
        assert (done.returncode, done.stdout) == (0, TEXT)
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{PREFIX}no OpenCL platform ")

    def test_one_that_does_not_load_leaves_the_others_alone(self, tmp_path: Path) -> None:
        vendors = Path(os.environ.get("OCL_ICD_VENDORS", "/etc/OpenCL/vendors"))
        for icd in vendors.glob("*.icd"):
            shutil.copy(icd, tmp_path)
        (tmp_path / "libgarbage.so").write_bytes(b"\x7fELF" + bytes(2048))
        (tmp_path / "aaa-broken.icd").write_text(f"{tmp_path / 'libgarbage.so'}\n")
        (tmp_path / "zzz-absent.icd").write_text("libnothing-of-this-name.so\n")
        done = aprtui("run", DEMO, "--require-gpu", OCL_ICD_VENDORS=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, TEXT, "")

    def test_one_that_answers_no_question_is_listed_and_not_chosen(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from aprcore.engines.opencl import device

        describe = device._describe

        def fails_first(index: int, platform: Any, handle: Any) -> Any:
            if index == 0:
                raise driver_error("DEVICE_NOT_AVAILABLE", "clGetDeviceInfo")
            return describe(index, platform, handle)

        monkeypatch.setattr(device, "_describe", fails_first)
        assert "DEVICE_NOT_AVAILABLE" in list_devices()[0].obstacle
        code, _, (line,) = called(capsys, "devices", "--device", "0")
        assert code == 2
        assert "clGetDeviceInfo" in line


def driver_error(status: str, routine: str) -> Exception:
    """What pyopencl raises when the driver's `routine` returns `status`."""
    import pyopencl as cl

    code = getattr(cl.status_code, status)
    return cl.RuntimeError(cl._cl._ErrorRecord("", code, routine))  # type: ignore[no-any-return]


class TestVanishing:
    """From some call on, every call on the device fails, to wait for it and to free it as well."""

    CALLS = ("enqueue_nd_range_kernel", "enqueue_copy", "enqueue_map_buffer")

    @pytest.fixture
    def vanish(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, str], None]:
        import pyopencl as cl

        def begin(routine: str, after: int, status: str) -> None:
            """Let `after` more calls of a routine work, and none of any kind after it."""
            state = {"left": after, "gone": False}

            def guarded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
                def guard(*arguments: Any, **options: Any) -> Any:
                    if name == routine:
                        state["left"] -= 1
                        state["gone"] = state["gone"] or state["left"] < 0
                    if state["gone"]:
                        raise driver_error(status, name)
                    return call(*arguments, **options)

                return guard

            for name in self.CALLS:
                monkeypatch.setattr(cl, name, guarded(name, getattr(cl, name)))
            for name in ("finish", "flush"):
                call = getattr(cl.CommandQueue, name)
                monkeypatch.setattr(cl.CommandQueue, name, guarded(name, call))

        return begin

    CASES = pytest.mark.parametrize(
        ("routine", "after", "status", "words"),
        [
            ("enqueue_nd_range_kernel", 0, "DEVICE_NOT_AVAILABLE", "the device is not available"),
            ("enqueue_nd_range_kernel", 30, "DEVICE_NOT_AVAILABLE", "the device is not available"),
            ("enqueue_nd_range_kernel", 300, "OUT_OF_RESOURCES", "memory or other resources"),
            ("enqueue_map_buffer", 4, "INVALID_COMMAND_QUEUE", "queue is no longer valid"),
            ("enqueue_copy", 9, "INVALID_CONTEXT", "context is no longer valid"),
            ("flush", 50, "OUT_OF_HOST_MEMORY", "out of memory"),
        ],
    )

    @CASES
    def test_the_cpu_carries_on_after_one_line(
        self, routine: str, after: int, status: str, words: str,
        vanish: Callable[[str, int, str], None], capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        vanish(routine, after, status)
        code, out, (line,) = called(capsys, "run", DEMO, "--gpu")
        assert (code, out) == (0, TEXT)
        assert line.startswith(PREFIX)
        assert words in line

    @CASES
    def test_a_required_device_and_the_gate_end_with_2(
        self, routine: str, after: int, status: str, words: str,
        vanish: Callable[[str, int, str], None], capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        vanish(routine, after, status)
        code, _, (line,) = called(capsys, "run", DEMO, "--require-gpu")
        assert code == 2
        assert line.startswith("aprtui: opencl path rejected: ")
        assert words in line
        code, _, (line, _) = called(capsys, "parity", DEMO)
        assert code == 2
        assert line.startswith(PREFIX)
        assert words in line


class TestBuild:
    # PoCL's compiler counts on stderr by itself.
    COUNTED = re.compile(r"\d+ (errors?|warnings?)( and \d+ errors?)? generated\.")

    def lines(self, done: subprocess.CompletedProcess[str]) -> list[str]:
        return [line for line in done.stderr.splitlines() if not self.COUNTED.fullmatch(line)]

    def test_the_first_error_of_the_log_and_the_kernel_are_named(self) -> None:
        """A macro in front of everything, as pyopencl takes it from outside."""
        options = {"PYOPENCL_BUILD_OPTIONS": "-Dkernel=a_word_it_lacks"}
        done = aprtui("run", DEMO, "--gpu", **options)
        assert (done.returncode, done.stdout) == (0, TEXT)
        (line,) = self.lines(done)
        assert line.startswith(PREFIX)
        assert "kernel expand_rows does not build: " in line
        assert "a_word_it_lacks" in line
        done = aprtui("run", DEMO, "--require-gpu", **options)
        assert (done.returncode, done.stdout, len(self.lines(done))) == (2, "", 1)


class TestMemory:
    @needs_pocl
    def test_it_runs_out_in_the_middle_of_a_layer(self, tmp_path: Path) -> None:
        """Scores of 4200 tokens are larger than the largest array of a device of 1 GB."""
        path = write_model(
            tmp_path / "m.apr", num_layers=1, metadata={"max_position_embeddings": 1 << 16}
        )
        ids = ",".join(str(i % SIZES["V"]) for i in range(4200))
        arguments = ("run", path, "--tokens", ids, "--max-tokens", "1")
        expected = aprtui(*arguments)
        assert expected.returncode == 0
        done = aprtui(*arguments, "--gpu", POCL_MEMORY_LIMIT="1")
        assert (done.returncode, done.stdout) == (0, expected.stdout)
        (line,) = done.stderr.splitlines()
        assert line.startswith(PREFIX)
        assert "out of memory" in line
        done = aprtui(*arguments, "--require-gpu", POCL_MEMORY_LIMIT="1")
        assert (done.returncode, done.stdout) == (2, "")


# Prints what a pass of the demo on the device gives, to the last bit.
BITS = """
import hashlib, sys
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.engines.opencl.device import open_device
from aprcore.engines.forward import trace
from aprcore.models.model import open_model

digest = hashlib.sha256()
device = open_device(None, lanes=int(sys.argv[2]))
with open_model(sys.argv[1]) as model, OpenCLBackend(device) as op:
    for _, tensor in trace(model.graph, model.weights, op, range(40, 57)):
        digest.update(tensor.tobytes())
    print(op.device.tuning.lanes, op.device.info.compute_units, digest.hexdigest())
"""

# Multiplies twice by a weight that no array of the device may be as large as.
TOO_LARGE = """
import sys
import numpy as np
from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.formats.storage import StoredTensor
from aprcore.ground.data_file import DataFile
from pathlib import Path

rows, width = 70_000, 1024
tensor = StoredTensor("w", (rows, width), "F32", DataFile(Path(sys.argv[1])), 0, 4 * rows * width)
x = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
with OpenCLBackend(budget_bytes=1 << 30) as op:
    assert tensor.size_bytes > op.device.info.largest_allocation_bytes
    expected = NumpyBackend(1).linear(x, [tensor])
    for _ in range(3):
        found = op.to_host(op.linear(op.from_host(x), [tensor]))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert op.weights.kept_bytes == tensor.size_bytes
print("right")
"""


@needs_pocl
class TestLimits:
    """Limits of the device as PoCL takes them from outside."""

    def printed(self, code: str, *arguments: str | Path, **environment: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
            env=os.environ | environment, check=True, timeout=120,
        ).stdout  # fmt: skip

    @pytest.mark.parametrize(("limit", "lanes"), [("1", 1), ("20", 16), ("64", 64)])
    def test_work_groups_are_no_larger_than_the_device_allows(self, limit: str, lanes: int) -> None:
        first = self.printed(BITS, DEMO, "64", POCL_MAX_WORK_GROUP_SIZE=limit)
        assert first.split()[0] == str(lanes)

    @pytest.mark.parametrize("lanes", ["1", "16"])
    def test_every_process_gives_the_same_bits_on_any_number_of_threads(self, lanes: str) -> None:
        runs = [
            self.printed(BITS, DEMO, lanes, **environment).split()
            for environment in ({}, {}, {"POCL_MAX_PTHREAD_COUNT": "1"})
        ]
        assert runs[2][1] == "1"
        assert len({digest for _, _, digest in runs}) == 1

    def test_a_weight_larger_than_the_largest_array(self, tmp_path: Path) -> None:
        path = tmp_path / "weight"
        rows = np.random.default_rng(0).standard_normal((7_000, 1024)).astype(np.float32)
        with path.open("wb") as file:
            for part in range(10):
                file.write((rows * (part + 1)).tobytes())
        assert self.printed(TOO_LARGE, path, POCL_MEMORY_LIMIT="1") == "right\n"


class TestPrecision:
    """A device without cl_khr_fp64 or cl_khr_fp16."""

    # The compiler here knows double whatever it is told: no kernel may name it, or hold a literal
    # that makes it of a float.
    LACKING = (
        "#define double a_type_it_lacks\n"
        "#define half a_type_it_lacks\n"
        '#pragma clang diagnostic error "-Wdouble-promotion"\n'
    )

    @pytest.mark.parametrize(
        "line", ["*x = (double)*x / 3", "half h = *x; *x = h", "*x = *x * 1.1"]
    )
    @needs_pocl
    def test_a_kernel_that_needs_them_would_be_noticed(self, line: str) -> None:
        text = f"kernel void needy(global float *x) {{ {line}; }}"
        with pytest.raises(KernelBuildError):
            Programs(backend().device).build("needy", self.LACKING + text, {})

    @pytest.mark.parametrize("lanes", [None, 16])
    def test_no_kernel_needs_them(self, lanes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        def without(file: str) -> str:
            return (self.LACKING if file == "common.cl" else "") + read_source(file)

        monkeypatch.setattr(program, "read_source", without)
        with OpenCLBackend(open_device(None, lanes=lanes)) as op:
            walk(op)


class TestNotFinite:
    """Where a NaN or an infinity of the input shows on the CPU, it shows on the device."""

    @pytest.mark.parametrize("lanes", [None, 64])
    @pytest.mark.parametrize("num_tokens", [1, 5, 19])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_of_a_whole_pass(
        self, bad: float, num_tokens: int, lanes: int | None, tmp_path: Path
    ) -> None:
        name = "model.embed_tokens.weight"
        embedding = draw_weights()[name].copy()
        embedding[7, 3] = bad
        path = write_model(tmp_path / "m.apr", changed={name: embedding})
        tokens = tuple((7 if i == num_tokens // 2 else i % 6) for i in range(num_tokens))
        with opened(path) as model, np.errstate(all="ignore"):
            sides = [
                dict(trace(model.graph, model.weights, op, tokens))
                for op in (NumpyBackend(1), backend(lanes))
            ]
        assert list(sides[0]) == list(sides[1])
        assert not np.isfinite(sides[0][StageKey(0, "attn_norm")]).all()
        for key, ours in sides[0].items():
            for kind in (np.isnan, np.isposinf, np.isneginf):
                np.testing.assert_array_equal(kind(sides[1][key]), kind(ours), err_msg=str(key))


class TestTwoProcesses:
    @needs_pocl
    def test_they_share_a_device_and_a_cold_cache(self, tmp_path: Path) -> None:
        environment = os.environ | {"POCL_CACHE_DIR": str(tmp_path / "cache")}
        commands = [command("run", DEMO, "--require-gpu"), command("parity", DEMO, "--strict")] * 2
        running = [
            subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=environment)
            for line in commands
        ]  # fmt: skip
        try:
            for number, process in enumerate(running):
                out, errors = process.communicate(timeout=200)
                assert (process.returncode, errors) == (0, "")
                assert out == TEXT if number % 2 == 0 else "same: " in out
        finally:
            for process in running:
                process.kill()
                process.wait()
        assert any((tmp_path / "cache").rglob("*.so")), "the cache was not where it was looked for"


class TestInterrupt:
    """Ctrl-C during a kernel, which no device can stop."""

    # Scores of so many tokens are one kernel of many seconds.
    NUM_TOKENS = 6000
    SOON_S = 5.0  # to be told from the half minute that the pass takes

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
    @pytest.mark.parametrize("cpu_s", [2.0, 4.0])
    def test_the_process_ends_soon(self, cpu_s: float, tmp_path: Path) -> None:
        path = write_block_model(tmp_path / "m.apr", "Q8_0", heads=4, kv_heads=1, head_dim=512)
        # So that building is no part of what is interrupted.
        few = ",".join(["1"] * 20)
        assert aprtui("run", path, "--tokens", few, "--max-tokens", "1", "--gpu").returncode == 0
        ids = ",".join(["1"] * self.NUM_TOKENS)
        line = command("run", path, "--tokens", ids, "--require-gpu", "--max-tokens", "1")
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started = time.monotonic()
        try:
            while process.poll() is None and used_s(process.pid) < cpu_s:
                time.sleep(0.05)
            assert process.poll() is None, "the pass is too short to be interrupted"
            reached_s = time.monotonic() - started
            process.send_signal(signal.SIGINT)
            interrupted = time.monotonic()
            out, errors = process.communicate(timeout=100)
            took_s = time.monotonic() - interrupted
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, out, errors) == (130, "", "")
        # Where others have the processors, all of the pass takes that much longer.
        assert took_s < max(self.SOON_S, 2 * reached_s)

    def test_a_wait_for_a_tensor_hears_it(self) -> None:
        done = subprocess.run([sys.executable, "-c", WAITING, str(self.NUM_TOKENS)], text=True,
                              capture_output=True, timeout=200, check=True)  # fmt: skip
        assert float(done.stdout) < self.SOON_S


# Prints how long after it began a wait for a kernel of many seconds was interrupted.
WAITING = """
import os, signal, sys, threading, time
import numpy as np
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.network.mask import CAUSAL

op = OpenCLBackend()
q, k = (op.from_host(np.ones((int(sys.argv[1]), heads * 512))) for heads in (4, 1))
op.to_host(op.attention_scores(op.rows(q, 0, 2), op.rows(k, 0, 2), 4, 1, 1.0, CAUSAL))
scores = op.attention_scores(q, k, 4, 1, 1.0, CAUSAL)
threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
started = time.monotonic()
try:
    op.to_host(scores)
except KeyboardInterrupt:
    print(time.monotonic() - started, flush=True)
os._exit(0)
"""


def used_s(pid: int) -> float:
    """Processor time of all threads of a process; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model by the type of its weights."""
    folder = tmp_path_factory.mktemp("models")
    paths = {
        dtype: write_block_model(folder / f"{dtype}.apr", dtype, hidden=96, ffn=160)
        for dtype in ("F16", "Q8_0")
    }
    return paths | {"F32": write_model(folder / "F32.apr")}


@pytest.mark.parametrize("fault", WRONG_KERNELS, ids=str)
class TestWrongKernel:
    """A wrong kernel of every family, built by the device's own compiler."""

    @pytest.fixture
    def tested(self, fault: WrongKernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
        monkeypatch.setattr(program, "read_source", fault.read_source)
        with OpenCLBackend(open_device(None, lanes=fault.lanes)) as op:
            yield Engine(op)

    def test_the_gate_names_its_stage(
        self, fault: WrongKernel, tested: Engine, models: dict[str, Path]
    ) -> None:
        tokens = tuple(range(3, 3 + fault.num_tokens))
        request = ParityRequest(models[fault.dtype], tokens=tokens)
        *_, report = check_parity(request, None, tested)
        assert isinstance(report, ParityReport)
        assert report.diverges
        assert report.first is not None
        assert (report.first.step, report.first.key) == (0, StageKey(0, fault.stage))
        assert f"{report.first.key}: " in report.reason

    def test_the_cpu_takes_over(
        self, fault: WrongKernel, tested: Engine, models: dict[str, Path]
    ) -> None:
        tokens = tuple(range(3, 3 + fault.num_tokens))
        with open_model(models[fault.dtype]) as model:

            def text(source: Any) -> list[int]:
                events = generate(source, tokens, 3)
                return [event.token for event in events if isinstance(event, TokenChosen)]

            def decoder(engine: Engine) -> Decoder:
                return Decoder(model.graph, model.weights, engine)

            cpu = Engine(NumpyBackend(1))
            reasons: list[str] = []
            found = text(GuardedDecoder(decoder(cpu), decoder(tested), reasons.append))
            assert found == text(decoder(cpu))
        (reason,) = reasons
        assert fault.stage in reason


def test_every_family_of_kernels_that_a_pass_runs_has_a_wrong_one() -> None:
    from importlib.resources import files

    folder = files("aprcore.engines.opencl").joinpath("kernels")
    families = {file.name for file in folder.iterdir() if file.name.endswith(".cl")}
    # The gate chooses tokens on the host: argmax is held against numpy's by its own tests.
    assert {fault.file for fault in WRONG_KERNELS} == families - {"argmax.cl"}
