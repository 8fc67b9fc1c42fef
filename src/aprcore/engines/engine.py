"""A backend that is ready to compute, and what it computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aprcore.engines.numpy import NumpyBackend
from aprcore.engines.reference import ReferenceBackend
from aprcore.network.backend import Backend

ENGINES = ("numpy", "opencl", "reference")


@dataclass(frozen=True, slots=True)
class Engine:
    """A backend and where it runs.

    Attributes:
        backend: Computes.
        device: Its device; the driver's text, which may hold anything.
        driver: The version of its driver, if it has one.
    """

    backend: Backend
    device: str = "cpu"
    driver: str | None = None

    @property
    def label(self) -> str:
        """Both in a few words."""
        return self.backend.name if self.device == "cpu" else f"{self.backend.name}: {self.device}"


@contextmanager
def open_engine(
    name: str, *, device: str | None = None, threads: int | None = None
) -> Iterator[Engine]:
    """Open one of `ENGINES` and close it in the end.

    Nothing of OpenCL is imported unless it is the one.

    Args:
        name: Which.
        device: The name or index of an OpenCL device; None for the best.
        threads: Threads of the CPU path; None for one per processor.

    Raises:
        BackendError: The device cannot be opened.
    """
    match name:
        case "numpy":
            yield Engine(NumpyBackend(threads))
        case "reference":
            yield Engine(ReferenceBackend())
        case "opencl":
            from aprcore.engines.opencl.backend import OpenCLBackend

            with OpenCLBackend(device) as backend:
                yield Engine(backend, backend.device.label, backend.device.info.driver)
        case _:
            raise ValueError(f"unknown backend {name!r}")
