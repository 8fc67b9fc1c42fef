"""Which rows the tree shows, and in what order: a pure function of the run and of what was chosen.

The rows are arranged anew whenever something changes; for 80 layers of 23 stages that takes about
a millisecond, and nothing can then be out of step with the run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from aprcore.network.stages import StageKey
from aprcore.records.telling import Layer, cosine_rank, rank_of
from aprtui.measures import BASIS, JUDGMENTS, Measure
from aprtui.run_state import RunState
from aprtui.theme import mark_of

if TYPE_CHECKING:
    from aprcore.judging.verdict import Verdict
    from aprcore.records.report import StageReport


class Row(NamedTuple):
    """A line of the tree: the run, a layer or a stage.

    Attributes:
        layer: Of a layer's row.
        key: Of a stage's row.
    """

    layer: int | None = None
    key: StageKey | None = None

    @property
    def group(self) -> int | None:
        """The layer whose row folds this row away."""
        return None if self.key is None else self.key.layer

    @property
    def title(self) -> str:
        """What the pane that describes it is called."""
        if self.key is not None:
            return str(self.key)
        return "run" if self.layer is None else f"layer {self.layer}"


RUN_ROW = Row()


class SortOrder(Enum):
    """The order of the rows. The value is what the screen calls it."""

    COMPUTATION = "order of computation"
    COSINE = "lowest cosine first"
    RELATIVE_L2 = "largest relative L2 first"
    MODEL = "model failures, then errors"
    KERNEL = "kernel failures, then errors"
    PARITY = "largest difference from the CPU first"
    TESTED = "GPU kernel failures, then errors"

    @property
    def measure(self) -> Measure | None:
        """The judgment whose figures it goes by."""
        if self is SortOrder.COMPUTATION:
            return None
        # An order by a judgment has its name; the others go by the comparison with the oracle.
        return Measure.__members__.get(self.name, Measure.CUMULATIVE)

    def following(self, measures: Sequence[Measure]) -> SortOrder:
        """The next one in the cycle, of those that a run with these judgments has."""
        orders = [order for order in SortOrder if order.measure in (None, *measures)]
        return orders[(orders.index(self) + 1) % len(orders)]

    @classmethod
    def by(cls, measure: Measure) -> SortOrder:
        """The first order that goes by a judgment."""
        return next(order for order in cls if order.measure is measure)


@dataclass(frozen=True, slots=True)
class Filter:
    """Words that a row has to contain, all of them.

    Attributes:
        layers: Layers asked for ("layer 3", "l3" or a bare "3"); empty: any.
        words: Parts of a stage's name or of its verdict's word.
    """

    layers: frozenset[int] = frozenset()
    words: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read what was typed; anything is a valid filter."""
        lowered = text.lower().replace("·", " ")
        layer = re.compile(r"(?<!\S)(?:layer[\s-]*|l)?(\d+)(?!\S)", re.ASCII)
        numbers = frozenset(int(number) for number in layer.findall(lowered))
        return cls(numbers, tuple(layer.sub(" ", lowered).split()))

    def __bool__(self) -> bool:
        return bool(self.layers or self.words)

    def accepts(self, key: StageKey, report: StageReport | None) -> bool:
        """Whether a stage has every word and is in one of the layers."""
        if self.layers and key.layer not in self.layers:
            return False
        scope = "whole-model" if key.layer is None else "layer"
        text = f"{scope} {key.stage} {mark_of(report).word.lower()}"
        return all(word in text for word in self.words)


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """A layer in one line.

    Attributes:
        done, total: Stages judged, and all.
        worst: The gravest verdict so far.
        lowest: The stage with the lowest cosine so far.
        worst_by: The stage that fares worst in the model and in the kernel judgment.
        nonfinite: NaN and infinities of the stages that stand alone.
    """

    done: int
    total: int
    worst: Verdict | None
    lowest: StageReport | None
    worst_by: Mapping[Measure, StageReport | None]
    nonfinite: int


def summarise_layer(
    state: RunState, layer: int, measure: Measure = Measure.CUMULATIVE
) -> LayerSummary:
    """What the row of a layer says when the tree shows a measure."""
    keys, known = state.keys_by_layer.get(layer, ()), state.reports_of(measure)
    judged = Layer(layer, tuple(known[key] for key in keys if key in known))
    traced = (report.trace for report in judged.stages)
    return LayerSummary(
        done=len(judged.stages),
        total=len(keys),
        worst=judged.worst,
        lowest=judged.lowest,
        worst_by={measure: judged.worst_by(measure) for measure in JUDGMENTS},
        nonfinite=sum(trace.nonfinite for trace in traced if trace is not None),
    )


def arrange(
    state: RunState, *, expanded: Collection[int], filter: Filter, order: SortOrder
) -> list[Row]:
    """The rows in view, from top to bottom; none before the run is open.

    A filter unfolds the layers that have a match and leaves out the others. A sort is flat.
    """
    if state.header is None:
        return []
    if order is not SortOrder.COMPUTATION:
        return [RUN_ROW, *(Row(key=key) for key in matching_keys(state, filter, order))]
    rows = [RUN_ROW]
    for layer, keys in state.keys_by_layer.items():
        matching = [key for key in keys if filter.accepts(key, state.reports.get(key))]
        if layer is not None and matching:
            rows.append(Row(layer=layer))
        if layer is None or filter or layer in expanded:
            rows.extend(Row(key=key) for key in matching)
    return rows


def matching_keys(state: RunState, filter: Filter, order: SortOrder) -> list[StageKey]:
    """The stages that pass the filter, folded away or not, in the order shown."""
    keys = [key for key in state.keys if filter.accepts(key, state.reports.get(key))]
    measure = order.measure
    reports = state.reports_of(measure)
    if order is SortOrder.COSINE:
        keys.sort(key=lambda key: cosine_rank(state.reports.get(key)))
    elif measure is not None:
        # Equal ones stay in the order of computation, also when reversed.
        name = BASIS.get(measure, measure)
        keys.sort(key=lambda key: rank_of(reports.get(key), name), reverse=True)
    return keys


def place_among(keys: list[StageKey], row: Row) -> int:
    """Where a row is in a list of stages; a layer counts as just before its first."""
    if row.key in keys:
        return keys.index(row.key)
    if row.layer is None:
        return -1
    return next((i for i, key in enumerate(keys) if key.layer == row.layer), 0) - 1
