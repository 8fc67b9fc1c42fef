"""Which kernel multiplies by a weight, and in which form it takes the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from aprcore.engines.opencl.device import FEW_TOKENS
from aprcore.engines.opencl.launch import DeviceArray, Launcher
from aprcore.engines.opencl.stored_rows import FLOAT_FORMATS
from aprcore.engines.opencl.streaming import Piece

# Tiles of `linear_many`: 6 rows by 16 tokens are 12 vectors of sums, beside which 16 registers
# hold two vectors of x and a weight. Four tiles of tokens share one expansion of the weights.
_TILE_ROWS, _TILE_TOKENS, _TILES = 6, 16, 4

_CHUNK = 256  # as in linear.cl

_u32, _u64, _f32 = np.uint32, np.uint64, np.float32


@dataclass(frozen=True, slots=True)
class Operand:
    """The input of a product as its kernel takes it.

    Attributes:
        array: Rows of `stride` values, or tiles of tokens.
        tokens: T.
        width: C.
        stride: Values from row to row; 0 for tiles.
    """

    array: DeviceArray
    tokens: int
    width: int
    stride: int


class Products:
    """The products of one device."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def operand(self, x: DeviceArray) -> Operand:
        """X [T, C] for `multiply`; made once for all weights that it meets."""
        tokens, width = x.shape
        if self._are_many(tokens):
            return self._packed(x)
        stride = -(-width // 8) * 8
        if stride != width:
            x = copy_columns(self._launcher, x, 0, width, stride)
        return Operand(x, tokens, width, stride)

    def multiply(self, operand: Operand, piece: Piece, y: DeviceArray, first: int) -> Any:
        """Columns of y [T, ...] from `first`: the operand times a piece's rows. Returns the event.

        The weights are expanded inside the product.
        """
        source, rows = piece.source, piece.stop - piece.start
        row_group, name, options = self._cut(source.dtype, operand.tokens)
        kernel = stored_kernel(self._launcher, name, "linear.cl", source.dtype, options)
        weights = (piece.buffer, _u64(source.row_bytes), _u32(rows), _f32(source.scale))
        output = (y, _u32(y.shape[1]), _u32(first))
        row_groups, tokens = -(-rows // row_group), operand.tokens
        x: tuple[Any, ...]
        if operand.stride:
            groups = (row_groups, -(-tokens // options["TOKENS"]))
            x = (operand.array, _u32(operand.stride), _u32(operand.width), _u32(tokens))
        else:
            groups = (row_groups, -(-tokens // (_TILE_TOKENS * _TILES)))
            x = (operand.array, _u32(operand.width), _u32(tokens))
        return self._launcher.run(kernel, groups, *weights, *x, *output, after=piece.ready)

    def _are_many(self, tokens: int) -> bool:
        return self._launcher.device.tuning.is_cpu and tokens > FEW_TOKENS

    def _cut(self, dtype: str, tokens: int) -> tuple[int, str, dict[str, int]]:
        """Rows of a work-group, the kernel, and the options to build it with."""
        if self._are_many(tokens):
            return _TILE_ROWS, "linear_many", {"ROWS": _TILE_ROWS, "TILES": _TILES}
        few = min(tokens, FEW_TOKENS)
        rows = self._launcher.device.tuning.few_rows(dtype, few)
        return rows, "linear_few", {"ROWS": rows, "TOKENS": few}

    def _packed(self, x: DeviceArray) -> Operand:
        tokens, width = x.shape
        tiles = -(-tokens // _TILE_TOKENS)
        packed = self._launcher.empty((tiles, width, _TILE_TOKENS))
        # The kernel is part of every program of `linear_many`; it needs none of their weights.
        options = {"ROWS": _TILE_ROWS, "TILES": _TILES}
        kernel = stored_kernel(self._launcher, "pack_tokens", "linear.cl", "F32", options)
        self._launcher.run(kernel, (-(-width // _CHUNK), tiles), x, _u32(width), _u32(tokens),
                           packed)  # fmt: skip
        return Operand(packed, tokens, width, 0)


def stored_kernel(
    launcher: Launcher, name: str, source: str, dtype: str, options: dict[str, int] | None = None
) -> Any:
    """A kernel that reads stored rows, built for their type."""
    family = "stored_float.cl" if dtype in FLOAT_FORMATS else "stored_blocks.cl"
    return launcher.kernel(name, [family, source], **{f"FORMAT_{dtype}": 1}, **(options or {}))


def copy_columns(
    launcher: Launcher, x: DeviceArray, first: int, count: int, out_width: int
) -> DeviceArray:
    """Columns of x in rows of `out_width` values, with zeros after the last."""
    rows, width = x.shape
    out = launcher.empty((rows, out_width))
    kernel = launcher.kernel("copy_columns", ["elementwise.cl"])
    launcher.run_over(kernel, out.size, x, _u32(rows), _u32(width), _u32(first), _u32(count),
                      _u32(out_width), out)  # fmt: skip
    return out
