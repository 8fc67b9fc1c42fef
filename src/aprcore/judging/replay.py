"""Replaying single stages: what the judge expects of a stage, given a side's own inputs.

A side (the trace, or the oracle) is a set of tensors. A stage of it is replayed on the tensors that
the side itself recorded; where an input was not recorded, because an engine fuses operations, it is
recomputed from the nearest recorded ancestors, and the span that is then judged as one is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.arithmetic import EngineArithmetic, group
from aprcore.engines.estimate import BlockedEstimate, Estimate, Profile, is_blocked
from aprcore.engines.prediction import PredictionBackend
from aprcore.judging.compare import compare, compare_pieces, count_finite
from aprcore.judging.layouts import Layout, alternatives, layout_of
from aprcore.judging.noise import AssessedBlocks, allowed_ratio, assess
from aprcore.judging.verdict import Judgment
from aprcore.network.backend import KeyValueCache, Site
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey
from aprcore.network.weights import Weight

Floats = NDArray[np.floating[Any]]
Int64 = NDArray[np.int64]
Read = Callable[[StageKey], "Floats | None"]


class Rows(NamedTuple):
    """A tensor of [H, T, S] values that is too large to be kept.

    Attributes:
        shape: H, T and S.
        read: Rows of a head, [rows, S].
    """

    shape: tuple[int, ...]
    read: Callable[[int, slice], Floats]


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a stage should have given.

    Attributes:
        estimate: Expected values and the variance of a sound engine's error, flat.
        span: Recorded stages that a judgment over several operations starts from; empty when the
            stage was replayed on its own inputs.
        recomputed: Stages inside the span that were not recorded; recording them narrows it.
    """

    estimate: Estimate
    span: tuple[StageKey, ...] = ()
    recomputed: tuple[StageKey, ...] = ()


class RecordedSide:
    """The tensors of one side, each kept until no later stage can read it.

    Attributes:
        engine: What the side's engine computes in.
        weights_rounded: As in `Profile`.
        layouts: By stage another layout than the canonical one that the engine was found to have.
        graph: The stages of the model, with those that only this side recorded.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Weight],
        tokens: Sequence[int] | None,
        num_tokens: int,
        engine: EngineArithmetic,
        *,
        weights_rounded: bool = False,
        read: Read | None = None,
        read_unmasked: Read | None = None,
        read_rows: Callable[[StageKey], Rows | None] | None = None,
        past: KeyValueCache | None = None,
    ) -> None:
        """Start with no tensor recorded.

        Args:
            graph, weights: The model whose operations are replayed.
            tokens: Token ids; without them the embedding cannot be replayed.
            num_tokens: T.
            engine: What the side's engine computes in.
            weights_rounded: As in `Profile`.
            read: Fetches a tensor that was not put in by `record`, or None where there is none.
            read_unmasked: The same with what a mask hides as it was dumped.
            read_rows: Fetches rows of one that is too large to be kept; None of any other.
            past: Keys and values before a decoding step, on the host; None for a full pass.
        """
        self.engine = engine
        self.weights_rounded = weights_rounded
        self.graph = graph
        self._weights = weights
        self._tokens = None if tokens is None else np.asarray(tokens, dtype=np.int64)
        self._past = None if past is None else past.converted(PredictionBackend([]).from_host)
        self._num_past = 0 if past is None else past.num_positions
        self._positions = np.arange(self._num_past, self._num_past + num_tokens)
        self._read = read
        self._read_unmasked = read_unmasked
        self._read_rows = read_rows
        self._recorded: dict[StageKey, Floats | None] = {}
        self._replayed: dict[StageKey, Expectation | None] = {}
        self._layer: int | None = -1
        self.layouts: dict[str, str] = {}

    def record(self, key: StageKey, tensor: Floats, *, is_as_dumped: bool = False) -> None:
        """Add a tensor in canonical layout; later stages may read it.

        Args:
            key: Which.
            tensor: Its values.
            is_as_dumped: Whether its dump holds the same: a large one is then read there again.
        """
        if not (is_as_dumped and self._rows(key) is not None):
            self._recorded[key] = tensor

    def _rows(self, key: StageKey) -> Rows | None:
        return None if self._read_rows is None else self._read_rows(key)

    def enter(self, key: StageKey) -> None:
        """Forget what neither this stage nor a later one reads: earlier layers but their output."""
        if key.layer == self._layer:
            return
        self._layer = key.layer
        # The last layer may yet have to be recomputed for the stages of the whole model.
        kept = {self.graph.num_layers - 1 if key.layer is None else key.layer, None}
        inputs = {self.graph.stream(key.layer)}
        for held in (self._recorded, self._replayed):
            for old in [k for k in held if k.layer not in kept and k not in inputs]:
                del held[old]

    def profile(self, key: StageKey) -> Profile:
        """What the engine rounds in a stage."""
        operation = self.graph.operation(key)
        types = () if operation is None else self.weight_types(key)
        return Profile(self.engine.of(operation, types), self.weights_rounded)

    def weight_types(self, key: StageKey) -> tuple[str, ...]:
        """The stored types of the weights that a stage uses."""
        operation = self.graph.operation(key)
        if operation is None:
            return ()
        site = self.site(key)
        found = (site.find(use.name) for use in operation.weights)
        return tuple(sorted({weight.dtype for weight in found if weight is not None}))

    def hidden_parts(self, key: StageKey) -> tuple[str, ...]:
        """The operations, as in `EngineArithmetic.parts`, whose results a stage has recomputed."""
        hidden: dict[str, None] = {}
        for source in (k for x in self.inputs(key) or () for k in x.recomputed):
            operation = self.graph.operation(source)
            if operation is not None and operation.role:
                hidden[group(operation, self.weight_types(source))] = None
        return tuple(hidden)

    def recorded_keys(self) -> tuple[StageKey, ...]:
        """The tensors that are held at present."""
        return tuple(key for key, x in self._recorded.items() if x is not None)

    def sizes(self) -> Mapping[str, int]:
        """Numbers for the letters of symbolic shapes."""
        num_tokens = self._positions.size
        return self.graph.config.sizes(num_tokens, self._num_past + num_tokens)

    def site(self, key: StageKey) -> Site:
        """Where a stage runs."""
        tokens = self._positions * 0 if self._tokens is None else self._tokens
        past = None if self._past is None else self._past.copy()
        return Site(self.graph.config, tokens, self._positions, key.layer, self._weights, past)

    def tensor(self, key: StageKey) -> Floats | None:
        """A recorded tensor as [T, C] or [H, T, S], or None."""
        if key not in self._recorded:
            self._recorded[key] = None if self._read is None else self._read(key)
        return self._recorded[key]

    def peek(self, key: StageKey) -> Floats | None:
        """As `tensor`, without keeping what had to be fetched."""
        if key in self._recorded:
            return self._recorded[key]
        return None if self._read is None else self._read(key)

    @property
    def past(self) -> KeyValueCache | None:
        """Keys and values before a decoding step."""
        return None if self._past is None else self._past.converted(lambda x: x.value)

    def reorder_past(self, key: StageKey, name: str) -> None:
        """Read cached keys in another layout, that which an engine's keys were found to have."""
        held = None if self._past is None else self._past.held.get((key.layer, "k"))
        operation = self.graph.operation(key)
        if self._past is None or held is None or getattr(operation, "part", "") != "k":
            return
        sizes = self.graph.config.sizes(self._num_past)
        flat = held.value.reshape(-1)
        layout = layout_of(key, sizes, flat.size)
        for found, rows in alternatives(operation, flat, layout, num_kv_heads=sizes["K"]):
            if found == name:
                value = rows.reshape(held.value.shape)
                self._past.held[key.layer, "k"] = Estimate(value, held.variance)

    def unmasked(self, key: StageKey) -> Floats | None:
        """A recorded tensor with what a mask hides, where the dump shows it."""
        return None if self._read_unmasked is None else self._read_unmasked(key)

    def with_engine(self, engine: EngineArithmetic) -> RecordedSide:
        """A copy of another arithmetic; what was recomputed is forgotten."""
        other = copy(self)
        other.engine = engine
        other._replayed = {}
        return other

    def with_tensor(self, key: StageKey, tensor: Floats) -> RecordedSide:
        """A copy that holds another tensor of one stage; what was recomputed is forgotten."""
        other = copy(self)
        other._recorded = self._recorded | {key: tensor}
        other._replayed = {}
        return other

    def inputs(self, key: StageKey) -> list[Expectation] | None:
        """The inputs of a stage, recorded or recomputed; None if that cannot be done."""
        found = []
        if key not in self.graph:
            return None
        for source in self.graph.inputs(key):
            known = self._input(source, key.layer)
            if known is None:
                return None
            found.append(known)
        if not found and self._tokens is None:
            return None
        return found

    def _input(self, key: StageKey, layer: int | None) -> Expectation | None:
        rows = None if key in self._recorded else self._rows(key)
        recorded = self.tensor(key) if rows is None else None
        if recorded is not None and is_blocked(recorded.shape):
            rows = Rows(recorded.shape, lambda head, rows: recorded[head, rows])
        if rows is not None:
            blocks = self._in_blocks(key, rows)
            return Expectation(blocks, (key,)) if blocks.is_finite() else None
        if recorded is not None:
            if not np.isfinite(recorded).all():
                return None
            value = np.asarray(recorded, dtype=np.float64)
            return Expectation(Estimate(value, self._lost_on_dump(key, value)), (key,))
        if key not in self._replayed:
            self._replayed[key] = self._recompute(key, layer)
        return self._replayed[key]

    def _in_blocks(self, key: StageKey, recorded: Rows) -> BlockedEstimate:
        """A large recorded tensor, in float64 a block at a time."""

        def make(head: int, rows: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            value = np.asarray(recorded.read(head, rows), dtype=np.float64)
            return value, self._lost_on_dump(key, value)

        heads, tokens, positions = recorded.shape
        is_exact = not self.profile(key).arithmetic.rounds_on_dump
        return BlockedEstimate((heads, tokens, positions), make, is_exact=is_exact)

    def _lost_on_dump(self, key: StageKey, value: Floats) -> NDArray[np.float64]:
        """The variance of a recorded tensor about what the engine computed with."""
        arithmetic = self.profile(key).arithmetic
        if not arithmetic.rounds_on_dump:
            return np.broadcast_to(0.0, value.shape)
        # What was recorded as zero may have been anything below half of the smallest number.
        step = np.maximum(arithmetic.stored.spacing(value), arithmetic.stored.smallest)
        return np.square(step) / 12

    def _recompute(self, key: StageKey, layer: int | None) -> Expectation | None:
        """A tensor that was not recorded, from its ancestors within one layer."""
        last = self.graph.num_layers - 1 if layer is None else layer
        if key.layer is not None and key.layer < last:
            return None
        inputs = self.inputs(key)
        if inputs is None:
            return None
        backend = PredictionBackend([(None, self.profile(key))])
        estimate = run_stage(backend, self.site(key), self.graph, key, [x.estimate for x in inputs])
        if estimate is None or not estimate.is_finite():
            return None
        return Expectation(estimate, _starts(inputs), (*_recomputed(inputs), key))

    def expect(self, key: StageKey) -> Expectation | None:
        """What this side should hold for a stage; None where that cannot be known."""
        inputs = self.inputs(key)
        if inputs is None:
            return None
        backend = PredictionBackend([(None, self.profile(key))])
        estimate = run_stage(backend, self.site(key), self.graph, key, [x.estimate for x in inputs])
        return None if estimate is None else self.expectation(key, inputs, estimate)

    def rounded(self, key: StageKey) -> NDArray[np.float64] | None:
        """What an engine gives for a stage that rounds every result on the way as this one does.

        `expect` leaves values that are not recorded as they are, and counts what rounding them may
        do; here each is rounded, which is right but for ties. None where that cannot be known.
        """
        inputs = []
        for source in self.graph.inputs(key):
            recorded = self.tensor(source)
            value = self.rounded(source) if recorded is None else recorded.astype(np.float64)
            if value is None or (key.layer is not None and source.layer != key.layer
                                 and recorded is None):  # fmt: skip
                return None
            inputs.append(Estimate(value, np.broadcast_to(0.0, value.shape)))
        if not inputs and self._tokens is None:
            return None
        profile = self.profile(key)
        backend = PredictionBackend([(None, profile)])
        made = run_stage(backend, self.site(key), self.graph, key, inputs)
        return None if made is None else profile.arithmetic.stored.round(made.whole().value)

    def expect_from(self, key: StageKey, inputs: Sequence[Floats]) -> Expectation | None:
        """As `expect`, with these tensors for inputs."""
        backend = PredictionBackend([(None, self.profile(key))])
        values = [np.asarray(x, dtype=np.float64) for x in inputs]
        exact = [Estimate(x, np.broadcast_to(0.0, x.shape)) for x in values]
        estimate = run_stage(backend, self.site(key), self.graph, key, exact)
        return None if estimate is None else Expectation(estimate)

    def expectation(
        self, key: StageKey, inputs: Sequence[Expectation], estimate: Estimate
    ) -> Expectation:
        """The estimate of a stage with the span that it covers, if it is more than the stage."""
        recomputed = _recomputed(inputs)
        return Expectation(estimate, _starts(inputs) if recomputed else (), recomputed)


def _starts(inputs: Iterable[Expectation]) -> tuple[StageKey, ...]:
    return tuple(dict.fromkeys(key for x in inputs for key in x.span))


def _recomputed(inputs: Iterable[Expectation]) -> tuple[StageKey, ...]:
    return tuple(dict.fromkeys(key for x in inputs for key in x.recomputed))


def run_stage(
    backend: PredictionBackend,
    site: Site,
    graph: Graph,
    key: StageKey,
    inputs: Sequence[Estimate],
) -> Estimate | None:
    """One stage on the prediction backend; None if the model lacks what the stage needs."""
    operation = graph.operation(key)
    if operation is None:
        return None
    if any(use.needed and site.find(use.name) is None for use in operation.weights):
        return None
    past = site.cache
    if (
        operation.cached and past is not None and past.num_positions
        and (site.layer, operation.cached) not in past.held
    ):  # fmt: skip
        return None  # what lies before a decoding step is not known
    if graph.stage(key).last_token:
        inputs = [backend.rows(x, x.value.shape[0] - 1, x.value.shape[0]) for x in inputs]
    result: Estimate = operation(backend, site, *inputs)
    return result


def expect_both(
    trace: RecordedSide | None, oracle: RecordedSide | None, key: StageKey
) -> tuple[Expectation | None, Expectation | None]:
    """`expect` of both sides; a stage that works row by row reads its weights once for both."""
    if trace is None or oracle is None:
        return (
            None if trace is None else trace.expect(key),
            None if oracle is None else oracle.expect(key),
        )
    operation = trace.graph.operation(key)
    if operation is None or not operation.row_wise:
        return trace.expect(key), oracle.expect(key)
    traced, captured = trace.inputs(key), oracle.inputs(key)
    if traced is None or captured is None or trace.graph.inputs(key) != oracle.graph.inputs(key):
        return trace.expect(key), oracle.expect(key)
    last = trace.graph.stage(key).last_token
    stacked = [_stack(a.estimate, b.estimate, last) for a, b in zip(traced, captured)]
    rows = stacked[0].value.shape[0] // 2
    profiles = trace.profile(key), oracle.profile(key)
    backend = PredictionBackend([(rows, profile) for profile in profiles])
    site = trace.site(key)
    site = Site(site.config, site.tokens, np.tile(site.positions, 2), site.layer, site.weights)
    both: Estimate = operation(backend, site, *stacked)
    dof = both.token_dof if profiles[0].rounds_weights else None
    shared = both.correlation
    first = Estimate(both.value[:rows], both.variance[:rows], dof, shared)
    second = Estimate(both.value[rows:], both.variance[rows:], both.token_dof, shared)
    return (
        trace.expectation(key, traced, first),
        oracle.expectation(key, captured, second),
    )


def _stack(a: Estimate, b: Estimate, last_token: bool) -> Estimate:
    rows = slice(-1, None) if last_token else slice(None)
    value = np.concatenate([a.value[rows], b.value[rows]])
    if not (np.any(a.variance) or np.any(b.variance)):
        return Estimate(value, np.broadcast_to(0.0, value.shape))
    variance = np.concatenate([a.variance[rows], b.variance[rows]])
    return Estimate(value, variance, None, max(a.correlation, b.correlation))


def make_judgment(x: Floats, expected: Expectation, layout: Layout) -> Judgment | None:
    """A tensor against what its side's own inputs say it should be; None if that is not finite."""
    estimate = expected.estimate
    if count_finite(x) < x.size:
        return None
    if isinstance(estimate, BlockedEstimate) and len(layout.factors) == 3:
        blocks = AssessedBlocks(x, estimate, layout)
        if not blocks.is_finite:
            return None
        found = compare_pieces(blocks.pieces())
        assessment = blocks.assessment()
    else:
        if not estimate.is_finite():
            return None
        found = compare(x, estimate.value)
        assessment = assess(x, estimate, layout)
    bound = assessment.floor * math.sqrt(float(allowed_ratio(float(max(1, x.size)))))
    return Judgment(
        found.relative_l2, found.cosine, bound, assessment, expected.span, expected.recomputed
    )  # fmt: skip
