"""Which weights a pass will multiply by, in order, so that they can be loaded ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aprcore.engines.base import Site
from aprcore.network.config import ModelConfig
from aprcore.network.graph import BY_NAME, StageKey
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
    config: ModelConfig, weights: Mapping[str, Weight], keys: Iterable[StageKey]
) -> list[Weight]:
    """The matrices of a pass in the order of their use, for `QueuedBackend.expect`.

    The operations of the table say it themselves: they are run on a backend that only listens.

    Args:
        config: The model's configuration.
        weights: Its weights, by canonical name.
        keys: The stages that will be computed, in order.

    Raises:
        WeightError: The model lacks a tensor.
    """
    recorder = _Recorder()
    nothing = np.empty(0, dtype=np.int64)
    for key in keys:
        stage = BY_NAME[key.stage]
        if stage.operation is not None:
            site = Site(config, nothing, nothing, key.layer, weights)
            stage.operation(recorder, site, *(None for _ in stage.reads))
    return recorder.weights
