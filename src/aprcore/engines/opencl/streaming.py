"""Rows on their way to the device: read by a thread of their own while kernels run.

The thread reads a piece straight into memory that the driver maps, a few pieces ahead of the
kernels, so that neither waits for the other and the host never holds more than those pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprcore.engines.opencl.device import OpenDevice
from aprcore.engines.opencl.errors import DeviceMemoryError, driver_errors
from aprcore.engines.opencl.stored_rows import RowSource

# One piece under the kernel, one ready, one being read.
SLOTS = 3


@dataclass(eq=False)
class ReadRequest:
    """Rows that are wanted on the device.

    Attributes:
        source: Where they come from.
        start, stop: Which.
        keep: Whether they shall stay there, in a buffer of their own.
    """

    source: RowSource
    start: int
    stop: int
    keep: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of the rows."""
        return (self.stop - self.start) * self.source.row_bytes


@dataclass(eq=False)
class Piece:
    """Rows that are on the device.

    Attributes:
        source: The weight they belong to.
        start, stop: Which rows.
        buffer: pyopencl's buffer.
        ready: The event after which they can be read; None if they can be now.
        last_use: The event after which the buffer may be overwritten, set by who reads it.
    """

    source: RowSource
    start: int
    stop: int
    buffer: Any
    ready: Any = None
    last_use: Any = None


@dataclass(eq=False)
class _Slot:
    """A buffer that is filled again and again."""

    buffer: Any
    size_bytes: int
    busy: Any = None


@dataclass(eq=False)
class _Loading:
    request: ReadRequest
    slot: _Slot
    buffer: Any
    ready: Future[Any]


class PieceStream:
    """A queue of requests, the first few of which are being loaded.

    Attributes:
        slot_bytes: The size of a reused buffer; a longer row gets a longer one.
    """

    def __init__(self, device: OpenDevice, slot_bytes: int) -> None:
        import pyopencl as cl

        self.slot_bytes = slot_bytes
        self._device = device
        with driver_errors(device.label):
            # Transfers must not queue up behind kernels.
            self._transfers = cl.CommandQueue(device.context)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="aprcore-upload")
        self._free = deque(_Slot(None, 0) for _ in range(SLOTS))
        self._planned: deque[ReadRequest] = deque()
        self._loading: deque[_Loading] = deque()

    def plan(self, requests: Iterable[ReadRequest]) -> None:
        """Queue requests up and begin to load."""
        self._planned.extend(requests)
        self._advance()

    @property
    def head(self) -> ReadRequest | None:
        """The request that will be taken next."""
        if self._loading:
            return self._loading[0].request
        return self._planned[0] if self._planned else None

    def take(self) -> Piece:
        """The next piece, as soon as it is there. `give_back` must follow.

        Raises:
            TruncatedError: The file ends before the rows do.
            DeviceMemoryError, DeviceUnavailableError: As `driver_errors`.
        """
        self._advance()
        loading = self._loading[0]
        request = loading.request
        try:
            ready = loading.ready.result()
        except BaseException:
            self.forget()
            raise
        return Piece(request.source, request.start, request.stop, loading.buffer, ready)

    def give_back(self, piece: Piece) -> None:
        """The kernels that read the taken piece are queued: its slot can be filled after them."""
        loading = self._loading.popleft()
        # A kept piece has not used its slot's buffer.
        if loading.buffer is loading.slot.buffer:
            loading.slot.busy = piece.last_use
        self._free.append(loading.slot)
        self._advance()

    def forget(self) -> None:
        """Drop everything that is queued.

        A load that has begun runs to its end in the thread, before any that is asked for later.
        """
        self._planned.clear()
        while self._loading:
            loading = self._loading.popleft()
            loading.ready.cancel()
            self._free.append(loading.slot)

    def close(self) -> None:
        """Drop everything and end the thread."""
        self.forget()
        self._loader.shutdown()
        self._free.clear()

    def abandon(self) -> None:
        """As `close`, but wait for nothing: the process is about to end."""
        self.forget()
        self._loader.shutdown(wait=False)

    def _advance(self) -> None:
        while self._free and self._planned:
            request, slot = self._planned[0], self._free[0]
            buffer = self._buffer(request, slot)
            self._planned.popleft()
            self._free.popleft()
            # Stays with the slot: a load that is forgotten before it began has not waited.
            busy = slot.busy if buffer is slot.buffer else None
            ready = self._loader.submit(self._load, request, buffer, busy)
            self._loading.append(_Loading(request, slot, buffer, ready))

    def _buffer(self, request: ReadRequest, slot: _Slot) -> Any:
        if request.keep:
            try:
                return self._allocate(request.size_bytes)
            except DeviceMemoryError:
                request.keep = False  # the device is fuller than was thought
        if slot.size_bytes < request.size_bytes:
            size_bytes = max(self.slot_bytes, request.size_bytes)
            slot.buffer = None  # frees the old one first
            slot.buffer, slot.size_bytes, slot.busy = self._allocate(size_bytes), size_bytes, None
        return slot.buffer

    def _allocate(self, size_bytes: int) -> Any:
        import pyopencl as cl

        flags = cl.mem_flags
        with driver_errors(self._device.label):
            return cl.Buffer(
                self._device.context, flags.READ_ONLY | flags.ALLOC_HOST_PTR, size_bytes
            )

    def _load(self, request: ReadRequest, buffer: Any, busy: Any) -> Any:
        """Runs in the thread: fill the buffer, return the event that it is the device's again."""
        import pyopencl as cl

        with driver_errors(self._device.label):
            if busy is not None:
                busy.wait()
            mapped, _ = cl.enqueue_map_buffer(
                self._transfers, buffer, cl.map_flags.WRITE_INVALIDATE_REGION, 0,
                (request.size_bytes,), np.uint8,
            )  # fmt: skip
            try:
                request.source.read_into(request.start, request.stop, mapped)
            finally:
                ready = mapped.base.release(self._transfers)
                self._transfers.flush()
            return ready
