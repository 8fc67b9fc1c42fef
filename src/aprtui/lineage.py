"""Following an inherited error upstream, through the table of stages, to where it began."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from aprcore.network.graph import StageKey, computation_order, input_keys, stage_keys
from aprtui.run_state import RunState

# Verdicts by word: the engine need not be imported to paint the first screen. What has one of these
# carries an error on, or is absent and an error may pass through it unseen.
CARRIES_ON = ("INHERITED", "NOISE", "FAIL", "NONFINITE", "SHAPE", "MISSING")


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
    features = _features(header.keys)
    readers: dict[StageKey, list[StageKey]] = {}
    for reader in stage_keys(header.num_layers, features | {"dense", "experts"}):
        for source in input_keys(reader, header.num_layers, features):
            readers.setdefault(source, []).append(reader)
    found: set[StageKey] = set()
    visited: set[StageKey] = set()
    unseen = list(readers.get(key, ()))
    while unseen:
        reader = unseen.pop()
        if reader in visited:
            continue
        visited.add(reader)
        if reader not in state.reports:
            unseen.extend(readers.get(reader, ()))
        elif _word(state, reader) in CARRIES_ON:
            found.add(reader)
    return tuple(sorted(found, key=computation_order))


def _ancestors(state: RunState, key: StageKey) -> dict[StageKey, StageKey]:
    """The stages that an error may have come from, each with the one that reads it."""
    header = state.header
    if header is None:
        return {}
    features = _features(header.keys)
    parents: dict[StageKey, StageKey] = {}
    unseen = deque([key])
    while unseen:
        reader = unseen.popleft()
        for source in input_keys(reader, header.num_layers, features):
            if source in parents or source == key:
                continue
            # An unrecorded stage has no verdict; its inputs may.
            if source not in state.reports or _word(state, source) in CARRIES_ON:
                parents[source] = reader
                unseen.append(source)
    return parents


def _features(keys: Iterable[StageKey]) -> frozenset[str]:
    """What decides which of two stages is read: where there is a bias, what follows reads it."""
    return frozenset({"qkv_bias"} if any(key.stage == "qkv_bias" for key in keys) else ())


def _word(state: RunState, key: StageKey) -> str | None:
    report = state.reports.get(key)
    return None if report is None or report.verdict is None else report.verdict.value


def _diverges(state: RunState, key: StageKey) -> bool:
    report = state.reports.get(key)
    return report is not None and report.is_divergence
