"""Ranks of a tensor-parallel engine: told by their sizes, and joined to what the whole run holds.

Each rank has some of the heads and of the feed-forward network's columns. What is made of those is
narrower by the number of ranks; the projections back to the residual stream give a part of a sum in
each, until they are added up; everything else is computed by every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.sidecar import Sidecar
from aprcore.dumps.source import StageSource
from aprcore.ground.errors import TraceError
from aprcore.judging.layouts import last_rows
from aprcore.network.backend import KeyValueCache
from aprcore.network.config import ModelConfig
from aprcore.network.graph import Graph
from aprcore.network.operations import Linear
from aprcore.network.stages import StageKey, resolve_shape, split_axes

Float32 = NDArray[np.float32]

MOST_RANKS = 64
_SPLIT = frozenset({"H", "K", "(H+2K)", "F", "V"})
# Ranks that compute the same round the same; parts of a sum are nothing like each other.
_SAME = 1e-3


class Split(NamedTuple):
    """How a dump is narrower than its model.

    Attributes:
        ranks: Of how many it is one.
        key: A stage that shows it.
        held: How many values that has.
        due: How many it has in the whole run.
    """

    ranks: int
    key: StageKey
    held: int
    due: int


def find_split(
    graph: Graph, counts: Mapping[StageKey, int], sizes: Mapping[str, int]
) -> Split | None:
    """Of how many ranks a dump is one; None if it is whole, or narrow in another way."""
    lasts = last_rows(graph, counts, sizes)
    dues = {key: _count(graph, key, sizes) for key in counts if key in graph and key not in lasts}
    narrow = [key for key, due in dues.items() if counts[key] != due]
    stages = {key.stage for key in narrow}
    in_part = any(key.stage in stages and counts[key] == due for key, due in dues.items())
    # A rank has its share of every column-parallel product: one that is whole speaks against it.
    is_product_whole = any(
        counts[key] == due and _is_split(graph, key) and isinstance(graph.operation(key), Linear)
        for key, due in dues.items()
    )
    if not narrow or in_part or is_product_whole:
        return None
    if not all(_is_split(graph, key) for key in narrow):
        return None
    for ranks in range(2, MOST_RANKS + 1):
        known = sizes_of_rank(sizes, ranks)
        if known is not None and all(counts[key] == _count(graph, key, known) for key in narrow):
            return Split(ranks, narrow[0], counts[narrow[0]], dues[narrow[0]])
    return None


def sizes_of_rank(sizes: Mapping[str, int], ranks: int) -> Mapping[str, int] | None:
    """The letters of shapes in one rank; None where the heads cannot be dealt out so.

    Of fewer kv heads than ranks each has one, the same as its neighbours.
    """
    heads, kv = sizes["H"], sizes["K"]
    if heads % ranks or sizes["F"] % ranks or (kv % ranks and ranks % kv):
        return None
    return {**sizes, "H": heads // ranks, "K": max(1, kv // ranks), "F": sizes["F"] // ranks,
            "V": -(-sizes["V"] // ranks)}  # fmt: skip


def _is_split(graph: Graph, key: StageKey) -> bool:
    return any(symbol in _SPLIT for axis in split_axes(graph.stage(key).shape) for symbol in axis)


def _count(graph: Graph, key: StageKey, sizes: Mapping[str, int]) -> int:
    return int(np.prod(graph.shape(key, sizes)))


class ShardedDump:
    """The tensors of all ranks as one dump; see `aprcore.dumps.source.StageSource`.

    Attributes:
        path: Where the first rank's are.
        sidecar: What that says of itself.
        counts: Number of values of every tensor of the whole run, in the order of computation.
        ignored: Names in any rank that are no stage.
        unlisted: Stages that a rank holds and does not list.
    """

    def __init__(self, dumps: Sequence[StageSource], graph: Graph, num_tokens: int) -> None:
        """Hold the ranks against each other; no tensor is read.

        Args:
            dumps: The ranks in order.
            graph: The stages of the model.
            num_tokens: T.

        Raises:
            TraceError: They are no ranks of one run, or not all of them.
        """
        first = dumps[0]
        self.path: Path = first.path
        self.sidecar: Sidecar = first.sidecar
        self.ignored = tuple(sorted({name for dump in dumps for name in dump.ignored}))
        self.unlisted = tuple(dict.fromkeys(key for dump in dumps for key in dump.unlisted))
        self._dumps = dumps
        self._graph = graph
        # Whether the parts of a sum were added up before they were dumped, where that is known.
        self._reduced: dict[StageKey, bool] = {}
        self._sizes = graph.config.sizes(num_tokens)
        for dump in dumps:
            split = find_split(graph, dump.counts, self._sizes)
            if split is None:
                raise TraceError("is no shard of a tensor-parallel run", where=dump.path,
                                 hint="give a whole dump with --trace")  # fmt: skip
            if split.ranks != len(dumps):
                raise TraceError(f"is one shard of {split.ranks}, and --shards names {len(dumps)}",
                                 where=dump.path, hint="name them all, in order")  # fmt: skip
        keys = [key for key in first.keys() if all(key in dump for dump in dumps)]
        self._narrow = {key for key in keys
                        if key in graph and first.counts[key] != _count(graph, key, self._sizes)
                        and _is_split(graph, key)}  # fmt: skip
        self.counts: Mapping[StageKey, int] = {
            key: _count(graph, key, self._sizes) if key in self._narrow else first.counts[key]
            for key in keys
        }

    @property
    def num_layers(self) -> int:
        """One more than the highest layer present."""
        return self._dumps[0].num_layers

    def __contains__(self, key: StageKey) -> bool:
        return key in self.counts

    def keys(self) -> tuple[StageKey, ...]:
        """Every tensor that all ranks have, in the order of computation."""
        return tuple(self.counts)

    def shape(self, key: StageKey) -> tuple[int, ...] | None:
        """The shape of a tensor in the whole run, where it is joined."""
        if key in self._narrow:
            return self._graph.shape(key, self._sizes)
        return self._dumps[0].shape(key)

    def past(self, config: ModelConfig) -> KeyValueCache | None:
        """None: what a step read of the cache is not joined."""
        return None

    def is_exact(self, key: StageKey) -> bool:
        """Not of a sum of parts, which the ranks add up in an order of their own."""
        if not self._is_summed(key):
            return True
        if key not in self._reduced:
            self.read(key)
        return self._reduced[key]

    def read(self, key: StageKey) -> Float32:
        """The values of one tensor of the whole run, flat.

        Raises:
            FormatError: A file is damaged.
            TraceError: Ranks disagree on what each of them computes.
        """
        parts = [dump.read(key) for dump in self._dumps]
        if key in self._narrow:
            return self._side_by_side(key, parts)
        self._reduced[key] = all(_agree(parts[0], part) for part in parts[1:])
        if self._reduced[key]:
            return parts[0]
        if not self._is_summed(key):
            raise TraceError(f"ranks disagree on {key}, which each of them computes",
                             where=self.path, hint="hold two of them against each other with"
                             " --trace and --against")  # fmt: skip
        total: Float32 = np.sum(parts, axis=0, dtype=np.float32)
        return total

    def _is_summed(self, key: StageKey) -> bool:
        """Whether it is a product of what every rank has a part of."""
        inputs = self._graph.inputs(key)
        operation = self._graph.operation(key)
        return isinstance(operation, Linear) and any(_is_split(self._graph, x) for x in inputs)

    def _side_by_side(self, key: StageKey, parts: Sequence[Float32]) -> Float32:
        shape = self._graph.stage(key).shape
        ranks = len(parts)
        known = sizes_of_rank(self._sizes, ranks)
        assert known is not None
        axes = split_axes(shape)
        if axes[0] != ("T",):  # heads first, or logits
            return np.concatenate(parts)[: self.counts[key]]
        rows = [part.reshape(resolve_shape("T", self._sizes)[0], -1) for part in parts]
        if axes[1][0] == "(H+2K)":
            q, kv = known["H"] * known["D"], known["K"] * known["D"]
            cuts = [np.split(x, [q, q + kv], axis=1) for x in rows]
            queries = [cut[0] for cut in cuts]
            rows = [*queries, *self._kv_heads([c[1] for c in cuts]),
                    *self._kv_heads([c[2] for c in cuts])]  # fmt: skip
        elif axes[1][0] == "K":
            rows = self._kv_heads(rows)
        return np.concatenate(rows, axis=1).reshape(-1)

    def _kv_heads(self, rows: Sequence[Float32]) -> list[Float32]:
        """The ranks' keys or values without those that neighbours have as well."""
        return list(rows[:: max(1, len(rows) // self._sizes["K"])])


def _agree(a: Float32, b: Float32) -> bool:
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.array_equal(a, b, equal_nan=True)
                    or np.linalg.norm(a - b) <= _SAME * np.linalg.norm(a))  # fmt: skip
