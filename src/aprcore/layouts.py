"""Layouts: the canonical shape of a stage's tensor, and the other shapes that engines dump.

A dump in another layout holds the same numbers; that is worth a note and never a divergence.
Source: FORMATS.md, "Canonical layouts".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.stages import BY_NAME, StageKey, axis_names, resolve_factors, resolve_shape

Floats = NDArray[np.floating[Any]]

# Stages whose last two axes are (query, key) of causal attention, and hold nothing above the
# diagonal: engines write zeros, minus infinity, the type's lowest value or the raw product there.
MASKED_STAGES = ("attn_scores",)


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
    """The layout of a stage's tensor of `count` values.

    Falls back to one flat axis when the sizes are not known or do not fit.
    """
    shape = BY_NAME[key.stage].shape
    try:
        resolved = resolve_shape(shape, sizes)
    except KeyError:
        return Layout((count,), (count,), ("index",))
    if math.prod(resolved) != count:
        return Layout((count,), (count,), ("index",))
    return Layout(resolved, resolve_factors(shape, sizes), axis_names(shape))


def infer_sizes(counts: Mapping[StageKey, int], num_tokens: int | None) -> Mapping[str, int]:
    """The letters of the symbolic shapes, from the number of values of each stage's tensor.

    For directories of stage files without a model. A letter that cannot be derived is left out.

    Args:
        counts: Values per tensor; tensors of one stage are expected to agree.
        num_tokens: T, if known.
    """
    by_stage = {key.stage: count for key, count in counts.items()}
    sizes: dict[str, int] = {}
    if "lm_head" in by_stage:
        sizes["V"] = by_stage["lm_head"]
    if not num_tokens:
        return sizes
    sizes["T"] = sizes["S"] = num_tokens

    def per_token(*names: str) -> int | None:
        for name in names:
            count = by_stage.get(name)
            if count and count % num_tokens == 0:
                return count // num_tokens
        return None

    if hidden := per_token("attn_norm", "embedding", "ffn_norm", "attn_out", "final_norm"):
        sizes["E"] = hidden
    if ffn := per_token("ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl"):
        sizes["F"] = ffn
    heads, rest = divmod(by_stage.get("attn_scores", 0), num_tokens**2)
    query, keys = per_token("q_post_rope", "attention"), per_token("k_post_rope")
    if heads and not rest and query and query % heads == 0:
        sizes["H"], sizes["D"] = heads, query // heads
        if keys and keys % sizes["D"] == 0:
            sizes["K"] = keys // sizes["D"]
    return sizes


def zero_above_diagonal(key: StageKey, x: Floats, layout: Layout) -> Floats:
    """`x` with what no judgment may look at set to zero: scores of positions after the query.

    Returns `x` itself for stages without such positions.
    """
    if key.stage not in MASKED_STAGES or len(layout.factors) != 3:
        return x
    _, queries, keys = layout.factors
    allowed = np.arange(keys)[None, :] <= np.arange(queries)[:, None] + (keys - queries)
    return np.where(allowed, x.reshape(layout.factors), np.zeros(1, dtype=x.dtype)).reshape(-1)


def alternatives(key: StageKey, x: Floats, layout: Layout) -> Iterator[tuple[str, Floats]]:
    """Other readings of a tensor: (what the dump did, the tensor put into canonical order).

    Args:
        key: The stage.
        x: The dumped values, flat.
        layout: The canonical layout that they should have had.
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
        if key.stage in ("q_post_rope", "k_post_rope") and dim % 2 == 0:
            for name, y in readings:
                halves = y.reshape(tokens, heads, dim // 2, 2).swapaxes(-1, -2).reshape(-1)
                also = f"{name}, " if name else ""
                yield f"{also}adjacent pairs within each head", halves
    if layout.axes == ("head", "token", "position") and factors[0] > 1 and factors[1] > 1:
        heads, queries, keys = factors
        yield "tokens before heads", x.reshape(queries, heads, keys).transpose(1, 0, 2).reshape(-1)
    if layout.axes[:1] == ("token",) and len(layout.shape) == 2 and layout.shape[0] > 1:
        tokens, width = layout.shape
        if tokens != width:
            yield "dimensions before tokens", x.reshape(width, tokens).T.reshape(-1)


def last_token(x: Floats, layout: Layout, count: int) -> tuple[Floats, Layout] | None:
    """The last token's part of a canonical tensor and its layout, if it has `count` values."""
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
