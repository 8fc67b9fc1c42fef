"""Which weights a pass will multiply by, in order, so that they can be loaded ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aprcore.network.backend import Site
from aprcore.network.graph import Graph
from aprcore.network.stages import StageKey
from aprcore.network.weights import Weight


class _Recorder:
    """A backend that computes nothing and remembers what it was to multiply by."""

    def __init__(self) -> None:
        self.weights: list[Weight] = []

    def linear(self, x: Any, weights: Sequence[Weight]) -> None:
        self.weights.extend(weights)

    def __getattr__(self, operation: str) -> Callable[..., None]:
        return lambda *args: None


def product_weights(
    graph: Graph, weights: Mapping[str, Weight], keys: Iterable[StageKey]
) -> list[Weight]:
    """The matrices of a pass in the order of their use, for `QueuedBackend.expect`.

    The operations say it themselves: they are run on a backend that only listens.

    Args:
        graph: The model's stages.
        weights: Its weights, by canonical name.
        keys: The stages that will be computed, in order.

    Raises:
        WeightError: The model lacks a tensor.
    """
    recorder = _Recorder()
    nothing = np.empty(0, dtype=np.int64)
    for key in keys:
        operation = graph.operation(key)
        if operation is not None:
            site = Site(graph.config, nothing, nothing, key.layer, weights)
            listener: Any = recorder
            operation(listener, site, *(None for _ in graph.inputs(key)))
    return recorder.weights
