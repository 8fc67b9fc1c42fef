"""Pictures of where a tensor is wrong: maps of cells, the largest difference of each kept.

A map is a PNG of one pixel per cell; the browser enlarges it. Its colours go from blue to yellow
in lightness as well, and so read the same for every kind of colour vision and in a grey print.
Source: Nunez, Anderton, Renslow, "Optimizing colormaps with consideration for color vision
deficiency" (2018), the map cividis.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aprcore.network.stages import StageKey
from aprcore.pictures import Grid
from aprcore.records.telling import format_ratio, plural, quoted

Bytes = NDArray[np.uint8]

# Decades of magnitude below the largest that have a colour of their own: what is smaller cannot
# have been what a stage fails for.
DECADES = 4
# cividis at equal steps, dark to bright.
RAMP = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120),
    (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip
# NaN and infinities: not a colour of the ramp, and their number stands beside the map.
NONFINITE = (204, 121, 167)
SHADES = 255  # of the ramp; the last index of a palette of 256 is NONFINITE
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class StageMap:
    """A picture of one stage.

    Attributes:
        key: The stage.
        grid: The map as a whole, downsampled.
        token_texts: The text of each token, for rows that are tokens; empty if it is not known.
        heads: How many heads lie below one another, for rows that are those of each head.
    """

    key: StageKey
    grid: Grid
    token_texts: tuple[str, ...] = ()
    heads: int = 0


def encode_png(grid: Grid) -> bytes:
    """A map as a PNG with one pixel per cell and a palette of 256 colours."""
    rows, columns = grid.values.shape
    pixels = np.zeros((rows, columns + 1), dtype=np.uint8)  # each line begins with its filter: none
    pixels[:, 1:] = shade(grid)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # 8 bits, indexed
    chunks = [
        (b"IHDR", header),
        (b"PLTE", _palette().tobytes()),
        (b"IDAT", zlib.compress(pixels.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return PNG_SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks)


def shade(grid: Grid) -> Bytes:
    """Indices into the palette: logarithmic in the magnitude, 0 for what is `DECADES` below."""
    magnitude = np.abs(np.asarray(grid.values, dtype=np.float64))
    indices = np.zeros(magnitude.shape, dtype=np.uint8)
    if grid.largest > 0:
        with np.errstate(divide="ignore"):  # an exact zero is darkest
            decades = np.log10(magnitude / grid.largest) / DECADES
        indices = (np.clip(decades + 1, 0, 1) * (SHADES - 1)).round().astype(np.uint8)
    indices[np.asarray(grid.nonfinite) > 0] = SHADES
    return indices


def describe_map(shown: StageMap) -> str:
    """A map in words, for those who do not see it."""
    grid = shown.grid
    rows, columns = grid.values.shape
    down = f", {grid.rows} down" if grid.rows else ""
    said = [f"{grid.kind.value} of {shown.key}{down}, {grid.columns} across"]
    if grid.largest > 0:
        row, column = np.unravel_index(int(np.abs(grid.values).argmax()), (rows, columns))
        first = grid.top + int(row) * grid.cell_rows
        places = [_reach(grid.rows, first, grid.cell_rows)] if grid.rows else []
        # A cell of a folded vector covers a piece of each of its rows, and what is between them.
        first = grid.left + first * grid.fold + int(column) * grid.cell_columns
        length = grid.cell_columns + (grid.cell_rows - 1) * grid.fold
        places.append(_reach(grid.columns, first, length))
        place = ", ".join(places)
        large = int((np.abs(grid.values) >= grid.largest / 10).sum())
        said.append(f"the largest is {format_ratio(grid.largest)} at {place}")
        said.append(f"{large:,} of {plural(rows * columns, 'cell')} are above a tenth of it")
    else:
        said.append("no finite value differs from zero")
    lost = lost_text(grid)
    return "; ".join([*said, lost] if lost else said)


def lost_text(grid: Grid) -> str:
    """How many values are not finite: "3 values NaN, 1 infinite"; empty if none is."""
    nan = int(np.asarray(grid.nan).sum())
    infinite = int(np.asarray(grid.nonfinite).sum()) - nan
    if nan and infinite:
        return f"{plural(nan, 'value')} NaN, {infinite:,} infinite"
    if nan or infinite:
        return f"{plural(nan or infinite, 'value')} {'NaN' if nan else 'infinite'}"
    return ""


def cell_text(grid: Grid) -> str:
    """What a cell covers: "a cell is the largest of 1 × 14 values"."""
    if grid.cell_rows == grid.cell_columns == 1:
        return "a cell is one value"
    return f"a cell is the largest of {grid.cell_rows} × {grid.cell_columns} values"


def row_labels(shown: StageMap) -> list[tuple[str, float]]:
    """Names beside the map from the top, each with the rows of cells that it stands for.

    A head names all of its rows; else each row has a name unless it covers several.
    """
    grid, count = shown.grid, shown.grid.values.shape[0]
    if shown.heads > 1:
        return [(f"head {head}", count / shown.heads) for head in range(shown.heads)]
    if grid.cell_rows != 1:
        return []
    texts = shown.token_texts if grid.rows in ("token", "query") else ()
    numbers = range(grid.top, grid.top + count)
    return [(f"{n} {quoted(texts[n])}" if n < len(texts) else str(n), 1.0) for n in numbers]


def _reach(axis: str, first: int, size: int) -> str:
    return f"{axis} {first}" if size == 1 else f"{axis} {first} to {first + size - 1}"


def _palette() -> NDArray[np.uint8]:
    """The ramp in `SHADES` steps, then the colour of what is not finite; [256, 3]."""
    stops = np.linspace(0, 1, len(RAMP))
    at = np.linspace(0, 1, SHADES)
    ramp = np.stack([np.interp(at, stops, [rgb[c] for rgb in RAMP]) for c in range(3)], axis=1)
    palette: NDArray[Any] = np.concatenate([ramp, [NONFINITE]])
    return palette.round().astype(np.uint8)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
