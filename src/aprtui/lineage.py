"""Following an inherited error upstream, through the graph, to where it began."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from aprcore.network.graph import Graph, computation_order, outline
from aprcore.network.stages import StageKey
from aprcore.records.report import RunHeader
from aprtui.run_state import RunState

# Verdicts by word: the engine need not be imported to paint the first screen. What has one of these
# carries an error on, or is absent and an error may pass through it unseen.
CARRIES_ON = ("INHERITED", "NOISE", "FAIL", "NONFINITE", "SHAPE", "MISSING", "UNJUDGED")


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where the error of a stage comes from.

    Attributes:
        path: From the stage itself up to where its error began, by the shortest way.
        faults: Every stage upstream that is to blame, in the order of computation.
    """

    path: tuple[StageKey, ...]
    faults: tuple[StageKey, ...]

    @property
    def origin(self) -> StageKey:
        """The first stage to blame, or where rounding began if none is."""
        return self.path[-1]


def trace_upstream(state: RunState, key: StageKey) -> Lineage | None:
    """Follow the inputs of a stage to the first one to blame; None if no input is off.

    Where nothing upstream is to blame, the way leads to the first stage that rounding has moved.
    """
    parents = _ancestors(state, key)
    faults = sorted((k for k in parents if _diverges(state, k)), key=computation_order)
    noise = [k for k in parents if _word(state, k) == "NOISE"]
    origin = min(faults or noise, key=computation_order, default=None)
    if origin is None:
        return None
    path = [origin]
    while path[-1] != key:
        path.append(parents[path[-1]])
    return Lineage(tuple(reversed(path)), tuple(faults))


def spoiled_by(state: RunState, key: StageKey) -> tuple[StageKey, ...]:
    """The stages that read a stage and whose error may come from it, in the order of computation.

    A reader that was not recorded is passed through: what reads it stands in its place.
    """
    header = state.header
    if header is None or _word(state, key) not in CARRIES_ON:
        return ()
    graph = _graph(header)
    found: set[StageKey] = set()
    visited: set[StageKey] = set()
    unseen = list(graph.readers(key))
    while unseen:
        reader = unseen.pop()
        if reader in visited:
            continue
        visited.add(reader)
        if reader not in state.reports:
            unseen.extend(graph.readers(reader))
        elif _word(state, reader) in CARRIES_ON:
            found.add(reader)
    return tuple(sorted(found, key=computation_order))


def _ancestors(state: RunState, key: StageKey) -> dict[StageKey, StageKey]:
    """The stages on the ways an error may have come by, each with the one that reads it.

    A way ends with the first stage that carries nothing on: it is here, and is nobody's fault.
    """
    header = state.header
    if header is None:
        return {}

    def carries_on(source: StageKey) -> bool:
        # An unrecorded stage has no verdict; its inputs may.
        return source not in state.reports or _word(state, source) in CARRIES_ON

    return dict(_graph(header).ancestors(key, carries_on))


def _graph(header: RunHeader) -> Graph:
    """What reads what in a run; its model may not be at hand."""
    return _outline(header.num_layers, header.keys, header.architecture)


@lru_cache(maxsize=4)
def _outline(num_layers: int, keys: tuple[StageKey, ...], architecture: str | None) -> Graph:
    layers = {key.layer for key in keys if key.layer is not None}
    return outline(num_layers, {key.stage for key in keys}, architecture, layers)


def _word(state: RunState, key: StageKey) -> str | None:
    report = state.reports.get(key)
    return None if report is None or report.verdict is None else report.verdict.value


def _diverges(state: RunState, key: StageKey) -> bool:
    report = state.reports.get(key)
    return report is not None and report.is_divergence
