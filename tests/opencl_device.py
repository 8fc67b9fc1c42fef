"""The device of the tests, or the reason why there is none."""

from __future__ import annotations

from functools import cache

import pytest

from aprcore.engines.opencl.backend import OpenCLBackend
from aprcore.engines.opencl.device import list_devices, open_device
from aprcore.ground.errors import BackendError


@cache
def obstacle() -> str:
    """Why no device can be used; nothing if one can."""
    try:
        list_devices()
        open_device()
    except BackendError as error:
        return str(error)
    return ""


def require_device() -> None:
    """Skip the whole module where there is no device."""
    if obstacle():
        pytest.skip(f"no OpenCL device: {obstacle()}", allow_module_level=True)


@cache
def backend(lanes: int | None = None) -> OpenCLBackend:
    """The backend of all tests, which keeps what it has built; one per number of lanes."""
    return OpenCLBackend(open_device(None, lanes=lanes))
