"""Stored types: how many bytes a tensor takes, where its values lie, and what they are as float32.

`FORMATS` is the table: a type is a row. The types of .apr are expanded here, ggml's super-blocks in
`aprcore.quant.super_blocks`, and its other types by the `gguf` package, which is imported only when
such a tensor is read.

Source: docs/formats.md, "Models"; ggml's block structures as in `gguf.GGML_QUANT_SIZES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aprcore.ground.errors import UnsupportedError
from aprcore.ground.precision import BFLOAT16
from aprcore.quant.super_blocks import EXPANSIONS

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]


class BlockLayout(Enum):
    """How the values of a tensor are laid out in bytes."""

    PLAIN = "one number per value"
    ROWS = "blocks start anew at every row"
    PADDED_ROWS = "blocks start anew at every row, the last of a row filled up"
    FLAT = "blocks run over the flattened tensor, the last filled up"
    SCALED = "one float32 scale for the tensor, then one byte per value"


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A row of the table.

    Attributes:
        name: As the file formats spell it.
        block_values: Values in a block.
        block_bytes: Bytes of a block.
        layout: How blocks follow each other.
        number: The numpy type of a `PLAIN` value; bits for BF16, which numpy lacks.
        expand: Blocks, uint8 [n, bytes of a block], into float32 [values], written whole; None:
            the `gguf` package does it.
    """

    name: str
    block_values: int
    block_bytes: int
    layout: BlockLayout
    number: str = ""
    expand: Callable[[Bytes, Float32], None] | None = None


FLOAT_TYPES = ("F32", "F16", "BF16", "F64")

SCALE_BYTES = 4  # the float32 in front of an AprQ8 tensor

_PLAIN = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8",
          "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
          "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "u1"}  # fmt: skip

# Values and bytes per block. Q8_1 and Q8_K are ggml's own intermediates and never stored.
_GGML_ROWS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
              "Q8_0": (32, 34), "IQ4_NL": (32, 18), "MXFP4": (32, 17), "NVFP4": (64, 36),
              "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
              "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110),
              "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66)}  # fmt: skip
_GGML_PADDED_ROWS = {"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
                     "Q5_K": (256, 176), "Q6_K": (256, 210)}  # fmt: skip

FORMATS: Mapping[str, BlockFormat] = {
    row.name: row
    for row in (
        *(BlockFormat(name, 1, np.dtype(number).itemsize, BlockLayout.PLAIN, number)
          for name, number in _PLAIN.items()),
        *(BlockFormat(name, *sizes, BlockLayout.ROWS) for name, sizes in _GGML_ROWS.items()),
        *(BlockFormat(name, *sizes, BlockLayout.PADDED_ROWS, expand=EXPANSIONS.get(name))
          for name, sizes in _GGML_PADDED_ROWS.items()),
        BlockFormat("AprQ4", 32, 18, BlockLayout.FLAT),
        BlockFormat("AprQ8", 1, 1, BlockLayout.SCALED),
    )
}  # fmt: skip


class Span(NamedTuple):
    """Where a range of values lies: bytes relative to the tensor, and what to drop of them."""

    offset_bytes: int
    size_bytes: int
    skip_values: int
    """Values decoded from the first block that belong before the range."""


def find_format(dtype: str) -> BlockFormat:
    """The row of a type.

    Raises:
        UnsupportedError: No row has that name.
    """
    row = FORMATS.get(dtype)
    if row is None:
        raise UnsupportedError(
            f"unsupported tensor type {dtype!r}", hint=f"supported are {', '.join(FORMATS)}"
        )
    return row


def storage_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes.

    Raises:
        UnsupportedError: The type is unknown, or its rows are not whole blocks and the type does
            not fill them up.
    """
    row = find_format(dtype)
    values = math.prod(shape)
    match row.layout:
        case BlockLayout.PLAIN:
            return values * row.block_bytes
        case BlockLayout.FLAT:
            return -(-values // row.block_values) * row.block_bytes
        case BlockLayout.SCALED:
            return SCALE_BYTES + values
    length = shape[-1] if shape else 1
    if row.layout is BlockLayout.ROWS and length % row.block_values:
        raise UnsupportedError(
            f"rows of {length} values are not whole {dtype} blocks of {row.block_values}"
        )
    return math.prod(shape[:-1]) * row_bytes(row, length)


def rows_have_bytes(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether each row along the first axis has stored bytes of its own.

    Not where blocks run over row ends, nor in a vector, whose rows are single values of a block.

    Raises:
        UnsupportedError: The type is unknown.
    """
    layout = find_format(dtype).layout
    if layout in (BlockLayout.ROWS, BlockLayout.PADDED_ROWS):
        return len(shape) != 1
    return layout is BlockLayout.PLAIN


def row_bytes(row: BlockFormat, length: int) -> int:
    """Bytes of `length` values in whole blocks."""
    return -(-length // row.block_values) * row.block_bytes


def locate(row: BlockFormat, row_length: int, first: int, count: int) -> Span:
    """Where `count` values from the flat index `first` lie.

    For types in rows of blocks the range must be whole rows of `row_length` (the last axis).
    """
    match row.layout:
        case BlockLayout.PLAIN:
            return Span(first * row.block_bytes, count * row.block_bytes, 0)
        case BlockLayout.SCALED:
            return Span(SCALE_BYTES + first, count, 0)
        case BlockLayout.FLAT:
            block, skip = divmod(first, row.block_values)
            return Span(block * row.block_bytes, row_bytes(row, skip + count), skip)
    stride = row_bytes(row, row_length)
    return Span(first // row_length * stride, count // row_length * stride, 0)


def dequantize(
    dtype: str,
    raw: Bytes,
    out: Float32,
    *,
    row_length: int | None = None,
    skip_values: int = 0,
    scale: float = 1.0,
) -> None:
    """Expand stored bytes into `out`.

    Args:
        dtype: A name in `FORMATS`.
        raw: The bytes that `locate` names, uint8 [size_bytes], contiguous.
        out: float32 [count], written whole.
        row_length: Values per row, for types in rows of blocks; all of `out` by default.
        skip_values: As in `Span`.
        scale: The scale of an AprQ8 tensor.

    Raises:
        UnsupportedError: The type is unknown.
    """
    row = find_format(dtype)
    # What a file holds may be any bits: an infinite scale is for the comparison to report.
    with np.errstate(all="ignore"):
        match row.layout:
            case BlockLayout.PLAIN:
                _widen(row, raw, out)
            case BlockLayout.SCALED:
                np.multiply(raw.view(np.int8), np.float32(scale), out=out)
            case BlockLayout.FLAT:
                out[:] = _expand_apr_q4(raw)[skip_values : skip_values + out.size]
            case BlockLayout.ROWS | BlockLayout.PADDED_ROWS:
                _expand_ggml(row, raw, out, row_length or out.size)


def _widen(row: BlockFormat, raw: Bytes, out: Float32) -> None:
    match row.name:
        case "BF16":
            np.copyto(out, raw.view(BFLOAT16.dtype))
        case "F16":
            _widen_half(raw.view("<u2"), out)
        case _:
            np.copyto(out, raw.view(row.number), casting="unsafe")


def _widen_half(halves: NDArray[np.uint16], out: Float32) -> None:
    """float16 bits -> float32, exactly.

    numpy's cast goes value by value. Shifting the exponent and mantissa into place and scaling
    by the difference of the biases is exact, subnormals included, and six times as fast; only
    infinities and NaN have no such image.
    """
    if not halves.size or int(np.max(halves & 0x7FFF)) >= 0x7C00:
        np.copyto(out, halves.view(np.float16))
        return
    bits = out.view(np.int32)
    bits[:] = halves.view(np.int16)  # the sign is extended to the left
    bits <<= 13
    bits &= _SIGN_EXPONENT_MANTISSA
    out *= _HALF_BIAS


# What a half has once shifted into a float32: its sign, five bits of exponent, the mantissa.
_SIGN_EXPONENT_MANTISSA = np.uint32(0x8FFF_E000).view(np.int32)
_HALF_BIAS = np.float32(2.0 ** (127 - 15))


def _expand_apr_q4(raw: Bytes) -> Float32:
    """AprQ4 blocks [n, 18] -> float32 [32 n]; a NaN, infinite or subnormal scale counts as 0."""
    blocks = raw.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").reshape(-1)
    exponents = scales.view(np.uint16) & 0x7C00
    normal = (exponents != 0) & (exponents != 0x7C00)
    nibbles = np.empty((len(blocks), 16, 2), np.int8)
    nibbles[:, :, 0] = blocks[:, 2:] & 0x0F
    nibbles[:, :, 1] = blocks[:, 2:] >> 4
    nibbles -= 8
    values: Float32 = nibbles.reshape(-1, 32) * scales.astype(np.float32)[:, None]
    values[~normal] = 0  # not a product with 0, which would leave negative zeros
    return values.reshape(-1)


def _expand_ggml(row: BlockFormat, raw: Bytes, out: Float32, row_length: int) -> None:
    """Rows of ggml blocks -> float32, the filling at the end of each row dropped."""
    if not out.size:
        return
    if row.expand is not None:
        blocks = raw.reshape(-1, row.block_bytes)
        if row_length % row.block_values == 0:
            row.expand(blocks, out.reshape(-1))
            return
        filled = np.empty(len(blocks) * row.block_values, np.float32)
        row.expand(blocks, filled)
        whole_rows = filled.reshape(out.size // row_length, -1)
        out.reshape(-1, row_length)[:] = whole_rows[:, :row_length]
        return
    # Half a second to import: only those who open such a file pay it.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as expand

    rows = raw.reshape(out.size // row_length, -1)
    values = expand(rows, GGMLQuantizationType[row.name])
    out.reshape(-1, row_length)[:] = values.reshape(len(rows), -1)[:, :row_length]
