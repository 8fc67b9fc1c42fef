"""The operations of the stages on an OpenCL device, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.engines.opencl.device import OpenDevice, open_device
from aprcore.engines.opencl.launch import DeviceArray, Launcher
from aprcore.engines.opencl.products import Products, copy_columns, stored_kernel
from aprcore.engines.opencl.streaming import Piece
from aprcore.engines.opencl.weights_on_device import DeviceWeights
from aprcore.network.backend import Int64
from aprcore.network.mask import Mask
from aprcore.network.rope import Rope
from aprcore.network.weights import Float32, Weight, row_values

_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

# A pass rotates by the same angles in every layer; the next pass may have others.
_KEPT_TABLES = 4

_u32, _u64, _f32 = np.uint32, np.uint64, np.float32
_UNBOUNDED = 2**32 - 1  # as a bound of a mask: more than there are positions


class OpenCLBackend:
    """Float32 operations in canonical layout; see `aprcore.network.backend.Backend`.

    For one thread at a time: kernels hold their arguments, and all work goes through one in-order
    queue. Results repeat bit for bit on a device, whatever is kept or streamed.

    Attributes:
        device: Where it computes.
        weights: The weights there.
    """

    name = "opencl"

    def __init__(
        self,
        device: OpenDevice | str | None = None,
        *,
        budget_bytes: int | None = None,
        piece_bytes: int | None = None,
    ) -> None:
        """Open a device unless it is open.

        Args:
            device: An open device, or a name or index as for `choose_device`; None for the best.
            budget_bytes, piece_bytes: As for `DeviceWeights`.

        Raises:
            DeviceUnavailableError: There is none.
        """
        self.device = device if isinstance(device, OpenDevice) else open_device(device)
        self.weights = DeviceWeights(self.device, budget_bytes, piece_bytes)
        self._launcher = Launcher(self.device)
        self._products = Products(self._launcher)
        self._tables: dict[tuple[Rope, bytes], tuple[Any, Any]] = {}

    def close(self) -> None:
        """Wait for the device and free what it holds."""
        self.weights.close()
        self._tables.clear()
        self._launcher.close()

    def __enter__(self) -> OpenCLBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is KeyboardInterrupt:  # a kernel may take minutes, and nobody wants what it makes
            self.weights.abandon()
            self._launcher.abandon()
        else:
            self.close()

    def expect(self, weights: Iterable[Weight]) -> None:
        """See `QueuedBackend`."""
        self.weights.expect(weights)

    def finish(self) -> None:
        """Wait until everything asked for is done."""
        self._launcher.finish()

    def from_host(self, x: NDArray[np.floating[Any]]) -> DeviceArray:
        """See `Backend`."""
        values = np.ascontiguousarray(x, dtype=np.float32)
        return DeviceArray(self._launcher.upload(values), values.shape)

    def to_host(self, x: DeviceArray) -> Float32:
        """See `Backend`. Waits for everything before it."""
        return self.fetch(x)()

    def fetch(self, x: DeviceArray) -> Callable[[], Float32]:
        """See `QueuedBackend`."""
        return self._launcher.download(x)

    def embed(self, tokens: Int64, weight: Weight) -> DeviceArray:
        """See `Backend`. Only the rows of the tokens go to the device."""
        source, ids = self.weights.source(weight), tokens.tolist()
        stored = np.empty((len(ids), source.row_bytes), dtype=np.uint8)
        for row, token in enumerate(ids):
            source.read_into(token, token + 1, stored[row])
        piece = Piece(source, 0, len(ids), self._launcher.upload(stored))
        return self.expand(piece, np.arange(len(ids)))

    def expand(self, piece: Piece, rows: Int64) -> DeviceArray:
        """Rows of a piece, by their index in it, as floats [len(rows), C]."""
        source = piece.source
        indices = self._launcher.upload(rows.astype(np.uint32))
        out = self._launcher.empty((rows.size, *source.weight.shape[1:]))
        kernel = stored_kernel(self._launcher, "expand_rows", "embedding.cl", source.dtype)
        piece.last_use = self._launcher.run(
            kernel, (rows.size,), piece.buffer, _u64(source.row_bytes), _f32(source.scale),
            _u32(row_values(source.weight)), indices, out, after=piece.ready,
        )  # fmt: skip
        return out

    def scale(self, x: DeviceArray, factor: float) -> DeviceArray:
        """See `Backend`."""
        return self._each("scale", x, _f32(factor))

    def soft_cap(self, x: DeviceArray, cap: float) -> DeviceArray:
        """See `Backend`."""
        return self._each("soft_cap", x, _f32(cap))

    def rms_norm(
        self, x: DeviceArray, weight: Weight, eps: float, offset: float = 0.0
    ) -> DeviceArray:
        """See `Backend`."""
        size = weight.shape[0]
        y = self._launcher.empty(x.shape)
        kernel = self._launcher.kernel("rms_norm", ["norms.cl"])
        gain = self.weights.vector(weight)
        self._launcher.run(
            kernel, (x.size // size,), x, gain, _u32(size), _f32(eps), _f32(offset), y
        )
        return y

    def linear(self, x: DeviceArray, weights: Sequence[Weight]) -> DeviceArray:
        """See `Backend`. Quantised weights are expanded inside the product."""
        y = self._launcher.empty((x.shape[0], sum(weight.shape[0] for weight in weights)))
        operand = self._products.operand(x)
        first = 0
        for weight in weights:
            if row_values(weight) != x.shape[1]:
                raise ValueError(f"{weight.name} {weight.shape} does not fit {x.shape}")
            for piece in self.weights.pieces(weight):
                piece.last_use = self._products.multiply(operand, piece, y, first + piece.start)
            first += weight.shape[0]
        return y

    def add_bias(self, x: DeviceArray, biases: Sequence[Weight]) -> DeviceArray:
        """See `Backend`."""
        rows, width = x.shape
        out = self._launcher.empty(x.shape)
        kernel = self._launcher.kernel("add_bias", ["elementwise.cl"])
        first = 0
        for bias in biases:
            count = bias.shape[0]
            self._launcher.run_over(
                kernel, rows * count, x, self.weights.vector(bias), _u32(rows), _u32(width),
                _u32(first), _u32(count), out,
            )  # fmt: skip
            first += count
        return out

    def columns(self, x: DeviceArray, start: int, stop: int) -> DeviceArray:
        """See `Backend`."""
        return copy_columns(self._launcher, x, start, stop - start, stop - start)

    def rows(self, x: DeviceArray, start: int, stop: int) -> DeviceArray:
        """See `Backend`."""
        row_size = math.prod(x.shape[1:])
        return self._launcher.copy(x, start * row_size, (stop - start, *x.shape[1:]))

    def append_rows(self, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See `Backend`."""
        return self._launcher.join(x, y)

    def rope(
        self, x: DeviceArray, positions: Int64, rope: Rope, *, adjacent_pairs: bool = False
    ) -> DeviceArray:
        """See `Backend`; with `adjacent_pairs` dimension 2i is paired with 2i + 1 instead."""
        half = rope.head_dim // 2
        spacing, partner = (2, 1) if adjacent_pairs else (1, half)
        cosines, sines = self._angles(positions, rope)
        y = self._launcher.empty(x.shape)
        kernel = self._launcher.kernel("rotate_heads", ["rope.cl"])
        self._launcher.run_over(
            kernel, x.size // 2, x, cosines, sines, _u32(x.shape[0]),
            _u32(x.shape[1] // rope.head_dim), _u32(half), _u32(spacing), _u32(partner), y,
        )  # fmt: skip
        return y

    def attention_scores(
        self, q: DeviceArray, k: DeviceArray, num_heads: int, num_kv_heads: int, scale: float,
        mask: Mask,
    ) -> DeviceArray:  # fmt: skip
        """See `Backend`."""
        tokens, positions, size = q.shape[0], k.shape[0], q.shape[1] // num_heads
        scores = self._launcher.empty((num_heads, tokens, positions))
        kernel = self._launcher.kernel("attention_scores", ["attention.cl"])
        self._launcher.run_over(
            kernel, scores.size, q, k, _u32(tokens), _u32(positions), _u32(num_heads),
            _u32(num_kv_heads), _u32(size), _f32(scale), *_bounds(mask), scores, cost=size,
        )  # fmt: skip
        return scores

    def masked_softmax(self, scores: DeviceArray, mask: Mask) -> DeviceArray:
        """See `Backend`."""
        heads, tokens, positions = scores.shape
        weights = self._launcher.empty(scores.shape)
        kernel = self._launcher.kernel("masked_softmax", ["attention.cl"])
        self._launcher.run(
            kernel, (heads * tokens,), scores, _u32(tokens), _u32(positions), *_bounds(mask),
            weights,
        )  # fmt: skip
        return weights

    def weighted_values(
        self, softmax: DeviceArray, v: DeviceArray, num_kv_heads: int
    ) -> DeviceArray:
        """See `Backend`."""
        heads, tokens, positions = softmax.shape
        size = v.shape[1] // num_kv_heads
        out = self._launcher.empty((tokens, heads * size))
        kernel = self._launcher.kernel("weighted_values", ["attention.cl"])
        self._launcher.run_over(
            kernel, tokens * heads * -(-size // 8), softmax, v, _u32(tokens), _u32(positions),
            _u32(heads), _u32(num_kv_heads), _u32(size), out, cost=8 * positions,
        )  # fmt: skip
        return out

    def activation(self, x: DeviceArray, kind: str) -> DeviceArray:
        """See `Backend`."""
        if kind not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {kind!r}")
        return self._each(kind, x)

    def add(self, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See `Backend`."""
        return self._pairwise("add", x, y)

    def multiply(self, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        """See `Backend`."""
        return self._pairwise("multiply", x, y)

    def argmax(self, x: DeviceArray) -> int:
        """The flat index of the largest value, the first of equals; a NaN counts as the largest."""
        found = self._launcher.empty((1,))
        kernel = self._launcher.kernel("argmax", ["argmax.cl"])
        self._launcher.run(kernel, (1,), x, _u32(x.size), found)
        return int(self.to_host(found).view(np.uint32)[0])

    def _each(self, name: str, x: DeviceArray, *numbers: np.float32) -> DeviceArray:
        y = self._launcher.empty(x.shape)
        kernel = self._launcher.kernel(name, ["elementwise.cl"])
        self._launcher.run_over(kernel, x.size, x, _u64(x.size), *numbers, y)
        return y

    def _pairwise(self, name: str, x: DeviceArray, y: DeviceArray) -> DeviceArray:
        if x.shape != y.shape:
            raise ValueError(f"{name} of {x.shape} and {y.shape}")
        out = self._launcher.empty(x.shape)
        kernel = self._launcher.kernel(name, ["elementwise.cl"])
        self._launcher.run_over(kernel, x.size, x, y, _u64(x.size), out)
        return out

    def _angles(self, positions: Int64, rope: Rope) -> tuple[Any, Any]:
        """Cosines and sines [T, D/2] on the device."""
        key = (rope, positions.astype(np.int64).tobytes())
        if key not in self._tables:
            while len(self._tables) >= _KEPT_TABLES:
                self._tables.pop(next(iter(self._tables)))
            # Angles in float32, as engines and transformers compute them.
            frequencies = rope.inverse_frequencies().astype(np.float32)
            angles = positions.astype(np.float32)[:, None] * frequencies
            factor = np.float32(rope.attention_factor())
            self._tables[key] = (
                self._launcher.upload(np.cos(angles) * factor),
                self._launcher.upload(np.sin(angles) * factor),
            )
        return self._tables[key]


def _bounds(mask: Mask) -> tuple[np.uint32, np.uint32]:
    """How many positions behind its own and ahead of it a query sees, as kernels take them."""
    behind, ahead = (_UNBOUNDED if n is None else min(n, _UNBOUNDED) for n in mask)
    return _u32(behind), _u32(ahead)
