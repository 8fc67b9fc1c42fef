"""Encoding float32 values in the stored types that this project writes.

Source: docs/formats.md, "Models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.precision import BFLOAT16, FLOAT16, FloatType
from aprcore.quant.quantise import QUANTISED, count_unrepresentable, quantise
from aprcore.quant.types import Float32

Encoded = NDArray[Any]


def encode(dtype: str, values: Float32) -> tuple[Encoded, int]:
    """Encode whole rows.

    Args:
        dtype: A key of `ENCODERS`.
        values: float32 [rows, ...]; for Q8_0 and Q4_0 the last axis is whole blocks.

    Returns:
        The stored bytes as an array of any type, and how many values are lost: NaN or infinite
        in `values`, or without a finite image in `dtype`. The bytes are of no use then.
    """
    return ENCODERS[dtype](values)


def _encode_f32(values: Float32) -> tuple[Encoded, int]:
    return values, _count_nonfinite(values)


def _encode_half(kind: FloatType) -> Callable[[Float32], tuple[Encoded, int]]:
    def encode_values(values: Float32) -> tuple[Encoded, int]:
        with np.errstate(over="ignore"):
            halves = values.astype(kind.dtype)
        return halves.view("<u2"), _count_nonfinite(halves)

    return encode_values


def _encode_blocks(dtype: str) -> Callable[[Float32], tuple[Encoded, int]]:
    def encode_rows(values: Float32) -> tuple[Encoded, int]:
        rows = values.reshape(-1, values.shape[-1])
        lost = count_unrepresentable(dtype, rows)
        return (np.empty(0, np.uint8), lost) if lost else (quantise(dtype, rows), 0)

    return encode_rows


def _count_nonfinite(values: Encoded) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))


ENCODERS: Mapping[str, Callable[[Float32], tuple[Encoded, int]]] = {
    "F32": _encode_f32,
    "F16": _encode_half(FLOAT16),
    "BF16": _encode_half(BFLOAT16),
    **{dtype: _encode_blocks(dtype) for dtype in QUANTISED},
}
