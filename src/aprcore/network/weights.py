"""A weight that is read a few rows at a time.

No weight is ever held whole: an operation asks for the rows that it multiplies next, which arrive
in a buffer small enough to stay in a core's cache. That keeps the peak of a trace far below the
size of the model, and it is faster than a product over a resident matrix (the bytes cross the
memory bus once). Files are read with `pread`, never mapped: a mapped file that shrinks kills the
process with SIGBUS, whereas a short read is an error like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

# Rows are streamed in pieces of about this many float32 bytes: below it the calls dominate, above
# it the piece leaves a 1 MiB L2 cache. 0.75 to 1 MiB was the optimum on two x86 machines.
CHUNK_BYTES = 896 * 1024


class Weight(Protocol):
    """A tensor in a model file. Row-major; linear weights are [out, in].

    Attributes:
        name: The canonical (Hugging Face) name.
        shape: Sizes, row-major.
        dtype: The stored type as the format spells it: "F32", "BF16", "Q4_K", "AprQ4", ...
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...

    def read(self, start: int, stop: int, out: Float32 | None = None) -> Float32:
        """Rows `start` to `stop` (along the first axis) as float32, dequantised.

        Thread-safe. Writes into `out` (flat, C-contiguous, at least that many values) when it is
        given and returns a view of it; otherwise allocates.

        Returns:
            Shape (stop - start, *shape[1:]), C-contiguous.

        Raises:
            TruncatedError: The file ends before the rows do (it may have shrunk since it was
                opened).
        """
        ...

    def step_squares(self, start: int, stop: int) -> tuple[Float32, int]:
        """Squared rounding steps of rows `start` to `stop`, from the stored bytes. Thread-safe.

        A value stored with step d carries a rounding error of variance d²/12.

        Returns:
            Shape (stop - start, groups), each entry the mean of d² over `group` consecutive
            values of the row (the last group may be short), and `group`. See `aprcore.quant.steps`.

        Raises:
            TruncatedError: As for `read`.
        """
        ...


def row_values(weight: Weight) -> int:
    """Number of values in one row of `weight` (1 for a vector)."""
    return int(np.prod(weight.shape[1:], dtype=np.int64))


def row_chunks(weight: Weight, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover `weight`, each of about `chunk_bytes` as float32.

    The partition depends on the shape alone, so results do not depend on the number of threads.
    """
    rows = max(1, chunk_bytes // max(1, 4 * row_values(weight)))
    if rows >= 16:
        rows -= rows % 16  # whole register tiles of the matrix product
    for start in range(0, weight.shape[0], rows):
        yield start, min(start + rows, weight.shape[0])


@runtime_checkable
class StoredWeight(Weight, Protocol):
    """A weight whose rows have stored bytes of their own."""

    def read_raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The stored bytes of rows `start` to `stop`."""
        ...


def read_all(weight: Weight) -> Float32:
    """The whole tensor as float32. For vectors and small tensors."""
    return weight.read(0, weight.shape[0])
