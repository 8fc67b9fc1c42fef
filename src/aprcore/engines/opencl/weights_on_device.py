"""Weights on the device: quantised as they are stored, kept there while they fit, else streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from aprcore.engines.opencl.device import DeviceInfo, OpenDevice
from aprcore.engines.opencl.errors import driver_errors
from aprcore.engines.opencl.stored_rows import RowSource, row_source
from aprcore.engines.opencl.streaming import Piece, PieceStream, ReadRequest
from aprcore.network.weights import Weight, read_all

_MIB = 1024 * 1024

# A piece must be large against a launch (17 us on PoCL) and small against a cache where the host's
# memory is the device's; over a bus it must be large against a transfer's latency.
_SHARED_PIECE_BYTES, _BUS_PIECE_BYTES = 8 * _MIB, 32 * _MIB

# Of a kept weight on the host's memory: nothing streams through a cache there, and fewer launches
# mean fewer moments at which every core waits for the last.
_SHARED_KEPT_PIECE_BYTES = 64 * _MIB

# On a device with memory of its own: what is left belongs to activations and to others.
_OWN_MEMORY_SHARE = 0.8
# On the host's memory a kept weight competes with the file in the page cache that it came from.
_SHARED_MEMORY_SHARE, _SHARED_BUDGET_BYTES = 0.25, 2048 * _MIB

# Pieces are whole groups of rows of every product kernel: of 6, 4, 2 and 1 rows.
_ROW_GROUP = 12


@dataclass(frozen=True, eq=False)
class _Plan:
    """The requests for a weight that are queued up, and what was set aside for keeping it."""

    requests: list[ReadRequest]
    reserved_bytes: int


@dataclass(eq=False)
class _Entry:
    """What is known of a weight. Holds on to it, so that its id stays its own."""

    source: RowSource
    uses: int = 0
    kept: list[Piece] | None = None
    plan: _Plan | None = None


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
        kept_piece_bytes = piece_bytes or _BUS_PIECE_BYTES
        if piece_bytes is None:
            piece_bytes = _BUS_PIECE_BYTES
            if info.shares_host_memory:
                piece_bytes, kept_piece_bytes = _SHARED_PIECE_BYTES, _SHARED_KEPT_PIECE_BYTES
        self.budget_bytes = _default_budget(info) if budget_bytes is None else budget_bytes
        self.kept_bytes = 0
        self._device = device
        self._piece_bytes = min(piece_bytes, info.largest_allocation_bytes)
        self._kept_piece_bytes = min(kept_piece_bytes, info.largest_allocation_bytes)
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

        A hint: asking for others instead is right, and what was expected before is forgotten.
        """
        if self._stream.head is not None:  # a pass was given up in the middle
            self._forget()
        for weight in weights:
            entry = self._entry(weight)
            if entry.kept is None and entry.plan is None:
                self._plan(entry)

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
        if entry.plan is None or self._stream.head is not entry.plan.requests[0]:
            self._forget()
            self._plan(entry)
        plan, entry.plan = entry.plan, None
        assert plan is not None
        entry.uses += 1
        kept: list[Piece] = []
        taken = 0
        try:
            for request in plan.requests:
                piece = self._stream.take()
                yield piece
                self._stream.give_back(piece)
                taken += 1
                if request.keep:
                    kept.append(Piece(piece.source, piece.start, piece.stop, piece.buffer))
        finally:
            if taken < len(plan.requests):  # an error, or nobody asks for the rest
                self._forget()
            self._settle(entry, plan, kept, is_whole=taken == len(plan.requests))

    def _settle(self, entry: _Entry, plan: _Plan, kept: list[Piece], *, is_whole: bool) -> None:
        """Keep a weight of which every piece has a buffer of its own."""
        if len(kept) == len(plan.requests):
            entry.kept = kept
            return
        self.kept_bytes -= plan.reserved_bytes
        if is_whole and plan.reserved_bytes:  # the device was full before the budget was
            self.budget_bytes = self.kept_bytes

    @property
    def known(self) -> tuple[Weight, ...]:
        """Every weight that was asked for; they are held on to until they are dropped."""
        vectors = (weight for weight, _ in self._vectors.values())
        return (*(entry.source.weight for entry in self._entries.values()), *vectors)

    def drop(self, weights: Iterable[Weight]) -> None:
        """Free what is kept of these weights, and forget them."""
        self._forget()
        for weight in weights:
            self._vectors.pop(id(weight), None)
            entry = self._entries.pop(id(weight), None)
            if entry is not None and entry.kept is not None:
                self.kept_bytes -= entry.source.size_bytes

    def close(self) -> None:
        """Free everything on the device. The object cannot be used afterwards."""
        self._stream.close()
        self._entries.clear()
        self._vectors.clear()

    def abandon(self) -> None:
        """As `close`, but wait for nothing: the process is about to end."""
        self._stream.abandon()

    def _entry(self, weight: Weight) -> _Entry:
        entry = self._entries.get(id(weight))
        if entry is None:
            entry = self._entries[id(weight)] = _Entry(row_source(weight))
        return entry

    def _plan(self, entry: _Entry) -> None:
        """Queue up the rows of a weight."""
        source = entry.source
        keep = (
            entry.uses >= self._uses_before_keeping
            and self.kept_bytes + source.size_bytes <= self.budget_bytes
        )
        reserved_bytes = source.size_bytes if keep else 0
        self.kept_bytes += reserved_bytes
        piece_bytes = self._kept_piece_bytes if keep else self._piece_bytes
        rows = max(1, piece_bytes // max(1, source.row_bytes))
        if rows >= _ROW_GROUP:
            rows -= rows % _ROW_GROUP
        requests = [
            ReadRequest(source, start, min(start + rows, source.num_rows), keep)
            for start in range(0, source.num_rows, rows)
        ]
        entry.plan = _Plan(requests, reserved_bytes)
        self._stream.plan(requests)

    def _forget(self) -> None:
        """Expect nothing any more."""
        self._stream.forget()
        for entry in self._entries.values():
            if entry.plan is not None:
                self.kept_bytes -= entry.plan.reserved_bytes
                entry.plan = None


def _default_budget(info: DeviceInfo) -> int:
    if info.shares_host_memory:
        return min(int(info.memory_bytes * _SHARED_MEMORY_SHARE), _SHARED_BUDGET_BYTES)
    return int(info.memory_bytes * _OWN_MEMORY_SHARE)
