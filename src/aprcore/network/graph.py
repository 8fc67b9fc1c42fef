"""The graph of a model: every intermediate tensor of a pass, what it reads and what makes it.

An architecture (`aprcore.network.architectures`) says what a layer consists of; `Graph` resolves
that for one configuration, a layer at a time, since layers may differ. Everything else asks the
graph: the passes, the judge, the oracle, directories, causes and the screen. Nothing outside this
package knows a stage by its name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property

from aprcore.ground.errors import PlanError
from aprcore.network.architectures import (
    ARCHITECTURES,
    find_architecture,
    known_names,
    known_rows,
    outline_config,
)
from aprcore.network.config import ModelConfig
from aprcore.network.operations import Operation
from aprcore.network.stages import (
    ALIASES,
    MOST_LAYERS,
    Builder,
    Row,
    Scope,
    Stage,
    StageKey,
    resolve_shape,
)


class Graph:
    """The stages of one model.

    Layers are resolved when they are asked for, so that an absurd number of them costs nothing.

    Attributes:
        config: What was resolved.
        num_layers: One more than the highest layer.
        layers: Those that are there, in order: all, or of a run whose model is not at hand those
            that something was recorded of. Each reads what the one before it made.
    """

    def __init__(
        self,
        config: ModelConfig,
        also: Collection[str] = (),
        last_rows: Collection[StageKey] = (),
        layers: Collection[int] | None = None,
    ) -> None:
        """Resolve a configuration.

        Args:
            config: The configuration; its architecture says what there is.
            also: Conditional stages that are there whether the model has them or not.
            last_rows: Tensors of which there is the last token's row only.
            layers: The layers that are there; None for all.
        """
        self.config = config
        self.num_layers = config.num_layers
        inside = range(self.num_layers)
        self.layers: Sequence[int] = (
            inside if layers is None else sorted(layer for layer in layers if layer in inside)
        )
        self._also = frozenset(also)
        self._last_rows = frozenset(last_rows)
        self._architecture = find_architecture(config.architecture)
        self._layers: dict[int | None, Mapping[str, Row]] = {}
        builder = Builder(config, None, also=self._also)
        self._stream = self._architecture.begin(builder)
        self._begin = tuple(builder.rows)

    def including(self, names: Iterable[str]) -> Graph:
        """The same with conditional stages that someone recorded: an oracle's bias, say."""
        more = self._also | set(names)
        if more == self._also:
            return self
        return Graph(self.config, more, self._last_rows, self.layers)

    def with_last_rows(self, keys: Iterable[StageKey]) -> Graph:
        """The same for an engine that goes on with the last token's row only from these on.

        Engines drop what no logits are asked for behind the last layer's attention.
        """
        rows = frozenset(keys)
        if rows == self._last_rows:
            return self
        return Graph(self.config, self._also, rows, self.layers)

    def layer(self, number: int | None) -> Mapping[str, Row]:
        """The rows of a layer, or of what follows the layers, by name in order of computation."""
        found = self._layers.get(number)
        if found is None:
            found = {row.stage.name: self._narrowed(row) for row in self._build(number)}
            self._layers[number] = found
        return found

    def _build(self, number: int | None) -> Iterator[Row]:
        builder = Builder(self.config, number, self.stream(number), self._also)
        if number == 0:
            yield from self._begin
        if number is None:
            self._architecture.end(builder)
        else:
            self._architecture.layer(builder)
        yield from builder.rows

    def _narrowed(self, row: Row) -> Row:
        if row.key not in self._last_rows:
            return row
        return row._replace(stage=replace(row.stage, last_token=True))

    @cached_property
    def _last_name(self) -> str:
        """What every layer calls its output; layers differ in what is between."""
        builder = Builder(self.config, 0, self._stream, self._also)
        self._architecture.layer(builder)
        return builder.rows[-1].stage.name

    @cached_property
    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor of a pass, in the order of computation."""
        layers: list[int | None] = [*self.layers, None]
        return tuple(row.key for number in layers for row in self.layer(number).values())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, StageKey) and self.find(key) is not None

    def find(self, key: StageKey) -> Row | None:
        """The row of a tensor, or None if the model has no such tensor."""
        if key.layer is not None and not 0 <= key.layer < self.num_layers:
            return None
        return self.layer(key.layer).get(key.stage)

    def stage(self, key: StageKey) -> Stage:
        """What a tensor is: as this model has it, else as it is known elsewhere."""
        row = self.find(key)
        return known_stages()[key.stage] if row is None else row.stage

    def operation(self, key: StageKey) -> Operation | None:
        """What makes a tensor; None where this model has none that does."""
        row = self.find(key)
        return None if row is None else row.stage.operation

    def inputs(self, key: StageKey) -> tuple[StageKey, ...]:
        """The tensors that a stage reads, in argument order; none of one that is not here."""
        row = self.find(key)
        return () if row is None else row.inputs

    def readers(self, key: StageKey) -> tuple[StageKey, ...]:
        """The tensors that read one, in the order of computation."""
        near: list[int | None] = [key.layer]
        if key.layer is not None:
            after = bisect_left(self.layers, key.layer + 1)
            near.append(self.layers[after] if after < len(self.layers) else None)
        return tuple(
            row.key for n in near for row in self.layer(n).values() if key in row.inputs
        )  # fmt: skip

    def ancestors(
        self, key: StageKey, goes_on: Callable[[StageKey], bool]
    ) -> Iterator[tuple[StageKey, StageKey]]:
        """What a stage was made from, the nearest first, each with the stage that reads it.

        Args:
            key: The stage.
            goes_on: Whether to go on to what an ancestor was made from in its turn.
        """
        unseen, visited = deque([key]), {key}
        while unseen:
            reader = unseen.popleft()
            for source in self.inputs(reader):
                if source not in visited:
                    visited.add(source)
                    yield source, reader
                    if goes_on(source):
                        unseen.append(source)

    def shape(self, key: StageKey, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The canonical shape of a tensor in numbers.

        Raises:
            KeyError: `sizes` lacks a letter that the shape uses.
        """
        return resolve_shape(self.stage(key).shape, sizes)

    def order(self, key: StageKey) -> tuple[int, int]:
        """Sorts keys into the order of computation, whole-model stages last."""
        return computation_order(key)

    def stream(self, layer: int | None) -> StageKey:
        """The residual stream that a layer is given, or what follows the layers (None)."""
        before = len(self.layers) if layer is None else bisect_left(self.layers, layer)
        return StageKey(self.layers[before - 1], self._last_name) if before else self._stream

    def is_stream(self, key: StageKey) -> bool:
        """Whether a tensor is the residual stream between two layers."""
        return key == self._stream or (key.layer is not None and key.stage == self._last_name)

    def of_kind(self, layer: int | None, kind: type[Operation]) -> tuple[StageKey, ...]:
        """The tensors of a layer that an operation of this kind makes."""
        rows = self.layer(layer).values()
        return tuple(row.key for row in rows if isinstance(row.stage.operation, kind))

    @property
    def embedding(self) -> StageKey:
        """The tensor that the first layer is given."""
        return self._stream

    @cached_property
    def logits(self) -> StageKey:
        """The tensor that the next token is chosen from."""
        return [*self.layer(None).values()][-1].key


class Inheritance:
    """What the recorded stages say, handed on through those that nobody recorded.

    A residual stream that was not recorded leads from every stage to every earlier one; here it is
    walked once, however many ask. Stages are told of and asked about in the order of computation.
    """

    def __init__(self, graph: Graph) -> None:
        """Start with no stage recorded."""
        self._graph = graph
        self._said: dict[StageKey, int] = {}

    def tell(self, key: StageKey, flags: int) -> None:
        """Say something of a recorded stage, in bits."""
        self._said[key] = flags

    def before(self, key: StageKey) -> int:
        """Every bit that one of the nearest recorded ancestors of a stage has."""
        unseen = list(self._graph.inputs(key))
        while unseen:
            source = unseen[-1]
            if source in self._said:
                unseen.pop()
                continue
            waiting = [k for k in self._graph.inputs(source) if k not in self._said]
            unseen += waiting
            if not waiting:
                self._said[source] = self._merge(source)
        return self._merge(key)

    def _merge(self, key: StageKey) -> int:
        flags = 0
        for source in self._graph.inputs(key):
            flags |= self._said[source]
        return flags


@cache
def known_stages() -> Mapping[str, Stage]:
    """Every stage of every architecture by name, in an order of computation that fits them all."""
    names: list[str] = []
    stages: dict[str, Stage] = {}
    for rows in known_rows():
        after = 0
        for row in rows:
            name = row.stage.name
            if name in stages:
                after = names.index(name) + 1
                continue
            stages[name] = row.stage
            names.insert(after, name)
            after += 1
    return {name: stages[name] for name in names}


def find_stage(name: str) -> Stage:
    """A stage of any architecture, by its name in any case or by an alias.

    Raises:
        PlanError: No stage has that name; the message lists those that exist.
    """
    lowered = name.strip().lower()
    stage = known_stages().get(ALIASES.get(lowered, lowered))
    if stage is None:
        raise PlanError(f"unknown stage {name!r}", hint=f"stages are {', '.join(known_stages())}")
    return stage


@cache
def parse_path(path: str) -> StageKey | None:
    """The key of a path such as "layer-3/attn_norm" or "lm_head", or None if it names no stage.

    A stage of the first layer at the top level is read as layer 0's.
    """
    folder, _, name = path.rpartition("/")
    name = ALIASES.get(name, name)
    stage = known_stages().get(name)
    if stage is None:
        return None
    if not folder:
        if stage.scope is Scope.MODEL:
            return StageKey(None, name)
        return StageKey(0, name) if stage.scope is Scope.FIRST_LAYER else None
    number = folder.removeprefix("layer-")
    if number == folder or not (number.isascii() and number.isdigit() and len(number) <= 10):
        return None
    if int(number) >= MOST_LAYERS:
        return None
    if stage.scope is Scope.MODEL or (stage.scope is Scope.FIRST_LAYER and int(number) != 0):
        return None
    return StageKey(int(number), name)


@cache
def _positions() -> Mapping[str, int]:
    return {name: position for position, name in enumerate(known_stages())}


def computation_order(key: StageKey) -> tuple[int, int]:
    """Sorts keys of any model into the order of computation, whole-model stages last."""
    layer = 1 << 62 if key.layer is None else key.layer
    return layer, _positions()[key.stage]


def outline(
    num_layers: int, present: Collection[str], architecture: str | None = None,
    layers: Collection[int] | None = None,
) -> Graph:  # fmt: skip
    """The graph of a run whose model is not at hand, from the names of its stages.

    Sizes and numbers of its configuration mean nothing; what reads what does.

    Args:
        num_layers: One more than the highest layer.
        present: Names of stages that were recorded.
        architecture: The architecture, if it is known; else the first that has most of the stages.
        layers: The layers that something was recorded of; None for all.
    """
    if architecture is None or architecture not in ARCHITECTURES:
        names = set(present)
        architecture = min(ARCHITECTURES, key=lambda a: len(names - known_names(a)))
    return Graph(outline_config(architecture, num_layers), present, layers=layers)
