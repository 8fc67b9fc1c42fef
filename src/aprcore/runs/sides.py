"""The two sides of a run: what is under test, and what it is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.source import PartlyRead, StageSource
from aprcore.engines.arithmetic import EngineArithmetic
from aprcore.engines.estimate import is_blocked, is_large
from aprcore.ground.errors import AprError
from aprcore.judging.layouts import (
    hidden_rows,
    is_readable,
    last_rows,
    layout_of,
    zero_masked,
)
from aprcore.judging.replay import RecordedSide, Rows
from aprcore.network.graph import Graph, computation_order
from aprcore.network.stages import StageKey
from aprcore.records.report import RunHeader

if TYPE_CHECKING:
    from aprcore.models.model import Model
    from aprcore.network.backend import Backend, KeyValueCache

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Sides:
    """Two open sides that may be compared.

    Attributes:
        header: What will be judged.
        model: The open model, if there is one.
        trace: The dump under test; None when the model is traced.
        oracle: The reference, if there is one.
        sizes: Numbers for the letters of symbolic shapes, as far as known.
        graph: The stages of the model, or those that the dumped ones give away.
        not_computed: Rows whose oracle is missing and which nothing else needs.
        arithmetic: What the engine behind the trace computes in.
        oracle_arithmetic: The same of the oracle's.
        bound_alone: The cumulative bound where neither other judgment can be made.
        cumulative_only: Whether neither other judgment is asked for.
        threads: Threads of the CPU path.
        reference: A float model that the quantised one was made of, if it is at hand.
        past: Keys and values before the trace, in a decoding step.
        layouts: By stage another layout that most of the trace's were found to have.
        other: A second dump that the trace is held against, as if it were under test itself.
    """

    header: RunHeader
    model: Model | None
    trace: StageSource | None
    oracle: StageSource | None
    sizes: Mapping[str, int]
    graph: Graph
    not_computed: frozenset[StageKey]
    arithmetic: EngineArithmetic
    oracle_arithmetic: EngineArithmetic
    bound_alone: float
    cumulative_only: bool
    threads: int | None
    reference: Model | None = None
    other: Sides | None = None
    past: KeyValueCache | None = None
    layouts: Mapping[str, str] = field(default_factory=dict)

    def recorded(self) -> tuple[RecordedSide | None, RecordedSide | None]:
        """Both sides as the judge replays them: (trace, oracle), None where that is impossible."""
        model, num_tokens = self.model, self.sizes.get("T")
        if model is None or num_tokens is None or self.cumulative_only:
            return None, None
        trace = RecordedSide(
            self._graph_of(self.trace), model.weights, self.header.tokens, num_tokens,
            self.arithmetic,
            read=None if self.trace is None else self.reader(self.trace), past=self.past,
            read_unmasked=None if self.trace is None else self.reader(self.trace, unmasked=True),
            read_rows=None if self.trace is None else self._row_reader(self.trace),
        )  # fmt: skip
        if self.oracle is None:
            return trace, None
        oracle = RecordedSide(
            self._graph_of(self.oracle), model.weights,
            self.header.tokens, num_tokens,
            self.oracle_arithmetic, weights_rounded=True, read=self.reader(self.oracle),
            read_rows=self._row_reader(self.oracle),
        )  # fmt: skip
        return trace, oracle

    def _graph_of(self, dump: StageSource | None) -> Graph:
        """The stages as one side has them."""
        if dump is None:
            return self.graph
        rows = last_rows(self.graph, dump.counts, self.sizes)
        graph = self.graph.with_last_rows(rows)
        return graph.including(k.stage for k in dump.keys()) if dump is self.oracle else graph

    def reader(
        self, directory: StageSource, *, unmasked: bool = False
    ) -> Callable[[StageKey], Floats | None]:
        """Tensors of a directory in the shape of the table; None for other shapes.

        Args:
            directory: What to read.
            unmasked: Whether what a mask hides stays as it was dumped.
        """
        graph = self._graph_of(directory)

        def read(key: StageKey) -> Floats | None:
            if key not in directory or not directory.is_exact(key):
                return None
            x = directory.read(key)
            layout = layout_of(key, self.sizes, x.size)
            if not is_readable(graph, key, layout, self.sizes):
                return None
            if not unmasked:
                x = zero_masked(self.graph.operation(key), x, layout)
            return x.reshape(layout.shape)

        return read

    def _row_reader(self, dump: StageSource) -> Callable[[StageKey], Rows | None]:
        """As `reader`, of tensors that are too large to be kept: rows of a head, from the file."""
        if not isinstance(dump, PartlyRead):
            return lambda key: None
        graph, parts = self._graph_of(dump), dump

        def find(key: StageKey) -> Rows | None:
            # Of a dump's many tensors few are so large.
            if not is_large(dump.counts.get(key, 0)) or not dump.is_exact(key):
                return None
            layout = layout_of(key, self.sizes, dump.counts[key])
            if not is_blocked(layout.shape) or not is_readable(graph, key, layout, self.sizes):
                return None
            _, tokens, positions = layout.shape

            def read(head: int, rows: slice) -> Floats:
                first = head * tokens
                x = parts.read_part(
                    key, (first + rows.start) * positions, (first + rows.stop) * positions
                ).reshape(-1, positions)
                hidden = hidden_rows(self.graph.operation(key), rows, tokens, positions)
                if hidden is not None:
                    x[hidden] = 0
                return x

            return Rows(layout.shape, read)

        return find

    def tensors(
        self, backend: Backend | None = None, ahead: int = 0
    ) -> Iterator[tuple[StageKey, Floats | None]]:
        """Every row of the header in order, with the tensor under test (None: it lacks it).

        Tensors that rows read, but that are no rows themselves, come along in their place.

        Args:
            backend: Where to compute, if there is no trace; None for the CPU path. What comes, and
                in which order, does not depend on it.
            ahead: As for `aprcore.engines.forward.trace`. By default each tensor is computed when
                it is asked for, so that callers can tell what it takes.
        """
        if self.trace is not None:
            for key in self.header.keys:
                yield key, self.trace.read(key) if key in self.trace else None
            return
        assert self.model is not None and self.header.tokens is not None
        from aprcore.engines.forward import needed_keys, trace
        from aprcore.engines.numpy import NumpyBackend

        graph = self.graph
        rows = {k for k in self.header.keys if k in graph and k not in self.not_computed}
        wanted = set(needed_keys(graph, rows.__contains__))
        stream = trace(
            graph, self.model.weights, backend or NumpyBackend(self.threads),
            self.header.tokens, wanted.__contains__, ahead=ahead,
        )  # fmt: skip
        for key in sorted(wanted.union(self.header.keys), key=computation_order):
            if key not in wanted:
                yield key, None
                continue
            made, tensor = next(stream)
            assert made == key, f"{made} was computed where {key} was expected"
            yield (key, tensor) if key not in self.not_computed else (key, None)
            del tensor  # it may be large, and the next one is made before it is replaced

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """Text of token ids, as far as a tokenizer is at hand."""
        return {} if self.model is None else token_texts(self.model, ids)


def token_texts(model: Model, ids: Iterable[int]) -> dict[int, str]:
    """Text of token ids; empty where the model has no usable tokenizer."""
    try:
        tokenizer = model.tokenizer()
        return {token: tokenizer.token_text(token) for token in ids}
    except AprError:
        return {}
