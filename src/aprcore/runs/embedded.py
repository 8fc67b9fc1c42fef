"""Which tokens a dump ran, told from its rows of the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aprcore.dumps.source import StageSource
from aprcore.network.operations import EMBEDDING, Embed
from aprcore.network.weights import row_chunks

if TYPE_CHECKING:
    from aprcore.models.model import Model

# Squared distance from a row of the weights, over the row's own square: bfloat16 makes 1e-5, and
# rows of two tokens are hundreds of times further apart.
_CLOSE = 1e-3


def embedded_tokens(dump: StageSource, model: Model) -> tuple[int, ...] | None:
    """The ids whose rows a dump's embedding holds; None where it has none, or they are no rows."""
    key = model.graph.embedding
    weight = model.weights.get(EMBEDDING)
    operation = model.graph.operation(key)
    width = model.config.hidden_size
    if key not in dump or weight is None or dump.counts[key] % width:
        return None
    x = dump.read(key).reshape(-1, width).astype(np.float64)
    if not np.isfinite(x).all():
        return None
    if isinstance(operation, Embed):
        x /= operation.scale
    found = np.zeros(len(x), np.int64)
    nearest = np.full(len(x), np.inf)
    squares = np.square(x).sum(axis=1)
    for start, stop in row_chunks(weight):
        rows = weight.read(start, stop).astype(np.float64)
        distances: NDArray[np.float64] = squares[:, None] - 2 * x @ rows.T
        distances += np.square(rows).sum(axis=1)
        best = distances.argmin(axis=1)
        values = distances[np.arange(len(x)), best]
        found = np.where(values < nearest, start + best, found)
        nearest = np.minimum(values, nearest)
    if np.any(nearest > _CLOSE * squares):
        return None
    return tuple(int(token) for token in found)
