"""Any tensor of a run, both sides, on demand: read again, or made again from its layer's input.

A run compares each tensor and drops it. To look at one later, a dump is read once more. Where the
model itself is traced, only the input of each layer is kept, in a temporary file; any other tensor
is made again from that, with at most one layer of work and to the last bit as the run saw it.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.directory import TraceDirectory
from aprcore.dumps.source import StageSource
from aprcore.dumps.stage_file import HEADER
from aprcore.ground.errors import TraceError
from aprcore.judging.layouts import Layout, alternatives, last_token, layout_of, zero_masked
from aprcore.network.operations import Operation
from aprcore.network.stages import StageKey
from aprcore.pictures.plane import FilePlane, MemoryPlane, Plane, TensorPair, changed
from aprcore.records.report import StageReport
from aprcore.records.saved_run import SavedRun
from aprcore.records.tensor_source import TensorSource
from aprcore.runs.open_sides import open_sides
from aprcore.runs.request import Request
from aprcore.runs.sides import Sides

Floats = NDArray[np.floating[Any]]
Float32 = NDArray[np.float32]

__all__ = ["LayerInputs", "TensorPair", "TensorStore"]


class LayerInputs(Mapping[StageKey, Float32]):
    """The tensors that the layers of one traced pass read, in a temporary file.

    As a mapping it holds those that were kept. What cannot be written, to a full disk say, is not
    kept, and no error. May be used from several threads at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._end_bytes = 0
        self._held: dict[StageKey, tuple[int, tuple[int, ...]]] = {}
        self._is_closed = False

    def keep(self, key: StageKey, tensor: Floats) -> None:
        """Keep a tensor: the stream that a layer or what follows the layers is given."""
        values = np.ascontiguousarray(tensor, dtype=np.float32)
        with self._lock:
            if self._is_closed or key in self._held:
                return
            try:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(prefix="aprtui-", buffering=0)  # noqa: SIM115
                _write_at(self._file.fileno(), self._end_bytes, values)
            except OSError:
                return
            self._held[key] = self._end_bytes, values.shape
            self._end_bytes += values.nbytes

    def __getitem__(self, key: StageKey) -> Float32:
        with self._lock:
            start_bytes, shape = self._held[key]
            assert self._file is not None
            values = np.empty(shape, dtype=np.float32)
            view, done = values.data.cast("B") if values.size else memoryview(b""), 0
            while done < values.nbytes:
                count = os.preadv(self._file.fileno(), [view[done:]], start_bytes + done)
                if count == 0:
                    raise KeyError(key)
                done += count
        return values

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._held

    def __iter__(self) -> Iterator[StageKey]:
        with self._lock:
            return iter(tuple(self._held))

    def __len__(self) -> int:
        with self._lock:
            return len(self._held)

    def close(self) -> None:
        """Forget everything; what comes later is not kept."""
        with self._lock:
            self._is_closed = True
            self._held.clear()
            if self._file is not None:
                self._file.close()
                self._file = None


def _write_at(descriptor: int, offset_bytes: int, values: Float32) -> None:
    if values.size == 0:
        return
    view, done = values.data.cast("B"), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset_bytes + done)


def open_tensors(request: Request, kept: LayerInputs | None = None) -> TensorSource:
    """Where the tensors of a request's run come from; takes the arguments of `TensorStore`.

    Raises:
        FormatError: The request names a saved run that cannot be read.
    """
    if request.saved is not None:
        return SavedRun(request.saved)
    return TensorStore(request, kept)


class TensorStore:
    """Both sides of any stage of a run, finished or still going on.

    Calls from several threads wait for each other.
    """

    def __init__(self, request: Request, kept: LayerInputs | None = None) -> None:
        """Open nothing yet.

        Args:
            request: What the run was asked for; its files are opened once more when needed.
            kept: The layers' inputs as that run kept them; without them a tensor of a traced model
                takes all layers before it.
        """
        # Neither the judge nor the device is needed to read a tensor or to make it again.
        self._request = replace(
            request, cumulative_only=True, reference_weights=None, gpu=False, require_gpu=False,
            device=None,
        )  # fmt: skip
        self._kept: Mapping[StageKey, Float32] = {} if kept is None else kept
        self._stack = ExitStack()
        self._sides: Sides | None = None
        self._lock = threading.Lock()

    def open(self, report: StageReport) -> TensorPair:
        """Both sides of a stage, in the layout in which they were judged.

        Sides of different sizes have a layout each and no difference, unless one is the last token
        of the other: then that is what both sides show.

        Args:
            report: What the run found out about the stage.

        Raises:
            AprError: A file is gone or is not what the run saw.
        """
        with self._lock:
            if self._sides is None:
                self._sides = self._stack.enter_context(open_sides(self._request))
            return self._read(self._sides, report)

    def close(self) -> None:
        """Close the files; pairs that were handed out stay readable."""
        with self._lock:
            self._stack.close()
            self._sides = None

    def _read(self, sides: Sides, report: StageReport) -> TensorPair:
        key, operation = report.key, sides.graph.operation(report.key)
        trace: _Stored | _Made | None = None
        if sides.trace is not None:
            trace = _Stored(sides.trace, key, operation) if key in sides.trace else None
        elif sides.model is not None and sides.header.tokens is not None and key in sides.graph:
            trace = _Made(sides, key, self._kept)
        oracle = None
        if sides.oracle is not None and key in sides.oracle:
            oracle = _Stored(sides.oracle, key, operation)
        sources = [x for x in (trace, oracle) if x is not None]
        if report.layout is not None:
            judged = math.prod(report.layout.shape)
            if sources and judged not in [source.count for source in sources]:
                where = sources[0].where
                raise changed(where, f"{key} has {sources[0].count} values, and had {judged}")
        is_last_token = report.comparison is not None and report.layout is not None
        planes: list[Plane | None] = []
        for source, side in ((trace, "trace"), (oracle, "oracle")):
            if source is None:
                planes.append(None)
                continue
            layout = layout_of(key, sides.sizes, source.count)
            if is_last_token and len({x.count for x in sources}) > 1:
                assert report.layout is not None
                layout = report.layout
            planes.append(_open_plane(source, layout, report, side, sides))
        return TensorPair(key, *planes)


class _Stored:
    """A tensor of a dump."""

    def __init__(self, source: StageSource, key: StageKey, operation: Operation | None) -> None:
        self.count = source.counts[key]
        self._operation = operation
        self.where = source.path
        self._source = source
        self._key = key

    def read(self) -> Floats:
        """Its values as they were dumped, flat."""
        return self._source.read(self._key)

    def plane(self, layout: Layout) -> Plane | None:
        """The tensor in its file, where it lies there as it is."""
        if not isinstance(self._source, TraceDirectory):
            return None
        return FilePlane(self._source.file(self._key), self._operation, layout, HEADER.size)


class _Made:
    """A tensor of a traced model, made again from what was kept of the layer before."""

    def __init__(self, sides: Sides, key: StageKey, kept: Mapping[StageKey, Float32]) -> None:
        assert sides.model is not None
        self.count = math.prod(sides.graph.shape(key, sides.sizes))
        self.where = sides.model.path
        self._sides = sides
        self._key = key
        self._kept = kept

    def read(self) -> Floats:
        """Its values, flat."""
        from aprcore.engines.forward import forward, needed_keys
        from aprcore.engines.numpy import NumpyBackend

        model, tokens = self._sides.model, self._sides.header.tokens
        assert model is not None and tokens is not None
        wants = self._key.__eq__
        try:
            needed = needed_keys(self._sides.graph, wants, self._kept)
            given = {key: self._kept[key] for key in needed if key in self._kept}
        except (KeyError, OSError) as error:  # closed meanwhile, or a disk that fails
            raise TraceError("what was kept of the run is gone", hint="run again") from error
        if self._key in given:
            return given[self._key].reshape(-1)
        backend = NumpyBackend(self._sides.threads)
        stream = forward(self._sides.graph, model.weights, backend, tokens, wants, given=given)
        _, tensor = next(stream)
        values: Float32 = np.ascontiguousarray(tensor).reshape(-1)
        return values

    def plane(self, layout: Layout) -> Plane | None:
        """None: it is nowhere but in memory."""
        return None


def _open_plane(
    source: _Stored | _Made, layout: Layout, report: StageReport, side: str,
    sides: Sides,
) -> Plane:  # fmt: skip
    """One side in a layout, read as it was judged."""
    key, sizes, operation = report.key, sides.sizes, sides.graph.operation(report.key)
    is_whole = source.count == math.prod(layout.shape)
    clauses = (clause.rpartition(" in the ") for clause in report.permuted.split("; "))
    name = next((name for name, _, where in clauses if where == side), None)
    plane = source.plane(layout) if is_whole and name is None else None
    if plane is not None:
        return plane
    x = source.read().reshape(-1)
    if not is_whole:
        last = last_token(key, x, sizes, math.prod(layout.shape))
        assert last is not None, "one side was judged to be the last token of the other"
        x, _ = last
    if name is None:
        return MemoryPlane(_canonical(operation, x, layout), layout)
    fits = []
    for num_kv_heads in (sizes.get("K"), None):
        for other, reading in alternatives(operation, x, layout, num_kv_heads=num_kv_heads):
            if other != name:
                continue
            values = _canonical(operation, reading, layout)
            if _agrees(values, report, side):
                return MemoryPlane(values, layout)
            fits.append(values)
    if not fits:
        raise changed(source.where, f"{key} cannot be read as {name!r}")
    return MemoryPlane(fits[0], layout)


def _canonical(operation: Operation | None, x: Floats, layout: Layout) -> Float32:
    values = zero_masked(operation, x, layout)
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1)


def _agrees(values: Float32, report: StageReport, side: str) -> bool:
    """Whether a reading has the values that the report lists: several have the same name."""
    if report.comparison is None:
        return True
    top = report.comparison.top
    listed = top.a if side == "trace" else top.b
    return np.array_equal(values[top.indices], listed, equal_nan=True)
