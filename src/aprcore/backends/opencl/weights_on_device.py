"""Weights on the device: quantised as they are stored, kept there while they fit, else streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aprcore.backends.opencl.device import DeviceInfo, OpenDevice
from aprcore.backends.opencl.errors import driver_errors
from aprcore.backends.opencl.stored_rows import RowSource, row_source
from aprcore.backends.opencl.streaming import Piece, PieceStream, Request
from aprcore.weights import Weight, read_all

_MIB = 1024 * 1024

# A piece must be large against a launch (17 us on PoCL) and small against a cache where the host's
# memory is the device's; over a bus it must be large against a transfer's latency.
_SHARED_PIECE_BYTES, _BUS_PIECE_BYTES = 4 * _MIB, 32 * _MIB

# On a device with memory of its own: what is left belongs to activations and to others.
_OWN_MEMORY_SHARE = 0.8
# On the host's memory a kept weight competes with the file in the page cache that it came from.
_SHARED_MEMORY_SHARE, _SHARED_BUDGET_BYTES = 0.25, 512 * _MIB

# Pieces are whole groups of rows of every product kernel: of 6, 4, 2 and 1 rows.
_ROW_GROUP = 12


@dataclass(eq=False)
class _Entry:
    """What is known of a weight. Holds on to it, so that its id stays its own."""

    source: RowSource
    uses: int = 0
    kept: list[Piece] | None = None
    expected: list[list[Request]] = field(default_factory=list)


class DeviceWeights:
    """Hands out weights as pieces of rows that are on the device.

    A weight that has been kept costs nothing; others are loaded by a thread while earlier pieces
    are multiplied. On a device with memory of its own weights are kept from their first use, and on
    the host's memory from their second: writing a fresh page costs more than reading the file
    again, so a single pass is faster through a few buffers that stay in the cache. Nothing that is
    kept is dropped for something else, because a pass reads all weights in turn.

    Attributes:
        budget_bytes: How much may be kept.
        kept_bytes: How much is kept or is about to be.
    """

    def __init__(
        self, device: OpenDevice, budget_bytes: int | None = None, piece_bytes: int | None = None
    ) -> None:
        """Prepare to load; nothing is allocated yet.

        Args:
            device: Where to.
            budget_bytes: By default most of the memory of a device that has its own, and a small
                part of the host's.
            piece_bytes: By default what suits the device; at most its largest allocation.
        """
        info = device.info
        if piece_bytes is None:
            piece_bytes = _SHARED_PIECE_BYTES if info.shares_host_memory else _BUS_PIECE_BYTES
        self.budget_bytes = _default_budget(info) if budget_bytes is None else budget_bytes
        self.kept_bytes = 0
        self._device = device
        self._piece_bytes = min(piece_bytes, info.largest_allocation_bytes)
        self._uses_before_keeping = 1 if info.shares_host_memory else 0
        self._stream = PieceStream(device, self._piece_bytes)
        self._entries: dict[int, _Entry] = {}
        self._vectors: dict[int, tuple[Weight, Any]] = {}

    def vector(self, weight: Weight) -> Any:
        """A norm's gain or a bias as a float32 buffer, kept.

        Raises:
            TruncatedError: The file ends before the tensor does.
        """
        found = self._vectors.get(id(weight))
        if found is None:
            import pyopencl as cl

            flags = cl.mem_flags
            values = np.ascontiguousarray(read_all(weight), dtype=np.float32)
            with driver_errors(self._device.label):
                buffer = cl.Buffer(
                    self._device.context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=values
                )
            found = self._vectors[id(weight)] = (weight, buffer)
        return found[1]

    def source(self, weight: Weight) -> RowSource:
        """How a weight's rows are read."""
        return self._entry(weight).source

    def expect(self, weights: Iterable[Weight]) -> None:
        """Say which weights will be asked for next, in order, so that loading runs ahead.

        A hint: asking for others instead is right and only forgets what was expected.
        """
        for weight in weights:
            entry = self._entry(weight)
            if entry.kept is None and not entry.expected:
                requests = self._requests(entry)
                entry.expected.append(requests)
                self._stream.plan(requests)

    def pieces(self, weight: Weight) -> Iterator[Piece]:
        """All rows of a weight, in order.

        The caller sets `last_use` of each piece before it asks for the next.

        Raises:
            TruncatedError: The file ends before the rows do.
            DeviceMemoryError, DeviceUnavailableError: As `driver_errors`.
        """
        entry = self._entry(weight)
        if entry.kept is not None:
            yield from entry.kept
            return
        if not entry.expected or self._stream.head is not entry.expected[0][0]:
            self._forget()
            entry.expected.append(self._requests(entry))
            self._stream.plan(entry.expected[0])
        requests, pieces = entry.expected.pop(0), []
        entry.uses += 1
        done = False
        try:
            for _ in requests:
                request, piece = self._stream.take()
                yield piece
                self._stream.give_back(piece)
                if request.keep:
                    pieces.append(Piece(piece.source, piece.start, piece.stop, piece.buffer))
            done = True
        finally:
            if not done:  # an error, or nobody asks for the rest
                self._forget()
            if len(pieces) == len(requests):
                entry.kept = pieces
            elif requests[0].keep or pieces:  # memory ran out on the way: stay within what is there
                self.kept_bytes -= entry.source.size_bytes
                self.budget_bytes = self.kept_bytes

    def close(self) -> None:
        """Free everything on the device. The object cannot be used afterwards."""
        self._stream.close()
        self._entries.clear()
        self._vectors.clear()

    def _entry(self, weight: Weight) -> _Entry:
        entry = self._entries.get(id(weight))
        if entry is None:
            entry = self._entries[id(weight)] = _Entry(row_source(weight))
        return entry

    def _requests(self, entry: _Entry) -> list[Request]:
        source = entry.source
        keep = (
            entry.uses >= self._uses_before_keeping
            and self.kept_bytes + source.size_bytes <= self.budget_bytes
        )
        if keep:
            self.kept_bytes += source.size_bytes
        rows = max(1, self._piece_bytes // max(1, source.row_bytes))
        if rows >= _ROW_GROUP:
            rows -= rows % _ROW_GROUP
        return [
            Request(source, start, min(start + rows, source.num_rows), keep)
            for start in range(0, source.num_rows, rows)
        ]

    def _forget(self) -> None:
        """Expect nothing any more."""
        self._stream.forget()
        for entry in self._entries.values():
            for requests in entry.expected:
                if requests[0].keep:
                    self.kept_bytes -= entry.source.size_bytes
            entry.expected.clear()


def _default_budget(info: DeviceInfo) -> int:
    if info.shares_host_memory:
        return min(int(info.memory_bytes * _SHARED_MEMORY_SHARE), _SHARED_BUDGET_BYTES)
    return int(info.memory_bytes * _OWN_MEMORY_SHARE)
