"""The protocol of a backend: one method for each thing that operations do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.errors import WeightError
from aprcore.network.config import ModelConfig
from aprcore.network.mask import Mask
from aprcore.network.rope import Rope
from aprcore.network.weights import Weight

Array = Any  # whatever the backend computes with
Int64 = NDArray[np.int64]


@dataclass(slots=True)
class KeyValueCache:
    """Keys and values of the tokens that were run before, by layer.

    Arrays are replaced and never written into, so a copy is as cheap as a dictionary and a step can
    be run a second time from where it began. Joining rows costs what attention then reads again.

    Attributes:
        num_positions: Tokens that were run before.
        held: Rows [num_positions, K·D] by layer and name ("k" or "v").
    """

    num_positions: int = 0
    held: dict[tuple[int | None, str], Array] = field(default_factory=dict)

    def copy(self) -> KeyValueCache:
        """A cache that goes its own way from here."""
        return replace(self, held=dict(self.held))

    def claim(self, num_tokens: int) -> Int64:
        """The positions of the next tokens. A pass that ends early leaves the cache unusable."""
        first = self.num_positions
        self.num_positions += num_tokens
        return np.arange(first, self.num_positions)

    def converted(self, convert: Callable[[Array], Array]) -> KeyValueCache:
        """The same rows as arrays of another backend."""
        return replace(self, held={key: convert(rows) for key, rows in self.held.items()})


@dataclass(frozen=True, slots=True)
class Site:
    """Where in the model an operation runs: what it may use besides its inputs.

    Attributes:
        config: The model's configuration.
        tokens: Token ids of the pass, [T].
        positions: Their positions, [T].
        layer: The layer, or None for a whole-model stage.
        weights: Every weight of the model, by canonical name.
        cache: What attention reads besides this pass's own keys and values; None in a full pass.
    """

    config: ModelConfig
    tokens: Int64
    positions: Int64
    layer: int | None
    weights: Mapping[str, Weight]
    cache: KeyValueCache | None = None

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

    def with_past(self, op: Backend, name: str, rows: Array) -> Array:
        """Keys or values of every position so far: the cached ones, then `rows`, which it keeps."""
        if self.cache is None:
            return rows
        past = self.cache.held.get((self.layer, name))
        joined = rows if past is None else op.append_rows(past, rows)
        self.cache.held[self.layer, name] = joined
        return joined


class Backend(Protocol):
    """Operations over arrays in canonical layout (see `aprcore.network.graph`).

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

    def scale(self, x: Array, factor: float) -> Array:
        """X times a number, which is rounded to the backend's type first."""
        ...

    def soft_cap(self, x: Array, cap: float) -> Array:
        """Cap times tanh(x / cap)."""
        ...

    def rms_norm(self, x: Array, weight: Weight, eps: float, offset: float = 0.0) -> Array:
        """RMSNorm by offset + weight, over groups of len(weight) values: rows, or heads."""
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

    def attention_scores(
        self, q: Array, k: Array, num_heads: int, num_kv_heads: int, scale: float, mask: Mask
    ) -> Array:
        """Q [T, H·D] · k [S, K·D] · scale -> [H, T, S], zero where t does not see s."""
        ...

    def masked_softmax(self, scores: Array, mask: Mask) -> Array:
        """Softmax of scores [H, T, S] over what each query sees, zero elsewhere."""
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

    def append_rows(self, x: Array, y: Array) -> Array:
        """The rows of x [S, C], then those of y [T, C] -> [S + T, C]."""
        ...


@runtime_checkable
class QueuedBackend(Backend, Protocol):
    """A backend whose operations return before they are done, in the order of the calls."""

    def expect(self, weights: Iterable[Weight]) -> None:
        """Say which weights the next products take, in order, so that loading runs ahead.

        A hint: asking for others instead is right, and what was expected before is forgotten.
        """
        ...

    def fetch(self, x: Array) -> Callable[[], NDArray[np.floating[Any]]]:
        """Begin to bring an array to the host; what is returned waits for it, as `to_host`."""
        ...
