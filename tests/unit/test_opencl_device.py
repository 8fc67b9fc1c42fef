"""Choosing a device, and what is said when there is none or when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.engines.opencl.device import (
    DeviceInfo,
    choose_device,
    list_devices,
    open_device,
    tune,
)
from aprcore.engines.opencl.errors import (
    DeviceMemoryError,
    DeviceUnavailableError,
    KernelBuildError,
    driver_errors,
    translate_status,
)
from aprcore.engines.opencl.program import Programs, read_source
from aprcore.engines.opencl.stored_rows import BLOCK_FORMATS, FLOAT_FORMATS
from aprcore.ground.errors import BackendError, TruncatedError
from aprcore.quant.types import SCALE_BYTES, storage_size
from aprtui.cli import main
from opencl_device import backend, obstacle
from stored_weights import fitting_width, random_tensor

needs_device = pytest.mark.skipif(bool(obstacle()), reason=f"no OpenCL device: {obstacle()}")


def device(index: int, name: str, kind: str = "gpu", **changes: object) -> DeviceInfo:
    info = DeviceInfo(
        index=index, platform=f"{name} platform", name=name, version="OpenCL 3.0", driver="1",
        kind=kind, memory_bytes=8 << 30, largest_allocation_bytes=2 << 30, local_bytes=48 << 10,
        max_group=1024, compute_units=16, shares_host_memory=kind == "cpu", extensions=(),
    )  # fmt: skip
    return replace(info, **changes)  # type: ignore[arg-type]


CPU, SMALL, LARGE = device(0, "cpu", "cpu"), device(1, "small"), device(2, "large")
LARGE = replace(LARGE, memory_bytes=16 << 30)
BROKEN = device(3, "broken", memory_bytes=99 << 30, obstacle="its driver has no compiler")


def test_the_best_device_is_the_gpu_with_the_most_memory() -> None:
    choice = choose_device([CPU, SMALL, LARGE, BROKEN])
    assert choice.device is LARGE
    assert choice.reason == "of 2 devices of kind gpu, the one with the most memory"
    assert choose_device([CPU, SMALL]).reason.startswith("the only device of kind gpu")
    assert choose_device([CPU, BROKEN]).reason == "the only device that can be used"
    assert choose_device([SMALL, replace(SMALL, index=5)]).device is SMALL


def test_a_device_is_found_by_index_or_name() -> None:
    devices = [CPU, SMALL, LARGE, BROKEN]
    assert choose_device(devices, "1").device is SMALL
    assert choose_device(devices, "LARGE").device is LARGE
    assert choose_device(devices, "OpenCL 3").device is LARGE
    assert "the best of 4 that match" in choose_device(devices, "platform").reason
    with pytest.raises(DeviceUnavailableError, match="no device is 'radeon'; devices are 0 cpu"):
        choose_device(devices, "radeon")
    with pytest.raises(DeviceUnavailableError, match="no device is '9'"):
        choose_device(devices, "9")
    with pytest.raises(DeviceUnavailableError, match="no device is ''"):
        choose_device(devices, "")
    with pytest.raises(DeviceUnavailableError, match="broken: its driver has no compiler"):
        choose_device(devices, "broken")


def test_no_device_that_can_be_used_is_an_error() -> None:
    with pytest.raises(DeviceUnavailableError, match="no OpenCL platform has a device"):
        choose_device([])
    with pytest.raises(DeviceUnavailableError, match="its driver has no compiler"):
        choose_device([BROKEN])


def test_work_groups_respect_the_limits_of_the_device() -> None:
    assert tune(CPU).lanes == 1
    assert tune(LARGE).lanes == 64
    assert tune(replace(LARGE, max_group=20)).lanes == 16
    assert tune(replace(LARGE, local_bytes=1024)).lanes == 16
    assert tune(replace(LARGE, max_group=1)).lanes == 1


def run_without_platforms(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OCL_ICD_VENDORS": str(folder / "absent")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@needs_device
def test_without_a_driver_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    code = "import sys; from aprtui.cli import main; sys.exit(main(['devices']))"
    result = run_without_platforms(code, tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("aprtui: no OpenCL platform is installed")
    assert "pip install" in line


@needs_device
def test_without_a_driver_no_device_opens(tmp_path: Path) -> None:
    code = (
        "from aprcore.engines.opencl.backend import OpenCLBackend\n"
        "from aprcore.engines.opencl.errors import DeviceUnavailableError\n"
        "try: OpenCLBackend()\n"
        "except DeviceUnavailableError as error: print('refused')"
    )
    assert run_without_platforms(code, tmp_path).stdout == "refused\n"


def test_without_pyopencl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    with pytest.raises(DeviceUnavailableError, match=r"pip install 'aprtui\[gpu\]'"):
        open_device()


def test_importing_the_backend_does_not_import_pyopencl() -> None:
    code = (
        "import sys, aprcore.engines.opencl.backend, aprtui.commands.devices\n"
        "print('pyopencl' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


@needs_device
def test_devices_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    printed = capsys.readouterr().out
    for info in list_devices():
        assert info.name in printed
        assert info.platform in printed
    assert "would use" in printed
    assert main(["devices", "--device", "no such"]) == 2
    assert main(["devices", "--json"]) == 0


def test_texts_of_a_driver_are_shown_literally(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = device(0, "[/bold]\x1b[31m[pad]")
    monkeypatch.setattr("aprcore.engines.opencl.device.list_devices", lambda: (strange,))
    assert main(["devices"]) == 0
    printed = capsys.readouterr().out
    assert r"[/bold]\x1b[31m[pad]" in printed
    assert "\x1b" not in printed


# Failures of a device


@needs_device
def test_a_build_error_names_the_kernel_and_the_first_error() -> None:
    programs = Programs(backend().device)
    good, broken = read_source("common.cl"), read_source("norms.cl")
    broken = broken.replace("const float scale", "const float scale = undeclared_thing;\nint other")
    with pytest.raises(KernelBuildError) as raised:
        programs.build("whatever", good + broken, {})
    assert "kernel rms_norm does not build" in str(raised.value)
    assert "undeclared_thing" in str(raised.value)
    assert "\n" not in str(raised.value)


@needs_device
def test_an_array_beyond_the_device_is_refused() -> None:
    op = backend()
    limit = op.device.info.largest_allocation_bytes
    with pytest.raises(DeviceMemoryError, match="out of memory"):
        op._launcher.empty((limit // 4 + 1,))
    assert op.to_host(op.add(*[op.from_host(np.ones(3))] * 2)).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("code", "kind"),
    [(-4, DeviceMemoryError), (-6, DeviceMemoryError), (-2, DeviceUnavailableError),
     (-36, DeviceUnavailableError), (-52, BackendError)],
)  # fmt: skip
def test_every_status_of_a_driver_becomes_an_error(code: int, kind: type[Exception]) -> None:
    error = translate_status(code, "clSomething failed", "some device")
    assert type(error) is kind
    assert str(error).startswith("some device: ")


@needs_device
def test_what_the_driver_raises_is_translated() -> None:
    import pyopencl as cl

    both = cl.mem_flags.READ_ONLY | cl.mem_flags.WRITE_ONLY
    pattern = "some device: the driver reports: .*INVALID_VALUE"
    with pytest.raises(BackendError, match=pattern), driver_errors("some device"):
        cl.Buffer(backend().device.context, both, 8)
    with pytest.raises(DeviceMemoryError), driver_errors("some device"):
        cl.Buffer(backend().device.context, cl.mem_flags.READ_ONLY, 1 << 50)


@needs_device
def test_a_full_device_streams_instead_of_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [random_tensor("Q8_0", (64, 320), seed) for seed in range(3)]
    x = np.random.default_rng(0).standard_normal((5, 320)).astype(np.float32)
    expected = [backend().to_host(backend().linear(backend().from_host(x), [w])) for w in weights]
    with OpenCLBackend(backend().device, piece_bytes=8000) as op:
        allocate, calls = op.weights._stream._allocate, []

        def full(size_bytes: int) -> object:
            calls.append(size_bytes)
            if len(calls) > 5:
                raise DeviceMemoryError("the device is out of memory")
            return allocate(size_bytes)

        monkeypatch.setattr(op.weights._stream, "_allocate", full)
        for _ in range(3):
            for w, y in zip(weights, expected):
                np.testing.assert_array_equal(op.to_host(op.linear(op.from_host(x), [w])), y)
        assert op.weights.kept_bytes <= op.weights.budget_bytes
        kept = [entry for entry in op.weights._entries.values() if entry.kept]
        assert op.weights.kept_bytes == sum(entry.source.size_bytes for entry in kept)


@needs_device
def test_no_more_is_kept_than_the_budget_and_no_more_is_held_than_a_few_pieces() -> None:
    weights = [random_tensor("F32", (100, 64), seed) for seed in range(4)]
    size = weights[0].size_bytes
    with OpenCLBackend(backend().device, budget_bytes=2 * size, piece_bytes=4096) as op:
        x = op.from_host(np.ones((2, 64)))
        for _ in range(3):
            for w in weights:
                op.linear(x, [w])
        assert op.weights.kept_bytes == 2 * size
        slots = op.weights._stream._free
        assert len(slots) == 3
        assert all(slot.size_bytes <= 4096 for slot in slots)


@needs_device
def test_a_file_that_shrinks_is_an_error_after_which_the_backend_still_works(
    tmp_path: Path,
) -> None:
    from aprcore.formats.storage import StoredTensor
    from aprcore.ground.data_file import DataFile

    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * 64 * 100))
    tensor = StoredTensor("w", (100, 64), "F32", DataFile(path), 0, 4 * 64 * 100)
    good = random_tensor("F32", (100, 64), 0)
    with OpenCLBackend(backend().device, piece_bytes=4096) as op:
        x = op.from_host(np.ones((2, 64)))
        os.truncate(path, 4 * 64 * 50)
        with pytest.raises(TruncatedError):
            op.linear(x, [tensor])
        expected = np.ones((2, 64)) @ good.read(0, 100).T
        np.testing.assert_allclose(op.to_host(op.linear(x, [good])), expected, rtol=1e-4, atol=1e-4)


@needs_device
def test_expecting_other_weights_than_come_is_harmless() -> None:
    a, b, c = (random_tensor("Q4_K", (90, 256), seed) for seed in range(3))
    x = np.ones((3, 256), np.float32)
    op = backend()
    expected = {w: op.to_host(op.linear(op.from_host(x), [w])) for w in (a, b, c)}
    with OpenCLBackend(op.device, piece_bytes=5000, budget_bytes=0) as other:
        for order, asked in (((a, b, c), (a, b, c)), ((a, b), (b, c, a)), ((a, a, c), (a, a, a))):
            other.expect(order)
            for w in asked:
                found = other.to_host(other.linear(other.from_host(x), [w]))
                np.testing.assert_array_equal(found, expected[w])


@needs_device
def test_what_is_forgotten_does_not_overwrite_what_a_kernel_still_reads() -> None:
    a, b, c = (random_tensor("F32", (480, 2048), seed) for seed in range(3))
    x = np.random.default_rng(0).standard_normal((400, 2048)).astype(np.float32)
    # Eight pieces through three buffers, each of which a slow kernel reads.
    with OpenCLBackend(backend().device, piece_bytes=60 * 2048 * 4, budget_bytes=0) as op:
        there = op.from_host(x)
        expected = op.to_host(op.linear(there, [a]))
        for _ in range(4):
            queued = op.linear(there, [a])
            op.expect([b])
            op.linear(there, [c])
            np.testing.assert_array_equal(op.to_host(queued), expected)


@needs_device
@pytest.mark.parametrize("dtype", [*FLOAT_FORMATS, *BLOCK_FORMATS])
def test_weights_are_kept_as_they_are_stored(dtype: str) -> None:
    tensor = random_tensor(dtype, (61, fitting_width(dtype, 512)), 0)
    with OpenCLBackend(backend().device) as op:
        x = op.from_host(np.ones((2, 512)))
        for _ in range(3):
            op.linear(x, [tensor])
        (entry,) = op.weights._entries.values()
        assert entry.kept is not None
        header = SCALE_BYTES if dtype == "AprQ8" else 0
        stored = storage_size(dtype, tensor.shape) - header
        assert op.weights.kept_bytes == sum(piece.buffer.size for piece in entry.kept) == stored


@needs_device
@pytest.mark.parametrize("budget_bytes", [0, 1 << 30])
@pytest.mark.parametrize("dtype", ["F32", "Q4_K", "AprQ8"])
def test_what_exceeds_the_largest_allocation_is_split_by_rows(
    dtype: str, budget_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyopencl as cl

    limit = 5000  # four rows of F32, with room for the input and the output
    opened = backend().device
    small = replace(opened, info=replace(opened.info, largest_allocation_bytes=limit))
    tensor = random_tensor(dtype, (200, 256), 0)
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    expected = backend().to_host(backend().linear(backend().from_host(x), [tensor]))
    sizes: list[int] = []
    make = cl.Buffer

    def counted(context: Any, flags: int, size: int = 0, hostbuf: Any = None) -> Any:
        sizes.append(size)
        return make(context, flags, size, hostbuf)

    monkeypatch.setattr(cl, "Buffer", counted)
    with OpenCLBackend(small, budget_bytes=budget_bytes) as op:
        for _ in range(3):
            found = op.to_host(op.linear(op.from_host(x), [tensor]))
            np.testing.assert_array_equal(found, expected)
        ids = np.array([199, 0, 7])
        np.testing.assert_array_equal(
            op.to_host(op.embed(ids, tensor)), NumpyBackend(1).embed(ids, tensor)
        )
    assert len(sizes) >= 3
    assert max(sizes) <= limit


@needs_device
def test_two_backends_share_a_device() -> None:
    import threading

    tensor = random_tensor("Q6_K", (200, 512), 0)
    x = np.random.default_rng(0).standard_normal((7, 512)).astype(np.float32)
    expected = backend().to_host(backend().linear(backend().from_host(x), [tensor]))
    wrong: list[int] = []

    def work() -> None:
        with OpenCLBackend(piece_bytes=9000) as op:
            for turn in range(20):
                if not np.array_equal(op.to_host(op.linear(op.from_host(x), [tensor])), expected):
                    wrong.append(turn)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
