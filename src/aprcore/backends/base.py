"""The protocol of a backend: one method per operation of the table of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aprcore.config import ModelConfig
from aprcore.errors import WeightError
from aprcore.rope import Rope
from aprcore.weights import Weight

Array = Any  # whatever the backend computes with
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the model an operation runs: what it may use besides its inputs.

    Attributes:
        config: The model's configuration.
        tokens: Token ids of the pass, [T].
        positions: Their positions, [T].
        layer: The layer, or None for a whole-model stage.
        weights: Every weight of the model, by canonical name.
    """

    config: ModelConfig
    tokens: Int64
    positions: Int64
    layer: int | None
    weights: Mapping[str, Weight]

    def find(self, name: str) -> Weight | None:
        """A weight of this layer (or of the model, by its whole name), if the model has it."""
        if self.layer is not None:
            weight = self.weights.get(f"model.layers.{self.layer}.{name}")
            if weight is not None:
                return weight
        return self.weights.get(name)

    def weight(self, name: str) -> Weight:
        """As `find`, for a weight that the stage cannot do without.

        Raises:
            WeightError: The model lacks it.
        """
        weight = self.find(name)
        if weight is None:
            raise WeightError(f"the model has no tensor {name!r} for layer {self.layer}")
        return weight


class Backend(Protocol):
    """Operations over arrays in canonical layout (see `aprcore.stages`).

    Arrays are row-major; x is [T, C] unless said otherwise. No method writes into its inputs.
    """

    name: str

    def from_host(self, x: NDArray[np.floating[Any]]) -> Array:
        """A host array as this backend's."""
        ...

    def to_host(self, x: Array) -> NDArray[np.floating[Any]]:
        """This backend's array on the host, C-contiguous."""
        ...

    def embed(self, tokens: Int64, weight: Weight) -> Array:
        """Rows of `weight` [V, E] by token id -> [T, E]."""
        ...

    def rms_norm(self, x: Array, weight: Weight, eps: float) -> Array:
        """RMSNorm over groups of len(weight) values: whole rows, or each head on its own."""
        ...

    def linear(self, x: Array, weights: Sequence[Weight]) -> Array:
        """X @ W.T for each W [out, C], side by side -> [T, sum of out]."""
        ...

    def add_bias(self, x: Array, biases: Sequence[Weight]) -> Array:
        """X plus the concatenated biases, on every row."""
        ...

    def columns(self, x: Array, start: int, stop: int) -> Array:
        """Columns start to stop of x."""
        ...

    def rope(self, x: Array, positions: Int64, rope: Rope) -> Array:
        """Rotate every head of x [T, N·D], pairing dimension i with i + D/2."""
        ...

    def attention_scores(self, q: Array, k: Array, num_heads: int, num_kv_heads: int) -> Array:
        """Q [T, H·D] · k [S, K·D] / sqrt(D) -> [H, T, S], zero where s is after t."""
        ...

    def causal_softmax(self, scores: Array) -> Array:
        """Softmax over s <= t of scores [H, T, S], zero elsewhere."""
        ...

    def weighted_values(self, softmax: Array, v: Array, num_kv_heads: int) -> Array:
        """Softmax [H, T, S] · v [S, K·D] -> [T, H·D]."""
        ...

    def activation(self, x: Array, kind: str) -> Array:
        """The activation function of `ModelConfig.hidden_act`."""
        ...

    def add(self, x: Array, y: Array) -> Array:
        """X + y."""
        ...

    def multiply(self, x: Array, y: Array) -> Array:
        """X * y, elementwise."""
        ...

    def rows(self, x: Array, start: int, stop: int) -> Array:
        """Rows start to stop of x."""
        ...
