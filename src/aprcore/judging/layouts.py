"""Layouts: the canonical shape of a stage's tensor, and the other shapes that engines dump.

A dump in another layout holds the same numbers; that is worth a note and never a divergence.
The layouts are those of docs/formats.md, "Stages and canonical layouts".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.network.graph import Graph, known_stages
from aprcore.network.operations import AddBias, Linear, Operation, Rotate, Scores
from aprcore.network.stages import StageKey, axis_names, resolve_factors, resolve_shape

Floats = NDArray[np.floating[Any]]
Int64 = NDArray[np.int64]


class Layout(NamedTuple):
    """The canonical shape of one tensor.

    Attributes:
        shape: Sizes on disk.
        factors: Sizes with heads and dimensions apart, for naming a position.
        axes: What each factor counts.
    """

    shape: tuple[int, ...]
    factors: tuple[int, ...]
    axes: tuple[str, ...]

    def position(self, index: int) -> tuple[int, ...]:
        """A flat index as one coordinate per factor."""
        return tuple(int(i) for i in np.unravel_index(index, self.factors))


def layout_of(key: StageKey, sizes: Mapping[str, int], count: int) -> Layout:
    """The layout of a stage's tensor of `count` values: every token, or one row of the last.

    Falls back to one flat axis when the sizes are not known or do not fit.
    """
    shape = known_stages()[key.stage].shape
    for known in (sizes, {**sizes, "T": 1} if is_by_token(shape) else sizes):
        try:
            resolved = resolve_shape(shape, known)
        except KeyError:
            break
        if math.prod(resolved) == count:
            return Layout(resolved, resolve_factors(shape, known), axis_names(shape))
    return Layout((count,), (count,), ("index",))


def is_by_token(shape: str) -> bool:
    """Whether a symbolic shape is a row for each token."""
    return axis_names(shape)[0] == "token"


def last_rows(
    graph: Graph, counts: Mapping[StageKey, int], sizes: Mapping[str, int]
) -> frozenset[StageKey]:
    """The tensors of a dump that hold the last token's row only, and can be judged so.

    Behind the last layer's attention, that is: everything that is made of them works row by row,
    and none of it has every row.
    """
    if sizes.get("T", 1) < 2:
        return frozenset()
    rows = {
        key: layout.shape[0]
        for key, count in counts.items()
        if (layout := layout_of(key, sizes, count)).axes[0] == "token"
    }

    found: dict[StageKey, bool] = {}

    def is_last(key: StageKey) -> bool:
        if key not in found:
            operation = graph.operation(key)
            by_row = operation is not None and operation.row_wise
            found[key] = (by_row and not isinstance(operation, Rotate) and rows.get(key, 1) == 1
                          and all(map(is_last, graph.readers(key))))  # fmt: skip
        return found[key]

    return frozenset(key for key, count in rows.items() if count == 1 and is_last(key))


def is_readable(graph: Graph, key: StageKey, layout: Layout, sizes: Mapping[str, int]) -> bool:
    """Whether stages that read a tensor find the rows that they expect of their side."""
    if layout.axes == ("index",):
        return False
    is_whole = layout.axes[0] != "token" or layout.shape[0] == sizes.get("T")
    return is_whole or graph.stage(key).last_token


def infer_sizes(
    counts: Mapping[StageKey, int], num_tokens: int | None, num_positions: int | None = None
) -> Mapping[str, int]:
    """The letters of the symbolic shapes, from the number of values of each stage's tensor.

    For directories of stage files without a model. A letter that cannot be derived is left out.

    Args:
        counts: Values per tensor; tensors of one stage are expected to agree.
        num_tokens: T, if known.
        num_positions: S, if it is known; None where it is T.
    """
    by_shape: dict[str, int] = {}
    for key, count in counts.items():
        shape = known_stages()[key.stage].shape
        # Of two dumps one may hold the last token only.
        by_shape[shape] = max(count, by_shape.get(shape, 0))
    sizes: dict[str, int] = {}
    if "V" in by_shape:
        sizes["V"] = by_shape["V"]
    if not num_tokens:
        return sizes
    sizes["T"], sizes["S"] = num_tokens, num_positions or num_tokens

    def per_token(shape: str) -> int | None:
        count = by_shape.get(shape)
        return count // num_tokens if count and count % num_tokens == 0 else None

    for letter in ("E", "F"):
        if width := per_token(f"T,{letter}"):
            sizes[letter] = width
    heads, rest = divmod(by_shape.get("H,T,S", 0), num_tokens * sizes["S"])
    query, keys = per_token("T,H·D"), per_token("T,K·D")
    if heads and not rest and query and query % heads == 0:
        sizes["H"], sizes["D"] = heads, query // heads
        if keys and keys % sizes["D"] == 0:
            sizes["K"] = keys // sizes["D"]
    return sizes


def is_masked(operation: Operation | None) -> bool:
    """Whether a tensor holds values that no judgment may look at: scores that nobody reads.

    Engines write zeros, minus infinity, the type's lowest value or the raw product there.
    """
    return isinstance(operation, Scores)


def zero_masked(operation: Operation | None, x: Floats, layout: Layout) -> Floats:
    """`x` with what no judgment may look at set to zero.

    Returns `x` itself for stages without such values, and where they are zero already.

    Args:
        operation: What makes the tensor: its mask says what nobody reads.
        x: Its values, flat.
        layout: Its layout.
    """
    if not isinstance(operation, Scores) or len(layout.factors) != 3:
        return x
    hidden = ~operation.mask.allowed(*layout.factors[1:])
    by_head = x.reshape(layout.factors)
    if not any(np.any(of_head[hidden]) for of_head in by_head):
        return x
    zeroed = by_head.copy()
    for of_head in zeroed:
        of_head[hidden] = 0
    return zeroed.reshape(-1)


def hidden_rows(
    operation: Operation | None, rows: slice, tokens: int, positions: int
) -> NDArray[np.bool_] | None:
    """What `zero_masked` sets to zero in rows of a head, [rows, S]; None for nothing."""
    if not isinstance(operation, Scores):
        return None
    mask = operation.mask.before(tokens - rows.stop)
    return ~mask.allowed(rows.stop - rows.start, positions)


# How an engine that rotates dimension 2i with 2i + 1 keeps q and k, before and after.
PAIRS = "adjacent pairs within each head"
PAIRS_OF_JOINED = "adjacent pairs within each head of q and k"


def alternatives(
    operation: Operation | None, x: Floats, layout: Layout, *, num_kv_heads: int | None = None,
    is_oracle: bool = False,
) -> Iterator[tuple[str, Floats]]:  # fmt: skip
    """Other readings of a tensor: (what the dump did, the tensor put into canonical order).

    Args:
        operation: What makes the tensor.
        x: The dumped values, flat.
        layout: The canonical layout that they should have had.
        num_kv_heads: K; without it every number that fits is tried.
        is_oracle: Whether the dump is the reference. The order of q, k and v and of their rows is
            then the weights' own: another one means that the model file is wrong.
    """
    factors = layout.factors
    if x.size != math.prod(factors):
        return
    if layout.axes == ("token", "head", "dim"):
        tokens, heads, dim = factors
        readings = [("", x)]
        if tokens > 1 and heads > 1:
            by_head = x.reshape(heads, tokens, dim).transpose(1, 0, 2).reshape(-1)
            readings.append(("heads before tokens", by_head))
            yield readings[-1]
        for name, y in readings:
            for order, columns in _column_orders(operation, heads, dim, num_kv_heads, is_oracle):
                both = f"{name}, {order}" if name else order
                yield both, y.reshape(tokens, heads * dim)[:, columns].reshape(-1)
    if layout.axes == ("head", "token", "position") and factors[0] > 1 and factors[1] > 1:
        heads, queries, keys = factors
        yield "tokens before heads", x.reshape(queries, heads, keys).transpose(1, 0, 2).reshape(-1)
        if queries == keys:
            yield "tokens reversed", x.reshape(factors)[:, ::-1, ::-1].reshape(-1)
    if layout.axes[:1] == ("token",) and factors[0] > 1:
        yield "tokens reversed", x.reshape(factors)[::-1].reshape(-1)
    if layout.axes[:1] == ("token",) and len(layout.shape) == 2 and layout.shape[0] > 1:
        tokens, width = layout.shape
        if tokens != width:
            yield "dimensions before tokens", x.reshape(width, tokens).T.reshape(-1)


def _column_orders(
    operation: Operation | None, heads: int, dim: int, num_kv_heads: int | None, is_oracle: bool
) -> Iterator[tuple[str, Int64]]:
    """Where each canonical column lies in dumps of q, k and v with columns in another order."""
    if isinstance(operation, Rotate) and dim % 2 == 0:
        yield PAIRS, _adjacent_pairs(heads, dim)
    if not is_joined(operation) or is_oracle:
        return
    counts = range(1, heads // 3 + 1) if num_kv_heads is None else (num_kv_heads,)
    for kv in counts:
        if (heads - 2 * kv) % kv:
            continue
        rotated = heads - kv
        if dim % 2 == 0:
            columns = np.arange(heads * dim)
            columns[: rotated * dim] = _adjacent_pairs(rotated, dim)
            yield PAIRS_OF_JOINED, columns
        for name, order in interleavings(heads - 2 * kv, kv, dim):
            yield name, np.argsort(order)


def is_joined(operation: Operation | None) -> bool:
    """Whether a tensor is q, k and v side by side."""
    return isinstance(operation, Linear | AddBias) and len(operation.modules) > 1


def _adjacent_pairs(heads: int, dim: int) -> Int64:
    """Dimension i + s·D/2 of each head lies at 2i + s."""
    return np.arange(heads * dim).reshape(heads, dim // 2, 2).swapaxes(1, 2).reshape(-1)


def interleavings(heads: int, kv: int, dim: int) -> Iterator[tuple[str, Int64]]:
    """Orders of a fused q, k and v: the canonical column at each place of the fused one."""
    q = np.arange(heads * dim).reshape(kv, -1)
    k = heads * dim + np.arange(kv * dim).reshape(kv, -1)
    v = k + kv * dim
    if kv > 1:
        yield "interleaved q, k and v of each kv head", np.hstack([q, k, v]).reshape(-1)
        pairs = np.hstack([k, v]).reshape(-1)
        yield "interleaved k and v of each head", np.concatenate([q.reshape(-1), pairs])
    if heads == kv:
        every = np.stack([q.reshape(-1), k.reshape(-1), v.reshape(-1)], axis=1)
        yield "interleaved q, k and v of each dimension", every.reshape(-1)


def last_token(
    key: StageKey, x: Floats, sizes: Mapping[str, int], count: int
) -> tuple[Floats, Layout] | None:
    """The last token's part of a tensor of all tokens and its layout, if it has `count` values."""
    layout = layout_of(key, sizes, x.size)
    if known_stages()[key.stage].last_token and x.size == sizes.get("T", 0) * count:
        row = x.reshape(-1)[-count:]  # an engine that dumps the logits of every token
        return row, layout_of(key, sizes, count)
    if "token" not in layout.axes:
        return None
    axis = layout.axes.index("token")  # the first axis on disk, or the second behind the heads
    if layout.factors[axis] < 2:
        return None
    row = x.reshape(layout.factors).take(-1, axis=axis).reshape(-1)
    if row.size != count:
        return None
    shape, factors = (
        (*sizes[:axis], 1, *sizes[axis + 1 :]) for sizes in (layout.shape, layout.factors)
    )
    return row, Layout(shape, factors, layout.axes)
