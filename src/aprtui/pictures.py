"""Makes pictures of a run's tensors when the screen asks for one; called from a worker's thread.

Nothing here touches a widget. What the screen wants is an `Ask`, small and hashable: the picture
that answers it is kept for a while, and comes at once when it is asked for again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textual.message import Message

from aprtui.ramp import DECADES, LEVELS, VALUE_DECADES

if TYPE_CHECKING:
    from aprcore.judging.layouts import Layout
    from aprcore.network.graph import StageKey
    from aprcore.pictures import (
        CellValue,
        Grid,
        HeatMap,
        Histogram,
        MapKind,
        MapView,
        TensorPair,
        TokenFigures,
        ValueWindow,
    )
    from aprcore.records.report import StageReport
    from aprcore.records.tensor_source import TensorSource

# Pictures kept. The largest is a map of a large terminal: half a megabyte.
PICTURES_KEPT = 48
# Values of one window of the Values tab: more than a screen of them, at a cost of one read.
WINDOW_VALUES = 1024
HISTOGRAM_BINS = 60


@dataclass(frozen=True, slots=True)
class TokensAsk:
    """How far off each token is."""


@dataclass(frozen=True, slots=True)
class HistogramAsk:
    """How large the values are."""


@dataclass(frozen=True, slots=True)
class ValuesAsk:
    """Values from a flat index on."""

    start: int


@dataclass(frozen=True, slots=True)
class SubjectAsk:
    """What maps of a stage there are."""


@dataclass(frozen=True, slots=True)
class GridAsk:
    """A rectangle of a map; the fields as in `aprcore.pictures.HeatMap.grid`."""

    kind: MapKind
    view: MapView
    top: int
    left: int
    cell_rows: int
    cell_columns: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class CellAsk:
    """What is behind one cell of a map; the fields as in `aprcore.pictures.HeatMap.peak`."""

    kind: MapKind
    view: MapView
    top: int
    left: int
    rows: int
    columns: int


Ask = TokensAsk | HistogramAsk | ValuesAsk | SubjectAsk | GridAsk | CellAsk


@dataclass(frozen=True, slots=True)
class Figures:
    """The answer to `TokensAsk`.

    Attributes:
        tokens: Figures of each token; None where there are no two sides of one layout.
        by_head: Figures of each head of each token, where there are heads.
    """

    tokens: TokenFigures | None
    by_head: TokenFigures | None


@dataclass(frozen=True, slots=True)
class Subject:
    """The answer to `SubjectAsk`: every kind of map, with the views of each."""

    views: dict[MapKind, tuple[MapView, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Shades:
    """The answer to `GridAsk`.

    Attributes:
        grid: The values.
        levels: Their levels (`aprtui.ramp`), row by row.
        top: Where the scale ends.
        decades: Powers of ten that it spans.
    """

    grid: Grid
    levels: list[list[int]]
    top: float
    decades: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return len(self.levels), len(self.levels[0]) if self.levels else 0


if TYPE_CHECKING:
    Picture = Figures | Subject | Shades | CellValue | Histogram | ValueWindow


@dataclass
class PictureMade(Message):
    """A picture is ready; perhaps nobody wants it any more."""

    stage: StageKey
    ask: Ask
    picture: Picture


@dataclass
class PictureFailed(Message):
    """A picture cannot be made."""

    stage: StageKey
    ask: Ask
    error: Exception


class PictureMaker:
    """Makes the pictures of one run, and keeps the last ones.

    May be used from several threads; one makes a picture at a time.
    """

    def __init__(self, tensors: TensorSource) -> None:
        self._tensors = tensors
        self._made: OrderedDict[tuple[StageKey, Ask], Picture] = OrderedDict()
        self._lock = threading.Lock()
        # The last ones only: a tensor that was made again from its layer, or read, takes memory.
        self._pair: TensorPair | None = None
        self._map: HeatMap | None = None

    def find(self, stage: StageKey, ask: Ask) -> Picture | None:
        """A picture that was made before."""
        picture = self._made.get((stage, ask))
        if picture is not None:
            with suppress(KeyError):  # another thread may have dropped it just now
                self._made.move_to_end((stage, ask))
        return picture

    def make(
        self,
        report: StageReport,
        ask: Ask,
        is_cancelled: Callable[[], bool],
        post: Callable[[Message], Any],
    ) -> None:
        """Make a picture and post it, or why it cannot be made; nothing if it is cancelled."""
        from aprcore.pictures import Cancelled

        try:
            with self._lock:
                if is_cancelled():
                    return
                picture = self._make(report, ask, is_cancelled)
                self._made[report.key, ask] = picture
                while len(self._made) > PICTURES_KEPT:
                    self._made.popitem(last=False)
        except Cancelled:
            return
        # Anything that escapes would take the terminal down.
        except Exception as error:
            if not is_cancelled():
                post(PictureFailed(report.key, ask, error))
            return
        if not is_cancelled():
            post(PictureMade(report.key, ask, picture))

    def _make(self, report: StageReport, ask: Ask, is_cancelled: Callable[[], bool]) -> Picture:
        from aprcore import pictures

        pair = self._open(report)
        match ask:
            case TokensAsk():
                return _figures(pair, is_cancelled)
            case HistogramAsk():
                return pictures.histogram(pair, HISTOGRAM_BINS, is_cancelled)
            case ValuesAsk():
                return pictures.values(pair, ask.start, WINDOW_VALUES)
            case SubjectAsk():
                kinds = pictures.map_kinds(pair)
                layouts: dict[MapKind, Layout] = {k: pictures.map_layout(pair, k) for k in kinds}
                return Subject({kind: pictures.views(layouts[kind]) for kind in kinds})
            case GridAsk():
                shown = self._open_map(pair, ask.kind, ask.view, is_cancelled)
                grid = shown.grid(
                    ask.top, ask.left, ask.cell_rows, ask.cell_columns, ask.rows, ask.columns
                )
                return _shade(grid, report)
            case CellAsk():
                shown = self._open_map(pair, ask.kind, ask.view, is_cancelled)
                return shown.peak(ask.top, ask.left, ask.rows, ask.columns, is_cancelled)

    def _open(self, report: StageReport) -> TensorPair:
        if self._pair is None or self._pair.key != report.key:
            self._pair = self._map = None
            self._pair = self._tensors.open(report)
        return self._pair

    def _open_map(
        self, pair: TensorPair, kind: MapKind, view: MapView, is_cancelled: Callable[[], bool]
    ) -> HeatMap:
        from aprcore.pictures import HeatMap

        if self._map is None or (self._map.kind, self._map.view) != (kind, view):
            self._map = None
            self._map = HeatMap(pair, kind, view, is_cancelled)
        return self._map


def _shade(grid: Grid, report: StageReport) -> Shades:
    """A grid in levels.

    A difference is seen against the size of the oracle's values, so that rounding looks dark and a
    fault bright at every stage; only a larger one widens the scale.
    """
    from aprcore.pictures import MapKind, levels_of

    top = 1.0 if grid.kind is MapKind.RATIO else grid.largest
    if grid.kind is MapKind.DIFF and report.comparison is not None:
        top = max(top, report.comparison.rms_b)
    decades = VALUE_DECADES if grid.kind in (MapKind.TRACE, MapKind.ORACLE) else DECADES
    return Shades(grid, levels_of(grid, top, decades, LEVELS).tolist(), top, decades)


def _figures(pair: TensorPair, is_cancelled: Callable[[], bool]) -> Figures:
    from aprcore.pictures import token_figures

    if not pair.comparable:
        return Figures(None, None)
    tokens = token_figures(pair, is_cancelled, by_head=False)
    by_head = token_figures(pair, is_cancelled)
    return Figures(tokens, by_head if by_head.heads else None)
