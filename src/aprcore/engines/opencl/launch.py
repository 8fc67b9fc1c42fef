"""Arrays on the device, and kernels that run over them."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.opencl.device import OpenDevice
from aprcore.engines.opencl.errors import driver_errors, memory_error
from aprcore.engines.opencl.program import Programs
from aprcore.ground.errors import BackendError
from aprcore.network.weights import Float32

# Work of an elementwise group, in values: large against handing out a group on a CPU, small enough
# to occupy a GPU.
_CPU_GROUP_WORK, _LANE_WORK = 4096, 4

# Launchers that were given up: to free what they hold would wait for their kernels.
_abandoned: list[Launcher] = []


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class DeviceArray:
    """A float32 array on the device, row-major and contiguous.

    Attributes:
        buffer: pyopencl's buffer.
        shape: Sizes.
    """

    buffer: Any
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Launcher:
    """Allocates arrays and queues kernels on one device, in order.

    Attributes:
        device: The device.
    """

    def __init__(self, device: OpenDevice) -> None:
        import pyopencl.tools

        self.device = device
        self._programs = Programs(device)
        self._typed: set[Any] = set()  # kernels that know the types of their numbers
        self._last: Any = None  # the event of what was queued last
        # Copies to the host that may not be done: to let go of one is to wait for it.
        self._downloads: deque[Any] = deque()
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="aprcore-wait")
        # Fresh memory costs more than most operations: freed arrays are used again. The queue is
        # in order, so whoever gets them writes after whoever read them.
        with driver_errors(device.label):
            allocator = pyopencl.tools.ImmediateAllocator(device.queue)
            self._pool = pyopencl.tools.MemoryPool(allocator)

    def close(self) -> None:
        """Wait for the device and free arrays that nobody holds."""
        with suppress(BackendError):  # nobody asks any more what a device that failed has to say
            self.finish()
        self._waiter.shutdown()
        self._pool.stop_holding()

    def abandon(self) -> None:
        """Leave the device to itself, as the process is about to end: kernels cannot be stopped."""
        self._waiter.shutdown(wait=False)
        _abandoned.append(self)

    def finish(self) -> None:
        """Wait until everything queued is done."""
        self._wait(self._last)
        with driver_errors(self.device.label):
            self.device.queue.finish()
        self._downloads.clear()

    def _wait(self, event: Any) -> None:
        """Wait for an event so that Ctrl-C is heard: the driver's own wait is deaf to it."""
        if event is None:
            return
        with driver_errors(self.device.label):
            if _is_done(event):
                return
            if threading.current_thread() is threading.main_thread():
                self._waiter.submit(event.wait).result()
            else:
                event.wait()

    def empty(self, shape: tuple[int, ...]) -> DeviceArray:
        """An array of unknown content.

        Raises:
            DeviceMemoryError: There is no room for it.
        """
        size_bytes = 4 * math.prod(shape)
        # Not every driver checks this, and the pool of arrays does not either.
        if size_bytes > self.device.info.largest_allocation_bytes:
            raise memory_error(self.device.label)
        with driver_errors(self.device.label):
            return DeviceArray(self._pool.allocate(size_bytes), shape)

    def upload(self, values: NDArray[Any]) -> Any:
        """A buffer with a copy of `values`."""
        import pyopencl as cl

        self._wait(self._last)
        with driver_errors(self.device.label):
            buffer = self._pool.allocate(values.nbytes)
            cl.enqueue_copy(self.device.queue, buffer, np.ascontiguousarray(values))
        return buffer

    def download(self, x: DeviceArray) -> Callable[[], Float32]:
        """Queue a copy to the host; what is returned waits for it and for everything before it."""
        import pyopencl as cl

        values = np.empty(x.shape, dtype=np.float32)
        with driver_errors(self.device.label):
            copied = cl.enqueue_copy(self.device.queue, values, x.buffer, is_blocking=False)
            self._last = copied
            self.device.queue.flush()
            while self._downloads and _is_done(self._downloads[0]):
                self._downloads.popleft()
        self._downloads.append(copied)

        def wait() -> Float32:
            self._wait(copied)
            return values

        return wait

    def copy(self, x: DeviceArray, first: int, shape: tuple[int, ...]) -> DeviceArray:
        """A copy of consecutive values from the flat index `first`."""
        import pyopencl as cl

        out = self.empty(shape)
        with driver_errors(self.device.label):
            self._last = cl.enqueue_copy(
                self.device.queue, out.buffer, x.buffer, src_offset=4 * first,
                byte_count=4 * out.size,
            )  # fmt: skip
        return out

    def join(self, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """The rows of x, then those of y."""
        import pyopencl as cl

        out = self.empty((x.shape[0] + y.shape[0], *x.shape[1:]))
        with driver_errors(self.device.label):
            cl.enqueue_copy(self.device.queue, out.buffer, x.buffer, byte_count=4 * x.size)
            self._last = cl.enqueue_copy(
                self.device.queue, out.buffer, y.buffer, dst_offset=4 * x.size,
                byte_count=4 * y.size,
            )  # fmt: skip
        return out

    def kernel(self, name: str, sources: Sequence[str], **options: int) -> Any:
        """See `Programs.kernel`."""
        return self._programs.kernel(name, sources, **options)

    def run(self, kernel: Any, groups: tuple[int, ...], *args: Any, after: Any = None) -> Any:
        """Queue a kernel over so many groups; returns its event.

        Args:
            kernel: From `kernel`.
            groups: Work-groups along each axis.
            args: Arrays, buffers and numpy scalars.
            after: An event of another queue to wait for.
        """
        import pyopencl as cl

        lanes = self.device.tuning.lanes
        local = (lanes, *(1 for _ in groups[1:]))
        queue = self.device.queue
        values = [arg.buffer if isinstance(arg, DeviceArray) else arg for arg in args]
        with driver_errors(self.device.label):
            if kernel not in self._typed:
                # Otherwise pyopencl finds out what each number is every time: 50 us of a launch.
                types = (type(x) if isinstance(x, np.generic) else None for x in values)
                kernel.set_scalar_arg_dtypes(list(types))
                self._typed.add(kernel)
            kernel.set_args(*values)
            event = self._last = cl.enqueue_nd_range_kernel(
                queue, kernel, (groups[0] * lanes, *groups[1:]), local,
                wait_for=None if after is None else [after],
            )  # fmt: skip
            queue.flush()
        return event

    def run_over(self, kernel: Any, count: int, *args: Any, cost: int = 1) -> Any:
        """Queue an elementwise kernel over `count` indices, each worth `cost` values."""
        lanes = self.device.tuning.lanes
        work = _CPU_GROUP_WORK if self.device.tuning.is_cpu else _LANE_WORK * lanes
        groups = max(1, min(-(-count // lanes), -(-count * cost // work)))
        return self.run(kernel, (groups,), *args)


def _is_done(event: Any) -> bool:
    import pyopencl as cl

    return bool(event.command_execution_status == cl.command_execution_status.COMPLETE)
