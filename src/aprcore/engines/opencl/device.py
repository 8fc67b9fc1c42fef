"""OpenCL devices: which there are, which one to use and why, and how kernels are cut for it.

pyopencl is imported only when a function here is called: neither the explorer nor the command
line may pay for it, and it need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aprcore.engines.opencl.errors import DeviceUnavailableError, driver_errors

# Extensions that matter to someone who reads the list: what may be stored and how precisely.
NOTABLE_EXTENSIONS = ("cl_khr_fp16", "cl_khr_fp64", "cl_khr_int64_base_atomics",
                      "cl_khr_subgroups", "cl_khr_il_program")  # fmt: skip

_KIND_RANKS = {"gpu": 0, "accelerator": 1, "other": 2, "cpu": 3}

# 64 is a whole number of sub-groups on every known GPU; no kernel relies on that.
_GPU_LANES = 64

# Sums of one lane in the product of few tokens, as `linear.cl` keeps them: rows x tokens.
FEW_TOKENS = 8
_GPU_ROWS = 2
_LANE_BYTES = 4 * FEW_TOKENS * _GPU_ROWS


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as its driver describes it. Texts are the driver's own and may hold anything.

    Attributes:
        index: Its place in the list of all devices.
        platform, name, version, driver: The driver's texts.
        kind: "gpu", "accelerator", "cpu" or "other".
        memory_bytes: Global memory.
        largest_allocation_bytes: The largest single buffer.
        local_bytes: Memory that a work-group shares.
        max_group: The largest work-group.
        compute_units: Cores, or multiprocessors.
        shares_host_memory: Whether its memory is the host's.
        extensions: All of them.
        obstacle: Why it cannot be used, or nothing.
        handle: pyopencl's device.
    """

    index: int
    platform: str
    name: str
    version: str
    driver: str
    kind: str
    memory_bytes: int
    largest_allocation_bytes: int
    local_bytes: int
    max_group: int
    compute_units: int
    shares_host_memory: bool
    extensions: tuple[str, ...]
    obstacle: str = ""
    handle: Any = field(default=None, repr=False, compare=False)

    @property
    def notable_extensions(self) -> tuple[str, ...]:
        """Its extensions among `NOTABLE_EXTENSIONS`."""
        return tuple(name for name in NOTABLE_EXTENSIONS if name in self.extensions)


@dataclass(frozen=True, slots=True)
class Choice:
    """The device to use and why."""

    device: DeviceInfo
    reason: str


@dataclass(frozen=True, slots=True)
class Tuning:
    """How kernels are cut for a device.

    Attributes:
        lanes: Work-items that share a row; a power of two, 1 on a CPU.
    """

    lanes: int

    @property
    def is_cpu(self) -> bool:
        """Whether a work-item has vector registers and a cache of its own."""
        return self.lanes == 1

    def few_rows(self, dtype: str, tokens: int) -> int:
        """Rows of a weight that a work-group multiplies with few tokens.

        On a CPU, rows share each vector of x, which comes from a farther cache than the registers:
        the more the better, but decoding needs registers of its own, most of all for K-quants.
        """
        if not self.is_cpu:
            return _GPU_ROWS
        if dtype in ("Q4_K", "Q5_K", "Q6_K"):
            return 1
        return 4 if dtype == "F32" or tokens == 1 else 2


@dataclass(frozen=True, slots=True)
class OpenDevice:
    """A device with a context and an in-order queue of its own. For one thread.

    Attributes:
        info: The device.
        context: pyopencl's context.
        queue: pyopencl's queue.
        tuning: How kernels are cut for it.
    """

    info: DeviceInfo
    context: Any
    queue: Any
    tuning: Tuning

    @property
    def label(self) -> str:
        """The device in messages."""
        return f"{self.info.platform}: {self.info.name}"


def list_devices() -> tuple[DeviceInfo, ...]:
    """Every device of every platform, in the drivers' order.

    Raises:
        DeviceUnavailableError: pyopencl is not installed, or there is no platform.
    """
    try:
        import pyopencl as cl
    except ImportError as error:
        raise DeviceUnavailableError(
            f"pyopencl cannot be imported ({error})", hint="pip install 'aprtui[gpu]'"
        ) from error
    try:
        platforms = cl.get_platforms()
    except cl.Error as error:
        raise _no_platform(str(error)) from error
    found: list[DeviceInfo] = []
    for platform in platforms:
        try:
            handles = platform.get_devices()
        except cl.Error:  # a platform without devices, or one whose driver fails to load
            continue
        for handle in handles:
            try:
                info = _describe(len(found), platform, handle)
            except cl.Error as error:
                info = _indescribable(len(found), str(error))
            found.append(info)
    return tuple(found)


def _no_platform(message: str) -> DeviceUnavailableError:
    return DeviceUnavailableError(
        f"no OpenCL platform is installed ({message})",
        hint="install the device's driver, or `pip install 'pyopencl[pocl]'` for one on the CPU",
    )


def _indescribable(index: int, message: str) -> DeviceInfo:
    """A device whose driver does not even answer questions: listed, never chosen."""
    return DeviceInfo(
        index=index, platform="unknown", name="unknown", version="unknown", driver="unknown",
        kind="other", memory_bytes=0, largest_allocation_bytes=0, local_bytes=0, max_group=0,
        compute_units=0, shares_host_memory=False, extensions=(),
        obstacle=f"its driver reports: {message}",
    )  # fmt: skip


def _describe(index: int, platform: Any, handle: Any) -> DeviceInfo:
    import pyopencl as cl

    kinds = cl.device_type
    kind = next(
        (
            name
            for name, bit in (
                ("gpu", kinds.GPU), ("accelerator", kinds.ACCELERATOR), ("cpu", kinds.CPU),
            )
            if handle.type & bit
        ),
        "other",
    )  # fmt: skip
    obstacle = ""
    if not handle.available:
        obstacle = "its driver says that it is not available"
    elif not handle.compiler_available:
        obstacle = "its driver has no compiler"
    elif not handle.endian_little:
        obstacle = "it is big-endian"
    return DeviceInfo(
        index=index,
        platform=platform.name.strip(),
        name=handle.name.strip(),
        version=handle.version.strip(),
        driver=handle.driver_version.strip(),
        kind=kind,
        memory_bytes=handle.global_mem_size,
        largest_allocation_bytes=handle.max_mem_alloc_size,
        local_bytes=handle.local_mem_size,
        max_group=handle.max_work_group_size,
        compute_units=handle.max_compute_units,
        shares_host_memory=bool(handle.host_unified_memory) or kind == "cpu",
        extensions=tuple(handle.extensions.split()),
        obstacle=obstacle,
        handle=handle,
    )


def choose_device(devices: Sequence[DeviceInfo], wanted: str | None = None) -> Choice:
    """The device to use.

    Args:
        devices: Those there are.
        wanted: An index in the list, or part of a platform's, device's or version's text in any
            case; None for the best.

    Raises:
        DeviceUnavailableError: None is wanted, or none can be used.
    """
    if not devices:
        raise DeviceUnavailableError(
            "no OpenCL platform has a device", hint="its driver may not know the hardware"
        )
    if wanted is not None:
        return _choose_wanted(devices, wanted)
    usable = [device for device in devices if not device.obstacle]
    if not usable:
        raise DeviceUnavailableError(
            f"no device can be used: {devices[0].obstacle}", where=devices[0].name
        )
    best = min(usable, key=_rank)
    return Choice(best, _reason(best, usable))


def _choose_wanted(devices: Sequence[DeviceInfo], wanted: str) -> Choice:
    text = wanted.strip()
    if text.isascii() and text.isdigit():
        matches = [device for device in devices if device.index == int(text)]
        reason = f"asked for by index {int(text)}"
    else:
        matches = [device for device in devices if text and text.lower() in _texts(device).lower()]
        reason = f"asked for by name {text!r}"
    if not matches:
        names = ", ".join(f"{device.index} {device.name}" for device in devices)
        raise DeviceUnavailableError(f"no device is {wanted!r}", hint=f"devices are {names}")
    best = min(matches, key=_rank)
    if best.obstacle:
        raise DeviceUnavailableError(best.obstacle, where=best.name)
    if len(matches) > 1:
        reason += f", the best of {len(matches)} that match"
    return Choice(best, reason)


def _texts(device: DeviceInfo) -> str:
    return "\n".join((device.platform, device.name, device.version))


def _rank(device: DeviceInfo) -> tuple[bool, int, int, int]:
    return (bool(device.obstacle), _KIND_RANKS[device.kind], -device.memory_bytes, device.index)


def _reason(best: DeviceInfo, usable: Sequence[DeviceInfo]) -> str:
    if len(usable) == 1:
        return "the only device that can be used"
    peers = [device for device in usable if device.kind == best.kind]
    if len(peers) == 1:
        return f"the only device of kind {best.kind}; GPUs come first, CPUs last"
    if any(device.memory_bytes < best.memory_bytes for device in peers):
        return f"of {len(peers)} devices of kind {best.kind}, the one with the most memory"
    return f"the first of {len(peers)} equal devices of kind {best.kind}"


def open_device(wanted: str | None = None, *, lanes: int | None = None) -> OpenDevice:
    """Choose a device and open it.

    Args:
        wanted: As for `choose_device`.
        lanes: Work-items that share a row, a power of two; by default what suits the device.

    Raises:
        DeviceUnavailableError: There is none, or it cannot be opened.
    """
    info = choose_device(list_devices(), wanted).device
    import pyopencl as cl

    with driver_errors(info.name):
        context = cl.Context([info.handle])
        return OpenDevice(info, context, cl.CommandQueue(context), tune(info, lanes))


def tune(info: DeviceInfo, lanes: int | None = None) -> Tuning:
    """How to cut kernels for a device: by its kind and its limits, never by its name."""
    if lanes is None:
        lanes = 1 if info.kind == "cpu" else _GPU_LANES
    while lanes > 1 and (lanes > info.max_group or lanes * _LANE_BYTES > info.local_bytes):
        lanes //= 2
    return Tuning(lanes)
