"""Kernels: the .cl files of this package, built once per device and options, and kept."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from aprcore.engines.opencl.device import OpenDevice
from aprcore.engines.opencl.errors import KernelBuildError, driver_errors

# Contraction of a product and a sum is wanted; nothing that would lose a NaN or an infinity is.
_OPTIONS = ("-cl-std=CL1.2", "-cl-mad-enable")

_KERNEL = re.compile(r"^\s*kernel\b.*?\bvoid\s+(\w+)\s*\(", re.MULTILINE)
# clang's "file:12:5: error: ..." and PoCL's "error: file:12:5: ...", among others.
_LINE_NUMBER = re.compile(r":(\d+):\d+:")

Options = tuple[tuple[str, int], ...]


@dataclass
class Programs:
    """Builds kernels on demand. For one thread: a kernel holds its arguments.

    Attributes:
        device: Where they run.
    """

    device: OpenDevice
    _built: dict[tuple[tuple[str, ...], Options], Any] = field(default_factory=dict)
    _kernels: dict[tuple[str, tuple[str, ...], Options], Any] = field(default_factory=dict)

    def kernel(self, name: str, sources: Sequence[str], **options: int) -> Any:
        """A kernel of the program made of `sources`, with `options` as macros.

        Args:
            name: The kernel.
            sources: Files in `kernels/`; `common.cl` goes in front.
            options: Macros besides LANES.

        Raises:
            KernelBuildError: The device's compiler rejects the program.
            DeviceUnavailableError, DeviceMemoryError: As `driver_errors`.
        """
        program_key = (tuple(sources), tuple(sorted(options.items())))
        key = (name, *program_key)
        kernel = self._kernels.get(key)
        if kernel is None:
            if program_key not in self._built:
                text = "\n".join(read_source(file) for file in ("common.cl", *sources))
                self._built[program_key] = self.build(name, text, options)
            import pyopencl as cl

            with driver_errors(self.device.label):
                kernel = self._kernels[key] = cl.Kernel(self._built[program_key], name)
        return kernel

    def build(self, name: str, text: str, options: dict[str, int]) -> Any:
        """Build a program; `name` is the kernel it is built for, to be named in an error.

        Raises:
            KernelBuildError: The compiler rejects it; names the kernel and the first error.
        """
        import pyopencl as cl

        macros = {"LANES": self.device.tuning.lanes} | options
        flags = [*_OPTIONS, *(f"-D{macro}={value}" for macro, value in macros.items())]
        with warnings.catch_warnings(), driver_errors(self.device.label):
            warnings.simplefilter("ignore", cl.CompilerWarning)
            try:
                # The driver keeps binaries itself; pyopencl's own cache would do it again.
                return cl.Program(self.device.context, text).build(flags, cache_dir=False)
            except cl.RuntimeError as error:
                if error.code != cl.status_code.BUILD_PROGRAM_FAILURE:
                    raise
                raise _build_error(name, text, str(error), self.device.label) from error


def read_source(file: str) -> str:
    """The text of a file in `kernels/`."""
    return files("aprcore.engines.opencl").joinpath("kernels", file).read_text("utf-8")


def _build_error(name: str, text: str, log: str, device: str) -> KernelBuildError:
    first = next((line.strip() for line in log.splitlines() if "error:" in line), None)
    if first is None:
        first = next((line.strip() for line in log.splitlines()[1:] if line.strip()), "no message")
    number = _LINE_NUMBER.search(first)
    if number is not None:
        name = _kernel_at(text, int(number[1])) or name
    return KernelBuildError(f"kernel {name} does not build: {first}", where=device,
                            hint="use another driver or --no-gpu")  # fmt: skip


def _kernel_at(text: str, line: int) -> str | None:
    """The kernel whose text a line is in."""
    before = "\n".join(text.splitlines()[:line])
    names = _KERNEL.findall(before)
    return names[-1] if names else None
