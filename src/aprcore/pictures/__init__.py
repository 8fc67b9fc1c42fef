"""Pictures of a tensor: figures per token, maps, histograms. Numbers only; the screen draws them.

Both sides are streamed in pieces, never held whole unless they are in memory anyway. Every function
that may take a while asks `is_cancelled` between pieces.
"""

from aprcore.pictures.heat_map import HeatMap
from aprcore.pictures.histograms import histogram
from aprcore.pictures.map_views import map_kinds, map_layout, views
from aprcore.pictures.plane import FilePlane, MemoryPlane, Plane, TensorPair
from aprcore.pictures.records import (
    EDGE_BITS,
    OUTLIER_RMS,
    Cancelled,
    CellValue,
    Grid,
    Histogram,
    IsCancelled,
    MapKind,
    MapView,
    TokenFigures,
    ValueWindow,
)
from aprcore.pictures.shading import levels_of
from aprcore.pictures.token_rows import token_figures, values

__all__ = [
    "EDGE_BITS", "OUTLIER_RMS", "Cancelled", "CellValue", "FilePlane", "Grid", "HeatMap",
    "Histogram", "IsCancelled", "MapKind", "MapView", "MemoryPlane", "Plane", "TensorPair",
    "TokenFigures", "ValueWindow", "histogram", "levels_of", "map_kinds", "map_layout",
    "token_figures", "values", "views",
]  # fmt: skip
