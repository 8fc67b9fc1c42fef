"""What can go wrong on a device, in the words of `aprcore.ground.errors`.

The driver's exceptions are translated here and nowhere else, so that callers need not import
pyopencl to catch them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aprcore.ground.errors import BackendError

# Status codes of the OpenCL specification (CL/cl.h).
_UNAVAILABLE = {
    -1: "no such device",
    -2: "the device is not available",
    -34: "the device's context is no longer valid",
    -36: "the device's queue is no longer valid",
    -9999: "the device stopped in the middle of a kernel",  # NVIDIA's own
}
_MEMORY = {-4, -6, -61}
_RESOURCES = -5  # mostly memory, and what some drivers say of a device that they have lost


class DeviceUnavailableError(BackendError):
    """There is no device to compute on, or the one there was has gone."""


class KernelBuildError(BackendError):
    """The device's compiler rejects a kernel."""


class DeviceMemoryError(BackendError):
    """The device has not enough memory."""


def memory_error(device: str, what: str = "memory") -> DeviceMemoryError:
    """The error for an allocation that a device has no room for."""
    return DeviceMemoryError(
        f"the device is out of {what}", where=device, hint="use fewer tokens, or --no-gpu"
    )


@contextmanager
def driver_errors(device: str) -> Iterator[None]:
    """Turn what the driver of `device` raises into a `BackendError`.

    Raises:
        DeviceUnavailableError: The device cannot be used (any more).
        DeviceMemoryError: Memory ran out on the device.
        BackendError: The driver reports anything else.
    """
    import pyopencl as cl

    try:
        yield
    except cl.Error as error:
        raise translate_status(error.code, str(error), device) from error


def translate_status(code: int, message: str, device: str) -> BackendError:
    """The error for a status code of OpenCL and the driver's own message."""
    if code in _MEMORY:
        return memory_error(device)
    if code == _RESOURCES:
        return memory_error(device, "memory or other resources")
    if code in _UNAVAILABLE:
        return DeviceUnavailableError(
            _UNAVAILABLE[code], where=device, hint="`aprtui devices` lists those that are"
        )
    return BackendError(f"the driver reports: {message}", where=device)
