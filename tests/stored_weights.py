"""Weights of every stored type in a file, for tests of those who read stored bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from aprcore.formats.storage import DataFile, StoredTensor
from aprcore.quant import FORMATS, Layout, storage_size

# Where a block has its half-precision scales: any other byte may be anything.
SCALES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "AprQ4": (0,), "Q2_K": (80, 82), "IQ4_NL": (0,),
}  # fmt: skip


def fitting_width(dtype: str, width: int) -> int:
    """`width`, or the next one that whole blocks hold where the type demands it."""
    row = FORMATS[dtype]
    return -(-width // row.block_values) * row.block_values if row.layout is Layout.ROWS else width


def random_bytes(dtype: str, shape: tuple[int, int], seed: int, *, wild: bool = False) -> bytes:
    """Stored bytes of a random tensor.

    Args:
        dtype: A name in `FORMATS`.
        shape: Rows and columns.
        seed: The same one gives the same bytes.
        wild: Leave scales (or values) any bits: infinite, NaN, subnormal.
    """
    rng = np.random.default_rng([seed, *shape])
    size = storage_size(dtype, shape)
    raw = rng.integers(0, 256, size, dtype=np.uint8)
    if dtype in ("F32", "F16", "BF16", "F64"):
        return raw.tobytes() if wild else _numbers(dtype, rng.standard_normal(shape))
    if wild:
        return raw.tobytes()
    if dtype == "AprQ8":
        raw[:4] = np.float32([0.01]).view(np.uint8)
    else:
        blocks = raw.reshape(-1, FORMATS[dtype].block_bytes)
        for offset in SCALES[dtype]:
            scales = rng.uniform(0.001, 0.02, len(blocks)) * rng.choice([-1, 1], len(blocks))
            blocks[:, offset : offset + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return raw.tobytes()


def _numbers(dtype: str, values: np.ndarray) -> bytes:
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype(FORMATS[dtype].number).tobytes()


def stored_tensor(
    dtype: str, shape: tuple[int, int], raw: bytes, *, name: str = "w"
) -> StoredTensor:
    """A tensor in a file of its own, somewhere inside it; the file has no name any more."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights"
        path.write_bytes(b"\xff" * 64 + raw + b"\xff" * 64)
        return StoredTensor(name, shape, dtype, DataFile(path), 64, len(raw))


def random_tensor(
    dtype: str, shape: tuple[int, int], seed: int, *, wild: bool = False
) -> StoredTensor:
    """A random tensor in a file."""
    return stored_tensor(dtype, shape, random_bytes(dtype, shape, seed, wild=wild))
