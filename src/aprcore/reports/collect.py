"""Which tensors a report shows, fetched once more after the run."""

from __future__ import annotations

from aprcore.ground.errors import AprError
from aprcore.pictures import HeatMap, MapKind
from aprcore.records.report import Report
from aprcore.records.tensor_source import TensorSource
from aprcore.reports.maps import StageMap

# A map has at most as many cells: its PNG then is at most 16 KB, and 24 of them 0.5 MB in base 64.
MAP_ROWS, MAP_COLUMNS = 64, 256
MAPS_SHOWN = 24


def collect_maps(
    report: Report, store: TensorSource, limit: int = MAPS_SHOWN
) -> tuple[StageMap, ...]:
    """Maps of |diff| of the first divergence, then of the other failing stages.

    A stage with nothing to hold it against has none. Nor has one whose file has gone meanwhile: the
    run is over, and the report is of what it found.
    """
    maps: list[StageMap] = []
    for stage in report.stages:
        if len(maps) >= limit:
            break
        if not stage.is_divergence or stage.comparison is None:
            continue
        try:
            pair = store.open(stage)
            if not pair.comparable:
                continue
            grid = HeatMap(pair, MapKind.DIFF).overview(MAP_ROWS, MAP_COLUMNS)
        except AprError:
            continue
        if grid.values.size == 0:
            continue
        by_head = stage.layout is not None and stage.layout.axes[0] == "head"
        heads = stage.layout.factors[0] if stage.layout is not None and by_head else 0
        maps.append(StageMap(stage.key, grid, report.header.token_texts or (), heads))
    return tuple(maps)
